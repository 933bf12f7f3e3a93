"""sparge_statistics and sparge_prepass against quantized.py and centring.py, the pooling of selection.py and plain fp64."""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
from dataclasses import dataclass, field
from types import SimpleNamespace

import emulator
import layouts
import pytest
import quantized
import torch
import torch.nn.functional as F
from sparge_kernels import centring, config, selection
from sparge_kernels.cuda.params import PrepassParams, StatisticsParams, Strides

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LOG2E = torch.tensor(1.44269504)
EPS = 2.0**-24
KEY_AT_POSITION = torch.tensor([16 * g + 2 * t + (e & 1) + 8 * (e >> 1) for g in range(4) for t in range(4) for e in range(4)])


@dataclass
class Case:
    """One problem; q, k, v (B, H, S, D) with any strides."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None = None
    perm: torch.Tensor | None = None
    pv: str = "int8"
    smooth_k: bool = True
    splits: int = 2
    scale: float = 0.1
    extras: bool = True  # everything that may be null is asked for
    dim: int = field(init=False)

    def __post_init__(self):
        self.dim = config.padded_dim(self.q.shape[3])
        self.keys = selection.Keys.from_mask(self.mask)
        self.dtype = next(name for name, dtype in DTYPES.items() if dtype == self.q.dtype)

    @property
    def library(self):
        found = {v.name: v for v in config.variants("sm_89")}[config.prepass_name(self.dim, self.dtype)]
        return emulator.library(found)

    def split_length(self) -> int:
        return 16 * math.ceil(self.k.shape[2] / self.splits / 16)

    def masks(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """key_valid and key_bias as the kernels take them."""
        if self.mask is None:
            return None, None
        if self.mask.dtype == torch.bool:
            return self.mask.to(torch.uint8), None
        bias = self.mask.float() - self.keys.top[:, None]
        return None, torch.where(self.keys.valid, bias, -math.inf)


def pointer(x: torch.Tensor | None):
    return None if x is None else x.data_ptr()


def strides(x: torch.Tensor) -> Strides:
    assert x.stride(3) == 1 or x.shape[3] == 1
    return Strides(*x.stride()[:3])


def statistics(case: Case, seed: int = 0, library=None) -> SimpleNamespace:
    batch, kv_heads, s_k, dim = case.k.shape
    length = case.split_length()
    valid, bias = case.masks()
    rows = (batch, kv_heads, case.splits)
    out = SimpleNamespace(
        k_sum=emulator.guarded((*rows, case.dim), torch.float32),
        k_count=emulator.guarded(rows, torch.float32),
        v_absmax=emulator.guarded((*rows, case.dim), torch.int32),
    )
    params = StatisticsParams(
        k=case.k.data_ptr(), v=case.v.data_ptr(), k_stride=strides(case.k), v_stride=strides(case.v), key_valid=pointer(valid),
        key_bias=pointer(bias), **{n: t.data_ptr() for n, t in vars(out).items()}, kv_heads=kv_heads, s_k=s_k, dim=dim, splits=case.splits,
        split_length=length, batch=batch,
    )  # fmt: skip
    (library or case.library).launch("sparge_statistics", batch * kv_heads * case.splits, params, seed=seed)
    emulator.check_guards(*vars(out).values())
    return out


def layout(case: Case) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every output of the pre-pass, from layout.cuh."""
    batch, heads, s_q, _ = case.q.shape
    kv_heads, s_k, e = case.k.shape[1], case.k.shape[2], case.dim
    n_q, n_k = -(-s_q // 128), -(-s_k // 64)
    q, k = (batch, heads), (batch, kv_heads)
    v8 = ((*k, n_k * 64, e), torch.float16) if case.pv == "fp16" else ((*k, n_k, e, 64), torch.int8)
    return {
        "q8": ((*q, n_q * 128, e), torch.int8),
        "q_scale": ((*q, n_q * 128), torch.float32),
        "k8": ((*k, n_k * 64, e), torch.int8),
        "k_scale": ((*k, n_k), torch.float32),
        "v8": v8,
        "v_scale": ((*k, e), torch.float32),
        "bias2": ((batch, n_k * 64), torch.float32),
        "q_mean": ((*q, n_q * 4, 2, e), torch.float16),
        "q_square": ((*q, n_q * 4, 2, e), torch.float16),
        "q_pool_scale": ((*q, n_q * 4, 2), torch.float32),
        "k_mean": ((*k, n_k, 2, e), torch.float16),
        "k_variance": ((*k, n_k, 2, e), torch.float16),
        "k_pool_scale": ((*k, n_k, 2), torch.float32),
        "k_weight": ((batch, n_k), torch.float32),
        "q_sim": ((*q, n_q), torch.float32),
        "k_sim": ((*k, n_k), torch.float32),
        "v_mean": ((*k, n_k, e), torch.float32),
        "lse_shift": ((*q, s_q), torch.float32),
    }


OPTIONAL = ("bias2", "q_sim", "k_sim", "v_mean", "lse_shift")


def prepass(case: Case, stats: SimpleNamespace, seed: int = 0, library=None) -> SimpleNamespace:
    """The outputs; q8, k8 and v8 with the bytes of a row in order."""
    batch, heads, s_q, dim = case.q.shape
    kv_heads, s_k = case.k.shape[1], case.k.shape[2]
    valid, bias = case.masks()
    out = {n: emulator.guarded(*how) for n, how in layout(case).items() if case.extras or n not in OPTIONAL}
    if case.mask is None:
        out.pop("bias2", None)
    params = PrepassParams(
        q=case.q.data_ptr(), k=case.k.data_ptr(), v=case.v.data_ptr(), q_stride=strides(case.q), k_stride=strides(case.k), v_stride=strides(case.v),
        perm=pointer(case.perm), key_valid=pointer(valid), key_bias=pointer(bias), **{n: t.data_ptr() for n, t in vars(stats).items()},
        **{n: t.data_ptr() for n, t in out.items()}, scale=case.scale, batch=batch, heads=heads, kv_heads=kv_heads, s_q=s_q, s_k=s_k, dim=dim,
        splits=case.splits, smooth_k=int(case.smooth_k), pv=config.PV.index(case.pv),
    )  # fmt: skip
    grid = batch * heads * -(-s_q // 128) + batch * kv_heads * -(-s_k // 64)
    (library or case.library).launch("sparge_prepass", grid, params, seed=seed)
    emulator.check_guards(*out.values())
    return SimpleNamespace(**{n: layouts.swizzled(t) if n in ("q8", "k8", "v8") else t for n, t in out.items()})


def run(case: Case, seed: int = 0, library=None) -> SimpleNamespace:
    stats = statistics(case, seed, library)
    return SimpleNamespace(**vars(stats), **vars(prepass(case, stats, seed, library)))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.dtype.itemsize])


