"""Token orders for sequences that hold a (T, H, W) grid and text: row-major, 3-D tiles, Hilbert curve.

Attention does not care about the order of keys, and rows of queries can be put back; but blocks of 128 and 64 consecutive tokens are compact
regions of a video only in an order that is. On trained attention compact blocks pay at densities up to about 0.15; above, row-major is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

KINDS = ("row_major", "tiles", "hilbert")


@dataclass(frozen=True, eq=False)
class OrderPlan:
    """A permutation of S tokens and its inverse, with what it knows about them.

    Parameters
    ----------
    kind : str
        "row_major", "tiles" or "hilbert".
    segments : tuple
        The caller's sequence, front to back: an int is a protected span of that many tokens (text), (T, H, W) a grid in row-major order.
    perm : int64 (S,)
        `perm[p]` is the caller's index of the token at plan position p. On the CPU; `on` gives a cached copy elsewhere.
    inverse : int64 (S,)
        `inverse[i]` is the plan position of the caller's token i.
    """

    kind: str
    segments: tuple
    perm: Tensor
    inverse: Tensor
    _device_copies: dict = field(default_factory=dict, repr=False)

    @property
    def length(self) -> int:
        """Tokens in the sequence (S)."""
        return self.perm.numel()

    @property
    def is_identity(self) -> bool:
        """Whether the plan leaves every token where it is."""
        return self.kind == "row_major"

    @property
    def protected(self) -> tuple[tuple[int, int], ...]:
        """The protected spans as [start, end) ranges of the caller's token indices, to be given as `always_keep`."""
        spans, start = [], 0
        for segment in self.segments:
            if isinstance(segment, int):
                spans.append((start, start + segment))
            start += _length(segment)
        return tuple(spans)

    def on(self, device: torch.device) -> Tensor:
        """`perm` on `device`; copied once per device."""
        device = torch.device(device)
        if device.type == "cpu":
            return self.perm
        if device in self._device_copies:
            return self._device_copies[device]
        made = self.perm.to(device)
        if type(made) is Tensor:  # not one that only stands for a tensor, as while a compiler looks
            self._device_copies[device] = made
        return made

    def coordinates(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Per plan position: grid number (-1 on protected spans), frame t, place y * W + x inside the frame, and H * W of that grid."""
        columns = []
        for number, segment in enumerate(self.segments):
            size = _length(segment)
            if isinstance(segment, int):
                columns.append(np.stack([np.full(size, -1), np.zeros(size, int), np.zeros(size, int), np.zeros(size, int)]))
            else:
                frame = segment[1] * segment[2]
                t, place = np.divmod(np.arange(size), frame)
                columns.append(np.stack([np.full(size, number), t, place, np.full(size, frame)]))
        return tuple(np.concatenate(columns, axis=1)[:, self.perm.numpy()])


def plan(kind: str, segments: Sequence) -> OrderPlan:
    """The order plan of a sequence; plans are cached.

    Parameters
    ----------
    kind : "row_major" | "tiles" | "hilbert"
        row_major leaves every token in place. tiles walks 64-token boxes (4x4x4, 2x4x8 or 1x8x8 by the number of frames) back and forth, so that
        a key block is one box and a query block two neighbours. hilbert follows a Hilbert curve. Both put the grids first, in the given order,
        and move the protected spans to the end, where they touch the fewest blocks.
    segments : sequence
        The sequence front to back: an int >= 1 for a span to protect, (T, H, W) for a grid in row-major order.

    Raises
    ------
    ValueError
        For an unknown kind, an empty sequence, or a segment of another form.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    checked = []
    for segment in segments:
        numbers = tuple(segment) if isinstance(segment, Sequence) else (segment,)
        if len(numbers) != (3 if isinstance(segment, Sequence) else 1) or not all(type(n) is int and n >= 1 for n in numbers):
            raise ValueError(f"segments must hold lengths >= 1 or (T, H, W) grids of sizes >= 1, got {segment!r}")
        checked.append(numbers if len(numbers) == 3 else numbers[0])
    if not checked:
        raise ValueError("segments must hold at least one span or grid, got none")
    # What is made under a mode of the dispatcher (a fake, a tracer's) is of no use to a later call.
    is_plain = torch.compiler.is_dynamo_compiling() or not torch._C._len_torch_dispatch_stack()
    return (_cached_plan if is_plain else _cached_plan.__wrapped__)(kind, tuple(checked))


@lru_cache(maxsize=32)
def _cached_plan(kind: str, segments: tuple) -> OrderPlan:
    grids, spans, start = [], [], 0
    for segment in segments:
        if isinstance(segment, int):
            spans.append(start + np.arange(segment))
        else:
            grids.append(start + _grid_order(kind, segment))
        start += _length(segment)
    perm = np.arange(start) if kind == "row_major" else np.concatenate(grids + spans)
    inverse = np.empty_like(perm)
    inverse[perm] = np.arange(start)
    return OrderPlan(kind, segments, torch.from_numpy(perm), torch.from_numpy(inverse))


def _length(segment) -> int:
    return segment if isinstance(segment, int) else segment[0] * segment[1] * segment[2]


def _grid_order(kind: str, grid: tuple[int, int, int]) -> np.ndarray:
    t, y, x = (axis.ravel() for axis in np.meshgrid(*map(np.arange, grid), indexing="ij"))
    if kind == "hilbert":
        return np.argsort(hilbert_index(t, y, x, grid), kind="stable")
    if kind == "tiles":
        return np.lexsort(_tile_keys(t, y, x, grid))
    return np.arange(t.size)


def _tile_keys(t, y, x, grid) -> tuple[np.ndarray, ...]:
    """Sort keys, least significant first: inside a tile row-major, tiles back and forth so that consecutive ones touch."""
    depth = 4 if grid[0] >= 4 else 2 if grid[0] >= 2 else 1
    size = {4: (4, 4, 4), 2: (2, 4, 8), 1: (1, 8, 8)}[depth]
    tile_t, tile_y, tile_x = t // size[0], y // size[1], x // size[2]
    rows, columns = -(-grid[1] // size[1]), -(-grid[2] // size[2])
    snake_y = np.where(tile_t % 2 == 0, tile_y, rows - 1 - tile_y)
    snake_x = np.where((tile_t * rows + snake_y) % 2 == 0, tile_x, columns - 1 - tile_x)
    return x % size[2], y % size[1], t % size[0], snake_x, snake_y, tile_t


def hilbert_index(t: np.ndarray, y: np.ndarray, x: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """Distance along a 3-D Hilbert curve (2-D for a single frame) of the smallest power-of-two cube around the grid.

    Source: J. Skilling, Programming the Hilbert curve, AIP Conf. Proc. 707 (2004).
    """
    axes = [a.astype(np.int64) for a in ((y, x) if grid[0] == 1 else (t, y, x))]
    bits = max(1, int(max(grid) - 1).bit_length())
    bit = 1 << (bits - 1)
    while bit > 1:  # undo the excess work of the transposed form
        low = bit - 1
        for i in range(len(axes)):
            swap = np.where(axes[i] & bit, 0, (axes[0] ^ axes[i]) & low)
            axes[0] = np.where(axes[i] & bit, axes[0] ^ low, axes[0] ^ swap)
            if i:
                axes[i] = axes[i] ^ swap
        bit >>= 1
    for i in range(1, len(axes)):  # Gray encode
        axes[i] = axes[i] ^ axes[i - 1]
    flip, bit = np.zeros_like(axes[0]), 1 << (bits - 1)
    while bit > 1:
        flip = np.where(axes[-1] & bit, flip ^ (bit - 1), flip)
        bit >>= 1
    axes = [a ^ flip for a in axes]
    index = np.zeros_like(axes[0])
    for b in range(bits - 1, -1, -1):
        for a in axes:
            index = (index << 1) | ((a >> b) & 1)
    return index
