"""What sparge_statistics and sparge_prepass must leave: by quantized.py and centring.py, the pooling of selection.py and plain fp64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import quantized
import torch
import torch.nn.functional as F
from prepass_case import Case, run
from sparge_kernels import selection

LOG2E = torch.tensor(1.44269504)
EPS = 2.0**-24
KEY_AT_POSITION = torch.tensor([16 * g + 2 * t + (e & 1) + 8 * (e >> 1) for g in range(4) for t in range(4) for e in range(4)])


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