def assert_same(a: SimpleNamespace, b: SimpleNamespace, *, but: tuple[str, ...] = ()) -> None:
    """Every tensor that both have, bit by bit."""
    for name in vars(a).keys() & vars(b).keys() - set(but):
        assert torch.equal(bits(getattr(a, name)), bits(getattr(b, name))), f"{name} differs"


# ---- the expected tensors --------------------------------------------------------------------------------------------------------------------------


def padded(x: torch.Tensor, rows: int, channels: int) -> torch.Tensor:
    """(..., S, D) -> (..., rows, channels)."""
    return F.pad(x, (0, channels - x.shape[-1], 0, rows - x.shape[-2]))


def centre(case: Case, stats: SimpleNamespace) -> torch.Tensor:
    """fp32 (B, H_kv, 1, E) out of the partial sums, added in the kernel's order."""
    if not case.smooth_k:
        return torch.zeros(*case.k.shape[:2], 1, case.dim)
    total, count = torch.zeros_like(stats.k_sum[:, :, 0]), torch.zeros_like(stats.k_count[:, :, 0])
    for s in range(case.splits):
        total, count = total + stats.k_sum[:, :, s], count + stats.k_count[:, :, s]
    return (total / count.clamp_min(1)[..., None])[:, :, None]


def close(name: str, got: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor | float) -> None:
    error = (got.double() - expected.double()).abs()
    i = int((error - bound).argmax())
    held = not error.isnan().any() and bool((error <= bound).all())
    assert held, f"{name}: {got.flatten()[i].item()!r} for {expected.flatten()[i].item()!r} at {i}, off by {error.flatten()[i].item():.3g}"


