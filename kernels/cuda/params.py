"""The kernels' parameter structs, field by field as in src/layout.cuh (a test compares names, sizes and offsets)."""

from __future__ import annotations

import ctypes

from ..config import ATTENTION

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class Strides(ctypes.Structure):
    """In elements; the last dimension is contiguous."""

    _fields_ = [("batch", _LONG), ("head", _LONG), ("token", _LONG)]


def _fields(pointers: str = "", strides: str = "", longs: str = "", floats: str = "", ints: str = "") -> list:
    return [(n, t) for names, t in ((pointers, _POINTER), (strides, Strides), (longs, _LONG), (floats, _FLOAT), (ints, _INT)) for n in names.split()]


class StatisticsParams(ctypes.Structure):
    """Partial sums over K and V."""

    _fields_ = [
        *_fields("k v", "k_stride v_stride"),
        *_fields("key_valid key_bias k_sum k_count v_absmax", ints="kv_heads s_k dim splits split_length batch"),
    ]


class PrepassParams(ctypes.Structure):
    """Gather, centre, quantise, pool."""

    _fields_ = [
        *_fields("q k v", "q_stride k_stride v_stride"),
        *_fields("perm key_valid key_bias k_sum k_count v_absmax q8 q_scale k8 k_scale v8 v_scale bias2"),
        *_fields("q_mean q_square q_pool_scale k_mean k_variance k_pool_scale k_weight q_sim k_sim v_mean lse_shift"),
        *_fields(floats="scale", ints="batch heads kv_heads s_q s_k dim splits smooth_k pv"),
    ]


class SelectParams(ctypes.Structure):
    """Scores to lists of kept blocks."""

    _fields_ = [
        *_fields("q_mean q_square k_mean k_variance q_pool_scale k_pool_scale k_weight q_sim k_sim v_mean bias2 forced_q forced_k"),
        *_fields("topk_heads cdf_heads sim_heads block_map", longs="map_batch map_head"),
        *_fields("lists counts visible pv_tiles counter state scratch", longs="scratch_stride"),
        *_fields(floats="scale topk cdf sim", ints="batch heads kv_heads s_q s_k capacity"),
        *_fields(ints="subblock causal causal_offset row_in_shared shift"),
    ]


class SequenceParams(ctypes.Structure):
    """The order of a head's query blocks."""

    _fields_ = _fields("counts sequence", ints="s_q")


class AttentionParams(ctypes.Structure):
    """Block-sparse attention over the lists."""

    _fields_ = [
        *_fields("q8 k8 v8 q_scale k_scale v_scale bias2 lists counts perm out", "out_stride"),
        *_fields("lse lse_shift top pv_heads pv_tiles state row_shift counter sequence", floats="pvthreshd"),
        *_fields(ints="batch heads kv_heads s_q s_k dim capacity causal causal_offset out_type"),
    ]


SYMBOLS = {
    "sparge_statistics": StatisticsParams,
    "sparge_prepass": PrepassParams,
    "sparge_select": SelectParams,
    "sparge_sequence": SequenceParams,
    **{kernel.symbol: AttentionParams for kernel in ATTENTION},
}
"""Kernel -> its struct."""

FIELDS = {symbol: frozenset(field[0] for field in struct._fields_) for symbol, struct in SYMBOLS.items()}
"""Kernel -> the names in its struct."""
