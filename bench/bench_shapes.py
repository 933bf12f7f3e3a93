"""The attention calls that are measured: those of image and video models, and the same with heads of 64."""

from __future__ import annotations

from dataclasses import dataclass, replace

TOPK = (1.0, 0.5, 0.25, 0.1)


@dataclass(frozen=True)
class Shape:
    """Self-attention of one layer, batch 1 unless it comes from a file.

    Attributes
    ----------
    name : str
    s_q, s_k : int
        Tokens.
    heads, dim : int
    kv_heads : int
        0: as many as `heads`.
    batch : int
    """

    name: str
    s_q: int
    s_k: int
    heads: int
    dim: int
    kv_heads: int = 0
    batch: int = 1

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    def flop(self, density: float) -> float:
        """Of the two products over the kept blocks, one multiplication and one addition each."""
        return 4.0 * self.batch * self.heads * self.s_q * self.s_k * self.dim * density

    def memory(self) -> int:
        """Bytes that measuring it takes at most, estimated: the tensors and their copies in the other layout, two outputs, the workspace, lists."""
        q = self.batch * self.heads * self.s_q * self.dim
        kv = self.batch * self.key_heads * self.s_k * self.dim
        lists = self.batch * self.heads * self.s_q * self.s_k // (128 * 64)
        return 20 * q + 20 * kv + 12 * lists + (1 << 30)


def _joint(name: str, tokens: int, heads: int, dim: int) -> Shape:
    return Shape(name, tokens, tokens, heads, dim)


MOCHI = _joint("Mochi 22k", 14 * 30 * 53 + 180, 24, 128)

# Tokens as (frames x height x width) of latents after patching, and the text.
MODELS = (
    _joint("Flux 1024 px", 64 * 64 + 512, 24, 128),
    _joint("Flux 2048 px", 128 * 128 + 512, 24, 128),
    MOCHI,
    _joint("CogVideoX 17k", 13 * 30 * 45 + 226, 48, 64),
    _joint("Wan 1.3B 32k", 21 * 30 * 52, 12, 128),
    _joint("Wan 1.3B 75k", 21 * 45 * 80, 12, 128),
    _joint("Wan 14B 32k", 21 * 30 * 52, 40, 128),
    _joint("Wan 14B 75k", 21 * 45 * 80, 40, 128),
    _joint("HunyuanVideo 118k", 33 * 45 * 80 + 256, 24, 128),
)

SHORT = (MODELS[0], MOCHI)
HEADLINE = tuple(shape for shape in MODELS if shape.name in ("Flux 1024 px", "Mochi 22k", "Wan 14B 75k", "HunyuanVideo 118k"))
"""From a picture to the longest video: what is told first."""
AGAINST_PEERS = HEADLINE[1:3]


def twin(shape: Shape) -> Shape:
    """The same call with heads of 64."""
    return replace(shape, name=f"{shape.name}, D 64", dim=64)


def shapes(short: bool = False) -> tuple[Shape, ...]:
    """What a run measures, in order."""
    return SHORT if short else MODELS + tuple(twin(shape) for shape in MODELS if shape.dim != 64)
