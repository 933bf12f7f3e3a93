"""The geometry of one call on the device: how the work is cut, and where every buffer between the kernels lies in the one workspace."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from .. import config
from ..block_mask import BLOCK_K, BLOCK_Q, num_blocks
from .params import SYMBOLS

ALIGNMENT = 256
"""Bytes between possible starts of buffers."""
MAX_SPLITS = 32
"""Parts of the keys that the statistics are taken over at most."""
TASK_BLOCKS = 16
"""Query blocks of one selection task."""
SCRATCH_ROWS = 64
"""Score rows of one selection task: four pools for each of its query blocks."""
CHUNK_ELEMENTS = 1 << 26
"""fp32 elements of k, v or q that compensation converts at a time, or those of one kv head's."""

Row = tuple[str, tuple[int, ...], str]
"""A buffer: name (the field of the structs that points to it, if one does), shape, torch dtype name."""


class Problem(NamedTuple):
    """All that the geometry of a call depends on; the letters are those of src/layout.cuh.

    Strides are in elements. `judged`, `compensate`, `want_lse` and `masked` ask for buffers of their own; so does `drawn`: attention's blocks draw
    their items from a counter, and `sequenced`: those of a head by the length of their lists. `processors`: multiprocessors.
    """

    batch: int
    heads: int
    kv_heads: int
    s_q: int
    s_k: int
    dim: int
    dtype: str
    pv: str
    capacity: int
    q_stride: tuple[int, ...]
    k_stride: tuple[int, ...]
    v_stride: tuple[int, ...]
    causal: bool
    causal_offset: int
    subblock: bool
    smooth_k: bool
    judged: bool
    compensate: bool
    want_lse: bool
    masked: bool
    drawn: bool
    sequenced: bool
    processors: int


@dataclass(frozen=True)
class Layout:
    """What follows from a `Problem`.

    Attributes
    ----------
    nbytes : int
        Of the workspace.
    buffers : dict
        Name (a field of the structs) -> (offset in the workspace, shape, torch dtype name).
    grids : dict
        Kernel -> blocks.
    select_shared : int
        Bytes of shared memory of the selection.
    splits : int
        Parts of the keys that the statistics are taken over.
    """

    nbytes: int
    buffers: dict[str, tuple[int, tuple[int, ...], str]]
    grids: dict[str, int]
    select_shared: int
    splits: int
    _templates: dict[str, bytes]
    _inside: dict[str, tuple[tuple[str, int], ...]]

    def params(self, symbol: str, base: int) -> ctypes.Structure:
        """The struct of a kernel with everything set but what lies outside of the workspace (which starts at address `base`)."""
        filled = SYMBOLS[symbol].from_buffer_copy(self._templates[symbol])
        for name, offset in self._inside[symbol]:
            setattr(filled, name, base + offset)
        return filled


