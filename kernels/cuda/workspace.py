"""The geometry of one call on the device: how the work is cut, and where every buffer between the kernels lies in the one workspace."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from .. import config
from ..block_mask import BLOCK_K, BLOCK_Q, num_blocks
from ..call import HINTS, Call, Form, Rule
from . import prepare
from .params import FIELDS, SYMBOLS

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
MOST_BLOCKS = 1 << 16
"""What 16 bits can name."""


class Binaries(NamedTuple):
    """The binaries of a call, how they hold P and V, and the row of the attention kernel."""

    pv: str
    prepass: config.Variant
    selection: config.Variant
    attention: config.Variant
    kernel: config.AttentionKernel

    @property
    def variants(self) -> tuple[config.Variant, ...]:
        """All of them."""
        return self.prepass, self.selection, self.attention


class Buffer(NamedTuple):
    """Where a buffer lies in the workspace, in bytes from its start, and what it is like."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class Launch(NamedTuple):
    """One kernel of a call: its binary, its CTAs, and bytes of dynamic shared memory."""

    symbol: str
    variant: config.Variant
    grid: int
    shared: int


@dataclass(frozen=True, eq=False)
class Workspace:
    """The one buffer of a call, everything in it, and the launches that work on it; the same for all calls of one `key`."""

    nbytes: int
    buffers: dict[str, Buffer]  # by the field of the structs that points to it, if one does
    results: dict[str, Form]  # what the call returns beside the output, by field too: it lies outside
    outside: tuple[str, ...]  # the fields that point to the caller's tensors and to results
    copied: tuple[str, ...]  # those of the caller's tensors that have a copy in `buffers`
    prepared: bool  # whether prepare.fill has anything to write
    launches: tuple[Launch, ...]  # in their order
    _structs: _Structs

    def view(self, space: Tensor, name: str) -> Tensor:
        """A buffer of the workspace `space`, uint8 (nbytes,)."""
        buffer = self.buffers[name]
        return space[buffer.offset : buffer.offset + buffer.nbytes].view(buffer.dtype).view(buffer.shape)

    def structs(self, base: int, addresses: list[int]) -> list[ctypes.Structure]:
        """The structs of the launches with all but their numbers, for a workspace at address `base` and the addresses of `outside`."""
        words = np.array([0, base, *addresses], np.uint64).take(self._structs.added)
        words += self._structs.words
        memory = words.data
        return [SYMBOLS[launch.symbol].from_buffer(memory, start) for launch, start in zip(self.launches, self._structs.starts, strict=True)]


class _Structs(NamedTuple):
    """The structs of a call one after the other, as 8-byte words.

    `words` holds the sizes, and where an address belongs the bytes from the start of the buffer; `added` says for each word whose address is to be
    added: 0 none, 1 the workspace's, from 2 on those of `Workspace.outside`. `starts`: where each struct begins, in bytes.
    """

    words: np.ndarray
    added: np.ndarray
    starts: tuple[int, ...]


