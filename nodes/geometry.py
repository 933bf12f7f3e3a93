"""Model families: what ComfyUI's model classes make of a latent. One table, one row a family.

For an attention call of S tokens a row says which tokens are text (to be protected), which are the (T, H, W) grid of the latent, and which are the
grids of reference latents. Rows know the order of the parts; one part (the text, in most) takes whatever length the others leave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, cast

from torch.nn import Module, ModuleDict, ModuleList

MAX_PROTECTED = 1024
"""Longer text spans are treated like any other tokens."""

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class ModelCall:
    """What is known of one model call before its attention calls.

    model : the diffusion model; x_shape : latent with its batch; context_tokens : text tokens given to the model (0 if none);
    conds : the model call's other conditions by name; options : transformer_options of the attention call.
    """

    model: Any
    x_shape: tuple[int, ...]
    context_tokens: int
    conds: Mapping
    options: Mapping


@dataclass(frozen=True)
class Part:
    """A stretch of the sequence: kind "text", "grid", "reference" or "rest"; a grid size, or a length; size None = what the others leave."""

    kind: str
    size: Grid | int | None = None

    @property
    def length(self) -> int:
        return self.size if isinstance(self.size, int) else self.size[0] * self.size[1] * self.size[2]


class CallShape(NamedTuple):
    """What the time of dense attention hangs on: q's shape as ComfyUI passes it, the number of heads and of keys, and whether there is a mask."""

    q: tuple[int, ...]
    heads: int
    s_k: int
    masked: bool


class Place(NamedTuple):
    """Where the tokens of a block map lie: the kind of their order, the segments of the sequence, and which of these is the latent's own grid."""

    order_kind: str
    segments: tuple[Grid | int, ...]
    grid: int


@dataclass(frozen=True)
class Spans:
    """The parts of one attention sequence, front to back, lengths all known."""

    parts: tuple[Part, ...]

    @property
    def protected(self) -> tuple[tuple[int, int], ...]:
        """Token ranges of text and other short spans."""
        return self._ranges(lambda part: isinstance(part.size, int) and part.size <= MAX_PROTECTED)

    @property
    def references(self) -> tuple[tuple[int, int], ...]:
        """Token ranges of the reference latents."""
        return self._ranges(lambda part: part.kind == "reference")

    def _ranges(self, wanted) -> tuple[tuple[int, int], ...]:
        ranges, start = [], 0
        for part in self.parts:
            if wanted(part):
                ranges.append((start, start + part.length))
            start += part.length
        return tuple(ranges)

    @property
    def segments(self) -> tuple[Grid | int, ...]:
        """For `order.plan`: protected spans as ints, grids as (T, H, W); a long text is a grid of one line."""
        return tuple((1, 1, p.size) if isinstance(p.size, int) and p.size > MAX_PROTECTED else p.size for p in self.parts)

    def place(self, order_kind: str) -> Place | None:
        """Of a block map in this order of the tokens; None where the sequence has no grid of the latent."""
        grid = next((i for i, part in enumerate(self.parts) if part.kind == "grid"), None)
        return None if grid is None else Place(order_kind, self.segments, grid)


@dataclass(frozen=True)
class Family:
    """One row: `parts` gives the sequence's parts in order; None where ComfyUI never routes the model's attention through its hook."""

    name: str
    parts: Callable[[ModelCall], list[Part]] | None


