"""The only place that words argument errors: argument, rule, value got, what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from .block_mask import BLOCK_K, BLOCK_Q, BlockMask, num_blocks
from .cuda import driver
from .order import OrderPlan

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
_NUMBER = (int, float)
LARGEST = 1e38  # of a number that is to be finite in fp32; math.isfinite does not go through torch.compile


def _got(value) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)


def tensors(q: Tensor, k: Tensor, v: Tensor | None, layout: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checks q, k, v and returns them as (B, H, S, D) views."""
    if layout not in ("HND", "NHD"):
        raise ValueError(f"layout must be 'HND' (B, H, S, D) or 'NHD' (B, S, H, D), got {layout!r}")
    named = (("q", q), ("k", k)) if v is None else (("q", q), ("k", k), ("v", v))
    for name, x in named:
        _tensor(name, x, q, layout)
    if layout == "NHD":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), None if v is None else v.transpose(1, 2)
    if 1 in q.stride()[:3] and q.shape[3] > 1:
        q = q.contiguous()  # overlapping rows: the output, made like q, would not be contiguous in its last dimension
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k must have q's batch and head_dim, got {_axes(q)} for q and {_axes(k)} for k; pass tensors of one call")
    if v is not None and v.shape != k.shape:
        raise ValueError(f"v must have k's shape, got {_axes(k)} for k and {_axes(v)} for v; use one value row per key")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"the number of q heads must be a multiple of the k/v heads (GQA), got {q.shape[1]} and {k.shape[1]}; repeat k and v")
    return q, k, v


