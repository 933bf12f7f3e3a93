"""Stage 1 against a naive fp64 selection written from the contract (conftest.py): which blocks are kept, forced, visible and counted."""

from __future__ import annotations

import math

import pytest
import torch
from sparge_kernels import order, select_blocks, selection, sparse_attention
from sparge_kernels.call import Call


def kept(*args, **options):
    return select_blocks(*args, **options).to_dense()


@pytest.mark.parametrize("score", ["subblock", "mean"])
@pytest.mark.parametrize("seed", [1, 11])
@pytest.mark.parametrize(
    "options",
    [
        dict(topk=0.05), dict(topk=0.35), dict(topk=0.5), dict(topk=1.0), dict(cdfthreshd=0.01), dict(cdfthreshd=0.5), dict(cdfthreshd=0.9),
        dict(cdfthreshd=1.0), dict(topk=0.2, cdfthreshd=0.7), dict(topk=0.6, cdfthreshd=0.2), dict(topk=0.1, simthreshd1=0.4),
        dict(topk=0.1, simthreshd1=1.0), dict(topk=0.1, simthreshd1=0.0), dict(cdfthreshd=0.5, simthreshd1=0.35), dict(topk=0.2, scale=0.02),
        dict(topk=0.2, scale=1.5), dict(cdfthreshd=0.5, scale=0.02), dict(topk=0.2, smooth_k=False), dict(topk=0.2, smooth_k=False, simthreshd1=0.6),
        dict(topk=0.2, always_keep=[(0, 1), (500, 520)]), dict(topk=0.2, always_keep={"q": [(127, 129)]}),
        dict(topk=0.2, always_keep={"k": [(63, 65)]}), dict(cdfthreshd=0.3, always_keep={"q": [(0, 10)], "k": [(990, 1000)]}),
        dict(topk=0.3, causal=True), dict(cdfthreshd=0.5, causal=True), dict(topk=0.5, causal=True, causal_offset=37),
        dict(topk=0.5, causal=True, causal_offset=-201),
        dict(topk=0.2, causal=True, always_keep={"k": [(0, 1)]}), dict(),
    ],
    ids=str,
)  # fmt: skip
def test_rules(clustered, naive, options, seed, score):
    q, k = clustered(seed, 1, 2, 1000, 16), clustered(seed + 2, 1, 1, 1000, 16)
    expected = naive.select(q, k, score=score, **options)
    got = select_blocks(q, k, score=score, **options)
    naive.compare_maps(got.to_dense(), expected)
    torch.testing.assert_close(got.density, (got.to_dense().sum((-2, -1)) / expected.visible.sum((-2, -1))).float())


@pytest.mark.parametrize("score", ["subblock", "mean"])
@pytest.mark.parametrize("s_q, s_k", [(1, 1), (63, 63), (200, 200), (200, 1000), (1000, 63), (129, 65), (161, 385)])
def test_lengths(clustered, naive, s_q, s_k, score):
    q, k = clustered(1, 2, 4, s_q, 16), clustered(3, 2, 2, s_k, 16)
    for options in (dict(topk=0.4), dict(cdfthreshd=0.6), dict(topk=0.2, simthreshd1=0.3), dict(topk=0.4, causal=True, causal_offset=3)):
        naive.compare_maps(kept(q, k, score=score, **options), naive.select(q, k, score=score, **options))


@pytest.mark.pairs(causal=[False, True], bias=["bool", "float"], score=["subblock", "mean"])
def test_masked_keys_never_count(clustered, naive, causal, bias, score):
    q, k = clustered(1, 2, 2, 500, 16), clustered(3, 2, 2, 500, 16)
    mask = torch.rand(2, 500, generator=torch.Generator().manual_seed(2)) > 0.5
    mask[0, 64:192] = False
    mask[1, 300:400] = False
    hidden = ~mask
    if bias == "float":
        mask = torch.where(mask, torch.randn(2, 500, generator=torch.Generator().manual_seed(3)), -math.inf)
    poisoned = k.masked_fill(hidden[:, None, :, None], math.nan)
    other = k.masked_fill(hidden[:, None, :, None], 1e4)
    judges = [dict()] if bias == "float" else [dict(), dict(simthreshd1=0.35)]
    for extra in judges:
        for rule in (dict(topk=0.3), dict(cdfthreshd=0.6)):
            options = dict(**rule, **extra, score=score, causal=causal, key_mask=mask)
            got = kept(q, poisoned, **options)
            naive.compare_maps(got, naive.select(q, other.masked_fill(hidden[:, None, :, None], 0), **options))
            assert torch.equal(got, kept(q, other, **options))