def close_pool(name: str, pair: torch.Tensor, scale: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    """A tensor (B, H, N, 2, E) of high and low parts; the low ones end at 2 ** -39 of a row's largest value, where fp16 does."""
    assert (scale.log2().frac() == 0).all(), "a scale is no power of two"
    top = pair[..., 0, :].double().abs().amax(-1)
    assert ((top == 0) & (scale == 1) | (top >= 2**14) & (top <= 2**15)).all(), f"the largest magnitudes of the rows are {top.flatten().tolist()}"
    close(name, decoded(pair, scale), expected, bound + expected.abs().amax(-1, keepdim=True) * 2.0**-39)


def decoded(pair: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp64 (B, H, N, E)."""
    return pair.double().sum(-2) * scale[..., None].double()


def blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """(..., S, X) -> fp64 (..., N, block, X), zero-padded."""
    n = -(-x.shape[-2] // block)
    return padded(x.double(), n * block, x.shape[-1]).unflatten(-2, (n, block))


def check_quantized(case: Case, got: SimpleNamespace, c: torch.Tensor) -> None:
    """8-bit tensors and scales: those of quantized.py."""
    order = slice(None) if case.perm is None else case.perm
    e, valid = case.dim, None if case.keys is None else case.keys.valid[:, order]
    q, k, v = (padded(x[:, :, order].float(), x.shape[2], e) for x in (case.q, case.k, case.v))
    k_rows = k - c if valid is None else torch.where(valid[:, None, :, None], k - c, 0)
    q_truth, k_truth = quantized.quantize_q(q), quantized.quantize_k(k_rows)
    to_score = torch.tensor(case.scale) * LOG2E
    for name, values, truth in (("q8", got.q8, q_truth), ("k8", got.k8, k_truth)):
        steps = (values.int() - padded(truth.values, values.shape[2], e).int()).abs()
        assert steps.max() == 0, f"{name} is {steps.max()} steps off at {steps.argmax()}"
    scale = padded(q_truth.scale, got.q8.shape[2], 1)[..., 0]
    close("q_scale", got.q_scale, scale * to_score, scale * to_score * 2 * EPS)
    assert torch.equal(got.k_scale, k_truth.scale[..., 0]), "k_scale"

    n_k = got.k_scale.shape[2]
    if case.pv == "fp16":
        top = quantized.quantize_v(v, "int8", valid).scale * 127
        exponent = torch.where(top > 0, (top.double() / 32768).log2().ceil(), 0.0)
        assert torch.equal(got.v_scale, (2.0 ** exponent[:, :, 0]).float())
        rows = v if valid is None else torch.where(valid[:, None, :, None], v, 0)
        expected = padded((rows * 2.0**-exponent).half(), n_k * 64, e)
        assert torch.equal(got.v8, expected)
        return
    truth = quantized.quantize_v(v, case.pv, valid)
    assert torch.equal(got.v_scale, truth.scale[:, :, 0]), "v_scale"
    expected = padded(truth.values.view(torch.int8), n_k * 64, e).unflatten(2, (n_k, 64)).transpose(3, 4)
    assert torch.equal(got.v8, expected[..., KEY_AT_POSITION]), "v8"


def check_pools(case: Case, got: SimpleNamespace, c: torch.Tensor) -> None:
    """Pools to a few fp32 roundings of the sums of magnitudes, against fp64 and against selection.py."""
    order = slice(None) if case.perm is None else case.perm
    batch, s_q, s_k, e = case.q.shape[0], case.q.shape[2], case.k.shape[2], case.dim
    q, k, v = (padded(x[:, :, order].float(), x.shape[2], e) for x in (case.q, case.k, case.v))
    weight = torch.ones(batch, s_k) if case.keys is None else case.keys.weight[:, order]
    k = torch.where(weight[:, None, :, None] > 0, k - c, 0)
    v = torch.where(weight[:, None, :, None] > 0, v, 0)
    fp32 = 16 * EPS  # of a sum of 32 or 64 terms by threes and tens, and the pair's own 2 ** -22

    share = blocks(torch.ones(s_q, 1), 32)
    share = share / share.sum(1, keepdim=True).clamp_min(1)
    four = got.q_sim.shape[2] * 4
    share = F.pad(share, (0, 0, 0, 0, 0, four - share.shape[0]))
    rows = padded(q.double(), four * 32, e).unflatten(2, (four, 32))
    mean, size = (rows * share).sum(-2), (rows.abs() * share).sum(-2)
    close_pool("q_mean", got.q_mean, got.q_pool_scale[..., 0], mean, fp32 * size)
    close_pool("q_square", got.q_square, got.q_pool_scale[..., 1], mean**2, 3 * fp32 * size**2)
    weights = blocks(weight[..., None], 64)[:, None]
    total = weights.sum(-2, keepdim=True)
    kb, vb = blocks(k, 64), blocks(v, 64)
    weights = weights / total.clamp_min(1e-300)
    # exp2 has a relative error of 2 ** -22 and its argument one of 2 ** -24 of at most 40.
    exact = case.mask is None or case.mask.dtype == torch.bool
    fp32 = fp32 if exact else 64 * EPS
    mean, size = (kb * weights).sum(-2), (kb.abs() * weights).sum(-2)
    square = (kb**2 * weights).sum(-2)
    close_pool("k_mean", got.k_mean, got.k_pool_scale[..., 0], mean, fp32 * size)
    close_pool("k_variance", got.k_variance, got.k_pool_scale[..., 1], square - mean**2, 2 * fp32 * square)
    close("k_weight", got.k_weight, total[:, 0, :, 0, 0], total[:, 0, :, 0, 0] * (0 if exact else fp32))
    close("v_mean", got.v_mean, (vb * weights).sum(-2), fp32 * (vb.abs() * weights).sum(-2))

    group = case.q.shape[1] // case.k.shape[1]
    product = q.double() * c.double().repeat_interleave(group, 1)
    close("lse_shift", got.lse_shift, case.scale * product.sum(-1), case.scale * 16 * EPS * product.abs().sum(-1))
    if case.mask is not None:
        valid, bias = case.masks()
        bias = torch.where(case.mask, 0.0, -math.inf) if bias is None else bias * LOG2E
        assert torch.equal(got.bias2, F.pad(bias[:, order], (0, got.bias2.shape[1] - s_k), value=-math.inf))

    for b in range(batch):
        own = None if case.keys is None else weight[b]
        k_pool = selection._pool(k[b].float(), 64, own, True, True)
        q_pool = selection._pool(q[b].float(), 32, None, False, True)
        variance = (k_pool.square - k_pool.mean**2).clamp_min(0)
        close_pool("k_mean of selection", got.k_mean[b], got.k_pool_scale[b, ..., 0], k_pool.mean, 2 * fp32 * size[b])
        close_pool("k_variance of selection", got.k_variance[b], got.k_pool_scale[b, ..., 1], variance, 4 * fp32 * square[b])
        close("k_sim", got.k_sim[b], k_pool.unit.square().sum(-1), 1e-5)
        close("q_sim", got.q_sim[b], selection._full_blocks(q_pool, q_pool.unit).square().sum(-1), 1e-5)


def check_statistics(case: Case, got: SimpleNamespace) -> None:
    """Sums to fp32, counts and maxima exactly."""
    batch, kv_heads, s_k, _ = case.k.shape
    length = case.split_length()
    valid = torch.ones(batch, s_k, dtype=torch.bool) if case.keys is None else case.keys.valid
    chosen = [16 * g + (g * g * 1126333 >> 20) % 16 for g in range(-(-s_k // 16))]  # of the whole head, whatever the splits
    for s in range(case.splits):
        rows, sampled = slice(s * length, (s + 1) * length), [t for t in chosen if s * length <= t < min((s + 1) * length, s_k)]
        k, v = padded(case.k.float(), s_k, case.dim)[:, :, sampled], padded(case.v.float(), s_k, case.dim)[:, :, rows]
        k = torch.where(valid[:, None, sampled, None], k, 0).double()
        v = torch.where(valid[:, None, rows, None], v, 0).abs()
        close("k_sum", got.k_sum[:, :, s], k.sum(2), 8 * EPS * k.abs().sum(2))
        assert torch.equal(got.k_count[:, :, s], valid[:, sampled].sum(1).float()[:, None].expand(batch, kv_heads))
        absmax = v.amax(2) if v.shape[2] else torch.zeros(batch, kv_heads, case.dim)
        assert torch.equal(got.v_absmax[:, :, s], absmax.view(torch.int32))


def check(case: Case, seed: int = 0) -> SimpleNamespace:
    got = run(case, seed)
    check_statistics(case, got)
    c = centre(case, got)
    check_quantized(case, got, c)
    check_pools(case, got, c)
    return got


# ---- problems --------------------------------------------------------------------------------------------------------------------------------------


def rand(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask_of(kind: str | None, batch: int, s_k: int) -> torch.Tensor | None:
    if kind is None:
        return None
    valid = torch.rand(batch, s_k, generator=torch.Generator().manual_seed(s_k)) < 0.7
    valid[0, 64:128] = False  # a whole block of the first element, and all of the last one
    if batch > 1:
        valid[-1] = False
    if kind == "bool":
        return valid
    return torch.where(valid, 3 * rand(s_k, batch, s_k) - 5, -math.inf)


def problem(dtype: str, dim: int, s: int, *, batch: int = 2, heads: int = 2, kv_heads: int = 1, s_k: int | None = None, mask: str | None = None,
            perm: bool = False, **how) -> Case:  # fmt: skip
    s_k = s_k or s
    spread = torch.linspace(0.2, 3, dim)
    q = rand(1, batch, heads, s, dim) * spread
    k = rand(2, batch, kv_heads, s_k, dim) + 2 * rand(3, dim) + rand(4, batch, kv_heads, -(-s_k // 16), dim).repeat_interleave(16, 2)[:, :, :s_k]
    v = rand(5, batch, kv_heads, s_k, dim) * spread
    order = torch.randperm(s, generator=torch.Generator().manual_seed(6)) if perm else None
    q, k, v = (x.to(DTYPES[dtype]) for x in (q, k, v))
    return Case(q, k, v, mask_of(mask, batch, s_k), order, **how)


SIZES = list(itertools.product((1, 37, 40, 64, 72, 128), (1, 63, 64, 129, 200, 333)))


def options(i: int, dim: int, s: int) -> dict:
    """Every option with every other somewhere in the grid of sizes (test_the_grid_covers_every_option)."""
    return dict(
        dtype=list(DTYPES)[(i + i // 6) % 3], dim=dim, s=s, mask=(None, "bool", "bias")[i // 2 % 3], perm=i % 2 == 1, pv=config.PV[i // 3 % 3],
        smooth_k=i % 7 != 3, splits=(1, 2, 5)[i % 3 - i % 2], heads=(2, 3, 4)[i % 3], kv_heads=(1, 3, 2)[i % 3],
    )  # fmt: skip


GRID = [pytest.param(options(i, *size), id="d{}-s{}".format(*size)) for i, size in enumerate(SIZES)]


@pytest.mark.parametrize("how", GRID)
def test_sizes(how):
    check(problem(**how), seed=how["s"] + how["dim"])


@pytest.mark.pairs(dtype=DTYPES, dim=[64, 128], pv=config.PV, mask=[None, "bool", "bias"])
def test_forms(dtype, dim, pv, mask):
    check(problem(dtype, dim, 150, mask=mask, pv=pv, perm=pv == "fp8", batch=1 if mask is None else 2))


def test_the_grid_covers_every_option():
    seen = [param.values[0] for param in GRID]
    both, options = (False, True), dict(dtype=DTYPES, mask=(None, "bool", "bias"), pv=config.PV, splits=(1, 2, 5), kv_heads=(1, 2, 3))
    for name, values in dict(**options, perm=both, smooth_k=both).items():
        assert {s[name] for s in seen} == set(values), name


def test_lengths_of_q_and_k_differ():
    check(problem("float16", 64, 130, s_k=321, heads=4, kv_heads=2))
    check(problem("bfloat16", 128, 260, s_k=65, mask="bias"))


def test_more_splits_than_keys():
    check(problem("float16", 64, 33, splits=7))


@pytest.mark.parametrize("splits", [1, 7, 32])
def test_the_statistics_sample_a_head_as_centring_does(splits):
    """Whatever the splits, on a video of 80 columns whose last row is cut short."""
    case = problem("bfloat16", 64, 40, s_k=4005, heads=1, splits=splits)
    case.k += 20 * rand(7, 1, 1, 80, 64).repeat(1, 1, 51, 1)[:, :, :4005].bfloat16()
    got = statistics(case)
    check_statistics(case, got)
    centre = got.k_sum.sum(2) / got.k_count.sum(2)[..., None]
    close("centre", centre, centring.key_centre(case.k)[:, :, 0].double(), 1e-3)


@pytest.mark.parametrize("mask", [None, "bool"])
def test_the_centre_is_that_of_centring(mask):
    """The two kernels together give what centring.py gives from k itself; the sums have another order, so values may be a step apart."""
    case = problem("float16", 128, 333, mask=mask, kv_heads=2, splits=3)
    got = run(case)
    valid = None if case.keys is None else case.keys.valid
    truth = quantized.quantize_k(case.k, centring.key_centre(case.k, valid), valid)
    close("k_scale", got.k_scale, truth.scale[..., 0], truth.scale[..., 0] * 1e-5)
    steps = (got.k8[:, :, :333].int() - truth.values.int()).abs()
    assert steps.max() <= 1 and steps.sum() <= steps.numel() / 1000


def test_division_is_exact():
    """Values at half a step, one rounding to either side, for scales over a wide range: the rounding is that of x / scale."""
    scale = torch.exp2(torch.linspace(-60, 60, 1024)) * (1 + torch.rand(1024, generator=torch.Generator().manual_seed(0)))
    steps = torch.cat([torch.arange(0, 63) + 0.5, torch.tensor([127.0])])
    rows = scale[:, None] * steps
    rows[:, -1] = scale * 127
    actual = rows[:, -1:] / 127  # what both find as the scale
    rows[:, :-1] = actual * steps[:-1]
    rows = torch.stack([rows, rows.nextafter(torch.full((), math.inf)), rows.nextafter(torch.zeros(()))])
    rows[..., -1] = rows[0, :, -1]
    case = problem("float32", 64, 3 * 1024, batch=1, heads=1, extras=False)
    case.q = rows.reshape(1, 1, -1, 64)
    got = run(case)
    truth = quantized.quantize_q(case.q)
    assert torch.equal(got.q8, truth.values)
    assert 0.4 < (got.q8[0, 0, 1024:2048] != got.q8[0, 0, 2048:]).float().mean() < 1, "the values are not at the edges of the steps"


# ---- what must not leak ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["bool", "bias"])
def test_masked_rows_leave_no_trace(dtype, mask):
    for pv in config.PV:
        case = problem(dtype, 64, 130, mask=mask, pv=pv, perm=True)
        clean = run(case)
        hidden = ~case.keys.valid[:, None, :, None]
        assert hidden[0].any() and case.keys.valid[0].any()
        for value in (math.nan, math.inf):
            case.k, case.v = (x.masked_fill(hidden, value) for x in (case.k, case.v))
            assert_same(run(case), clean)
        assert not any(t.isnan().any() for t in vars(clean).values() if t.is_floating_point())


def test_nothing_but_masked_keys():
    case = problem("float16", 40, 100, batch=2, mask="bool")
    got = check(case)
    assert not case.keys.valid[1].any()
    for name in (
        "k8",
        "k_scale",
        "k_mean",
        "k_variance",
        "k_sim",
        "k_weight",
        "k_sum",
        "k_count",
        "v8",
        "v_scale",
        "v_mean",
        "v_absmax",
        "lse_shift",
    ):
        assert not getattr(got, name)[1].any(), name
    assert (got.k_pool_scale[1] == 1).all() and (got.bias2[1] == -math.inf).all()


@pytest.mark.parametrize("pv", config.PV)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_where_it_was(pv, bad):
    case = problem("float16", 64, 200, heads=4, kv_heads=2, pv=pv)
    clean = run(case)
    case.q, case.k, case.v = case.q.clone(), case.k.clone(), case.v.clone()
    case.q[0, 1, 5, 3] = case.k[0, 0, 71, 2] = case.v[0, 1, 130, 9] = bad  # key 71 is not in the sample
    got = run(case)
    infinite = not math.isnan(bad)

    def moved(name: str) -> list:
        """Places whose bits differ, and that hold what is not finite."""
        a, b = getattr(got, name), getattr(clean, name)
        where = (bits(a) != bits(b)).nonzero().tolist()
        assert all(not math.isfinite(a[tuple(i)]) for i in where)
        assert infinite or all(math.isnan(a[tuple(i)]) for i in where)
        return where

    assert moved("q_scale") == [[0, 1, 5]] and moved("k_scale") == [[0, 0, 1]] and moved("v_scale") == [[0, 1, 9]]
    assert infinite or got.q_sim.isfinite().all() and got.k_sim.isfinite().all(), "a row of NaN counts as a zero vector, as in selection.py"
    # A value of 0 under a scale that is not finite, or the NaN itself: never a number that hides it.
    if pv == "int8":
        assert not got.v8[0, 1, :, 9].any()
    for name in ("q8", "k8", "v8", "q_mean", "k_mean", "v_mean", "lse_shift"):
        head = (0, 0) if name.startswith("k") else (0, 1)
        same = bits(getattr(got, name)) == bits(getattr(clean, name))
        assert not same[head].all(), name
        same[head] = True
        assert same.all(), f"{name} of another head changed"
    case.k[0, 0, 17, 2] = bad  # a sampled key reaches the whole head through the centre, and no other
    got = run(case)
    assert (
        not got.k_scale[0, 0].isfinite().any()
        and torch.equal(got.k_scale[1], clean.k_scale[1])
        and torch.equal(got.k_scale[0, 1], clean.k_scale[0, 1])
    )


@pytest.mark.parametrize("pv", config.PV)
def test_zero_rows_blocks_and_channels(pv):
    case = problem("bfloat16", 72, 200, pv=pv, smooth_k=False, mask="bool", batch=1)
    case.q[:, :, 7] = 0
    case.q[:, :, 32:64] = 0
    case.k[:, :, 128:192] = 0
    case.v[..., 11] = 0
    got = check(case)
    assert not got.q8[:, :, 7].any() and not got.q_scale[:, :, 7].any() and not got.k_scale[:, :, 2].any()
    assert (got.q_pool_scale[:, :, 1] == 1).all() and (got.k_pool_scale[:, :, 2] == 1).all()
    assert not got.v8.float().transpose(-1, -2)[..., 11].any() if pv == "fp16" else not got.v8[..., 11, :].any()
    assert (got.v_scale[..., 11] == (1 if pv == "fp16" else 0)).all()


def test_variance_is_never_negative():
    """Keys that are all alike leave the rounding of the two squares alone, which has either sign."""
    case = problem("float32", 128, 64, batch=1, smooth_k=False)
    case.k = (1 + rand(9, 1, 1, 1, 128).abs()).expand(1, 1, 64, 128).contiguous()
    got = check(case)
    variance = decoded(got.k_variance, got.k_pool_scale[..., 1])
    assert (variance >= 0).all() and 0 < (variance == 0).float().mean() < 1


def test_bits_of_any_size():
    """fp32 rows from the smallest number to the largest: pairs keep 20 bits, and rows whose scale is no normal number are zero in 8 bits."""
    exponents = torch.tensor([-149, -140, -127, -126, -121, -115, -100, -60, 0, 60, 100, 121])
    case = problem("float32", 64, 32 * len(exponents), batch=1, heads=1, smooth_k=False)
    x = (1 + torch.arange(64) / 64).double() * 2.0 ** exponents[:, None].double()
    case.q = x.float().repeat_interleave(32, 0)[None, None].contiguous()
    got = run(case)
    scale = got.q_pool_scale[0, 0, :, 0].double()
    assert (scale.log2() == (exponents - 14).clamp_min(-126)).all()
    mean = got.q_mean[0, 0].double().sum(1) * scale[:, None]
    pools = case.q[0, 0, ::32].double()
    error = (mean - pools).abs()
    assert (error <= pools * 2.0**-20 + 2.0**-149).all()
    tiny = pools[:, -1] / 127 < 2.0**-126
    rows = got.q8[0, 0, : len(case.q[0, 0]) : 32]
    assert tiny[:4].all() and not tiny[5:].any()
    assert not rows[tiny].any() and (rows[~tiny].amax(-1) == 127).all() and got.q_scale.isfinite().all()


def test_large_v_in_half():
    case = problem("bfloat16", 64, 100, pv="fp16", batch=1)
    case.v[..., 3] *= 2.0**100
    case.v[..., 6] *= 2.0**-60
    case.v[0, 0, :, 4] = 32768
    case.v[0, 0, 5, 5] = 33024  # the next number
    got = check(case)
    assert got.v_scale[0, 0, 4] == 1 and got.v_scale[0, 0, 5] == 2 and got.v8.isfinite().all()


def test_a_key_of_low_bias_is_not_masked():
    """Keys far below the largest bias have a weight that is too small for fp32, but the block is one that softmax sees."""
    case = problem("float16", 64, 192, batch=1)
    bias = torch.zeros(1, 192)
    bias[:, 64:128] = -1000
    bias[:, 128:] = -math.inf
    case = Case(case.q, case.k, case.v, bias)
    got = run(case)
    assert got.k_weight[0, 0] == 64 and 0 < got.k_weight[0, 1] < 1e-35 and got.k_weight[0, 2] == 0
    mean = decoded(got.k_mean, got.k_pool_scale[..., 0])[0, 0, 1]
    close("k_mean", mean, (case.k.float() - centre(case, got))[0, 0, 64:128].double().mean(0), 1e-4)


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
