"""Which key blocks each query block attends to: `KeptBlocks` of a call, and `BlockMask` with builders for the usual static patterns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .order import OrderPlan

BLOCK_Q = 128
"""Query rows of a block, on every architecture."""
BLOCK_K = 64
"""Key rows of a block, on every architecture."""


def num_blocks(length: int, block: int) -> int:
    """Blocks of `block` rows that cover `length` rows; the last one may be partial."""
    return -(-length // block)


@dataclass(frozen=True, eq=False)
class KeptBlocks:
    """The kept blocks of a call as its backend left them; everything else is worked out when read, on the device of the call, without waiting for it.

    Attributes
    ----------
    blocks : bool (B, H, N_q, N_k) or int16 (B, H, N_q, capacity)
        A block map, or ascending key block numbers (unsigned) of which the first `counts` of a row hold.
    counts : int32 (B, H, N_q)
        Kept blocks of each row.
    visible : int32 (B, 1, N_q)
        Visible blocks of each row.
    key_blocks : int
        N_k.
    """

    blocks: Tensor
    counts: Tensor
    visible: Tensor
    key_blocks: int

    @property
    def density(self) -> Tensor:
        """Kept / visible blocks: fp32 (B, H), 0..1; 0 where nothing is visible."""
        return self.counts.sum(-1, dtype=torch.float32) / self.visible.sum(-1, dtype=torch.float32).clamp_min(1)

    def to_map(self) -> Tensor:
        """The block map, bool (B, H, N_q, N_k)."""
        if self.blocks.dtype == torch.bool:
            return self.blocks
        ids = self._numbers(slice(None)).long()  # what lies after a row's count goes to a column that is cut off
        kept = torch.zeros((*ids.shape[:-1], self.key_blocks + 1), dtype=torch.bool, device=ids.device)
        return kept.scatter_(-1, ids, True)[..., : self.key_blocks].contiguous()

    def pooled(self, most: int = 64) -> Tensor:
        """The pooled map: uint8 (H, R, C) with R = min(most, N_q), C = min(most, N_k).

        0..255 is the share that is kept of the blocks in a cell, over the batch. Of n blocks pooled to r cells, cell i holds the blocks
        i * n // r up to (i + 1) * n // r.
        """
        batch, heads, n_q = self.counts.shape
        q_edges, k_edges = (_edges(n, min(n, most), self.counts.device) for n in (n_q, self.key_blocks))
        per_chunk = max(1, _POOLED_AT_ONCE // max(1, self.blocks[:, :1].numel()))
        chunks = range(0, heads, per_chunk)
        below = torch.cat([self._kept_below(k_edges, slice(h, h + per_chunk)) for h in chunks])  # (H, N_q, C + 1)
        kept = F.pad(below.cumsum(1), (0, 0, 1, 0))[:, q_edges].diff(dim=1).diff(dim=2)
        blocks = q_edges.diff()[:, None] * k_edges.diff() * batch
        return (kept * 255 / blocks + 0.5).to(torch.uint8)

    def _kept_below(self, edges: Tensor, heads: slice) -> Tensor:
        """How many of the blocks in front of each edge a row of these heads keeps, summed over the batch: (heads, N_q, edges)."""
        if self.blocks.dtype == torch.bool:
            return F.pad(self.blocks[:, heads].sum(0).cumsum(-1), (1, 0))[..., edges]
        ids = self._numbers(heads)
        return torch.searchsorted(ids, edges.int().expand(*ids.shape[:-1], -1).contiguous()).sum(0)

    def _numbers(self, heads: slice) -> Tensor:
        """The lists as int32, N_k after a row's count."""
        blocks = self.blocks[:, heads]
        within = torch.arange(blocks.shape[-1], device=blocks.device) < self.counts[:, heads, :, None]
        return torch.where(within, blocks.int() & 0xFFFF, self.key_blocks)


_POOLED_AT_ONCE = 1 << 22
"""Entries of the kept blocks that `KeptBlocks.pooled` widens at once: some 50 MB, or what one head needs."""


def _edges(blocks: int, cells: int, device: torch.device) -> Tensor:
    """Where each of `cells` begins, and the end: int64 (cells + 1,); made on the device, for a copy from the host would wait."""
    return torch.arange(cells + 1, device=device) * blocks // cells


