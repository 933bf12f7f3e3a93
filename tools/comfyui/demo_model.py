"""Writes a small Wan 2.1 text-to-video checkpoint whose weights are designed, not trained: `python demo_model.py FILE`.

ComfyUI's loader sees an ordinary WanModel (2 heads of 128, six blocks). Along the sampling path dx/dsigma = a*x - b*smooth(x): the self
attention of the blocks is `smooth`, one block after another, so detail that no block carries dies out and broad shapes grow, and sampling
noise gives soft drifting clouds of colour. A head is a kernel over the offset (t, y, x) between query and key: q and k are nearly constant
vectors, and RoPE turns their product into a sum of cosines of the offset, whose amplitudes (the weights of norm_q and norm_k) are fitted to
a bell of the wanted width, and whose phases (the bias of q) put its peak at the wanted offset. The slowest frequencies, which RoPE hardly
turns, carry content instead, so that a token prefers its own colour and the attention mass of a block depends on the picture.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

FILE = "sparge_demo_wan.safetensors"
"""What the demo's workflow calls it."""

DIM, HEADS, HEAD_DIM, FFN, TEXT_DIM, FREQ_DIM = 256, 2, 128, 128, 4096, 256
LATENT, PATCH = 16, 64  # latent channels; values of one 1 x 2 x 2 patch
AXES = (44, 42, 42)  # RoPE channels of t, y, x in a head
RGB_CHANNELS = 12  # of the 16: 2 x 2 pixels of three colours; the other four are not decoded
VALUES = 7  # what a block passes on: three colours and four undecoded channels, each the mean over the patch

# The residual stream of a token: the patch itself (for a*x), then value streams, then constant channels, which set what LayerNorm divides by,
# so that it is nearly linear until colours are strong.
ANCHOR = slice(128, DIM)
CONTENT_FREQUENCIES = 3  # per axis, the slowest


@dataclass(frozen=True)
class Kernel:
    """One head: `width` in tokens (standard deviation), `peak`, the offset (t, y, x) it looks at, and what its output counts in the sum."""

    width: tuple[float, float, float]
    peak: tuple[float, float, float] = (0.0, 0.0, 0.0)
    weight: float = 0.5
    content: float = 0.6  # the pull of like colours, in score units


# A pair of heads a block. The drifting pairs look ahead along a motion and back along it; the fourth
# block subtracts a wide surrounding, or one colour would win everywhere; the last two measure the slopes in x and y.
BLOCKS = (
    (Kernel((0.6, 1.4, 1.4)), Kernel((1.8, 0.8, 0.8))),
    (Kernel((0.7, 1.0, 1.0), (2.0, 0.8, 2.4)), Kernel((0.7, 1.0, 1.0), (-2.0, -0.8, -2.4))),
    (Kernel((1.0, 1.3, 1.3), (2.5, 1.0, 3.0)), Kernel((1.0, 1.3, 1.3), (-2.5, -1.0, -3.0))),
    (Kernel((0.8, 1.2, 1.2), weight=1.0, content=1.0), Kernel((1.8, 3.2, 3.2), weight=-1.0, content=0.3)),
    (Kernel((0.5, 0.8, 0.8), (0.0, 0.0, 1.0), content=0.0), Kernel((0.5, 0.8, 0.8), (0.0, 0.0, -1.0), content=0.0)),
    (Kernel((0.5, 0.8, 0.8), (0.0, 1.0, 0.0), content=0.0), Kernel((0.5, 0.8, 0.8), (0.0, -1.0, 0.0), content=0.0)),
)
SLOPES_FROM = 4  # block
DECAY = 4.5  # a: how fast unsupported detail dies along the path
GROWTH = 46.0
WANDER = 0.1  # small random part of q and k: the peaks wander a little with the picture
STRONG = 4.0  # size of a value at which content pulls in full
ANCHOR_SIZE = 2.6
RAW_GAIN = 0.5
VALUE_GAIN = 8.0  # what the value streams hold, over the mean of the patch


SMOOTH, SLOPE_X, SLOPE_Y = 5, 6, 7  # value streams


def stream(index: int) -> slice:
    """The channels of value stream `index`: 0 comes from the patch, block i < 4 reads i and writes i + 1, the slope blocks read 4."""
    return slice(PATCH + index * VALUES, PATCH + (index + 1) * VALUES)


def frequencies(axis: int) -> torch.Tensor:
    n = AXES[axis] // 2
    return 10000.0 ** (-torch.arange(n, dtype=torch.float64) / n)


