"""Skipped blocks that do not vanish. V is correlated with K inside the blocks: independent V rewards the wrong thing."""

from __future__ import annotations

import math

import pytest
import torch
from sparge_kernels import block_sparse_attention, compensation, order, sparse_attention


def correlated(rand, clustered, s, b=1, h=2, h_kv=2, d=32, noise=0.3):
    q, k = clustered(1, b, h, s, d) * 0.8, clustered(3, b, h_kv, s, d) * 0.8
    return q, k, k @ rand(5, 1, h_kv, d, d) / d**0.5 + noise * rand(6, b, h_kv, s, d)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("topk", [0.1, 0.2])
@pytest.mark.parametrize("score", ["subblock", "mean"])
def test_lower_error_at_low_density(rand, clustered, naive, topk, score):
    q, k, v = correlated(rand, clustered, 2048, h=4, h_kv=2)
    truth = naive.dense(q, k, v)[0]
    plain = relative(sparse_attention(q, k, v, topk=topk, score=score), truth)
    pooled = relative(sparse_attention(q, k, v, topk=topk, score=score, compensate=True), truth)
    assert pooled < 0.85 * plain, f"{pooled:.3f} with compensation, {plain:.3f} without"


def pooled_by_hand(q, k, v, blocks, weight=None, bias=None, scale=None):
    """docs/design/algorithm.md "Compensation" in fp64 loops over rows and blocks: (S, D) heads; the frame is that of the k given."""
    q, k, v = q.double(), k.double(), v.double()
    s_q, s_k, d = q.shape[0], k.shape[0], q.shape[1]
    scale = d**-0.5 if scale is None else scale
    weight = torch.ones(s_k, dtype=torch.float64) if weight is None else weight.double()
    n_k = blocks.shape[1]
    pools = []
    covariance = torch.zeros(d, d, dtype=torch.float64)
    for j in range(n_k):
        r = slice(j * 64, (j + 1) * 64)
        w = weight[r]
        n = w.sum()
        km, vm = (w[:, None] * k[r]).sum(0) / n, (w[:, None] * v[r]).sum(0) / n
        variance = (w[:, None] * (k[r] - km) ** 2).sum(0) / n
        covariance += (w[:, None] * (v[r] - vm)).mT @ (k[r] - km)
        pools.append((n, km, vm, variance))
    covariance /= weight.sum()
    out, lse = torch.zeros(s_q, d, dtype=torch.float64), torch.zeros(s_q, dtype=torch.float64)
    for i in range(blocks.shape[0]):
        rows = range(i * 128, min((i + 1) * 128, s_q))
        qm = q[rows.start : rows.stop].mean(0)
        squares = sum(len(pool) * pool.mean(0) ** 2 for pool in q[rows.start : rows.stop].split(32)) / len(rows)
        for r in rows:
            numerator, denominator = torch.zeros(d, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
            for j in range(n_k):
                keys = slice(j * 64, (j + 1) * 64)
                n, km, vm, variance = pools[j]
                if blocks[i, j]:
                    e = weight[keys] * (scale * (k[keys] @ q[r])).exp()
                    numerator, denominator = numerator + e @ v[keys], denominator + e.sum()
                else:
                    hv = 0.5 * scale**2 * (squares @ variance)
                    w = n * (scale * (qm @ km) + min(hv, torch.tensor(8.0))).exp()
                    shrink = min(1.0, math.sqrt(8 / float(hv))) if hv > 0 else 1.0
                    numerator, denominator = numerator + w * vm + w * shrink * scale * (covariance @ q[r]), denominator + w
            out[r], lse[r] = numerator / denominator, denominator.log()
    return out, lse


@pytest.mark.parametrize("s, spread", [(200, 1.0), (333, 1.0), (333, 12.0)], ids=str)
def test_against_the_formula(rand, clustered, s, spread):
    q, k, v = correlated(rand, clustered, s, h=1, h_kv=1, d=16)
    q = q * spread  # the large spread passes the variance cap of 8
    blocks = torch.rand(-(-s // 128), -(-s // 64), generator=torch.Generator().manual_seed(1)) > 0.5
    blocks[:, 1] = True
    blocks[0, 0] = False
    out, lse = block_sparse_attention(q, k, v, blocks[None, None], compensate=True, smooth_k=False, return_lse=True)
    expected, expected_lse = pooled_by_hand(q[0, 0], k[0, 0], v[0, 0], blocks)
    assert relative(out[0, 0], expected) <= 2e-5
    torch.testing.assert_close(lse[0, 0].double(), expected_lse, rtol=2e-5, atol=2e-5)


def test_against_the_formula_with_a_bias(rand, clustered):
    q, k, v = correlated(rand, clustered, 333, h=1, h_kv=1, d=16)
    blocks = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 0, 0, 1, 0, 0], [1, 1, 0, 0, 1, 1]], dtype=torch.bool)
    bias = rand(9, 1, 333)
    bias[0, ::7] = -math.inf
    k, v = (x.masked_fill((bias == -math.inf)[:, None, :, None], math.nan) for x in (k, v))
    out, lse = block_sparse_attention(q, k, v, blocks[None, None], compensate=True, smooth_k=False, key_mask=bias, return_lse=True)
    expected, expected_lse = pooled_by_hand(q[0, 0], k[0, 0].nan_to_num(0), v[0, 0].nan_to_num(0), blocks, weight=bias[0].exp())
    assert relative(out[0, 0], expected) <= 2e-5
    torch.testing.assert_close(lse[0, 0].double(), expected_lse, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("smooth_k", [True, False])
@pytest.mark.parametrize("extra", ["", "mask", "bias", "order", "causal", "fp16"])
def test_exact_where_pooling_is_exact(rand, naive, extra, smooth_k):
    """Keys constant within a block (in plan order) and queries constant within a block: the pooled term is the block itself."""
    s, d, options = 640, 32, {}
    plan = order.plan("hilbert", ((4, 8, 16), 128)) if extra == "order" else None
    q = rand(1, 1, 2, 5, d).repeat_interleave(128, 2)
    k = rand(2, 1, 2, 10, d).repeat_interleave(64, 2) + 3
    v = rand(3, 1, 2, s, d)
    if plan is not None:
        q, k, v = (x[:, :, plan.inverse] for x in (q, k, v))
        options["order"] = plan
    if extra == "fp16":
        q, k, v = q.half(), k.half(), v.half()
    mask = None
    if extra == "mask":
        mask = torch.rand(1, s, generator=torch.Generator().manual_seed(1)) > 0.3
        mask[:, 128:192] = False
    if extra == "bias":
        mask = rand(4, 1, s)
    if extra == "causal":
        options |= dict(causal=True)
    if mask is not None:
        options["key_mask"] = mask
    out, lse, info = sparse_attention(q, k, v, topk=0.3, compensate=True, smooth_k=smooth_k, return_lse=True, return_info=True, **options)
    truth, true_lse = naive.dense(q, k, v, causal=extra == "causal", key_mask=mask)
    assert float(info.density.mean()) < 0.7
    tolerance = 2e-3 if extra == "fp16" else 3e-6
    assert relative(out, truth) <= tolerance
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-4 if extra == "fp16" else 1e-5, atol=1e-5)
    assert relative(sparse_attention(q, k, v, topk=0.3, smooth_k=smooth_k, **options), truth) > 0.05, "skipping alone is as good"


