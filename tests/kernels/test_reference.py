"""The package's own reference against a dense softmax, a brute-force PV skip, and the error table of the quantised forms."""

from __future__ import annotations

import math

import pytest
import quantized
import reference
import torch
from sparge_kernels import BlockMask, centring


@pytest.mark.pairs(
    lengths=[(1, 1), (63, 63), (200, 200), (130, 333), (333, 130)],
    edge=[(False, 0), (True, 0), (True, -70), (True, 90)],
    mask=["", "bool", "float"],
)
def test_exact_form(rand, naive, lengths, edge, mask):
    (s_q, s_k), (causal, offset) = lengths, edge
    q, k, v = rand(1, 2, 4, s_q, 16), rand(2, 2, 2, s_k, 16), rand(3, 2, 2, s_k, 16)
    key_mask = None
    if mask:
        key_mask = torch.rand(2, s_k, generator=torch.Generator().manual_seed(1)) > 0.4
        k, v = (x.masked_fill(~key_mask[:, None, :, None], math.nan) for x in (k, v))
    if mask == "float":
        key_mask = torch.where(key_mask, rand(4, 2, s_k), -1e4)
    blocks = torch.rand(2, 4, -(-s_q // 128), -(-s_k // 64), generator=torch.Generator().manual_seed(2)) > 0.3
    for kept in (None, blocks, BlockMask.from_dense(blocks)):
        for row_group, key_tile in ((64, 64), (128, 128)):
            out, lse, skipped = reference.attention(
                q, k, v, kept, causal=causal, causal_offset=offset, key_mask=key_mask, row_group=row_group, key_tile=key_tile, scale=0.3
            )
            how = dict(causal=causal, causal_offset=offset, key_mask=key_mask, scale=0.3, blocks=None if kept is None else blocks)
            truth, true_lse = naive.dense(q, k.nan_to_num(0), v.nan_to_num(0), **how)
            torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(lse, true_lse, rtol=1e-10, atol=1e-12)
            assert (skipped == 0).all() and out.dtype == torch.float64


def test_fp32_form(rand, naive):
    q, k, v = (rand(n, 1, 1, 200, 16) for n in range(3))
    out, lse, _ = reference.attention(q, k, v, dtype=torch.float32)
    truth, true_lse = naive.dense(q, k, v)
    assert out.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=1e-6)


def skip_by_brute_force(q, k, v, kept, threshold, row_group, key_tile, scale):
    """One head: decides tile by tile from the full score matrix, then takes one softmax over what was not dropped."""
    s_q, s_k = q.shape[0], k.shape[0]
    scores = scale * q.double() @ k.double().mT
    out, dropped, tiles = torch.zeros_like(q, dtype=torch.float64), 0, 0
    for i in range(kept.shape[0]):
        blocks = [j for j in range(kept.shape[1]) if kept[i, j]]
        per_tile = key_tile // 64
        groups = [sum(([*range(j * 64, min(j * 64 + 64, s_k))] for j in blocks[t : t + per_tile]), []) for t in range(0, len(blocks), per_tile)]
        for first in range(i * 128, min(i * 128 + 128, s_q), row_group):
            rows = list(range(first, min(first + row_group, i * 128 + 128, s_q)))
            running = {r: -math.inf for r in rows}
            used = []
            for keys in groups:
                tops = {r: float(scores[r, keys].max()) for r in rows}
                tiles += 1
                if all((running[r] - tops[r]) / math.log(2) >= threshold for r in rows):
                    dropped += 1
                    continue
                used += keys
                running = {r: max(running[r], tops[r]) for r in rows}
            if used:
                out[rows] = scores[rows][:, used].softmax(-1) @ v[used].double()
    return out, dropped / max(tiles, 1)


@pytest.mark.pairs(row_group=[16, 64, 128], key_tile=[64, 128], s=[500, 450], threshold=[3.0, 15.0])
def test_pv_skip_rule(rand, s, row_group, key_tile, threshold):
    q, k, v = (rand(n, 1, 2, s, 16) for n in range(3))
    rows = torch.arange(s)
    q[..., 0] = 20 + (rows // 16 % 3) * 8.0  # groups of 16 rows differ, so that the granularity matters
    n_k = -(-s // 64)
    k[..., 0] = torch.tensor([0.0, 2.0, -3.0, 2.5, -1.0, 1.9, -4.0, -4.0])[:n_k].repeat_interleave(64)[:s]
    kept = torch.ones(1, 2, -(-s // 128), n_k, dtype=torch.bool)
    kept[0, 1, 0, 1] = False
    kept[0, 1, 1, :2] = False
    out, lse, skipped = reference.attention(q, k, v, kept, pvthreshd=threshold, row_group=row_group, key_tile=key_tile)
    rates = []
    for h in range(2):
        expected, rate = skip_by_brute_force(q[0, h], k[0, h], v[0, h], kept[0, h], threshold, row_group, key_tile, 0.25)
        torch.testing.assert_close(out[0, h], expected, rtol=1e-9, atol=1e-10)
        assert float(skipped[0, h]) == pytest.approx(rate)
        rates.append(rate)
    assert max(rates) > 0, "nothing was skipped: the test says nothing"
    plain = reference.attention(q, k, v, kept)[0]
    difference = (out - plain).abs().max()
    assert 0 < difference and (threshold < 15 or difference < 1e-2)


def test_pv_skip_granularity_matters(rand):
    q, k, v = (rand(n, 1, 1, 256, 16) for n in range(3))
    q[..., 0] = torch.where(torch.arange(256) // 16 % 2 == 0, 12.0, 0.0)
    k[..., 0] = torch.tensor([3.0, -3.0, 3.0, -3.0]).repeat_interleave(64)
    rates = [float(reference.attention(q, k, v, pvthreshd=10, row_group=g, key_tile=t)[2]) for g, t in ((16, 64), (64, 64), (16, 128))]
    assert rates[0] == pytest.approx(0.25) and rates[1] == 0 and rates[2] == 0


FLAT = [  # docs/design/algorithm.md, "What is exact, what is not"
    (dict(qk="int8"), 0.0112), (dict(pv="fp8"), 0.036), (dict(pv="int8"), 0.0113), (dict(pv="fp16"), 0.0003),
]  # fmt: skip


@pytest.mark.parametrize("how, table", FLAT, ids=str)
def test_errors_of_the_quantised_forms_match_the_table(rand, how, table):
    q, k, v = (rand(n, 1, 2, 1024, 128) for n in range(3))
    truth, true_lse, _ = reference.attention(q, k, v)
    out, lse, _ = reference.attention(q, k, v, **how, key_tile=128)
    error = float((out - truth).norm() / truth.norm())
    assert 0.6 * table < error < 1.6 * table, f"{error:.5f}, table {table}"
    assert (lse - true_lse).abs().max() < 0.05


def test_int8_scores_centre_k_and_give_the_true_lse(rand):
    q, k, v = (rand(n, 1, 1, 300, 64) for n in range(3))
    k = k + 20 * rand(9, 64)
    truth, true_lse, _ = reference.attention(q, k, v)
    smooth, smooth_lse, _ = reference.attention(q, k, v, qk="int8")
    rough, _, _ = reference.attention(q, k, v, qk="int8", smooth_k=False)
    a, b = (float((x - truth).norm() / truth.norm()) for x in (smooth, rough))
    assert a < 0.03 < 5 * a < b
    assert (smooth_lse - true_lse).abs().max() < 0.1 and true_lse.abs().max() > 20


@pytest.mark.parametrize("s_k", [9, 300, 304])
def test_int8_scores_are_those_of_quantize(rand, s_k):
    """Keys that are alike but for the sampled ones, which are far away: any other sample would give another centre, and another scale."""
    q, k, v = rand(0, 1, 1, 40, 64), rand(1, 1, 1, s_k, 64), rand(2, 1, 1, s_k, 64)
    k[:, :, centring.sampled_keys(s_k, k.device)] += 30 * rand(3, 64)
    centre = centring.key_centre(k)
    q8, k8 = quantized.quantize_q(q).dequantize(), quantized.quantize_k(k, centre).dequantize()
    expected, lse, _ = reference.attention(q8, k8, v)
    got, true_lse, _ = reference.attention(q, k, v, qk="int8")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(true_lse, lse + 64**-0.5 * (q.double() * centre.double()).sum(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [dict(qk="int8", pv="int8"), dict(qk="int8", pv="fp8")], ids=str)
def test_quantised_forms_with_zero_channels_masks_and_blind_rows(rand, form):
    q, k, v = (rand(n, 1, 1, 200, 16) for n in range(3))
    v[..., 3] = 0
    q[:, :, 5] = 0
    mask = torch.arange(200)[None] % 3 > 0
    mask[:, 64:128] = False
    k, v = (x.masked_fill(~mask[:, None, :, None], math.nan) for x in (k, v))
    out, lse, _ = reference.attention(q, k, v, key_mask=mask, causal=True, causal_offset=-10, **form)
    truth, true_lse, _ = reference.attention(q, k, v, key_mask=mask, causal=True, causal_offset=-10)
    assert out.isfinite().all() and (out[..., 3] == 0).all()
    assert (out[:, :, :11] == 0).all() and (lse[:, :, :11] == -math.inf).all()
    assert (out - truth).norm() / truth.norm() < 0.06


def test_tiles_too_far_below_for_any_weight_stay_numbers():
    """e ** -1000 is zero even in fp64, and so is the step that P is rounded to."""
    q = torch.ones(1, 1, 1, 64)
    k = torch.cat([torch.zeros(64, 64), torch.full((64, 64), 200.0), torch.zeros(64, 64)])[None, None]
    v = torch.randn(1, 1, 192, 64, generator=torch.Generator().manual_seed(0))
    out, lse, _ = reference.attention(q, k, v, qk="exact", pv="int8")
    assert torch.allclose(out[0, 0, 0], v[0, 0, 64:128].double().mean(0), atol=0.02) and bool(lse.isfinite().all())