def capacity(s_k: int, *, topk: float | None, only_topk: bool, causal: bool, keep_q: tuple[int, ...], keep_k: tuple[int, ...], ordered: bool) -> int:
    """Key blocks that a row's list must have room for.

    `topk` alone, as one number, bounds what a row keeps (`only_topk`); the judge, a cumulative threshold, causal edges and rows that attend to
    everything do not. Where an order scatters the tokens of `keep_k`, each may lie in a block of its own.
    """
    n_k = num_blocks(s_k, BLOCK_K)
    if not only_topk or causal or any(end > start for start, end in zip(keep_q[::2], keep_q[1::2], strict=True)):
        return n_k
    forced = 0
    for start, end in zip(keep_k[::2], keep_k[1::2], strict=True):
        if end > start:
            forced += end - start if ordered else num_blocks(end, BLOCK_K) - start // BLOCK_K
    # A little more than the exact number, which the device rounds in fp32; whole numbers, which torch.compile can reason about.
    return min(n_k, math.ceil(topk * 65536) * n_k // 65536 + 2 + forced)


@lru_cache(maxsize=256)
def plan(problem: Problem, more: tuple[Row, ...] = ()) -> Layout:
    """Cuts the work and carves the workspace; `more`: buffers that hang on how the caller's tensors lie (see prepare.py)."""
    p = problem
    width = config.padded_dim(p.dim)
    n_q, n_k = num_blocks(p.s_q, BLOCK_Q), num_blocks(p.s_k, BLOCK_K)
    pools = BLOCK_Q // 32
    splits, split_length = _splits(p.s_k, p.batch * p.kv_heads, p.processors)
    tasks = p.batch * p.heads * num_blocks(n_q, TASK_BLOCKS)
    slots = min(tasks, 2 * p.processors)
    shared, in_shared = config.select_shared(width, n_k)

    q, kv = (p.batch, p.heads), (p.batch, p.kv_heads)
    wanted = {
        "k_sum": ((*kv, splits, width), "float32"), "k_count": ((*kv, splits), "float32"), "v_absmax": ((*kv, splits, width), "int32"),
        "q8": ((*q, n_q * BLOCK_Q, width), "int8"), "q_scale": ((*q, n_q * BLOCK_Q), "float32"),
        "k8": ((*kv, n_k * BLOCK_K, width), "int8"), "k_scale": ((*kv, n_k), "float32"),
        "v8": ((*kv, n_k, width, BLOCK_K), "float16" if p.pv == "fp16" else "int8"), "v_scale": ((*kv, width), "float32"),
        "q_mean": ((*q, n_q * pools, 2, width), "float16"), "q_square": ((*q, n_q * pools, 2, width), "float16"),
        "q_pool_scale": ((*q, n_q * pools, 2), "float32"),
        "k_mean": ((*kv, n_k, 2, width), "float16"), "k_variance": ((*kv, n_k, 2, width), "float16"), "k_pool_scale": ((*kv, n_k, 2), "float32"),
        "k_weight": ((p.batch, n_k), "float32"),
        "scratch": ((slots, SCRATCH_ROWS, n_k), "float32"),
    }  # fmt: skip
    if p.masked:
        wanted["bias2"] = ((p.batch, n_k * BLOCK_K), "float32")
    if p.judged:
        wanted["q_sim"], wanted["k_sim"] = ((*q, n_q), "float32"), ((*kv, n_k), "float32")
    if p.compensate:
        wanted["v_mean"], wanted["state"] = ((*kv, n_k, width), "float32"), ((*q, n_q, 4 + width), "float32")
    if p.compensate and not p.causal:
        wanted |= _row_shift(p, width, n_k)
    if p.want_lse:
        wanted["lse_shift"] = ((*q, p.s_q), "float32")
    if p.drawn:
        wanted["counter"] = ((1,), "int32")
    if p.sequenced:
        wanted["sequence"] = ((*q, n_q), "int16")
    wanted |= {name: (shape, dtype) for name, shape, dtype in more}
    buffers, end = {}, 0
    for name, (shape, dtype) in wanted.items():
        buffers[name] = (end, shape, dtype)
        end += -(-math.prod(shape) * _BYTES[dtype] // ALIGNMENT) * ALIGNMENT

    sizes = dict(
        batch=p.batch, heads=p.heads, kv_heads=p.kv_heads, s_q=p.s_q, s_k=p.s_k, dim=p.dim, splits=splits, split_length=split_length,
        capacity=p.capacity, smooth_k=int(p.smooth_k), hadamard=0, pv=config.PV.index(p.pv), subblock=int(p.subblock), causal=int(p.causal),
        causal_offset=max(-p.s_q, min(p.causal_offset, p.s_k)),  # beyond these ends nothing changes, and the struct has 32 bits
        row_in_shared=int(in_shared), shift=int(p.compensate and not p.causal), scratch_stride=n_k, out_type=config.DTYPES.index(p.dtype),
        q_stride=p.q_stride[:3], k_stride=p.k_stride[:3], v_stride=p.v_stride[:3],
    )  # fmt: skip
    templates, inside = {}, {}
    for symbol, struct in SYMBOLS.items():
        names = [name for name, _ in struct._fields_]
        templates[symbol] = bytes(struct(**{name: value for name, value in sizes.items() if name in names}))
        inside[symbol] = tuple((name, buffers[name][0]) for name in names if name in buffers)
    items = p.batch * p.heads * n_q
    grids = {
        "sparge_statistics": p.batch * p.kv_heads * splits, "sparge_prepass": p.batch * (p.heads * n_q + p.kv_heads * n_k),
        "sparge_select": slots, "sparge_sequence": p.batch * p.heads, "sparge_attention_mma": items,
        "sparge_attention_sm90": min(p.processors, items),
    }  # fmt: skip
    return Layout(end, buffers, grids, shared, splits, templates, inside)


_BYTES = {"bool": 1, "int8": 1, "int16": 2, "float16": 2, "float32": 4, "int32": 4}


def _row_shift(p: Problem, width: int, n_k: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """What prepare.row_shift works in: as many kv heads at a time, of whichever batch element, as CHUNK_ELEMENTS admits."""
    kv_heads, group = p.batch * p.kv_heads, p.heads // p.kv_heads
    longest = max(p.s_k, p.s_q * group)
    at_once = min(kv_heads, max(1, CHUNK_ELEMENTS // (longest * p.dim)))
    wanted = {
        "row_shift": ((p.batch, p.heads, p.s_q, p.dim), "float32"),
        "shift_weight": ((p.batch, 1), "float32"), "shift_scale": ((p.batch, p.kv_heads), "float32"),
        "shift_rows": ((at_once * longest * p.dim,), "float32"), "shift_values": ((at_once, p.s_k, p.dim), "float32"),
        "shift_pools": ((2, at_once, n_k, width), "float32"),
        "covariance": ((at_once, p.dim, p.dim), "float32"), "covariance_of_head": ((at_once * group, p.dim, p.dim), "float32"),
    }  # fmt: skip
    if p.smooth_k:
        wanted["shift_centre"], wanted["shift_count"] = ((p.batch, p.kv_heads, width), "float32"), ((p.batch, p.kv_heads, 1), "float32")
    if p.masked:
        wanted["hidden"] = ((p.batch, p.s_k), "bool")
    return wanted


def _splits(s_k: int, heads: int, processors: int) -> tuple[int, int]:
    """How many parts, of how many tokens: enough to give every multiprocessor two, in whole groups of the centre's sample."""
    wanted = min(MAX_SPLITS, num_blocks(2 * processors, heads))
    length = 16 * num_blocks(num_blocks(s_k, wanted), 16)
    return num_blocks(s_k, length), length