def amplitudes(axis: int, width: float, reach: int = 40, floor: float = 9.0) -> torch.Tensor:
    """Amplitudes A >= 0 with sum_f A_f (cos(w_f d) - 1) close to -min(d^2 / (2 width^2), floor) for |d| <= reach."""
    w = frequencies(axis)[:-CONTENT_FREQUENCIES]
    d = torch.arange(1, reach + 1, dtype=torch.float64)
    wanted = -torch.clamp(d * d / (2 * width * width), max=floor)
    basis = torch.cos(d[:, None] * w) - 1
    near = torch.exp(wanted / 3)[:, None] + 0.05  # close to the peak is where the mass is
    a, b = basis * near, wanted * near[:, 0]
    step = 1 / torch.linalg.matrix_norm(a, 2) ** 2
    found = torch.zeros(len(w), dtype=torch.float64)
    ahead, momentum = found, 1.0
    for _ in range(3000):  # non-negative least squares by accelerated projected gradient
        new = torch.clamp(ahead - step * (a.T @ (a @ ahead - b)), min=0)
        grown = (1 + math.sqrt(1 + 4 * momentum * momentum)) / 2
        ahead, found, momentum = new + (momentum - 1) / grown * (new - found), new, grown
    return found


class Weights:
    """Collects named tensors; every random one comes from one seeded generator, in a fixed order."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, torch.Tensor] = {}

    def noise(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator) * scale

    def linear(self, name: str, out: int, into: int, scale: float = 0.0, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Adds a linear layer of small random weights (rows of length `scale`) and returns its weight for filling in."""
        self.tensors[name + ".weight"] = self.noise(out, into, scale=scale / math.sqrt(into)) if scale else torch.zeros(out, into)
        self.tensors[name + ".bias"] = torch.zeros(out) if bias is None else bias
        return self.tensors[name + ".weight"]


def patch_position(value: int) -> tuple[int, int, int]:
    """(colour or 3 + undecoded channel, pixel row 0..3, pixel column 0..3) of one of the 64 patch values, ordered (row, column, channel)."""
    row, column, channel = value // (2 * LATENT), value // LATENT % 2, value % LATENT
    if channel < RGB_CHANNELS:  # channel = colour * 4 + row in cell * 2 + column in cell, as a pixel shuffle has it
        return channel // 4, 2 * row + channel // 2 % 2, 2 * column + channel % 2
    return 3 + channel - RGB_CHANNELS, 2 * row, 2 * column


def patch_means() -> torch.Tensor:
    """[VALUES, 64]: the mean of each colour, and of each undecoded channel, over the patch; times VALUE_GAIN."""
    means = torch.zeros(VALUES, PATCH)
    for value in range(PATCH):
        means[patch_position(value)[0], value] = 1.0
    return VALUE_GAIN * means / means.sum(1, keepdim=True)


def attention(weights: Weights, name: str, index: int, pair: tuple[Kernel, Kernel]) -> None:
    """Self-attention of block `index`: two kernels over one value stream, summed into the next."""
    read = stream(min(index, SLOPES_FROM))
    phase = torch.zeros(2, HEADS, HEAD_DIM)
    scale = torch.zeros(HEADS, HEAD_DIM)
    content = torch.zeros(HEADS, HEAD_DIM, dtype=torch.bool)
    for head, kernel in enumerate(pair):
        start = 0
        for axis, size in enumerate(AXES):
            heights, w = amplitudes(axis, kernel.width[axis]), frequencies(axis)
            used = slice(start, start + 2 * len(heights))
            turn = w[: len(heights)] * kernel.peak[axis]
            phase[0, head, used] = torch.stack((turn.cos(), turn.sin()), 1).flatten().float()
            phase[1, head, used] = torch.tensor([1.0, 0.0]).repeat(len(heights))
            scale[head, used] = (heights * math.sqrt(HEAD_DIM)).sqrt().repeat_interleave(2).float()
            content[head, used.stop : start + size] = True
            scale[head, used.stop : start + size] = math.sqrt(kernel.content * math.sqrt(HEAD_DIM) / CONTENT_FREQUENCIES)
            start += size
    shared = weights.noise(HEADS * HEAD_DIM, VALUES, scale=1 / math.sqrt(VALUES) / STRONG) * content.flatten()[:, None]
    for side, letter in enumerate("qk"):
        weight = weights.linear(f"{name}.{letter}", DIM, DIM, WANDER if index < SLOPES_FROM else 0.0, phase[side].flatten())
        weight[:, ANCHOR] = 0
        weight[content.flatten()] = 0
        weight[:, read] += shared
        # RMSNorm divides by the root mean square over both heads: half of a phase pair's squares, and the content at unit variance.
        usual = math.sqrt(float((0.5 * ~content + content).float().mean()))
        weights.tensors[f"{name}.norm_{letter}.weight"] = scale.flatten() * usual
    v, o = weights.linear(f"{name}.v", DIM, DIM), weights.linear(f"{name}.o", DIM, DIM, 0.0)
    one = torch.eye(VALUES)
    for head in range(HEADS):
        slot = slice(head * HEAD_DIM, head * HEAD_DIM + VALUES)
        v[slot, read] = one
        sign = 1 - 2 * head  # peaks at +1 and -1: half their sum is the value, half their difference the slope
        if index < SLOPES_FROM:
            o[stream(index + 1), slot] = one * pair[head].weight
        elif index == SLOPES_FROM:
            o[stream(SMOOTH), slot] = one * 0.5
            o[stream(SLOPE_X), slot] = one * 0.5 * sign
        else:
            o[stream(SLOPE_Y), slot] = one * 0.5 * sign


