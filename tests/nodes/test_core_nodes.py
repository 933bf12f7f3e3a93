"""Every core node that takes a model and gives one back, before and after ours: the picture is right, every call is counted, what is said is true."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from functools import cache
from pathlib import Path

import comfy_models
import pytest
import torch
from attention_calls import KEY

pytestmark = pytest.mark.usefixtures("no_gradients")

FAMILIES = {"wan_t2v": dict(latent=(1, 16, 2, 32, 32)), "sd15": dict(latent=(1, 4, 20, 20))}
STEPS = 3
NAMES = (
    "APG", "CFGNorm", "CFGOverride", "CFGZeroStar", "ContextWindowsManual", "DifferentialDiffusion", "EasyCache", "Epsilon Scaling", "FreSca",
    "FreeU", "FreeU_V2", "HyperTile", "LTXVContextWindows", "LTXVSpatioTemporalGuidance", "LazyCache", "Mahiro", "ModelAttentionBackend",
    "ModelComputeDtype", "ModelNoiseScale", "ModelSamplingAuraFlow", "ModelSamplingContinuousEDM", "ModelSamplingContinuousV",
    "ModelSamplingDiscrete", "ModelSamplingFlux", "ModelSamplingLTXV", "ModelSamplingSD3", "NAGuidance", "PatchModelAddDownscale",
    "PerturbedAttentionGuidance", "RenormCFG", "RescaleCFG", "ScaleROPE", "SelfAttentionGuidance", "SkipLayerGuidanceDiT",
    "SkipLayerGuidanceDiTSimple", "SkipLayerGuidanceSD3", "TCFG", "TemporalScoreRescaling", "TomePatchModel", "UNetCrossAttentionMultiply",
    "UNetSelfAttentionMultiply", "UNetTemporalAttentionMultiply", "VideoLinearCFGGuidance", "VideoTriangleCFGGuidance",
    "WanContextWindowsManual", "wanBlockSwap",
)  # fmt: skip
ELSEWHERE = {
    "TorchCompileModel": "test_override_compiled.py",
    "HypernetworkLoader": "needs a file",
    "LoraLoaderBypassModelOnly": "needs a file",
    "MultiGPU_WorkUnits": "needs several GPUs; test_threads.py has what it does",
    "SelectModelDevice": "needs several GPUs",
    "ChromaRadianceOptions": "of a family that is not built here",
    "FluxKVCache": "of a family that is not built here",
    "HiDreamO1PatchSeamSmoothing": "of a family that is not built here",
    "LTXVModalityGuidance": "of a family that is not built here",
    "MiniMaxH3SigmaShift": "of a family that is not built here",
    "ModelSamplingStableCascade": "of a family that is not built here",
    "WanAnimate2Cache": "of a family that is not built here",
}
FIRST = {"double_layers": "0", "single_layers": "0"}
VALUES = {
    "SkipLayerGuidanceDiT": FIRST,
    "SkipLayerGuidanceDiTSimple": FIRST,
    "SkipLayerGuidanceSD3": {"layers": "0"},
    "LTXVSpatioTemporalGuidance": {"blocks": "0"},
    "HyperTile": {"tile_size": 128},
}
REPLACES = {"ModelAttentionBackend"}  # the attention of every node before it
MERGES = {"TomePatchModel", "HyperTile"}  # tokens, or pictures into a batch: the calls have other lengths


@cache
def core_nodes() -> dict[str, type]:
    """ComfyUI's nodes with one socket that must be connected, a MODEL, and a MODEL as their first output, by name."""
    import comfy_extras

    found = {}
    for path in sorted(Path(comfy_extras.__path__[0]).glob("nodes_*.py")):
        try:
            module = importlib.import_module(f"comfy_extras.{path.stem}")
        except ImportError:  # a package that these tests do without, for sound or 3-D
            continue
        found |= getattr(module, "NODE_CLASS_MAPPINGS", {})
        if hasattr(module, "comfy_entrypoint"):
            found |= {node.GET_SCHEMA().node_id: node for node in asyncio.run(listed(module))}
    return {name: node for name, node in found.items() if takes_and_gives_a_model(node)}


async def listed(module) -> list[type]:
    made = module.comfy_entrypoint()
    return await (await made if inspect.isawaitable(made) else made).get_node_list()