@dataclass(frozen=True, eq=False)
class BlockMask:
    """A block map: which (query block, key block) pairs are kept.

    Parameters
    ----------
    block_map : bool (B, H, N_q, N_k)
        True = kept; not to be written to afterwards. B and H may be 1 and then hold for every batch or head. Blocks are 128 query rows by 64 key
        rows. `from_dense` checks and copies a map.
    visible : int32 (B|1, H|1, N_q) or None
        How many key blocks each row could have kept (causal and masks exclude the others). None: all N_k.
    """

    block_map: Tensor
    visible: Tensor | None = None
    _maps: dict = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_dense(cls, kept: Tensor, visible: Tensor | None = None) -> BlockMask:
        """From a bool map (B, H, N_q, N_k), or (N_q, N_k) which is read as (1, 1, N_q, N_k); True = kept."""
        if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
            raise TypeError(f"kept must be a bool tensor, got {getattr(kept, 'dtype', type(kept).__name__)}; compare or call .bool() first")
        if kept.dim() == 2:
            kept = kept[None, None]
        if kept.dim() != 4 or kept.shape[2] < 1 or kept.shape[3] < 1:
            raise ValueError(f"kept must have the shape (B, H, N_q, N_k), got {tuple(kept.shape)}; use 1 for B and H to share a mask")
        return cls(kept.clone(memory_format=torch.contiguous_format), visible)

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, H, N_q, N_k)."""
        return tuple(self.block_map.shape)

    def to_dense(self) -> Tensor:
        """A copy of the block map, bool (B, H, N_q, N_k)."""
        return self.block_map.clone()

    def on(self, device: torch.device, keep: bool = True) -> Tensor:
        """The block map on `device`, not to be written to; where `keep`, a copy is made once per device and stays with the mask."""
        if device == self.block_map.device:
            return self.block_map
        if device in self._maps:
            return self._maps[device]
        made = self.block_map.to(device)
        if keep and type(made) is Tensor:  # a tensor that only stands for one, as while a compiler looks, is of no use to a later call
            self._maps[device] = made
        return made

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}}

    @property
    def density(self) -> Tensor:
        """Kept / visible blocks per (batch, head): fp32 (B, H), 0..1; 0 where nothing is visible."""
        kept = self.block_map.sum(-1).sum(-1, dtype=torch.float32)
        if self.visible is None:
            return kept / (self.shape[2] * self.shape[3])
        return kept / self.visible.sum(-1, dtype=torch.float32).clamp_min(1)

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask with its tensors on `device`."""
        return BlockMask(self.block_map.to(device), None if self.visible is None else self.visible.to(device))

    def __or__(self, other: BlockMask) -> BlockMask:
        return self._combine(other, torch.logical_or)

    def __and__(self, other: BlockMask) -> BlockMask:
        return self._combine(other, torch.logical_and)

    def _combine(self, other: BlockMask, how) -> BlockMask:
        if not isinstance(other, BlockMask):
            return NotImplemented
        if self.shape[2:] != other.shape[2:] or any(a != b and 1 not in (a, b) for a, b in zip(self.shape[:2], other.shape[:2], strict=True)):
            raise ValueError(f"block masks must agree in N_q and N_k, and in B and H up to 1, got {self.shape} and {other.shape}")
        kept, known = how(self.block_map, other.block_map), [x.visible for x in (self, other) if x.visible is not None]
        if not known:
            return BlockMask(kept)
        # How many blocks were visible is known, not which: of both the fewer may be, of either the more, and all that are kept are.
        visible = reduce(torch.minimum if how is torch.logical_and else torch.maximum, known)
        return BlockMask(kept, torch.maximum(visible, kept.sum(-1, dtype=torch.int32)))

    @staticmethod
    def sliding_window(s_q: int, s_k: int, window: int) -> BlockMask:
        """Keeps a block when some query i and key j in it have |i - j| <= `window` (tokens, >= 0)."""
        if not window >= 0:
            raise ValueError(f"window must be >= 0 tokens, got {window}; 0 keeps the diagonal")
        gap = _gap(_block_ranges(s_q, BLOCK_Q), _block_ranges(s_k, BLOCK_K))
        return BlockMask.from_dense(torch.from_numpy(gap <= window))

    @staticmethod
    def global_tokens(s_q: int, s_k: int, ranges: Sequence[tuple[int, int]]) -> BlockMask:
        """Keeps every block that a token range [start, end) touches, as keys (whole columns) and as queries (whole rows)."""
        kept = np.zeros((num_blocks(s_q, BLOCK_Q), num_blocks(s_k, BLOCK_K)), dtype=bool)
        for start, end in ranges:
            if not 0 <= start < end <= max(s_q, s_k):
                raise ValueError(f"ranges must hold 0 <= start < end <= {max(s_q, s_k)} (tokens), got ({start}, {end}); use token indices")
            kept[:, start // BLOCK_K : num_blocks(end, BLOCK_K)] |= start < s_k
            kept[start // BLOCK_Q : num_blocks(end, BLOCK_Q)] |= start < s_q
        return BlockMask.from_dense(torch.from_numpy(kept))

    @staticmethod
    def frames(plan: OrderPlan, window: int, *, first: bool = True) -> BlockMask:
        """For a video: keeps key blocks with a frame within `window` frames of a query block's own, and protected spans.

        Parameters
        ----------
        plan : OrderPlan
            The token order (`order.plan`), which knows grid and spans; the mask is in plan order.
        window : int
            Frames to either side, >= 0.
        first : bool
            Also keep the blocks of frame 0 of each grid for every query (the usual attention sink of video models).
        """
        if window < 0:
            raise ValueError(f"window must be >= 0 frames, got {window}; 0 keeps the own frame")
        q, k = _block_boxes(plan, BLOCK_Q), _block_boxes(plan, BLOCK_K)
        return _of_boxes(_gap(q.t, k.t) <= window, q, k, first)

    @staticmethod
    def radial(plan: OrderPlan, *, width: float = 1.0) -> BlockMask:
        """For a video: the spatial window halves each time the distance in frames doubles (radial attention, Li et al. 2025).

        A block is kept when some query and key in it, d frames apart, lie within `width` * H * W / 2**floor(log2(max(d, 1))) positions of
        each other inside the frame (row-major distance), or in the same frame. Protected spans and frame 0 are kept.

        Parameters
        ----------
        plan : OrderPlan
            The token order (`order.plan`); the mask is in plan order.
        width : float
            Window at distance 1 as a share of the frame, > 0.
        """
        if not width > 0:
            raise ValueError(f"width must be > 0 (a share of the frame), got {width}")
        q, k = _block_boxes(plan, BLOCK_Q), _block_boxes(plan, BLOCK_K)
        frames_apart = _gap(q.t, k.t)
        window = width * k.frame_size[None] / np.exp2(np.floor(np.log2(np.maximum(frames_apart, 1))))
        return _of_boxes((frames_apart == 0) | (_gap(q.place, k.place) <= window), q, k, True)


def _block_ranges(length: int, block: int) -> np.ndarray:
    """The first and the last row of every block."""
    lo = np.arange(0, length, block)
    return np.stack([lo, np.minimum(lo + block, length) - 1])


class _Boxes(NamedTuple):
    """Per block the lowest and highest grid segment, frame and place inside the frame, and whether it holds protected tokens."""

    segment: np.ndarray
    t: np.ndarray
    place: np.ndarray
    frame_size: np.ndarray
    protected: np.ndarray


def _block_boxes(plan: OrderPlan, block: int) -> _Boxes:
    segment, t, place, frame_size = plan.coordinates()
    starts = np.arange(0, plan.length, block)
    on_grid = segment >= 0

    def span(values):
        lo = np.minimum.reduceat(np.where(on_grid, values, np.iinfo(np.int64).max // 4), starts)
        hi = np.maximum.reduceat(np.where(on_grid, values, -(np.iinfo(np.int64).max // 4)), starts)
        return np.stack([lo, hi])

    return _Boxes(span(segment), span(t), span(place), np.maximum.reduceat(frame_size, starts), ~np.logical_and.reduceat(on_grid, starts))


def _gap(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """How far apart the ranges (lowest, highest) of each query block and each key block are; 0 where they meet."""
    return np.maximum(np.maximum(k[0][None] - q[1][:, None], q[0][:, None] - k[1][None]), 0)


def _of_boxes(near: np.ndarray, q: _Boxes, k: _Boxes, first: bool) -> BlockMask:
    """What is near in the same grid, with the protected tokens and, where `first`, frame 0 of each grid as keys."""
    kept = near & (_gap(q.segment, k.segment) == 0) | q.protected[:, None] | k.protected
    return BlockMask.from_dense(torch.from_numpy(kept | (k.t[0] == 0) if first else kept))
