"""sparge_statistics and sparge_prepass: sizes, types, masks and values, field by field."""

from __future__ import annotations

import itertools
import math

import pytest
import quantized
import torch
from prepass_case import DTYPES, Case, assert_same, bits, problem, rand, run, statistics
from prepass_reference import centre, check, check_statistics, close, decoded
from sparge_kernels import centring, config

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