def _tensor(name: str, x: Tensor, q: Tensor, layout: str) -> None:
    """Refuses what none of q, k and v may be, alone or beside q."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}; convert it first")
    shape = x.shape
    if len(shape) != 4:
        raise ValueError(f"{name} must have 4 dimensions ({layout}: {'B, H, S, D' if layout == 'HND' else 'B, S, H, D'}), got shape {tuple(shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16 or float32, got {x.dtype}; convert it first")
    if 0 in shape:
        raise ValueError(f"{name} must have no empty dimension, got shape {tuple(shape)}; an empty sequence has no attention")
    if shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be 1 to {MAX_HEAD_DIM}, got {shape[3]} in {name}; use dense attention")
    if shape[3] > 1 and x.stride(3) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, got strides {tuple(x.stride())}; call {name}.contiguous()")
    if x.dtype != q.dtype or x.device != q.device:
        raise TypeError(
            f"q, k and v must share dtype and device, got {q.dtype} on {q.device} for q and {x.dtype} on {x.device} for {name}; use {name}.to(q)"
        )
    _constant(name, x)


def _constant(name: str, x: Tensor) -> None:
    """Refuses a tensor that a derivative is wanted by, backward or forward; under torch.func the result would be zeros in silence."""
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require grad: there is no backward; call it under torch.no_grad() or detach it")
    if torch.compiler.is_compiling() or (forward_ad._current_level < 0 and _functorch.peek_interpreter_stack() is None):
        return
    if not _functorch.is_batchedtensor(x) and forward_ad.unpack_dual(x).tangent is not None:
        raise ValueError(f"{name} must have no tangent, got one: there is no forward-mode derivative; detach it")
    if _functorch.is_functorch_wrapped_tensor(x):
        _constant(name, _functorch.get_unwrapped(x))


def _axes(x: Tensor) -> str:
    return f"B={x.shape[0]} H={x.shape[1]} S={x.shape[2]} D={x.shape[3]}"


class Range(NamedTuple):
    """What a number may be, and what to do about another one."""

    low: float
    high: float
    low_open: bool
    remedy: str

    def holds(self, x: float) -> bool:
        return (x > self.low if self.low_open else x >= self.low) and x <= self.high

    def __str__(self) -> str:
        return f"{'(' if self.low_open else '['}{self.low:g}, {'inf)' if self.high == math.inf else f'{self.high:g}]'}"


TOPK = Range(0, 1, True, "use 1 for dense attention, 0.5 for half of the blocks")
CDF = Range(0, 1, True, "leave it out to select by topk alone")
SIM = Range(-1, 1, False, "use -0.1 to switch the judge off")
PV = Range(0, math.inf, True, "15 is a good start, 50 is off in practice")


def number(name: str, value, allowed: Range, q: Tensor) -> float | Tensor:
    """A number, or a tensor with one for each head of q (B, H, S_q, D), on its device, within a range.

    A tensor on the CPU is checked. One on a device is not read (that would wait for the device), nor one that only stands for another (a fake, a
    torch.func transform's).
    """
    if isinstance(value, Tensor):
        if value.shape != (q.shape[1],) or value.is_complex():
            got = _got(value)
            raise ValueError(f"{name} as a tensor must hold one value per head, shape ({q.shape[1]},), got shape {got}; use one number for all heads")
        _constant(name, value)
        if value.device.type == "cpu" and not torch.compiler.is_compiling() and not _functorch.is_functorch_wrapped_tensor(value):
            own = type(value).__torch_dispatch__ is Tensor.__torch_dispatch__  # a fake has no numbers
            for head, x in enumerate(value.tolist() if own else ()):
                if not (allowed.holds(x) and math.isfinite(x)):
                    raise ValueError(f"{name} must be in {allowed}, got {x} for head {head}; {allowed.remedy}")
        return value.to(q.device)
    if isinstance(value, bool) or not isinstance(value, _NUMBER):
        raise TypeError(f"{name} must be a number or a 1-D tensor of one value per head, got {value!r}")
    if not (allowed.holds(value) and value <= LARGEST):
        raise ValueError(f"{name} must be in {allowed}, got {value!r}; {allowed.remedy}")
    return float(value)


def choice(name: str, value, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def flag(name: str, value) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def scale(value, dim: int) -> float:
    if value is None:
        return dim**-0.5
    if isinstance(value, bool) or not isinstance(value, _NUMBER) or not 0 < value < LARGEST:
        raise ValueError(f"scale must be a finite number > 0, got {_got(value)}; leave it out for head_dim ** -0.5")
    return float(value)


def causal_offset(causal: bool, value) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"causal_offset must be an int (query i sees keys j <= i + causal_offset), got {value!r}")
    if abs(value) >= 1 << 40:
        raise ValueError(f"causal_offset must lie within +-2**40 tokens, got {value}; leave causal out to see every key")
    if value and not causal:
        raise ValueError(f"causal_offset must be 0 without causal=True, got {value}; set causal=True or leave it out")
    return value


def key_mask(mask, k: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"key_mask must be a tensor (B, S_k), got {type(mask).__name__}")
    if tuple(mask.shape) != (k.shape[0], k.shape[2]):
        raise ValueError(
            f"key_mask must have the shape (B, S_k) = {(k.shape[0], k.shape[2])}, got {tuple(mask.shape)}; a mask that differs per query or head "
            "is not supported: use dense attention"
        )
    if mask.dtype != torch.bool and (not mask.is_floating_point() or mask.dtype.itemsize < 2):
        raise TypeError(f"key_mask must be bool (True = attend) or a bias of 16 bits or more, got {mask.dtype}; use mask.bool() or mask.float()")
    if mask.device != k.device:
        raise ValueError(f"key_mask must be on the device of k ({k.device}), got {mask.device}; move it there")
    _constant("key_mask", mask)
    return mask


def token_ranges(name: str, ranges, length: int) -> tuple[int, ...]:
    if isinstance(ranges, Tensor | str) or not isinstance(ranges, Sequence):
        raise TypeError(f"{name} must be a list of (start, end) pairs, got {ranges!r}; use [(start, end), ...]")
    flat = []
    for entry in ranges:
        if not isinstance(entry, Sequence) or len(entry) != 2 or not all(isinstance(x, int) and not isinstance(x, bool) for x in entry):
            raise TypeError(f"{name} must hold (start, end) pairs of ints, got {entry!r}; use [(start, end), ...]")
        start, end = entry
        if not 0 <= start <= end <= length:
            raise ValueError(
                f"{name} must hold ranges with 0 <= start <= end <= {length} (tokens), got ({start}, {end}); use token indices of the sequence"
            )
        flat += [start, end]
    return tuple(flat)


def always_keep(value, s_q: int, s_k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Flat (start, end, ...) for queries and for keys."""
    if value is None:
        return (), ()
    if isinstance(value, dict):
        unknown = set(value) - {"q", "k"}
        if unknown:
            raise ValueError(f"always_keep as a dict must have the keys 'q' and 'k', got {sorted(map(str, unknown))[0]!r}; leave it out")
        return token_ranges("always_keep['q']", value.get("q", ()), s_q), token_ranges("always_keep['k']", value.get("k", ()), s_k)
    if isinstance(value, Tensor | str) or not isinstance(value, Sequence):
        raise TypeError(f"always_keep must be a list of (start, end) or {{'q': [...], 'k': [...]}}, got {value!r}; use one of the two forms")
    return token_ranges("always_keep", value, s_q), token_ranges("always_keep", value, s_k)


def order(plan, s_q: int, s_k: int, causal: bool) -> OrderPlan | None:
    if plan is None:
        return None
    if not isinstance(plan, OrderPlan):
        raise TypeError(f"order must be a plan from sparge_kernels.order.plan, got {type(plan).__name__}")
    if causal:
        raise ValueError("order must be None with causal=True: reordered tokens have no causal edge; leave one of the two out")
    if plan.length != s_q or plan.length != s_k:
        raise ValueError(f"order must be a plan of the sequence's length, got {plan.length} tokens for S_q={s_q}, S_k={s_k}")
    return None if plan.is_identity else plan


def block_mask(mask, q: Tensor, k: Tensor) -> Tensor:
    """The bool map (B|1, H|1, N_q, N_k) on q's device."""
    n_q, n_k = num_blocks(q.shape[2], BLOCK_Q), num_blocks(k.shape[2], BLOCK_K)
    dense = mask.block_map if isinstance(mask, BlockMask) else mask
    if not isinstance(dense, Tensor) or dense.dtype != torch.bool:
        raise TypeError(f"block_mask must be a BlockMask or a bool tensor, got {_got(dense) if isinstance(dense, Tensor) else type(mask).__name__}")
    if isinstance(mask, BlockMask):
        # A map that is made during the capture of a CUDA graph lies in memory of that graph, and each replay writes over it.
        dense = mask.on(q.device, keep=not torch.compiler.is_compiling() and not driver.capturing(q.device))
    if dense.dim() != 4 or dense.shape[0] not in (1, q.shape[0]) or dense.shape[1] not in (1, q.shape[1]) or dense.shape[2:] != (n_q, n_k):
        raise ValueError(
            f"block_mask must have the shape (B|1, H|1, N_q, N_k) = ({q.shape[0]}|1, {q.shape[1]}|1, {n_q}, {n_k}), got {tuple(dense.shape)}; "
            f"blocks are {BLOCK_Q} queries by {BLOCK_K} keys"
        )
    return dense.to(q.device)