@pytest.mark.parametrize("shift", [-3.0, 4.0])
def test_a_constant_bias_changes_nothing_but_the_lse(rand, clustered, shift):
    q, k, v = correlated(rand, clustered, 512, b=2)
    bias = rand(9, 2, 512)
    bias -= bias.amax(-1, keepdim=True)
    blocks = torch.rand(1, 1, 4, 8, generator=torch.Generator().manual_seed(1)) > 0.5
    a, la = block_sparse_attention(q, k, v, blocks, compensate=True, key_mask=bias, return_lse=True)
    b, lb = block_sparse_attention(q, k, v, blocks, compensate=True, key_mask=bias + shift, return_lse=True)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(la + shift, lb, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [dict(topk=1), dict(cdfthreshd=1.0), dict(topk=1, causal=True), dict(topk=0.2, always_keep=[(0, 700)])], ids=str)
def test_nothing_skipped_changes_nothing(rand, clustered, options):
    q, k, v = correlated(rand, clustered, 700, b=2, h=4, h_kv=2)
    a, la = sparse_attention(q, k, v, **options, return_lse=True)
    b, lb = sparse_attention(q, k, v, **options, compensate=True, return_lse=True)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(la, lb, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("which", ["k", "v", "both"])
@pytest.mark.parametrize("offset", [0, 17, -80])
def test_causal_does_not_see_the_future(rand, clustered, offset, which):
    q, k, v = correlated(rand, clustered, 1000)
    # The mean score without centring: the choice of wholly visible blocks hangs on nothing behind the edge.
    options = dict(topk=0.2, causal=True, causal_offset=offset, compensate=True, return_lse=True, smooth_k=False, score="mean")
    out, lse = sparse_attention(q, k, v, **options)
    edge = 600
    if which != "v":
        k[:, :, edge:] = -2 * k[:, :, edge:]
    if which != "k":
        v[:, :, edge:] += 5 * k[:, :, edge:]
    again, again_lse = sparse_attention(q, k, v, **options)
    past = edge - offset  # row i sees keys up to i + offset: rows below this one see none of the changed keys
    torch.testing.assert_close(again[:, :, :past], out[:, :, :past], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again_lse[:, :, :past], lse[:, :, :past], rtol=1e-5, atol=1e-6)
    assert (again - out).abs().max() > 0.1


def test_a_dropped_block_on_the_diagonal_is_not_pooled(rand, naive):
    """A caller's map may drop blocks that the causal edge cuts: pooling them would show each row its future. Keys are constant within a block, so
    that the covariance is zero and the pooled term exact."""
    q = rand(1, 1, 2, 3, 16).repeat_interleave(128, 2)
    k = rand(2, 1, 2, 6, 16).repeat_interleave(64, 2)
    v = rand(3, 1, 2, 384, 16)
    blocks = torch.zeros(1, 1, 3, 6, dtype=torch.bool)
    blocks[..., 2, 0] = True
    out, lse = block_sparse_attention(q, k, v, blocks, causal=True, compensate=True, return_lse=True)
    whole = torch.arange(6)[None] * 64 + 63 <= torch.arange(3)[:, None] * 128
    truth, true_lse = naive.dense(q, k, v, causal=True, blocks=(blocks | whole))
    assert relative(out, truth) <= 1e-5 and (out[:, :, :128] == 0).all()
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=1e-5)


