"""The diffusers examples: whole pipelines of tiny models, and each family's processor against the one that diffusers ships."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import comfy_launch
import imageio.v3 as imageio
import pytest
import torch
from required import missing

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "python_examples"
FAMILIES = ("mochi", "hunyuan_video", "wan")
EXACT = 1e-5
GRID, VIDEO, TEXT = (3, 8, 8), 192, 70


@pytest.fixture(scope="module", autouse=True)
def diffusers():
    """The package, which downloads nothing here."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("diffusers", "accelerate"):
        if importlib.util.find_spec(name) is None:
            missing(name)
    comfy_launch.declare_torchvision_ops()
    return importlib.import_module("diffusers")


@pytest.fixture(scope="module")
def sparge():
    return importlib.import_module("sparge_diffusers")


@pytest.fixture
def run_main(monkeypatch, capsys):
    """run_main(family, *arguments): what the example prints, run in this process."""

    def run(family: str, *arguments: str) -> str:
        module = importlib.import_module("diffusers_" + family)
        monkeypatch.setattr(sys, "argv", ["example", *map(str, arguments)])
        importlib.import_module("command_line").main(module.EXAMPLE, module.__doc__)
        return capsys.readouterr().out

    return run


def numbers(printed: str) -> dict:
    sparse = re.search(r"^(\d+) attention calls sparse, mean density ([\d.]+)", printed, re.M)
    return {
        "sparse": int(sparse[1]),
        "density": float(sparse[2]),
        "dense": {reason: int(count) for count, reason in re.findall(r"^(\d+) attention calls dense: (.*)", printed, re.M)},
        "latents": float(re.search(r"error of the last latents (\S+);", printed)[1]),
        "pixels": float(re.search(r"pixels \(0 to 1\) (\S+)", printed)[1]),
    }


# Steps, layers and calls a layer and step: Wan's guidance is a second model call, Mochi's a second picture of the batch.
LAYERS = {"mochi": (3, 1), "hunyuan_video": (4, 1), "wan": (3, 2)}


