"""The presets: the table itself, which model gets which row, and what the node makes of it in runs of every length."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import comfy_models
import pytest

ROWS = {  # tiny model -> family; the others have no row
    "flux": "flux",
    "flux_kontext": "flux",
    "chroma": "chroma",
    "mochi": "mochi",
    "hunyuan_video": "hunyuan_video",
    "hunyuan_video_1_5": "hunyuan_video_1_5",
    "wan_t2v": "wan_t2v",
    "wan_i2v": "wan_i2v",
    "wan_vace": "wan_vace",
    "wan_2_2_5b": "wan_2_2_5b",
    "ltxv": "ltxv",
    "qwen_image": "qwen_image",
    "qwen_image_edit": "qwen_image",
    "cosmos1": "cosmos1",
    "cogvideox": "cogvideox",
}


@pytest.fixture(scope="module")
def presets(pack):
    return importlib.import_module(f"{pack.__name__}.nodes.presets")


@pytest.mark.parametrize("name", comfy_models.FAMILIES)
def test_a_model_gets_its_familys_row_or_none(comfy, presets, tiny, name):
    if missing := comfy_models.available(name):
        pytest.skip(missing)
    found = presets.preset_for(tiny(name).patcher.model.diffusion_model)
    assert (found and found.family) == ROWS.get(name)


def test_wan_2_2_i2v_takes_its_picture_without_clip(comfy, presets, tiny):
    model = tiny("wan_t2v", latent=(1, 16, 3, 41, 37), in_dim=36)
    assert presets.preset_for(model.patcher.model.diffusion_model).family == "wan_2_2_i2v"


def test_a_compiled_model_is_recognised(comfy, presets, tiny):
    compiled = SimpleNamespace(_orig_mod=tiny("wan_t2v").patcher.model.diffusion_model)
    assert presets.preset_for(compiled).family == "wan_t2v"


def _stand_in(cls: str, base: type = object, **attributes):
    return type(cls, (base,), {})() if not attributes else type(cls, (base,), attributes)()


@pytest.mark.parametrize(
    "model",
    [
        _stand_in("Flux", params=SimpleNamespace(vec_in_dim=None)),  # Flux 2, LongCat
        _stand_in("HunyuanVideo", vision_in_dim=None, params=SimpleNamespace(vec_in_dim=None)),  # HunyuanImage
        _stand_in("AnimateWanModel", base=type("WanModel", (), {"model_type": "t2v", "in_dim": 16, "out_dim": 16})),
        _stand_in("Flux"),  # nothing that tells what it is
        None,
    ],
    ids=["flux2", "hunyuan_image", "derived_from_wan", "bare", "none"],
)
def test_what_only_looks_like_a_family_has_no_row(presets, model):
    assert presets.preset_for(model) is None


def test_every_row_is_legal_and_says_where_it_comes_from(nodes, presets):
    assert {row.family for row in presets.PRESETS.values()} == set(ROWS.values()) | {"wan_2_2_i2v"}
    assert len({row.label for row in presets.PRESETS.values()}) == len(presets.PRESETS)
    for family, row in presets.PRESETS.items():
        values = {name: getattr(row, name) for name in ("topk", "start_percent", "end_percent", "dense_blocks")}
        assert nodes.patch.check(values) is None, family
        # The widgets' steps: a workflow must be able to write the value as it is.
        assert all(abs(values[name] * 100 - round(values[name] * 100)) < 1e-9 for name in ("topk", "start_percent", "end_percent")), family
        assert row.family == family and row.label and "not yet measured here" in row.source and "\n" not in row.source
