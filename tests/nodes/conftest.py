"""What the node tests share: the pack's node modules, tiny models small enough for many runs, and doubles of other nodes' attention patches.

Doubles are closures: ComfyUI deep-copies `model_options` in every `model.clone()`, and only functions come through that unchanged.
"""

from __future__ import annotations

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from attention_calls import KEY

MODULES = (
    "_comfy",
    "_kernels",
    "chain",
    "compiled",
    "export",
    "geometry",
    "maps",
    "monitor",
    "override",
    "pace",
    "patch",
    "pictures.animation",
    "pictures.block_maps",
    "pictures.canvas",
    "pictures.heat_map",
    "presets",
    "reasons",
    "recorder",
    "remarks",
    "report",
    "run_state",
    "schedule",
    "settings",
    "speedup",
    "statistics",
    "telemetry",
    "transport",
)
SMALL = {"wan_t2v": (1, 16, 1, 32, 32), "qwen_image": (1, 16, 1, 32, 32), "hunyuan_video": (1, 16, 1, 32, 32)}  # 256 tokens of picture


@pytest.fixture
def no_gradients():
    """As ComfyUI calls models."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def node_modules(pack):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny calls: on two busy cores a second thread makes these tests three times slower
    yield SimpleNamespace(**{name.rpartition(".")[2]: importlib.import_module(f"{pack.__name__}.nodes.{name}") for name in MODULES})
    torch.set_num_threads(threads)


@pytest.fixture
def nodes(node_modules, monkeypatch):
    """The node modules, with an empty store of runs and no user folder: what one test measures decides nothing in another."""
    monkeypatch.setattr(node_modules._comfy, "user_folder", lambda: None)
    runs = node_modules.telemetry.runs
    for kept in (runs.running, runs.closed, runs.unpatched, runs._shown):
        kept.clear()
    return node_modules


@pytest.fixture(scope="session")
def tiny(comfy):
    """`tiny(name, **changes)`: a model of `comfy_models`, built once a session; with a picture of 256 tokens where `SMALL` has the family."""
    import comfy_models

    built = {}

    def get(name: str, **changes):
        changes = {"latent": SMALL[name], **changes} if name in SMALL else changes
        key = (name, *sorted(changes.items()))
        if key not in built:
            built[key] = comfy_models.build(name, **changes)
        return built[key]

    return get


@pytest.fixture
def patched(nodes):
    """`patched(model, **settings)`: a clone of a model (TinyModel or ModelPatcher) with SpargeAttention on it; short sequences count."""

    def install(model, **settings):
        settings = nodes.settings.Settings(**{"min_tokens": 0, "topk": 0.3, **settings})
        return nodes.patch.install(getattr(model, "patcher", model), settings)

    return install


@pytest.fixture
def everything_kept(node_modules, monkeypatch):
    """topk 1 goes through the kernels with all blocks kept, where users get a dense run: what comes out must be what dense attention gives."""
    monkeypatch.setattr(node_modules.settings, "DENSE_AT_TOPK_1", False)


@pytest.fixture
def last_run(nodes):
    """The last closed run as a dict."""
    return lambda: nodes.telemetry.runs.closed[-1].to_dict()


@pytest.fixture
def sampled(nodes, last_run):
    """`sampled(model, patcher)`: the latents of three steps and the run, or None where none was opened."""

    def sample(model, patcher=None, **how):
        import comfy_models

        before = nodes.telemetry.runs.latest
        out = comfy_models.sample(model, patcher, steps=3, **how)
        return out, last_run() if nodes.telemetry.runs.latest > before else None

    return sample


@pytest.fixture
def dynamo(request):
    """A backend of torch.compile that counts. Nothing that was compiled in a test is left to the next one; nothing is forgotten within one."""
    import torch._dynamo
    from compiled_models import Backend

    torch._dynamo.reset()
    yield Backend(getattr(request, "param", "eager"))
    torch._dynamo.reset()


class Browser:
    """A PromptServer: `sent` has the data of our events as a browser gets them, `routes` what extensions register."""

    def __init__(self):
        from aiohttp import web

        self.routes, self.sent = web.RouteTableDef(), []

    def send_sync(self, event, data, sid=None):
        assert event == "sparge.run" and sid is None
        self.sent.append(json.loads(json.dumps(data, allow_nan=False)))

    def send_progress_text(self, text, node):
        pass


@pytest.fixture
def browser(monkeypatch):
    server = Browser()
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    return server


@pytest.fixture
def watch(comfy):
    """`watch(patcher)`: a clone and a list that gets one (sigma, schedule, transformer_options) for every model call, as our patch leaves them."""
    from comfy.patcher_extension import WrappersMP

    def install(patcher):
        calls, clone = [], patcher.clone()

        def note(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds):
            schedule = [float(s) for s in transformer_options["sample_sigmas"]]
            calls.append((float(transformer_options["sigmas"].max()), schedule, transformer_options))
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **conds)

        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "zz_watch", note)
        return clone, calls

    return install


@pytest.fixture
def passing():
    """`passing(previous=None)`: an override that notes (func, args, kwargs) in its `.seen` and passes the call on."""

    def make(previous=None):
        seen = []

        def override(func, *args, **kwargs):
            seen.append((func, args, dict(kwargs)))
            return previous(func, *args, **kwargs) if previous is not None else func(*args, **kwargs)

        override.seen = seen
        return override

    return make


@pytest.fixture
def computed(comfy, monkeypatch):
    """A list with the query length of every call that ComfyUI's own attention computes."""
    import comfy.ops

    lengths, real = [], comfy.ops.scaled_dot_product_attention

    def counting(q, *args, **kwargs):
        lengths.append(q.shape[2])
        return real(q, *args, **kwargs)

    monkeypatch.setattr(comfy.ops, "scaled_dot_product_attention", counting)
    return lengths


