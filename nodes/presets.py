"""What the presets decide: how much is kept, and, by model family, which steps and layers stay dense; every value with its source.

The values are what others published for the same models; none was measured with this pack on real weights. Where nothing is published a row
says so and takes careful ones: 0.2 of the schedule (the default of ComfyUI's own sparse attention node) and layer 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

FEW_STEPS = 8
"""Schedules of this many steps or fewer (distilled models) keep at most their first step dense where the window comes from a preset."""


@dataclass(frozen=True)
class Preset:
    """What a preset decides for a model. `dense_blocks` is written as on the node."""

    family: str
    label: str
    topk: float
    start_percent: float
    end_percent: float
    dense_blocks: str
    source: str


UNPUBLISHED = "nothing published for this model; 0.2 and the first layer are careful values; not yet measured here"

# fmt: off
PRESETS: dict[str, Preset] = {row.family: row for row in (
    Preset("flux", "Flux.1", 0.5, 0.2, 1.0, "0-1",
           "Chipmunk, FLUX.1-dev: layers 0 and 1 dense, and one step in ten; 0.2 is a careful value; not yet measured here"),
    Preset("chroma", "Chroma", 0.5, 0.2, 1.0, "0", UNPUBLISHED),
    Preset("mochi", "Mochi 1", 0.5, 0.24, 1.0, "",
           "Radial Attention, Mochi 1: 12 steps (of 50, taken from its other models) dense, no layer; not yet measured here"),
    Preset("hunyuan_video", "HunyuanVideo", 0.5, 0.24, 1.0, "0",
           "Radial Attention: 12 of 50 steps dense; Sparse VideoGen, 720p: 5 of 50 steps and the first layer; not yet measured here"),
    Preset("hunyuan_video_1_5", "HunyuanVideo 1.5", 0.5, 0.24, 1.0, "0",
           "nothing published without training; as HunyuanVideo; not yet measured here"),
    Preset("wan_t2v", "Wan 2.1 / 2.2 t2v", 0.5, 0.24, 1.0, "0",
           "Radial Attention: 12 of 50 steps (2.2: 11 of 40) and the first layer dense; Sparse VideoGen: 10 of 50 and the first layer; "
           "not yet measured here"),
    Preset("wan_i2v", "Wan 2.1 i2v", 0.5, 0.35, 1.0, "0",
           "Sparse VideoGen: 14 of 40 steps (480p: 8 of 40) and the first layer dense; not yet measured here"),
    Preset("wan_2_2_i2v", "Wan 2.2 i2v", 0.5, 0.27, 1.0, "0",
           "nothing published for i2v; Radial Attention, Wan 2.2 t2v: 11 of 40 steps and the first layer dense; not yet measured here"),
    Preset("wan_vace", "Wan VACE", 0.5, 0.24, 1.0, "0", "nothing published; as Wan t2v; not yet measured here"),
    Preset("wan_2_2_5b", "Wan 2.2 5B", 0.5, 0.27, 1.0, "0", "nothing published; as Radial Attention on Wan 2.2 14B; not yet measured here"),
    Preset("ltxv", "LTXV", 0.5, 0.2, 1.0, "0",
           "SpargeAttn's example for LTX-Video 0.9.7 keeps nothing dense at topk 0.5; 0.2 and the first layer are careful values; "
           "not yet measured here"),
    Preset("qwen_image", "Qwen-Image", 0.5, 0.2, 1.0, "0", UNPUBLISHED),
    Preset("cosmos1", "Cosmos 1", 0.5, 0.3, 1.0, "0",
           "Sparse VideoGen, Cosmos 1.0 14B: 10 of 35 steps and the first layer dense; not yet measured here"),
    Preset("cogvideox", "CogVideoX", 0.5, 0.2, 1.0, "0-1",
           "Sparse VideoGen, CogVideoX 1.5: the first 20 % of the schedule and layers 0 and 1 dense; not yet measured here"),
)}
# fmt: on
"""By family. Two models of one row cannot be told apart by what they are built of (Flux dev and Kontext; both experts of Wan 2.2 and Wan 2.1)."""

LEVELS: dict[str, Preset] = {
    name: Preset(name, name, topk, 0.2, 1.0, "0", f"{source}; not yet measured here")
    for name, topk, source in (
        ("careful", 0.7, "no source: more than SpargeAttn keeps in any example of its own"),
        ("balanced", 0.5, "SpargeAttn: the default of its topk functions and of its LTX-Video example"),
        ("fast", 0.3, "no source: less than the 0.4 of SpargeAttn's Wan 2.2 example"),
    )
}
"""The named presets; the source is that of topk. Steps and layers are for models of a family that is not in the table above: careful values."""


def chosen(name: str, row: Preset | None) -> Preset | None:
    """What the preset `name` decides for a model of a family's row: "auto" the row, one of LEVELS its own topk and the row's steps and layers."""
    level = LEVELS.get(name)
    if level is None or row is None:
        return level or row
    return replace(row, label=f"{name}, {row.label}", topk=level.topk, source=f"topk: {level.source}. Steps and layers: {row.source}")


def _wan(model) -> str:
    if getattr(model, "out_dim", None) == 48:
        return "wan_2_2_5b"
    if getattr(model, "model_type", None) == "i2v":
        return "wan_i2v"
    # Wan 2.2 takes the picture as more input channels alone, 2.1 through CLIP too (its model_type).
    return "wan_2_2_i2v" if getattr(model, "in_dim", 0) > getattr(model, "out_dim", 0) else "wan_t2v"


def _flux(model) -> str | None:
    """Flux 2 and LongCat share the class; they have no pooled text vector."""
    return "flux" if getattr(getattr(model, "params", None), "vec_in_dim", None) else None


def _hunyuan_video(model) -> str | None:
    """HunyuanImage shares the class; it has neither a pooled text vector nor a vision encoder."""
    if getattr(model, "vision_in_dim", None):
        return "hunyuan_video_1_5"
    return "hunyuan_video" if getattr(getattr(model, "params", None), "vec_in_dim", None) else None


_FAMILY_OF = {
    "Flux": _flux,
    "Chroma": lambda model: "chroma",
    "AsymmDiTJoint": lambda model: "mochi",
    "HunyuanVideo": _hunyuan_video,
    "WanModel": _wan,
    "VaceWanModel": lambda model: "wan_vace",
    "LTXVModel": lambda model: "ltxv",
    "QwenImageTransformer2DModel": lambda model: "qwen_image",
    "GeneralDIT": lambda model: "cosmos1",
    "CogVideoXTransformer3DModel": lambda model: "cogvideox",
}
"""By the exact class name: a model derived from one of these was trained for something else, and nothing is published for it."""


def preset_for(diffusion_model) -> Preset | None:
    """The row of a diffusion model (compiled ones too), or None for a family that is not in the table."""
    model = getattr(diffusion_model, "_orig_mod", diffusion_model)
    family = _FAMILY_OF.get(type(model).__name__, lambda model: None)(model)
    return None if family is None else PRESETS[family]