def key(call: Call, rule: Rule, inputs: prepare.Inputs) -> tuple:
    """What `carve` depends on beside the machine: all of a call, but of tensors only how they lie, and of numbers only what follows from them."""
    fields: list[object] = [*call, *rule]
    for i in _VARYING:
        x = fields[i]
        if x is not None:
            fields[i] = (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else float
    q, k, v = inputs
    return capacity(call, rule), rule.judged, q.stride(), k.stride(), None if v is None else v.stride(), *fields


_VARYING = tuple(i for i, name in enumerate(Call._fields + Rule._fields) if HINTS[name] is float or Tensor in get_args(HINTS[name]))
"""Fields of tensors and numbers."""


def capacity(call: Call, rule: Rule) -> int:
    """Key blocks that a row's list must have room for.

    `topk` alone, as one number, bounds what a row keeps; the judge, a cumulative threshold, causal edges and rows that attend to everything do not.
    Where an order scatters the tokens of `keep_k`, each may lie in a block of its own.
    """
    n_k, share = num_blocks(call.s_k, BLOCK_K), rule.share
    if share is None or call.causal or any(end > start for start, end in zip(call.keep_q[::2], call.keep_q[1::2], strict=True)):
        return n_k
    forced = 0
    for start, end in zip(call.keep_k[::2], call.keep_k[1::2], strict=True):
        if end > start:
            forced += end - start if call.perm is not None else num_blocks(end, BLOCK_K) - start // BLOCK_K
    # A little more than the exact number, which the device rounds in fp32; whole numbers, which torch.compile can reason about.
    return min(n_k, math.ceil(share * 65536) * n_k // 65536 + 2 + forced)


class _Cut(NamedTuple):
    """How the work of a call is cut."""

    width: int
    n_q: int
    n_k: int
    capacity: int
    splits: int
    split_length: int
    tasks: int
    attends: bool
    persistent: bool
    sorted: bool


def _cut(call: Call, rule: Rule, processors: int, attends: bool, persistent: bool) -> _Cut:
    n_q = num_blocks(call.s_q, BLOCK_Q)
    # A share of the blocks that is the same for all rows gives lists of one length, but for rows that keep everything: nothing to gain by sorting.
    vary = rule.block_map is not None or rule.cdf is not None or rule.judged
    persistent = attends and persistent
    in_order = persistent and vary and 1 < n_q <= MOST_BLOCKS
    width, n_k, most = config.padded_dim(call.dim), num_blocks(call.s_k, BLOCK_K), capacity(call, rule)
    splits, split_length = _splits(call.s_k, call.batch * call.kv_heads, processors)
    tasks = min(call.batch * call.heads * num_blocks(n_q, TASK_BLOCKS), 2 * processors)
    return _Cut(width, n_q, n_k, most, splits, split_length, tasks, attends, persistent, in_order)


def carve(call: Call, rule: Rule, inputs: prepare.Inputs, binaries: Binaries, processors: int) -> Workspace:
    """Cuts the work and carves the workspace."""
    cut = _cut(call, rule, processors, inputs.v is not None, binaries.kernel.persistent)
    given = prepare.given(call, rule)
    found = _found(call, cut)
    returned = ("lists", "counts", "visible") if not cut.attends else tuple(found) if call.want_info else ()
    results = {name: found[name] for name in returned}
    wanted = _between(call, rule, cut, binaries.pv) | {name: form for name, form in found.items() if name not in results}
    if call.want_lse and cut.attends:
        results["lse"] = Form((call.batch, call.heads, call.s_q), torch.float32)
    buffers, end = {}, 0
    prepared = prepare.buffers(call, given.copied)
    for name, form in (wanted | prepared).items():
        buffers[name] = Buffer(end, *form)
        end += -(-buffers[name].nbytes // ALIGNMENT) * ALIGNMENT

    outside = ("q", "k", "v", *(("out",) if cut.attends else ()), *given.readable, *(("perm",) if call.perm is not None else ()), *results)
    shared, in_shared = config.select_shared(cut.width, cut.n_k)
    launches = _launches(call, cut, binaries, processors, shared)
    values = _sizes(call, rule, cut, binaries.pv) | _strides(rule, inputs, given) | {"row_in_shared": int(in_shared)}
    structs = _structs(launches, values, {name: buffer.offset for name, buffer in buffers.items()}, outside)
    return Workspace(end, buffers, results, outside, tuple(given.copied), bool(prepared), launches, structs)


def _found(call: Call, cut: _Cut) -> dict[str, Form]:
    """What the selection and the attention report: the lists of kept blocks, their lengths, the visible blocks and the tiles."""
    rows = (call.batch, call.heads, cut.n_q)
    return {
        "lists": Form((*rows, cut.capacity), torch.int16),
        "counts": Form(rows, torch.int32),
        "visible": Form((call.batch, 1, cut.n_q), torch.int32),
        "pv_tiles": Form((call.batch, call.heads, 2), torch.int32),
    }


def _between(call: Call, rule: Rule, cut: _Cut, pv: str) -> dict[str, Form]:
    """What the kernels hand to each other."""
    n_q, n_k, width, pools = cut.n_q, cut.n_k, cut.width, BLOCK_Q // 32
    q, kv = (call.batch, call.heads), (call.batch, call.kv_heads)
    wanted = {
        "k_sum": Form((*kv, cut.splits, width), torch.float32), "k_count": Form((*kv, cut.splits), torch.float32),
        "v_absmax": Form((*kv, cut.splits, width), torch.int32),
        "q8": Form((*q, n_q * BLOCK_Q, width), torch.int8), "q_scale": Form((*q, n_q * BLOCK_Q), torch.float32),
        "k8": Form((*kv, n_k * BLOCK_K, width), torch.int8), "k_scale": Form((*kv, n_k), torch.float32),
        "v8": Form((*kv, n_k, width, BLOCK_K), torch.float16 if pv == "fp16" else torch.int8), "v_scale": Form((*kv, width), torch.float32),
        "q_mean": Form((*q, n_q * pools, 2, width), torch.float16), "q_square": Form((*q, n_q * pools, 2, width), torch.float16),
        "q_pool_scale": Form((*q, n_q * pools, 2), torch.float32),
        "k_mean": Form((*kv, n_k, 2, width), torch.float16), "k_variance": Form((*kv, n_k, 2, width), torch.float16),
        "k_pool_scale": Form((*kv, n_k, 2), torch.float32), "k_weight": Form((call.batch, n_k), torch.float32),
        "scratch": Form((cut.tasks, SCRATCH_ROWS, n_k), torch.float32),
    }  # fmt: skip
    if call.key_mask is not None:
        wanted["bias2"] = Form((call.batch, n_k * BLOCK_K), torch.float32)
    if rule.judged:
        wanted |= {"q_sim": Form((*q, n_q), torch.float32), "k_sim": Form((*kv, n_k), torch.float32)}
    if call.compensate:
        wanted |= {"v_mean": Form((*kv, n_k, width), torch.float32), "state": Form((*q, n_q, 4 + width), torch.float32)}
    if call.compensate and not call.causal:
        wanted |= _row_shift(call, width, n_k)
    if call.want_lse:
        wanted["lse_shift"] = Form((*q, call.s_q), torch.float32)
    if cut.persistent:
        wanted["counter"] = Form((1,), torch.int32)
    if cut.sorted:
        wanted["sequence"] = Form((*q, n_q), torch.int16)
    return wanted


def _row_shift(call: Call, width: int, n_k: int) -> dict[str, Form]:
    """What prepare.row_shift works in: as many kv heads at a time, of whichever batch element, as CHUNK_ELEMENTS admits."""
    kv_heads, group = call.batch * call.kv_heads, call.heads // call.kv_heads
    longest = max(call.s_k, call.s_q * group)
    at_once = min(kv_heads, max(1, CHUNK_ELEMENTS // (longest * call.dim)))
    shapes = {
        "row_shift": (call.batch, call.heads, call.s_q, call.dim), "shift_weight": (call.batch, 1), "shift_scale": (call.batch, call.kv_heads),
        "shift_rows": (at_once * longest * call.dim,), "shift_values": (at_once, call.s_k, call.dim), "shift_pools": (2, at_once, n_k, width),
        "covariance": (at_once, call.dim, call.dim), "covariance_of_head": (at_once * group, call.dim, call.dim),
    }  # fmt: skip
    if call.smooth_k:
        shapes |= {"shift_centre": (call.batch, call.kv_heads, width), "shift_count": (call.batch, call.kv_heads, 1)}
    wanted = {name: Form(shape, torch.float32) for name, shape in shapes.items()}
    if call.key_mask is not None:
        wanted["hidden"] = Form((call.batch, call.s_k), torch.bool)
    return wanted


def _launches(call: Call, cut: _Cut, binaries: Binaries, processors: int, select_shared: int) -> tuple[Launch, ...]:
    q_heads, kv_heads = call.batch * call.heads, call.batch * call.kv_heads
    items = q_heads * cut.n_q
    launches = [
        Launch("sparge_statistics", binaries.prepass, kv_heads * cut.splits, binaries.prepass.shared),
        Launch("sparge_prepass", binaries.prepass, items + kv_heads * cut.n_k, binaries.prepass.shared),
        Launch("sparge_select", binaries.selection, cut.tasks, select_shared),
    ]
    if cut.sorted:
        launches.append(Launch("sparge_sequence", binaries.selection, q_heads, 0))
    if cut.attends:
        grid = binaries.kernel.grid(items, processors)
        launches.append(Launch(binaries.attention.symbols[0], binaries.attention, grid, binaries.attention.shared))
    return tuple(launches)


def _sizes(call: Call, rule: Rule, cut: _Cut, pv: str) -> dict[str, int]:
    """The structs' whole numbers and flags."""
    return {
        "batch": call.batch, "heads": call.heads, "kv_heads": call.kv_heads, "s_q": call.s_q, "s_k": call.s_k, "dim": call.dim,
        "splits": cut.splits, "split_length": cut.split_length, "capacity": cut.capacity, "smooth_k": int(call.smooth_k),
        "pv": config.PV.index(pv), "subblock": int(rule.block_map is None and rule.score == "subblock"), "causal": int(call.causal),
        "causal_offset": max(-call.s_q, min(call.causal_offset, call.s_k)),  # beyond these ends nothing changes, and the struct has 32 bits
        "shift": int(call.compensate and not call.causal), "scratch_stride": cut.n_k,
        "out_type": config.DTYPES.index(str(call.dtype).removeprefix("torch.")),
    }  # fmt: skip


def _strides(rule: Rule, inputs: prepare.Inputs, given: prepare.Given) -> dict[str, int | tuple[int, ...]]:
    """The structs' strides, in elements: of the inputs and the output but for their last dimension, of a block map over batch and heads."""
    q, k, v = inputs
    tensors = {"q": q, "k": k, "v": k if v is None else v, "out": torch.empty_like(q, device="meta")}
    strides: dict[str, int | tuple[int, ...]] = {f"{name}_stride": x.stride()[:3] for name, x in tensors.items()}
    if rule.block_map is not None:
        batch, heads, n_q, n_k = rule.block_map.shape
        over = (heads * n_q * n_k, n_q * n_k) if "block_map" in given.copied else rule.block_map.stride()[:2]
        strides |= {"map_batch": over[0] * (batch > 1), "map_head": over[1] * (heads > 1)}
    return strides


def _structs(launches: tuple[Launch, ...], values: dict, offsets: dict[str, int], outside: tuple[str, ...]) -> _Structs:
    code, starts = bytearray(), []
    added: list[int] = []
    for launch in launches:
        struct = SYMBOLS[launch.symbol]
        start = len(added)
        starts.append(len(code))
        filled = struct(**{name: value for name, value in values.items() if name in FIELDS[launch.symbol]})
        added += [0] * (ctypes.sizeof(struct) // 8)
        for name in FIELDS[launch.symbol]:
            word = start + getattr(struct, name).offset // 8
            if name in offsets:
                setattr(filled, name, offsets[name])
                added[word] = 1
            elif name in outside:
                added[word] = 2 + outside.index(name)
        code += bytes(filled)
    return _Structs(np.frombuffer(bytes(code), np.uint64), np.array(added), tuple(starts))


def _splits(s_k: int, heads: int, processors: int) -> tuple[int, int]:
    """How many parts, of how many tokens: enough to give every multiprocessor two, in whole groups of the centre's sample."""
    wanted = min(MAX_SPLITS, num_blocks(2 * processors, heads))
    length = 16 * num_blocks(num_blocks(s_k, wanted), 16)
    return num_blocks(s_k, length), length