class Direct:
    """An override of ours in an open run with one model call of a family that no row knows, to be called as ComfyUI's attention is."""

    def __init__(self, nodes, model, previous, context_tokens, settings):
        source = model.patcher.clone()
        if previous is not None:
            source.model_options["transformer_options"][KEY] = previous
        self.patcher = nodes.patch.install(source, nodes.settings.Settings(**{"min_tokens": 0, "topk": 0.3, **settings}))
        (self.patch,) = nodes.patch.patches_of(self.patcher)
        self.state = nodes.run_state.RunState(self.patch, self.patcher, [1.0, 0.5, 0.0])
        self.state.family = None
        call = nodes.geometry.ModelCall(object(), (1, 16, 1, 8, 8), context_tokens, {}, {})
        self.context = nodes.run_state.CallContext(self.state, call)
        self.options = {KEY: self.patch.override}
        nodes.compiled.open_call(self.options, self.patch.key, self.context)

    def __call__(self, *args, **kwargs):
        """ComfyUI's own attention function, decorated as its models call it."""
        from comfy.ldm.modules.attention import attention_pytorch

        return attention_pytorch(*args, transformer_options=self.options, **kwargs)

    @property
    def run(self):
        return self.state.telemetry

    def reasons(self) -> list[str]:
        return list(self.run.reasons)

    def closed(self) -> dict:
        self.run.close()
        return self.run.to_dict()


@pytest.fixture
def direct(nodes, tiny):
    return lambda previous=None, context_tokens=0, **settings: Direct(nodes, tiny("wan_t2v"), previous, context_tokens, settings)


def dense_reference(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, scale=None, **_):
    """What ComfyUI's attention contract says, in fp64 and with PyTorch only; k and v may have fewer heads."""
    dim = q.shape[-1] if skip_reshape else q.shape[-1] // heads
    if not skip_reshape:
        q, k, v = ((x if x.dim() == 4 else x.unflatten(-1, (-1, dim))).transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    while mask is not None and mask.dim() < 4:
        mask = mask[None] if mask.dim() == 2 else mask[:, None]
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    out = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, scale=scale).to(q.dtype)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


@pytest.fixture(scope="session")
def reference():
    return dense_reference