def _ceil(n: int, patch: int) -> int:
    return -(-n // patch)


def _patched(shape: tuple[int, ...], patch) -> Grid:
    """(T, H, W) in tokens of a latent (B, C, H, W) or (B, C, T, H, W); patch is one int for H and W, or (t, h, w), or (h, w)."""
    t, (h, w) = (shape[2] if len(shape) == 5 else 1), shape[-2:]
    if isinstance(patch, int):
        patch = (1, patch, patch)
    pt, ph, pw = (1, *patch) if len(patch) == 2 else patch
    return _ceil(t, pt), _ceil(h, ph), _ceil(w, pw)


def _text(call: ModelCall) -> list[Part]:
    return [Part("text")]


def _grid(call: ModelCall) -> list[Part]:
    return [Part("grid", _patched(call.x_shape, call.model.patch_size))]


def _references(call: ModelCall, name: str = "ref_latents") -> list[Part]:
    given = call.conds.get(name)
    if given is None:
        return []
    latents = given if isinstance(given, list | tuple) else [given]
    return [Part("reference", _patched(tuple(x.shape), call.model.patch_size)) for x in latents]


def _in_order(*parts: Callable[[ModelCall], list[Part]]) -> Callable[[ModelCall], list[Part]]:
    return lambda call: [part for of in parts for part in of(call)]


def _hunyuan_video(call: ModelCall) -> list[Part]:
    """Video first up to ComfyUI 0.12, text first since 0.13; the blocks carry the mark of the old order."""
    video = _references(call, "ref_latent") + _grid(call)
    old_order = getattr(call.model.double_blocks[0], "flipped_img_txt", False)
    return video + _text(call) if old_order else _text(call) + video


def _wan(call: ModelCall) -> list[Part]:
    """Self-attention holds the video alone; a reference stands in front where the model has a layer for it, appended frames lengthen T."""
    patch = call.model.patch_size
    t, h, w = _patched(call.x_shape, patch)
    front = []
    if call.conds.get("reference_latent") is not None and getattr(call.model, "ref_conv", None) is not None:
        height, width = call.conds["reference_latent"].shape[-2:]
        front = [Part("reference", (1, height // 2, width // 2))]
    appended = call.conds.get("time_dim_concat")
    if appended is not None:
        t += _ceil(appended.shape[2], patch[0])
    return [*front, Part("grid", (t, h, w)), Part("rest")]


def _lumina(call: ModelCall) -> list[Part]:
    """Z-Image pads text and image to a multiple each; the pad of the text counts as text."""
    multiple = getattr(call.model, "pad_tokens_multiple", None)
    tokens = call.conds.get("num_tokens", call.context_tokens)
    if multiple is None or not isinstance(tokens, int):
        return _text(call) + _grid(call)
    return [Part("text", _ceil(tokens, multiple) * multiple), *_grid(call), Part("rest")]


def _ltxv(call: ModelCall) -> list[Part]:
    return [Part("grid", _patched(call.x_shape, 1)), Part("rest")]


def _cosmos(call: ModelCall) -> list[Part]:
    spatial, temporal = call.model.patch_spatial, call.model.patch_temporal
    return [Part("grid", _patched(call.x_shape, (temporal, spatial, spatial)))]


def _cogvideo(call: ModelCall) -> list[Part]:
    patch = getattr(call.model, "patch_size", 2)
    patch = (getattr(call.model, "patch_size_t", None) or 1, patch, patch) if isinstance(patch, int) else patch
    return [Part("text"), Part("grid", _patched(call.x_shape, patch))]


def _unet(call: ModelCall) -> list[Part]:
    """Every level of a UNet has a grid of its own, which ComfyUI tells the attention call."""
    shape = call.options.get("activations_shape") or call.x_shape
    return [Part("grid", (1, shape[-2], shape[-1]))]


FAMILIES: dict[str, Family] = {
    "Flux": Family("Flux", _in_order(_text, _grid, _references)),
    "Chroma": Family("Chroma", _in_order(_text, _grid, _references)),
    "AsymmDiTJoint": Family("Mochi", _in_order(_grid, _text)),
    "HunyuanVideo": Family("HunyuanVideo", _hunyuan_video),
    "WanModel": Family("Wan", _wan),
    "LTXVModel": Family("LTXV", _ltxv),
    "OpenAISignatureMMDITWrapper": Family("SD3", _in_order(_text, _grid)),
    "UNetModel": Family("Stable Diffusion UNet", _unet),
    "QwenImageTransformer2DModel": Family("Qwen-Image", _in_order(_text, _grid, _references)),
    "NextDiT": Family("Lumina2 / Z-Image", _lumina),
    "MiniTrainDIT": Family("Cosmos Predict2", _cosmos),
    "GeneralDIT": Family("Cosmos", _cosmos),
    "HiDreamImageTransformer2DModel": Family("HiDream", _in_order(_grid, _text)),
    "MMDiT": Family("AuraFlow", _in_order(_text, _grid)),
    "OmniGen2Transformer2DModel": Family("OmniGen2", _in_order(_text, _references, _grid)),
    "CogVideoXTransformer3DModel": Family("CogVideoX", _cogvideo),
    "Kandinsky5": Family("Kandinsky5", _in_order(_grid, _text)),
    "PixArtMS": Family("PixArt", None),
    "HunYuanDiT": Family("HunyuanDiT", None),
    "HunYuanDiTPlain": Family("Hunyuan3D 2.1", None),
}
"""By the class name of the diffusion model or of one of its bases."""


def family_of(model: object) -> Family | None:
    """The row of a diffusion model (compiled ones too), or None for a family that is not in the table."""
    model = getattr(model, "_orig_mod", model)
    return next((FAMILIES[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in FAMILIES), None)


def spans(family: Family | None, call: ModelCall, tokens: int) -> Spans | None:
    """The parts of a self-attention sequence of `tokens`, or None when they do not add up (a family or a use that is not known)."""
    if family is None or family.parts is None:
        return None
    parts = family.parts(call)
    left = tokens - sum(p.length for p in parts if p.size is not None)
    if left < 0 or (left > 0 and all(p.size is not None for p in parts)):
        return None
    return Spans(tuple(p if p.size is not None else Part(p.kind, left) for p in parts if p.size is not None or left > 0))


def grid_tokens(family: Family | None, call: ModelCall) -> int | None:
    """Tokens of the latent's own grid: a self-attention call shorter than this is not one of the model's layers. None: not known."""
    if family is None or family.parts is None:
        return None
    return sum(p.length for p in family.parts(call) if p.kind == "grid")


def block_number(model: object, options: Mapping) -> int | None:
    """The number of the model's block whose attention call this is, as ComfyUI says it with most models; else None.

    Models of two kinds of block count each kind from 0, the single ones after the double ones here. A UNet counts the blocks of each of its levels.
    """
    index = options.get("block_index")
    if type(index) is not int or "block" in options:
        return None
    model = getattr(model, "_orig_mod", model)
    return index + (len(getattr(model, "double_blocks", ())) if options.get("block_type") == "single" else 0)


def numbered_blocks(model: object) -> int:
    """How many blocks of a model ComfyUI numbers; 0 where it numbers none. Calls without a number (a refiner's) are numbered after them."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, Module) or not _numbers_blocks(cast(Any, type(model))):
        return 0
    lists = {name: len(child) for name, child in model.named_children() if isinstance(child, ModuleList | ModuleDict)}
    return lists.get("double_blocks", 0) + lists.get("single_blocks", 0) or max(lists.values(), default=0)


@lru_cache(maxsize=64)
def _numbers_blocks(model_class: type) -> bool:
    """Whether the class's own code names the option: a model call is under way before it is set."""
    functions = (value for cls in model_class.__mro__ if cls is not Module for value in vars(cls).values())
    return any("block_index" in getattr(getattr(function, "__code__", None), "co_consts", ()) for function in functions)


def fallback_protected(tokens: int, context_tokens: int) -> tuple[tuple[int, int], ...]:
    """For a sequence that no row explains: as many tokens at either end as there is text, for the text stands at one of them."""
    if not 0 < context_tokens <= MAX_PROTECTED or 2 * context_tokens >= tokens:
        return ()
    return (0, context_tokens), (tokens - context_tokens, tokens)
