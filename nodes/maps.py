"""The pooled maps of a run: which blocks its layers kept, small enough to keep, and laid back over the frames of the latent.

A pooled map is uint8, 0..255 for shares of 0..1: rows are queries, columns are keys (`AttentionInfo.pooled`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple, cast

import numpy as np
import torch

from . import _kernels
from .geometry import Grid, Place

MAX_BYTES = 32 << 20  # of one run; beyond it a run keeps the maps of every second step, then of every fourth, and the latest
MOST_REGIONS = (32, 64, 64)  # of a latent's frames, rows and columns
BLOCK_Q, BLOCK_K = 128, 64  # tokens of a block; the public door of the kernels does not name theirs (test_maps.py compares)


class At(NamedTuple):
    step: int
    layer: int


@dataclass(frozen=True, eq=False)
class Pooled:
    """The pooled maps of a call's heads on its device: uint8 (H, R, C), of `n_q` x `n_k` blocks; `place` None where that is not known."""

    heads: torch.Tensor
    n_q: int
    n_k: int
    place: Place | None


@dataclass
class PooledMap:
    """The pooled map of one (step, layer): the mean over calls and heads, uint8 (R, C); the rest as in `Pooled`."""

    values: np.ndarray
    n_q: int
    n_k: int
    place: Place | None
    calls: int = 1

    def add(self, values: np.ndarray) -> None:
        whole = self.values.astype(np.float32) * self.calls + values
        self.calls += 1
        self.values = (whole / self.calls + 0.5).astype(np.uint8)


@dataclass(frozen=True)
class HeadMaps:
    """The maps (H, R, C) of each call's heads by layer, in the last step that ran sparse: on the device, of a closed run on the host."""

    step: int = -1
    layers: dict[int, list] = field(default_factory=dict)


class RunMaps:
    """The pooled maps of one run. The sampler's thread adds them; the server's thread reads them."""

    def __init__(self) -> None:
        self.kept: dict[At, PooledMap] = {}
        self.every = 1  # of so many steps one is kept
        self.heads = HeadMaps()

    @property
    def nbytes(self) -> int:
        return sum(found.values.nbytes for found in self.kept.values())

    def add(self, at: At, pooled: Pooled, values: np.ndarray) -> None:
        """Takes in a call's map, the mean over its heads (R, C)."""
        found = self.kept.get(at)
        if found is not None and found.values.shape == values.shape:
            found.add(values)
        else:
            self.kept[at] = PooledMap(values, pooled.n_q, pooled.n_k, pooled.place)

    def thin(self) -> None:
        """Drops the maps of steps until the rest has room."""
        last = max((step for step, _ in self.kept), default=0)
        while True:
            if self.every > 1:
                self.kept = {at: found for at, found in self.kept.items() if at[0] % self.every == 0 or at[0] == last}
            if self.nbytes <= MAX_BYTES or self.every > last:
                return
            self.every *= 2

    def of_head(self, mean: PooledMap, at: At, head: int) -> PooledMap:
        """One head's map of the cell at `at`, whose mean over heads is `mean`. Raises LookupError, with a sentence for the user, without one."""
        heads = self.heads  # once: the sampler's thread may put the next step's in its place meanwhile
        calls = heads.layers.get(at.layer, []) if at.step == heads.step else []
        if not calls:
            kept = heads.step if heads.layers else "none here"
            raise LookupError(f"heads are kept for the last sparse step alone ({kept}), got step {at.step}")
        if head >= calls[0].shape[0]:
            raise LookupError(f"head must be below {calls[0].shape[0]}, got {head}")
        chosen = [torch.as_tensor(call[head]).cpu().numpy() for call in calls if call.shape == calls[0].shape]
        return replace(mean, values=(np.stack(chosen).mean(axis=0, dtype=np.float32) + 0.5).astype(np.uint8))


class Frames(NamedTuple):
    """What the queries of each region of the latent kept, and how often its keys were kept: uint8 (T, H, W) each, at most 32 x 64 x 64 regions."""

    queries: np.ndarray
    keys: np.ndarray


def frames(pooled: PooledMap) -> Frames | None:
    """The rows and the columns of a pooled map laid back over the latent's grid, the mean over the tokens of each region; None without a place."""
    if pooled.place is None:
        return None
    kind, segments, number = pooled.place
    grid, t, spot, _ = _kernels.order_plan(kind, segments).coordinates()
    position, size = np.flatnonzero(grid == number), cast(Grid, segments[number])
    y, x = np.divmod(spot[position], size[2])
    shape = [min(n, most) for n, most in zip(size, MOST_REGIONS, strict=True)]
    region = np.zeros(len(position), np.int64)
    for at, n, regions in zip((t[position], y, x), size, shape, strict=True):
        region = region * regions + at * regions // n
    tokens = np.bincount(region, minlength=shape[0] * shape[1] * shape[2])

    def laid_back(shares: np.ndarray, edges: np.ndarray, block: int) -> np.ndarray:
        cell = np.searchsorted(edges, position // block, side="right") - 1
        return (np.bincount(region, shares[cell], len(tokens)) / tokens + 0.5).astype(np.uint8).reshape(shape)

    rows, columns = (np.arange(cells + 1) * n // cells for cells, n in zip(pooled.values.shape, (pooled.n_q, pooled.n_k), strict=True))
    kept = pooled.values.astype(np.float64)
    return Frames(laid_back(kept @ np.diff(columns) / pooled.n_k, rows, BLOCK_Q), laid_back(np.diff(rows) @ kept / pooled.n_q, columns, BLOCK_K))