def takes_and_gives_a_model(node) -> bool:
    required = node.INPUT_TYPES().get("required", {})
    sockets = [row[0] for row in required.values() if isinstance(row[0], str) and row[0] not in ("INT", "FLOAT", "BOOLEAN", "STRING", "COMBO")]
    return sockets == ["MODEL"] and tuple(node.RETURN_TYPES)[:1] == ("MODEL",)


def defaults(node) -> dict:
    """The values of a node's widgets as they stand on a new one."""
    values = {}
    for name, (kind, *more) in node.INPUT_TYPES().get("required", {}).items():
        options = more[0] if more else {}
        choices = kind if isinstance(kind, list | tuple) else options.get("options", ())
        if kind != "MODEL":
            values[name] = options.get("default", choices[0] if choices else {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(kind, ""))
    return values


def applied(name: str, patcher):
    """What a core node makes of a model, with the values that a new node has."""
    node = core_nodes()[name]
    (socket,) = [name for name, row in node.INPUT_TYPES()["required"].items() if row[0] == "MODEL"]
    made = getattr(node(), node.FUNCTION)(**{socket: patcher, **defaults(node), **VALUES.get(name, {})})
    return (made if isinstance(made, tuple) else made.args)[0]


@pytest.fixture(scope="module", params=FAMILIES)
def family(comfy, request):
    model = comfy_models.build(request.param, **FAMILIES[request.param])
    config = model.patcher.model.model_config.unet_config
    config.setdefault("model_channels", getattr(model.patcher.model.diffusion_model, "model_channels", 0))  # FreeU looks it up
    return model


def noting(source, lengths: list):
    """The model with an override on top that notes (tokens, keys) of every call that comes to the hook, and passes it on."""
    clone = source.clone()
    options = clone.model_options["transformer_options"]
    below = options.get(KEY)

    def override(func, *args, **kwargs):
        axis = 2 if kwargs.get("skip_reshape") else 1
        lengths.append((args[0].shape[axis], args[1].shape[axis]))
        return func(*args, **kwargs) if below is None else below(func, *args, **kwargs)

    options[KEY] = override
    return clone


def sampled(family, source):
    lengths: list = []
    return comfy_models.sample(family, noting(source, lengths), steps=STEPS, cfg=4.0), lengths


@pytest.fixture(scope="module")
def dense_runs(family):
    """`dense_runs(name)`: what a core node gives without ours, and the calls that it makes; sampled once."""

    @cache
    def get(name):
        try:
            dense, lengths = sampled(family, applied(name, family.patcher))
        except Exception as error:
            return f"core's node does not run on this model by itself ({type(error).__name__}: {error})", None
        return (dense if dense.isfinite().all() else "core's node gives no picture of this model by itself"), lengths

    def run(name):
        with torch.no_grad():
            dense, lengths = get(name)
        if isinstance(dense, str):
            pytest.skip(dense)
        return dense, lengths

    return run


def test_every_core_node_is_listed(comfy):
    """A newer ComfyUI has more of them: look at each, then list it."""
    assert core_nodes().keys() <= {*NAMES, *ELSEWHERE}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", NAMES)
def test_a_core_node_and_ours(nodes, family, dense_runs, patched, everything_kept, name, order):
    if name not in core_nodes():
        pytest.skip("this ComfyUI has no such node")

    def combined(**settings):
        """Ours on top of the node's model, or below it."""
        if order == "before":
            return patched(applied(name, family.patcher), **settings)
        return applied(name, patched(family, **settings))

    dense, lengths = dense_runs(name)
    closed, seen = nodes.telemetry.runs.closed, {}
    for topk in (1.0, 0.3):
        closed.clear()
        out, seen[topk] = sampled(family, combined(topk=topk))
        (run,) = closed
        below = name in REPLACES and order == "after"  # then ours is on top of what notes, which sees what ours leaves
        assert (run.state, run.note, run.warning) == ("done", None, nodes.reasons.REPLACED if below else None)
        assert len(seen[topk]) == (sum(run.reasons.values()) if below else run.calls)
        assert run.calls == run.sparse_calls + sum(run.reasons.values())
        assert run.sparse_calls > 0 and run.sparse_calls == run.totals()["sparse_calls"]
        assert out.isfinite().all()
        if topk == 1:
            torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-4)
            assert seen[topk] == lengths or below
            whole = sum(1 for q, k in lengths if q == k and k > 64)
            assert run.sparse_calls == whole or name in MERGES
    assert (out - dense).norm() > 1e-4 * dense.norm() and "calls sparse" in nodes.remarks.summary(run)
