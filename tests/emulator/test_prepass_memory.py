"""sparge_statistics and sparge_prepass read inputs wherever they lie and write what is asked for, in any order and with every barrier."""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap

import emulator
import pytest
import torch
import torch.nn.functional as F
from prepass_case import OPTIONAL, Case, assert_same, layout, prepass, problem, run, statistics
from sparge_kernels import config

# ---- where the inputs lie --------------------------------------------------------------------------------------------------------------------------


def nhd(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def shifted(x: torch.Tensor) -> torch.Tensor:
    """The same values one element further on, so that no row is aligned."""
    memory = torch.full((x.numel() + 1,), math.nan, dtype=x.dtype)
    memory[1:] = x.flatten()
    return memory[1:].view(x.shape)


def wide_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows that lie D + 3 elements apart, with NaN between them."""
    return F.pad(x, (0, 3), value=math.nan)[..., : x.shape[-1]]


def fused_qkv(x: torch.Tensor) -> torch.Tensor:
    """A slice of a tensor (B, S, 3, H, D)."""
    batch, heads, s, dim = x.shape
    memory = torch.full((batch, s, 3, heads, dim), math.nan, dtype=x.dtype)
    memory[:, :, 1] = x.transpose(1, 2)
    return memory[:, :, 1].transpose(1, 2)


@pytest.mark.parametrize("view", [nhd, shifted, wide_rows, fused_qkv])
@pytest.mark.parametrize("dtype, dim", [("float16", 64), ("bfloat16", 40), ("float32", 128)])
def test_views(view, dtype, dim):
    case = problem(dtype, dim, 140, kv_heads=2, mask="bool", perm=True)
    clean = run(case)
    case.q, case.k, case.v = view(case.q), view(case.k), view(case.v)
    assert not case.q.is_contiguous() or case.q.data_ptr() % 16
    assert_same(run(case, seed=1), clean)


class Elsewhere:
    """What Case needs of a tensor, for rows anywhere in the address space."""

    def __init__(self, x: torch.Tensor, address: int, *steps: int):
        self.shape, self.dtype, self._address, self._steps = x.shape, x.dtype, address, (*steps, 1)

    def data_ptr(self) -> int:
        return self._address

    def stride(self, dim: int | None = None):
        return self._steps if dim is None else self._steps[dim]


def test_offsets_beyond_32_bits():
    """Tokens more than 2 ** 31 elements apart, heads and batches more than 2 ** 32, in memory that exists only where it is touched."""
    case = problem("float16", 64, 3, heads=2, kv_heads=2)
    clean = run(case)
    steps = batch, head, token = 2**35 + 128, 2**33 + 64, 2**31 + 64
    try:
        memory = mmap.mmap(-1, 2 * (batch + head + 2 * token + 64), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    except OSError:
        pytest.skip("this machine does not lend address space that no memory stands behind")
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for name in ("q", "k", "v"):
        x = getattr(case, name)
        for at in itertools.product(range(2), range(2), range(3)):
            start = 2 * sum(i * step for i, step in zip(at, steps, strict=True))
            memory[start : start + 128] = x[at].numpy().tobytes()
        far = Case(case.q, case.k, case.v)
        setattr(far, name, Elsewhere(x, address, *steps))
        assert_same(run(far), clean)


def test_a_stride_may_be_negative():
    case = problem("float16", 64, 70, kv_heads=2)
    clean = run(case)
    for name in ("q", "k", "v"):
        x = getattr(case, name)
        mirrored = x.flip(0, 1, 2).contiguous()
        other = Case(case.q, case.k, case.v)
        setattr(other, name, Elsewhere(x, mirrored[-1, -1, -1].data_ptr(), *(-step for step in mirrored.stride()[:3])))
        assert_same(run(other), clean)


# ---- order, options, bytes -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("pv", config.PV)
def test_bitwise_repeat_under_any_schedule(dim, pv):
    case = problem("bfloat16", dim, 200, mask="bias", perm=True, pv=pv)
    first = run(case, seed=0)
    for seed in range(1, 5):
        assert_same(run(case, seed=seed), first)


def test_options_change_nothing_else():
    case = problem("float16", 64, 200, mask="bias", kv_heads=2)
    full = run(case)
    bare = run(Case(case.q, case.k, case.v, case.mask, extras=False))
    assert not any(hasattr(bare, name) for name in OPTIONAL)
    assert_same(bare, full)


def test_without_smoothing_the_statistics_of_k_are_not_read():
    case = problem("float16", 64, 100, smooth_k=False)
    stats = statistics(case)
    clean = prepass(case, stats)
    stats.k_sum.fill_(math.nan)
    stats.k_count.fill_(math.nan)
    assert_same(prepass(case, stats), clean)
    assert not clean.lse_shift.any()


BARRIERS = {
    "weights and scales before they are used": ("  sync_cta();\n\n  float x[kKeyRows]", "\n  float x[kKeyRows]"),
    "the key block's maximum": ("  sync_cta();\n\n  absmax = 0;", "  absmax = 0;"),
    "transposed V before it is stored": ("  sync_cta();\n\n  if (p.pv != kPvHalf)", "  if (p.pv != kPvHalf)"),
    "pools of the warps": ("  sync_cta();\n  // One of 4 pools", "  // One of 4 pools"),
    "sums of the statistics": ("  sync_cta();\n  if (thread < kDim)", "  if (thread < kDim)"),
}


@pytest.mark.parametrize("name", BARRIERS)
def test_a_missing_barrier_is_seen(name):
    """The schedules of the tests above tell a kernel without one of its barriers from the right one."""
    case = problem("float16", 64, 130, batch=1)
    variant = {v.name: v for v in config.variants("sm_89")}[config.prepass_name(64, "float16")]
    broken = emulator.library(variant, replace=(BARRIERS[name],))
    clean = run(case)
    with pytest.raises((AssertionError, RuntimeError)):
        for seed in range(6):
            assert_same(run(case, seed=seed, library=broken), clean)


@pytest.mark.parametrize("dim, heads", [(64, 8), (128, 24)])
@pytest.mark.parametrize("plan, compensate", [(False, False), (True, False), (True, True)])
def test_bytes_per_token_and_channel(dim, heads, plan, compensate):
    """At most 12 with 16-bit inputs and 8-bit V, of q, k and v alike in size, when each input is read as often as the kernels read it."""
    tokens = 4096
    with torch.device("meta"):
        x = torch.empty(1, heads, tokens, dim, dtype=torch.float16)
        case = Case(x, x, x)
        writes = 0
        for name, (shape, dtype) in layout(case).items():
            if name not in OPTIONAL or (name == "v_mean" and compensate) or (name in ("q_sim", "k_sim")):
                writes += math.prod(shape) * dtype.itemsize
    size = x.numel() * x.element_size()
    reads = 3 * size + size + size / 16  # the pre-pass; V and one row of K in 16 in the statistics
    reads += 2 * heads * tokens * 8 * plan
    total = (reads + writes) / x.numel()
    assert 11.5 <= total <= 12, f"{total:.3f} bytes"