@pytest.fixture
def run_script(monkeypatch, capsys):
    """run_script(family, *arguments): what the example's file prints when it is run; Mochi's in a process of its own, which takes long to begin."""

    def run(family: str, *arguments: str) -> str:
        script = str(EXAMPLES / f"diffusers_{family}.py")
        if family == "mochi":
            done = subprocess.run(
                [sys.executable, str(ROOT / "tools/comfyui/comfy_launch.py"), script, *arguments], capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stderr
            return done.stdout
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tiny_pipeline_runs_sparse_from_the_command_line(family, tmp_path, run_script):
    out = tmp_path / "video.gif"
    told = numbers(run_script(family, "--tiny", "--topk", "0.1", "--dense-steps", "1", "--dense-layers", "-1", "--out", str(out)))
    layers, calls = LAYERS[family]
    assert told["sparse"] == 2 * (layers - 1) * calls
    assert told["dense"].pop("the first step") == layers * calls
    assert told["dense"].pop("in dense_layers") == 2 * calls
    assert told["dense"] == ({"cross-attention to 64 tokens": 3 * layers * calls} if family == "wan" else {})
    assert told["density"] < (0.2 if family == "wan" else 0.6)  # the text, which is kept, is much of so short a sequence
    assert 1e-4 < told["latents"] < 1 and 0 < told["pixels"] < 1  # fails on NaN too
    frames = imageio.imread(out)
    assert frames.shape == (13 if family == "mochi" else 17, 192, 192, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_at_topk_1_the_video_is_the_dense_one(family, run_main):
    told = numbers(run_main(family, "--tiny", "--topk", "1", "--dense-steps", "0", "--dense-layers", "", "--order", "hilbert"))
    layers, calls = LAYERS[family]
    assert told["sparse"] == 3 * layers * calls and told["density"] == 1
    assert told["latents"] < EXACT and told["pixels"] < EXACT


def test_a_pipeline_in_a_folder_is_loaded(run_main, tmp_path):
    importlib.import_module("diffusers_wan").tiny().save_pretrained(tmp_path / "wan")
    told = run_main("wan", "--model", tmp_path / "wan", "--frames", 5, "--height", 64, "--width", 64, "--steps", 3, "--topk", "0.2")
    assert "8 attention calls sparse" in told and "against dense" not in told
    # The defaults: of three steps and three layers one each.
    assert "6 attention calls dense: the first step" in told and "4 attention calls dense: in dense_layers" in told


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--topk", "0"), "--topk: must be a number above 0 to 1, got '0'"),
        (("--topk", "half"), "--topk: must be a number above 0 to 1, got 'half'"),
        (("--frames", "0"), "--frames: must be an integer from 1 upwards, got '0'"),
        (("--steps", "1"), "--steps: must be an integer from 2 upwards, got '1'"),
        (("--dense-layers", "first"), "--dense-layers: must be layer numbers with commas between them, such as 0,1,-1, got 'first'"),
        (("--out", "video.avi"), "--out: must be a file name that ends in one of .mp4, .gif, .webp, got 'video.avi'"),
        (("--out", "nowhere/video.gif"), "--out: must lie in a folder that exists, got 'nowhere/video.gif'; make the folder first"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_arguments_get_a_sentence(arguments, sentence, run_main, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main("wan", *arguments)
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize(("name", "arguments"), [("diffusers", ["--tiny"]), ("accelerate", [])])
def test_a_missing_package_gets_a_sentence(name, arguments, run_main, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=f"^The Python package {name} is missing, which this example needs; pip install {name}$"):
        run_main("mochi", *arguments)


def test_defaults_are_the_values_of_the_presets():
    spec = importlib.util.spec_from_file_location("sparge_presets_alone", ROOT / "nodes" / "presets.py")
    table = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = table
    spec.loader.exec_module(table)
    for family, row in (("mochi", "mochi"), ("hunyuan_video", "hunyuan_video"), ("wan", "wan_t2v")):
        example, preset = importlib.import_module("diffusers_" + family).EXAMPLE, table.PRESETS[row]
        assert example.dense_share == preset.start_percent and ",".join(map(str, example.dense_layers)) == preset.dense_blocks, family
        assert preset.topk == 0.5 and preset.end_percent == 1  # the scripts' own default, and no window at the end
        assert [example.dense_steps(n) for n in (2, 4, table.FEW_STEPS)] == [0, 1, 1] and example.dense_steps(50) == 12


# --- each family's processor against its own -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Case:
    """An attention module with inputs for it."""

    module: torch.nn.Module
    call: dict

    def __call__(self, **changed):
        out = self.module(**{**self.call, **changed})
        return out if isinstance(out, tuple) else (out,)


def angles(*shape: int) -> torch.Tensor:
    return torch.rand(*shape) * 6


@pytest.fixture
def case(diffusers):
    """case(kind): one attention layer of the family with two pictures in the batch whose texts differ in length."""

    def make(kind: str) -> Case:
        torch.manual_seed(0)
        video, text = torch.randn(2, VIDEO, 64), torch.randn(2, TEXT, 64)
        seen = torch.arange(TEXT) < torch.tensor([[5], [66]])
        if kind.startswith("mochi"):
            layers = importlib.import_module("diffusers.models.attention_processor")
            module = layers.MochiAttention(
                64, 64, layers.MochiAttnProcessor2_0(), heads=2, dim_head=32, out_dim=64, out_context_dim=64, context_pre_only=kind == "mochi last"
            )
            angle = angles(VIDEO, 2, 16)
            call = {"hidden_states": video, "encoder_hidden_states": text, "attention_mask": seen, "image_rotary_emb": (angle.cos(), angle.sin())}
        elif kind.startswith("hunyuan"):
            blocks = importlib.import_module("diffusers.models.transformers.transformer_hunyuan_video")
            block = blocks.HunyuanVideoTransformerBlock if kind == "hunyuan double" else blocks.HunyuanVideoSingleTransformerBlock
            module = block(2, 32, 2.0).attn
            angle = angles(VIDEO, 16).repeat_interleave(2, 1)
            mask = torch.cat([torch.ones(2, VIDEO, dtype=torch.bool), seen], 1)[:, None, None]
            call = {"hidden_states": video, "encoder_hidden_states": text, "attention_mask": mask, "image_rotary_emb": (angle.cos(), angle.sin())}
        else:
            layers = importlib.import_module("diffusers.models.transformers.transformer_wan")
            module = layers.WanAttention(64, 2, 32, processor=layers.WanAttnProcessor())
            angle = angles(1, VIDEO, 1, 16).repeat_interleave(2, -1)
            call = {"hidden_states": video, "rotary_emb": (angle.cos(), angle.sin())}
        return Case(module.eval().requires_grad_(False), call)

    return make


PROCESSORS = {"mochi": "MochiProcessor", "mochi last": "MochiProcessor", "hunyuan double": "HunyuanVideoProcessor",
              "hunyuan single": "HunyuanVideoProcessor", "wan": "WanProcessor"}  # fmt: skip
JOINT = [kind for kind in PROCESSORS if kind != "wan"]


def made_sparse(sparge, case: Case, kind: str, **settings):
    sparse = sparge.SparseAttention(**settings)
    sparse.grid = GRID
    case.module.processor = getattr(sparge, PROCESSORS[kind])(sparse, "0", False, case.module.processor)
    return sparse


def assert_close(got: tuple, expected: tuple) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and float((a - b).norm() / b.norm()) < EXACT


@pytest.fixture
def spied(sparge, monkeypatch):
    """What each call of sparse_attention was given and told: a list of (keyword arguments, info)."""
    calls = []
    real = sparge.sparse_attention

    def spy(*args, **kwargs):
        out, info = real(*args, **kwargs)
        calls.append((kwargs, info))
        return out, info

    monkeypatch.setattr(sparge, "sparse_attention", spy)
    return calls


@pytest.mark.parametrize("token_order", ["row_major", "tiles"])
@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_processor_at_topk_1_computes_what_the_models_own_does(kind, token_order, case, sparge):
    layer = case(kind)
    own = layer()
    sparse = made_sparse(sparge, layer, kind, topk=1.0, token_order=token_order)
    assert_close(layer(), own)
    assert len(sparse.densities["0"]) == 1 and not sparse.dense


@pytest.mark.parametrize("kind", ["mochi", "hunyuan double", "hunyuan single"])
def test_text_is_kept_and_its_padding_masked(kind, case, sparge, spied):
    layer = case(kind)
    made_sparse(sparge, layer, kind, topk=0.3)
    layer()
    ((given, info),) = spied
    lengths = torch.tensor([VIDEO + 5, VIDEO + 66])
    assert given["key_mask"].dtype == torch.bool and torch.equal(given["key_mask"], torch.arange(VIDEO + TEXT) < lengths[:, None])
    assert given["always_keep"] == ((VIDEO, VIDEO + TEXT),) and given["order"].segments == (GRID, TEXT)
    assert given["layout"] == "NHD" and given["topk"] == 0.3
    kept = info.kept.to_map()  # key blocks: three of video, then text 192..256 and 256..262, the last of them padding in the first picture
    assert kept[:, :, :, 3].all() and kept[1, :, :, 4].all() and not kept[0, :, :, 4].any()
    assert kept[:, :, 1:, :4].all()  # the text's own rows attend to everything they see
    assert not kept[:, :, 0, :3].all()


@pytest.mark.parametrize("kind", ["mochi", "hunyuan double", "hunyuan single"])
def test_what_stands_in_the_padding_never_reaches_the_video(kind, case, sparge):
    layer = case(kind)
    made_sparse(sparge, layer, kind, topk=0.3)
    text = layer.call["encoder_hidden_states"]
    changed = text.clone()
    changed[0, 5:] += 100
    changed[1, 66:] += 100
    before, after = layer()[0], layer(encoder_hidden_states=changed)[0]
    assert torch.equal(before, after)
    changed[0, :5] += 1
    assert not torch.equal(before[0], layer(encoder_hidden_states=changed)[0][0])


def test_a_prompt_of_no_tokens(case, sparge):
    """Mochi's pipeline can mask an empty negative prompt as a whole."""
    layer = case("mochi")
    none = layer.call["attention_mask"] & torch.tensor([[False], [True]])
    own = layer(attention_mask=none)
    made_sparse(sparge, layer, "mochi", topk=1.0)
    assert_close(layer(attention_mask=none), own)


def test_a_mask_that_differs_from_query_to_query_stays_dense(case, sparge):
    layer = case("hunyuan single")
    mask = torch.rand(2, 1, VIDEO + TEXT, VIDEO + TEXT) < 0.7
    own = layer(attention_mask=mask)
    sparse = made_sparse(sparge, layer, "hunyuan single")
    assert_close(layer(attention_mask=mask), own)
    assert dict(sparse.dense) == {"the mask differs from query to query": 1} and not sparse.densities


def test_wans_cross_attention_and_masks_stay_dense(case, sparge):
    layer = case("wan")
    text, mask = torch.randn(2, 20, 64), torch.rand(2, 1, 1, VIDEO) < 0.7
    own = layer(encoder_hidden_states=text, rotary_emb=None), layer(attention_mask=mask)
    sparse = made_sparse(sparge, layer, "wan")
    assert_close(layer(encoder_hidden_states=text, rotary_emb=None), own[0])
    assert_close(layer(attention_mask=mask), own[1])
    assert dict(sparse.dense) == {"cross-attention to 20 tokens": 1, "a mask on the self-attention": 1} and not sparse.densities


def test_what_no_backend_takes_stays_dense_with_its_reason(case, sparge):
    layer = case("wan")
    own = layer()
    sparse = made_sparse(sparge, layer, "wan", backend="cuda")
    assert_close(layer(), own)
    (reason,) = sparse.dense
    assert reason.startswith("no backend can run this attention call: cuda: ") and "no attention call ran sparse" in sparse.report()


def test_the_first_steps_of_every_run_stay_dense(sparge):
    pipe = importlib.import_module("diffusers_wan").tiny()
    pipe.set_progress_bar_config(disable=True)
    sparse = sparge.SparseAttention(dense_steps=1)
    sparse.install(pipe.transformer)
    for run in (1, 2):
        pipe("a fox", height=64, width=64, num_frames=1, num_inference_steps=2, max_sequence_length=64, output_type="latent",
             callback_on_step_end=sparse.step_done)  # fmt: skip
        assert sparse.dense["the first step"] == run * 3 * 2 == len(sparse.densities["0"]) * 3


def test_install_and_remove(sparge):
    transformer = importlib.import_module("diffusers_wan").tiny().transformer
    own = [m.processor for b in transformer.blocks for m in (b.attn1, b.attn2)]
    sparse = sparge.SparseAttention(dense_layers=(0, -1))
    sparse.install(transformer)
    assert [b.attn1.processor.listed for b in transformer.blocks] == [True, False, True]
    sparse.remove()
    assert [m.processor for b in transformer.blocks for m in (b.attn1, b.attn2)] == own and not transformer._forward_pre_hooks
    with pytest.raises(ValueError, match=r"^dense_layers must lie in -3 to 2, each once, got \[3\]$"):
        sparge.SparseAttention(dense_layers=(3,)).install(transformer)
    with pytest.raises(ValueError, match="^transformer must be one of HunyuanVideoTransformer3DModel, .*, got Linear; write a processor"):
        sparse.install(torch.nn.Linear(2, 2))