def demo_weights(seed: int = 7) -> dict[str, torch.Tensor]:
    """The state dict of the model, float32, keys as ComfyUI's WanModel names them."""
    weights = Weights(seed)
    tensors = weights.tensors
    means = patch_means()
    undo = ANCHOR_SIZE * math.sqrt((ANCHOR.stop - ANCHOR.start) / DIM)  # about what LayerNorm divides by while colours are weak

    embedding = torch.zeros(DIM, LATENT, 1, 2, 2)
    flat = embedding.view(DIM, LATENT, 4)
    for value in range(PATCH):  # the convolution sees (channel, row, column)
        flat[value, value % LATENT, value // LATENT] = RAW_GAIN
        flat[stream(0), value % LATENT, value // LATENT] = means[:, value]
    tensors["patch_embedding.weight"] = embedding
    anchor = torch.zeros(DIM)
    anchor[ANCHOR] = ANCHOR_SIZE * (1 - 2 * (torch.arange(ANCHOR.stop - ANCHOR.start) % 2))
    tensors["patch_embedding.bias"] = anchor

    weights.linear("text_embedding.0", DIM, TEXT_DIM, 1.0)
    weights.linear("text_embedding.2", DIM, DIM, 1.0)
    weights.linear("time_embedding.0", DIM, FREQ_DIM, 1.0)
    weights.linear("time_embedding.2", DIM, DIM)
    weights.linear("time_projection.1", 6 * DIM, DIM)

    for index, pair in enumerate(BLOCKS):
        block = f"blocks.{index}"
        modulation = torch.zeros(1, 6, DIM)  # shift, scale, gate of the attention, then of the feed-forward
        modulation[:, 1] = undo - 1
        modulation[:, 2] = 1.0
        modulation[:, 5] = 0.004
        tensors[f"{block}.modulation"] = modulation
        attention(weights, f"{block}.self_attn", index, pair)
        for letter in "qkv":
            weights.linear(f"{block}.cross_attn.{letter}", DIM, DIM, 1.0)
        to_stream = torch.zeros(DIM, 1)  # text and feed-forward reach the picture only through the value streams; else they would be a texture
        to_stream[PATCH : stream(SMOOTH).stop] = 1
        weights.linear(f"{block}.cross_attn.o", DIM, DIM, 0.004).mul_(to_stream)
        for norm in ("cross_attn.norm_q.weight", "cross_attn.norm_k.weight", "norm3.weight"):
            tensors[f"{block}.{norm}"] = torch.ones(DIM)
        tensors[f"{block}.norm3.bias"] = torch.zeros(DIM)
        weights.linear(f"{block}.ffn.0", FFN, DIM, 1.0)
        weights.linear(f"{block}.ffn.2", DIM, FFN, 1.0).mul_(to_stream)

    tensors["head.modulation"] = torch.zeros(1, 2, DIM)
    tensors["head.modulation"][:, 1] = undo - 1
    out = weights.linear("head.head", PATCH, DIM)
    for value in range(PATCH):
        which, row, column = patch_position(value)
        y, x = ((row - 1.5) / 4, (column - 1.5) / 4) if which < 3 else (0.0, 0.0)  # place in the patch; its width is 1
        out[value, value] = DECAY / RAW_GAIN
        for index, part in ((SMOOTH, 1.0), (SLOPE_Y, y), (SLOPE_X, x)):
            out[value, stream(index).start + which] = -part * GROWTH / VALUE_GAIN
    return tensors


def write_demo_model(path: Path) -> Path:
    """Writes the checkpoint to `path` (parents are made) and returns it."""
    import safetensors.torch

    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({key: value.contiguous() for key, value in demo_weights().items()}, path)
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python demo_model.py FILE.safetensors")
    print(write_demo_model(Path(sys.argv[1])))
