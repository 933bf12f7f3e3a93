"""Each row of the family table against sequences worked out by hand, with stand-ins for the diffusion models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

# The class of each row, and the name that a user reads.
CLASSES = {
    "Flux": "Flux",
    "Chroma": "Chroma",
    "AsymmDiTJoint": "Mochi",
    "HunyuanVideo": "HunyuanVideo",
    "WanModel": "Wan",
    "LTXVModel": "LTXV",
    "OpenAISignatureMMDITWrapper": "SD3",
    "UNetModel": "Stable Diffusion UNet",
    "QwenImageTransformer2DModel": "Qwen-Image",
    "NextDiT": "Lumina2 / Z-Image",
    "MiniTrainDIT": "Cosmos Predict2",
    "GeneralDIT": "Cosmos",
    "HiDreamImageTransformer2DModel": "HiDream",
    "MMDiT": "AuraFlow",
    "OmniGen2Transformer2DModel": "OmniGen2",
    "CogVideoXTransformer3DModel": "CogVideoX",
    "Kandinsky5": "Kandinsky5",
}
NEVER = {"PixArtMS": "PixArt", "HunYuanDiT": "HunyuanDiT", "HunYuanDiTPlain": "Hunyuan3D 2.1"}


def stand_in(name: str, **attributes):
    """An object whose class has the name of a diffusion model."""
    return type(name, (SimpleNamespace,), {"__hash__": object.__hash__})(**attributes)


def old_hunyuan(**attributes):
    return stand_in("HunyuanVideo", patch_size=[1, 2, 2], double_blocks=[SimpleNamespace(flipped_img_txt=True)], **attributes)


def new_hunyuan(**attributes):
    return stand_in("HunyuanVideo", patch_size=[1, 2, 2], double_blocks=[SimpleNamespace()], **attributes)


def latent(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def text(n):
    return ("text", n)


def grid(*size):
    return ("grid", size)


def reference(*size):
    return ("reference", size)


IMAGE, VIDEO = (2, 16, 67, 73), (1, 16, 3, 41, 37)  # odd: 34 x 37 and 3 x 21 x 19 patches of 2

# id: model, latent, conditions, tokens of the text given to the model, tokens of the sequence, parts
ROWS = {
    "flux": (stand_in("Flux", patch_size=2), IMAGE, {}, 7, 7 + 1258, [text(7), grid(1, 34, 37)]),
    "flux-image-alone": (stand_in("Flux", patch_size=2), IMAGE, {}, 7, 1258, [grid(1, 34, 37)]),
    "flux-kontext": (stand_in("Flux", patch_size=2), IMAGE, {"ref_latents": [latent(1, 16, 35, 28), latent(1, 16, 24, 39)]}, 7,
                     7 + 1258 + 252 + 240, [text(7), grid(1, 34, 37), reference(1, 18, 14), reference(1, 12, 20)]),
    "chroma": (stand_in("Chroma", patch_size=2), IMAGE, {}, 7, 1265, [text(7), grid(1, 34, 37)]),
    "chroma-radiance-patch": (stand_in("Chroma", patch_size=16), (1, 3, 512, 520), {}, 9, 9 + 32 * 33, [text(9), grid(1, 32, 33)]),
    "mochi": (stand_in("AsymmDiTJoint", patch_size=2), (1, 12, 3, 42, 38), {"num_tokens": 9}, 256, 1197 + 9, [grid(3, 21, 19), text(9)]),
    "hunyuan-old": (old_hunyuan(), VIDEO, {}, 7, 1204, [grid(3, 21, 19), text(7)]),
    "hunyuan-new": (new_hunyuan(), VIDEO, {}, 7, 1204, [text(7), grid(3, 21, 19)]),
    "hunyuan-old-reference": (old_hunyuan(), VIDEO, {"ref_latent": latent(1, 16, 41, 37)}, 7, 399 + 1204,
                              [reference(1, 21, 19), grid(3, 21, 19), text(7)]),
    "hunyuan-1.5-patch": (stand_in("HunyuanVideo", patch_size=[1, 1, 1], double_blocks=[SimpleNamespace()]), (1, 32, 3, 21, 19), {}, 7, 1210,
                          [text(13), grid(3, 21, 19)]),
    "wan": (stand_in("WanModel", patch_size=(1, 2, 2)), VIDEO, {}, 7, 1197, [grid(3, 21, 19)]),
    "wan-vace": (type("VaceWanModel", (type(stand_in("WanModel")),), {})(patch_size=(1, 2, 2)), VIDEO, {}, 7, 1197, [grid(3, 21, 19)]),
    "wan-reference": (stand_in("WanModel", patch_size=(1, 2, 2), ref_conv=object()), VIDEO, {"reference_latent": latent(1, 16, 42, 38)}, 7,
                      399 + 1197, [reference(1, 21, 19), grid(3, 21, 19)]),
    "wan-reference-without-layer": (stand_in("WanModel", patch_size=(1, 2, 2), ref_conv=None), VIDEO,
                                    {"reference_latent": latent(1, 16, 42, 38)}, 7, 1197, [grid(3, 21, 19)]),
    "wan-frames-appended": (stand_in("WanModel", patch_size=(1, 2, 2)), VIDEO, {"time_dim_concat": latent(1, 16, 2, 41, 37)}, 7, 5 * 399,
                            [grid(5, 21, 19)]),
    "wan-more-behind": (stand_in("WanModel", patch_size=(1, 2, 2)), VIDEO, {}, 7, 1197 + 40, [grid(3, 21, 19), ("rest", 40)]),
    "ltxv": (stand_in("LTXVModel"), (1, 128, 3, 21, 19), {}, 7, 1197, [grid(3, 21, 19)]),
    "ltxv-guides": (stand_in("LTXVModel"), (1, 128, 3, 21, 19), {}, 7, 1597, [grid(3, 21, 19), ("rest", 400)]),
    "sd3": (stand_in("OpenAISignatureMMDITWrapper", patch_size=2), IMAGE, {}, 154, 154 + 1258, [text(154), grid(1, 34, 37)]),
    "sd3-image-alone": (stand_in("OpenAISignatureMMDITWrapper", patch_size=2), IMAGE, {}, 154, 1258, [grid(1, 34, 37)]),
    "qwen": (stand_in("QwenImageTransformer2DModel", patch_size=2), (1, 16, 1, 67, 73), {}, 7, 1265, [text(7), grid(1, 34, 37)]),
    "qwen-edit": (stand_in("QwenImageTransformer2DModel", patch_size=2), (1, 16, 1, 61, 57), {"ref_latents": [latent(1, 16, 1, 35, 28)]}, 7,
                  7 + 899 + 252, [text(7), grid(1, 31, 29), reference(1, 18, 14)]),
    "lumina2": (stand_in("NextDiT", patch_size=2), IMAGE, {"num_tokens": 7}, 7, 1265, [text(7), grid(1, 34, 37)]),
    "z-image": (stand_in("NextDiT", patch_size=2, pad_tokens_multiple=32), IMAGE, {"num_tokens": 7}, 7, 32 + 1280,
                [text(32), grid(1, 34, 37), ("rest", 22)]),
    "z-image-no-pad": (stand_in("NextDiT", patch_size=2, pad_tokens_multiple=32), (1, 16, 64, 64), {"num_tokens": 32}, 32, 32 + 1024,
                       [text(32), grid(1, 32, 32)]),
    "cosmos-predict2": (stand_in("MiniTrainDIT", patch_spatial=2, patch_temporal=1), VIDEO, {}, 7, 1197, [grid(3, 21, 19)]),
    "cosmos": (stand_in("GeneralDIT", patch_spatial=2, patch_temporal=1), VIDEO, {}, 7, 1197, [grid(3, 21, 19)]),
    "hidream": (stand_in("HiDreamImageTransformer2DModel", patch_size=2), IMAGE, {}, 7, 1258 + 25, [grid(1, 34, 37), text(25)]),
    "auraflow": (stand_in("MMDiT", patch_size=2), IMAGE, {}, 7, 15 + 1258, [text(15), grid(1, 34, 37)]),
    "omnigen2": (stand_in("OmniGen2Transformer2DModel", patch_size=2), (1, 16, 61, 65), {"ref_latents": [latent(1, 16, 33, 29)]}, 7, 7 + 255 + 1023,
                 [text(7), reference(1, 17, 15), grid(1, 31, 33)]),
    "cogvideox": (stand_in("CogVideoXTransformer3DModel", patch_size=2, patch_size_t=None), VIDEO, {}, 16, 1213, [text(16), grid(3, 21, 19)]),
    "cogvideox-1.5": (stand_in("CogVideoXTransformer3DModel", patch_size=2, patch_size_t=2), (1, 16, 4, 41, 37), {}, 16, 814,
                      [text(16), grid(2, 21, 19)]),
    "kandinsky5": (stand_in("Kandinsky5", patch_size=(1, 2, 2)), VIDEO, {}, 7, 1197, [grid(3, 21, 19)]),
}  # fmt: skip


def model_call(nodes, model, shape, conds=None, context=7, options=None):
    return nodes.geometry.ModelCall(model, shape, context, conds or {}, options or {})


def parts_of(spans):
    return [(part.kind, part.size) for part in spans.parts]


@pytest.mark.parametrize("row", ROWS)
def test_rows(nodes, row):
    model, shape, conds, context, tokens, expected = ROWS[row]
    geometry = nodes.geometry
    call = model_call(nodes, model, shape, conds, context)
    spans = geometry.spans(geometry.family_of(model), call, tokens)
    assert parts_of(spans) == expected
    sizes = [size if isinstance(size, int) else size[0] * size[1] * size[2] for _, size in expected]
    assert sum(sizes) == tokens
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    ranges = [(kind, (start, start + n)) for (kind, _), start, n in zip(expected, starts, sizes, strict=True)]
    assert spans.protected == tuple(r for kind, r in ranges if kind in ("text", "rest"))
    assert spans.references == tuple(r for kind, r in ranges if kind == "reference")
    order = nodes._kernels.order_plan("tiles", spans.segments)
    assert order.length == tokens and order.protected == spans.protected


@pytest.mark.parametrize("row", ROWS)
def test_a_sequence_that_does_not_add_up_has_no_spans(nodes, row):
    """Shorter than the known parts; and longer, where no part may take whatever length is left."""
    model, shape, conds, context, tokens, expected = ROWS[row]
    geometry = nodes.geometry
    call = model_call(nodes, model, shape, conds, context)
    known = sum(size if isinstance(size, int) else size[0] * size[1] * size[2] for kind, size in expected if kind in ("grid", "reference"))
    assert geometry.spans(geometry.family_of(model), call, known - 1) is None
    if type(model).__name__ in ("MiniTrainDIT", "GeneralDIT"):
        assert geometry.spans(geometry.family_of(model), call, tokens + 1) is None


def test_every_row_is_tested(nodes):
    geometry = nodes.geometry
    assert {name: family.name for name, family in geometry.FAMILIES.items()} == CLASSES | NEVER
    for name in NEVER:
        family = geometry.family_of(stand_in(name))
        assert family.parts is None and geometry.spans(family, model_call(nodes, stand_in(name), IMAGE), 1258) is None
        assert geometry.grid_tokens(family, model_call(nodes, stand_in(name), IMAGE)) is None
    covered = {cls.__name__ for model, *_ in ROWS.values() for cls in type(model).__mro__}
    assert set(CLASSES) - covered == {"UNetModel"}  # below


def test_unet_levels(nodes):
    """Each level has a grid of its own, which ComfyUI tells the attention call."""
    geometry, model = nodes.geometry, stand_in("UNetModel")
    family = geometry.family_of(model)
    for shape in (torch.Size((2, 320, 33, 35)), [2, 640, 17, 18]):
        call = model_call(nodes, model, (2, 4, 66, 70), options={"activations_shape": shape})
        tokens = shape[2] * shape[3]
        assert parts_of(geometry.spans(family, call, tokens)) == [grid(1, shape[2], shape[3])]
        assert geometry.spans(family, call, tokens + 1) is None and geometry.spans(family, call, tokens - 1) is None
        assert geometry.grid_tokens(family, call) == tokens
    assert parts_of(geometry.spans(family, model_call(nodes, model, (2, 4, 9, 11)), 99)) == [grid(1, 9, 11)]


def test_hunyuan_refiner_is_no_block(nodes):
    for model in (old_hunyuan(), new_hunyuan()):
        call = model_call(nodes, model, VIDEO)
        family = nodes.geometry.family_of(model)
        assert nodes.geometry.spans(family, call, 7) is None and nodes.geometry.grid_tokens(family, call) == 1197


def test_long_text_is_a_line_and_not_protected(nodes):
    geometry, model = nodes.geometry, stand_in("Flux", patch_size=2)
    assert geometry.MAX_PROTECTED == 1024
    for length, protected in ((1024, ((0, 1024),)), (1025, ())):
        spans = geometry.spans(geometry.family_of(model), model_call(nodes, model, IMAGE, context=length), length + 1258)
        assert spans.protected == protected
        assert spans.segments == ((1024 if protected else (1, 1, 1025)), (1, 34, 37))
        assert nodes._kernels.order_plan("hilbert", spans.segments).length == length + 1258


def test_unknown_family(nodes):
    geometry = nodes.geometry
    model = stand_in("BrandNewDiT", patch_size=2)
    assert geometry.family_of(model) is None
    call = model_call(nodes, model, IMAGE)
    assert geometry.spans(None, call, 1265) is None and geometry.grid_tokens(None, call) is None


def test_fallback_protects_both_ends(nodes):
    protected = nodes.geometry.fallback_protected
    assert protected(1265, 7) == ((0, 7), (1258, 1265))
    assert protected(4096, 1024) == ((0, 1024), (3072, 4096))
    assert protected(4096, 1025) == ()  # too long to protect
    assert protected(1265, 0) == ()  # no text
    assert protected(14, 7) == protected(6, 7) == ()  # nothing else left
    assert protected(15, 7) == ((0, 7), (8, 15))


@pytest.mark.parametrize("name", ["Flux", "HunYuanDiT"])
def test_compiled_model(nodes, name):
    """torch.compile wraps a module in one of another class that holds it as _orig_mod and passes attributes on."""
    module = type(name, (torch.nn.Module,), {"forward": lambda self, x: x})()
    module.patch_size = 2
    compiled = torch.compile(module, backend="eager")
    geometry = nodes.geometry
    assert type(compiled).__name__ != name and geometry.family_of(compiled) is geometry.FAMILIES[name]
    if name == "Flux":
        assert parts_of(geometry.spans(geometry.family_of(compiled), model_call(nodes, compiled, IMAGE), 1265)) == [text(7), grid(1, 34, 37)]


def test_a_class_that_inherits_has_its_parents_row(nodes):
    child = type("FluxOfTomorrow", (type(stand_in("Flux")),), {})
    assert nodes.geometry.family_of(child()).name == "Flux"


def test_packed_latents(nodes):
    """Newer trees pack picture and sound into one tensor and give the shapes beside it; the first is the picture."""
    x = torch.zeros(1, 1, 999)
    assert nodes.run_state._latent_shape(x, {"latent_shapes": [(1, 16, 3, 8, 8), (1, 8, 20)]}) == (1, 16, 3, 8, 8)
    for conds in ({}, {"latent_shapes": []}, {"latent_shapes": None}):
        assert nodes.run_state._latent_shape(x, conds) == (1, 1, 999)