def test_rows_that_keep_nothing_get_the_pooled_term(rand, naive):
    q = rand(1, 1, 1, 2, 16).repeat_interleave(128, 2)
    k = rand(2, 1, 1, 4, 16).repeat_interleave(64, 2)
    v = rand(3, 1, 1, 256, 16)
    blocks = torch.zeros(1, 1, 2, 4, dtype=torch.bool)
    blocks[0, 0, 1, 2] = True
    out, lse = block_sparse_attention(q, k, v, blocks, compensate=True, return_lse=True)
    truth, true_lse = naive.dense(q, k, v)
    assert relative(out, truth) <= 1e-5
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compensate", [False, True])
def test_rows_that_see_nothing_stay_empty(rand, clustered, compensate):
    q, k, v = correlated(rand, clustered, 333, b=2)
    mask = torch.ones(2, 333, dtype=torch.bool)
    mask[1] = False
    out, lse = sparse_attention(q, k, v, topk=0.2, key_mask=mask, compensate=compensate, return_lse=True)
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all() and out[0].isfinite().all()
    out, lse = sparse_attention(q, k, v, topk=0.2, causal=True, causal_offset=-140, compensate=compensate, return_lse=True)
    assert (out[:, :, :140] == 0).all() and (lse[:, :, :140] == -math.inf).all() and out.isfinite().all()


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_no_overflow_when_the_pooled_mass_is_far_from_the_kept_mass(rand, clustered, shift):
    """m0 may lie far above or below a row's own maximum."""
    q, k, v = correlated(rand, clustered, 512, h=1, h_kv=1)
    q = q.abs() + 1
    k = k.clone()
    k[:, :, :256] += shift / 20
    blocks = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]] * 4, dtype=torch.bool)[None, None]
    out, lse = block_sparse_attention(q, k, v, blocks, compensate=True, return_lse=True)
    assert out.isfinite().all() and lse.isfinite().all()
    if shift < 0:
        torch.testing.assert_close(out, block_sparse_attention(q, k, v, blocks), rtol=1e-5, atol=1e-5)


def test_the_pooled_value_is_shifted_by_the_covariance_for_each_row(rand, clustered):
    q, k, v = (x[0] for x in correlated(rand, clustered, 256, d=16))
    pooled = torch.ones(2, 2, 4, dtype=torch.bool)
    nothing = torch.zeros(2, 256, 16), torch.full((2, 256), -math.inf)
    state = compensation.pooled_state(compensation.Heads(q, k, v, None, pooled), 0.25)
    base, base_lse = compensation.merge(*nothing, q, state._replace(covariance=torch.zeros(2, 16, 16)), 0.25)
    out, lse = compensation.merge(*nothing, q, state, 0.25)
    weight = (state.shift_weight / state.l0).repeat_interleave(128, 1)[..., None]
    torch.testing.assert_close(out - base, weight * 0.25 * (q @ state.covariance.mT), rtol=1e-4, atol=1e-5)
    assert torch.equal(lse, base_lse) and (out - base).abs().max() > 0.01


def test_state_is_finite_when_nothing_is_pooled(rand):
    q, k, v = (rand(n, 2, 200, 16) for n in range(3))
    pooled = torch.zeros(2, 2, 4, dtype=torch.bool)
    pooled[1, 1, 2] = True
    state = compensation.pooled_state(compensation.Heads(q, k, v, None, pooled), 0.25)
    assert (state.m0[0] == compensation.NOTHING_POOLED).all() and (state.l0[0] == 0).all() and (state.u[0] == 0).all()
    assert (state.shift_weight[0] == 0).all() and state.m0.isfinite().all() and state.covariance.isfinite().all()
    assert state.l0[1, 1] == 1 and state.m0[1, 1] > -100