@pytest.mark.parametrize("kind", ["tiles", "hilbert"])
@pytest.mark.parametrize("score", ["subblock", "mean"])
def test_orders(clustered, naive, score, kind):
    plan = order.plan(kind, (21, (5, 7, 13), 30))
    q, k = clustered(1, 1, 2, plan.length, 16), clustered(3, 1, 1, plan.length, 16)
    for options in (dict(topk=0.3), dict(cdfthreshd=0.6), dict(topk=0.2, simthreshd1=0.3), dict(topk=0.1, always_keep=[(0, 3)]),
                    dict(topk=0.2, key_mask=torch.arange(plan.length)[None] % 3 > 0)):  # fmt: skip
        naive.compare_maps(kept(q, k, order=plan, score=score, **options), naive.select(q, k, perm=plan.perm, score=score, **options))


@pytest.mark.parametrize("topk", [0.001, 0.05, 0.0625, 0.1, 0.15, 0.25, 0.3, 0.35, 0.5, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("n_free", [1, 2, 3, 7, 10, 16, 30])
def test_count_of_free_blocks(rand, topk, n_free):
    """max(1, floor(topk * n_free + 0.5)), and forced blocks on top."""
    import numpy as np

    n = max(1, int(np.floor(np.float32(topk) * np.float32(n_free) + np.float32(0.5))))
    q, k = rand(1, 1, 1, 128, 8), rand(2, 1, 1, 64 * n_free, 8)
    assert int(kept(q, k, topk=topk).sum()) == n
    forced = torch.cat([k, rand(3, 1, 1, 64 * 3, 8)], 2)
    got = kept(q, forced, topk=topk, always_keep={"k": [(64 * n_free, 64 * n_free + 192)]})
    assert int(got.sum()) == n + 3 and got[..., n_free:].all()
    per_head = kept(q, k, topk=torch.tensor([topk]))
    assert int(per_head.sum()) == n


def test_nothing_free_and_something_forced(rand):
    q, k = rand(1, 1, 1, 300, 8), rand(2, 1, 1, 500, 8)
    assert kept(q, k, topk=0.1, always_keep={"k": [(0, 500)]}).all()
    got = kept(q, k, topk=0.1, causal=True)
    assert got.sum(-1).flatten().tolist() == [2, 2 + 1, 1 + 1]  # cut by the diagonal: 2, 2, 1; free: 0, 2, 4


def test_causal_topk_counts_visible_blocks_only(clustered):
    """Counted among all blocks, topk=0.5 would keep three quarters of the visible ones."""
    q, k = clustered(1, 1, 1, 4096, 16), clustered(2, 1, 1, 4096, 16)
    mask = select_blocks(q, k, topk=0.5, causal=True)
    dense = mask.to_dense()[0, 0]
    for i in range(32):
        free = 2 * i  # 2 i + 2 visible, two on the diagonal forced
        assert int(dense[i].sum()) == 2 + (max(1, math.floor(0.5 * free + 0.5)) if free else 0)
        assert not dense[i, 2 * i + 2 :].any()
    assert mask.visible.flatten().tolist() == [2 * i + 2 for i in range(32)]
    assert 0.5 < float(mask.density) < 0.55


def test_density_is_kept_over_visible(clustered):
    q, k, v = (clustered(seed, 2, 2, 700, 16) for seed in (1, 3, 5))
    mask = torch.ones(2, 700, dtype=torch.bool)
    mask[0, 128:448] = False
    for options in (dict(topk=0.3, key_mask=mask), dict(topk=0.3, causal=True), dict(topk=0.3, key_mask=mask, causal=True), dict(topk=0.3)):
        blocks = select_blocks(q, k, **options)
        visible = torch.ones(2, 6, 11)
        if "key_mask" in options:
            visible[0, :, 2:7] = 0
        if "causal" in options:
            visible *= torch.arange(11)[None] * 64 <= torch.arange(6)[:, None] * 128 + 127
        expected = blocks.to_dense().sum((-2, -1)) / visible.sum((-2, -1))[:, None]
        torch.testing.assert_close(blocks.density, expected)
        _, info = sparse_attention(q, k, v, **options, return_info=True)
        torch.testing.assert_close(info.density, expected)
        torch.testing.assert_close(info.block_mask.density, expected)


def test_at_least_one_visible_block_a_row(rand):
    q, k = rand(1, 1, 2, 300, 8), rand(2, 1, 2, 1000, 8)
    for options in (dict(topk=1e-6), dict(cdfthreshd=1e-6), dict(topk=1e-6, key_mask=torch.arange(1000)[None] > 900)):
        assert (kept(q, k, **options).sum(-1) >= 1).all()
    assert (kept(q, k, cdfthreshd=1e-6).sum(-1) == 1).all()


def test_cdf_includes_the_crossing_block_and_no_more():
    """Four key blocks of predicted mass 1/2, 1/4, 1/8, 1/8: the scores are known in closed form."""
    q = torch.zeros(1, 1, 128, 2)
    q[..., 0] = 1
    k = torch.zeros(1, 1, 256, 2)
    k[0, 0, :, 0] = torch.tensor([1 / 8, 1 / 2, 1 / 8, 1 / 4]).log().repeat_interleave(64)
    for cdf, expected in ((0.3, [1]), (0.49, [1]), (0.51, [1, 3]), (0.74, [1, 3]), (0.76, 3), (0.99, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])):
        for score in ("mean", "subblock"):
            got = kept(q, k, cdfthreshd=cdf, scale=1.0, score=score)[0, 0, 0].nonzero()[:, 0].tolist()
            assert got == expected or len(got) == expected, f"cdf {cdf} {score}: {got}"
    # A forced block's mass counts towards the threshold.
    got = kept(q, k, cdfthreshd=0.6, scale=1.0, always_keep={"k": [(0, 64)]})[0, 0, 0].nonzero()[:, 0].tolist()
    assert got == [0, 1]


def test_short_last_key_block_weighs_less():
    """ln(n_j / 64): a one-token block needs 64 times the weight to win."""
    q = torch.ones(1, 1, 128, 1)
    k = torch.zeros(1, 1, 129, 1)
    k[0, 0, 64:128] = 0.001
    for last, winner in ((3.0, 1), (4.5, 2)):  # ln 64 = 4.16
        k[0, 0, 128] = last
        for score in ("mean", "subblock"):
            got = kept(q, k, topk=0.34, scale=1.0, score=score)[0, 0, 0]
            assert got.nonzero()[:, 0].tolist() == [winner], (last, score)


def test_subblock_sees_what_the_mean_hides():
    """Half of the rows want block 0 strongly, the other half the reverse of it: their mean says nothing; a spread-out block beats a flat one."""
    q = torch.zeros(1, 1, 128, 2)
    q[0, 0, :64, 0], q[0, 0, 64:, 0] = 6.0, -6.0
    q[..., 1] = 0.5
    k = torch.zeros(1, 1, 192, 2)
    k[0, 0, :64, 0] = 1.0
    k[0, 0, 64:128, 1] = 1.0
    assert kept(q, k, topk=0.3, scale=1.0, score="mean")[0, 0, 0].tolist() == [False, True, False]
    assert kept(q, k, topk=0.3, scale=1.0, score="subblock")[0, 0, 0].tolist() == [True, False, False]
    q = torch.ones(1, 1, 128, 1)
    k = torch.zeros(1, 1, 128, 1)
    k[0, 0, 64::2], k[0, 0, 65::2] = 3.0, -3.1
    assert kept(q, k, topk=0.5, scale=1.0, score="mean", smooth_k=False)[0, 0, 0].tolist() == [True, False]
    assert kept(q, k, topk=0.5, scale=1.0, score="subblock", smooth_k=False)[0, 0, 0].tolist() == [False, True]


def test_variance_term_is_capped_at_8():
    q = torch.ones(1, 1, 128, 1)
    k = torch.zeros(1, 1, 128, 1)
    k[0, 0, 64::2], k[0, 0, 65::2] = 10.0, -10.0  # variance 100: uncapped 50
    k[0, 0, :64] = 7.9
    assert kept(q, k, topk=0.5, scale=1.0, smooth_k=False)[0, 0, 0].tolist() == [False, True]
    k[0, 0, :64] = 8.1
    assert kept(q, k, topk=0.5, scale=1.0, smooth_k=False)[0, 0, 0].tolist() == [True, False]


def test_judge_keeps_mixed_blocks(rand):
    base = rand(1, 1, 1, 1, 16)
    q, k = base.expand(1, 1, 512, 16).clone(), base.expand(1, 1, 512, 16).clone()
    q = q + 0.01 * rand(2, 1, 1, 512, 16)
    k = k + 0.01 * rand(3, 1, 1, 512, 16)
    q[:, :, 128:256] = rand(4, 1, 1, 128, 16)  # query block 1 and key block 5 are mixed
    k[:, :, 320:384] = rand(5, 1, 1, 64, 16)
    got = kept(q, k, topk=0.1, simthreshd1=0.5, smooth_k=False)[0, 0]
    assert got[1].all() and got[:, 5].all() and got[[0, 2, 3]].sum(-1).tolist() == [2, 2, 2]
    off = kept(q, k, topk=0.1, simthreshd1=-0.1, smooth_k=False)[0, 0]
    assert off.sum(-1).tolist() == [1, 1, 1, 1]


def test_zero_rows_count_as_zero_vectors_never_nan(naive):
    q, k = torch.ones(1, 1, 256, 8), torch.ones(1, 1, 256, 8)
    k[:, :, 64:96] = 0  # half of the block: similarity 1/4
    q[:, :, 128:192] = 0
    for sim, mixed in ((0.2, False), (0.3, True)):
        got = kept(q, k, topk=0.25, simthreshd1=sim, smooth_k=False)
        assert bool(got[0, 0, 0, 1]) >= mixed and bool(got[0, 0, 1].all()) == mixed
        assert bool(got[0, 0, 0, 1]) == mixed, "a block of equal rows wins the count, so block 1 is kept by the judge alone"
    all_zero = kept(torch.zeros(1, 1, 256, 8), torch.zeros(1, 1, 256, 8), topk=0.25, simthreshd1=0.5)
    assert all_zero.all(), "blocks of zero vectors are not self-similar"


def test_last_partial_blocks_are_judged_on_their_valid_rows_only(rand):
    """The published code pads them: the last query block is dense and the last key block always kept."""
    base = rand(1, 1, 1, 1, 16)
    q = base + 0.01 * rand(2, 1, 1, 128 * 3 + 5, 16)
    k = base + 0.01 * rand(3, 1, 1, 64 * 9 + 3, 16)
    k[:, :, 576:] -= 0.2 * base
    got = kept(q, k, topk=0.2, simthreshd1=0.6, smooth_k=False)[0, 0]
    assert got.sum(-1).tolist() == [2, 2, 2, 2] and not got[:, 9].any()


def test_scale_reaches_the_selection(clustered):
    q, k = clustered(1, 1, 2, 1000, 16), clustered(3, 1, 2, 1000, 16)
    small, large = (select_blocks(q, k, cdfthreshd=0.6, scale=s).density.mean() for s in (0.01, 1.0))
    assert small > 0.5 > large


def test_centre_comes_from_the_caller_s_tokens(rand, naive):
    """In a token order too. The sampled tokens are -u and the rest u: centred by them the rest is 2 u and alike; by any other sample it is noise."""
    plan = order.plan("hilbert", ((4, 16, 16),))
    q, k = 1 + 0.3 * rand(1, 1, 1, 1024, 16), 1 + 0.3 * rand(2, 1, 1, 1024, 16)
    k[:, :, [16 * g + (g * g * 1126333 >> 20) % 16 for g in range(64)]] -= 2
    options = dict(topk=0.1, simthreshd1=0.4)
    got = kept(q, k, order=plan, **options)
    naive.compare_maps(got, naive.select(q, k, perm=plan.perm, **options))
    assert got.float().mean() < 0.5, "blocks that are alike were judged mixed"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_pools_in_fp32(clustered, naive, dtype):
    q, k = clustered(1, 1, 2, 1000, 64, dtype), clustered(3, 1, 2, 1000, 64, dtype)
    for options in (dict(topk=0.3), dict(cdfthreshd=0.7), dict(topk=0.2, simthreshd1=0.3)):
        naive.compare_maps(kept(q, k, **options), naive.select(q, k, **options))
    big = clustered(1, 1, 1, 500, 64, torch.float32) * 2000
    assert kept(big.half(), big.half(), topk=0.3).sum(-1).tolist() == [[[2, 2, 2, 2]]], "sums of large fp16 values overflow"


def test_many_heads_in_chunks_equal_single_heads(clustered, monkeypatch):
    q, k = clustered(1, 2, 6, 700, 16), clustered(3, 2, 3, 700, 16)
    options = dict(topk=0.3, cdfthreshd=0.3, simthreshd1=0.3)
    whole = kept(q, k, **options)
    for size in (1, 700 * 16 * 2 * 2, 1 << 30):
        monkeypatch.setattr(selection, "_CHUNK_ELEMENTS", size)
        assert torch.equal(kept(q, k, **options), whole)


def test_visibility_by_token_counting():
    for s_q, s_k, offset in ((300, 500, 0), (300, 500, -70), (129, 64, 5), (1, 1, -1), (256, 256, 64), (256, 256, 63)):
        call = Call.of(torch.zeros(1, 1, s_q, 1), torch.zeros(1, 1, s_k, 1), "torch", 1.0, causal=True, causal_offset=offset)
        visible, partial = selection.visibility(call, None)
        sees = torch.arange(s_k)[None] <= torch.arange(s_q)[:, None] + offset
        for i in range(-(-s_q // 128)):
            for j in range(-(-s_k // 64)):
                tile = sees[i * 128 : (i + 1) * 128, j * 64 : (j + 1) * 64]
                assert bool(visible[0, i, j]) == bool(tile.any()), (s_q, s_k, offset, i, j)
                assert bool(partial[i, j]) == bool(tile.any() and not tile.all()), (s_q, s_k, offset, i, j)
