"""sparse_attention, block_sparse_attention, merge_lse: against fp64 references and PyTorch's own attention."""

from __future__ import annotations

import math
import mmap

import pytest
import reference
import torch
from sparge_kernels import AttentionInfo, BlockMask, block_sparse_attention, merge_lse, order, select_blocks, sparse_attention
from sparge_kernels import block_mask as block_mask_module
from sparge_kernels.block_mask import KeptBlocks

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def qkv(rand, b, h, h_kv, s_q, s_k, d, dtype=torch.float32, seed=0):
    return rand(seed, b, h, s_q, d, dtype=dtype), rand(seed + 1, b, h_kv, s_k, d, dtype=dtype), rand(seed + 2, b, h_kv, s_k, d, dtype=dtype)


# topk=1 is dense attention.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "b, h, h_kv, s_q, s_k, d",
    [
        pytest.param(1, 2, 2, 1, 1, 64, id="S=1"),
        pytest.param(1, 2, 2, 63, 63, 64, id="S=63"),
        pytest.param(1, 2, 2, 200, 200, 64, id="S=200"),
        pytest.param(1, 2, 2, 1000, 1000, 64, id="S=1000"),
        pytest.param(1, 2, 2, 1, 1000, 64, id="S_q=1,S_k=1000"),
        pytest.param(1, 2, 2, 1000, 1, 64, id="S_q=1000,S_k=1"),
        pytest.param(1, 2, 2, 200, 63, 64, id="S_q=200,S_k=63"),
        pytest.param(2, 6, 2, 130, 200, 64, id="GQA 3:1,batch 2"),
        pytest.param(2, 4, 1, 129, 65, 40, id="MQA,batch 2"),
    ],
)
def test_topk_1_is_dense(rand, naive, dtype, b, h, h_kv, s_q, s_k, d):
    q, k, v = qkv(rand, b, h, h_kv, s_q, s_k, d, dtype)
    out, lse, info = sparse_attention(q, k, v, topk=1, return_lse=True, return_info=True)
    naive.check(out, q, k, v, lse=lse)
    naive.check(sparse_attention(q, k, v, topk=1), q, k, v)
    assert bool((info.density == 1).all()) and info.density.shape == (b, h)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 8, 40, 64, 80, 96, 128, 192, 256])
def test_head_dims(rand, naive, dtype, d):
    q, k, v = qkv(rand, 1, 2, 1, 150, 200, d, dtype)
    out, lse = sparse_attention(q, k, v, topk=1, return_lse=True)
    naive.check(out, q, k, v, lse=lse)
    out, lse, info = sparse_attention(q, k, v, topk=0.3, return_lse=True, return_info=True)
    naive.check(out, q, k, v, lse=lse, blocks=info.block_mask.to_dense())


VIEWS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "offset": lambda x: torch.cat([torch.full((5,), math.nan, dtype=x.dtype), x.flatten()])[5:].view(x.shape),
    "sliced": lambda x: _inside(x, (1, 1, 3, 8)),
    "every second row": lambda x: torch.stack([x, torch.full_like(x, math.nan)], 3).flatten(2, 3)[:, :, ::2],
    "expanded batch": lambda x: x[:1].expand(x.shape),
    "expanded heads": lambda x: x[:, :1].expand(x.shape),
}


def _inside(x, margin):
    """x in the middle of a larger buffer full of NaN."""
    big = torch.full([n + 2 * m for n, m in zip(x.shape, margin, strict=True)], math.nan, dtype=x.dtype)
    view = big[tuple(slice(m, m + n) for n, m in zip(x.shape, margin, strict=True))]
    view.copy_(x)
    return view


@pytest.mark.parametrize("topk", [1, 0.4])
@pytest.mark.parametrize("view", VIEWS)
def test_strided_views(rand, naive, view, topk):
    q, k, v = (VIEWS[view](x) for x in qkv(rand, 2, 4, 2, 200, 333, 40))
    out, lse, info = sparse_attention(q, k, v, topk=topk, return_lse=True, return_info=True)
    naive.check(out, q, k, v, lse=lse, blocks=info.block_mask.to_dense())
    again = sparse_attention(*(x.contiguous() for x in (q, k, v)), topk=topk)
    assert torch.equal(again, out)


@pytest.mark.parametrize("topk", [1, 0.4])
def test_head_dim_1_may_have_any_last_stride(rand, naive, topk):
    q, k, v = (x[..., ::7][..., :1] for x in qkv(rand, 1, 2, 2, 200, 200, 7))
    q = q.as_strided(q.shape, (*q.stride()[:3], 3))
    out, lse, info = sparse_attention(q, k, v, topk=topk, return_lse=True, return_info=True)
    naive.check(out, q, k, v, lse=lse, blocks=info.block_mask.to_dense())


@pytest.mark.parametrize("topk", [1, 0.4])
def test_layout_nhd(rand, naive, topk):
    q, k, v = qkv(rand, 2, 4, 2, 200, 333, 64)
    expected, expected_lse, e_info = sparse_attention(q, k, v, topk=topk, return_lse=True, return_info=True)
    nhd = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    out, lse, info = sparse_attention(*nhd, topk=topk, layout="NHD", return_lse=True, return_info=True)
    assert out.shape == nhd[0].shape and lse.shape == (2, 4, 200)
    assert torch.equal(info.block_mask.to_dense(), e_info.block_mask.to_dense())
    naive.check(out.transpose(1, 2), q, k, v, lse=lse, blocks=info.block_mask.to_dense())
    torch.testing.assert_close(out.transpose(1, 2), expected, rtol=1e-5, atol=1e-6)
    mask = info.block_mask
    again = block_sparse_attention(*nhd, mask, layout="NHD")
    assert torch.equal(again, out)
    chosen = select_blocks(nhd[0], nhd[1], topk=topk, layout="NHD")
    assert torch.equal(chosen.to_dense(), mask.to_dense())


def key_masks():
    s_k = 333
    scattered = torch.rand(2, s_k, generator=torch.Generator().manual_seed(5)) > 0.4
    blocks = scattered.clone()
    blocks[0, 64:192] = False
    blocks[1, :64] = False
    blocks[1, 320:] = False
    empty = blocks.clone()
    empty[1] = False
    one = torch.zeros(2, s_k, dtype=torch.bool)
    one[0, 332], one[1, 70] = True, True
    bias = torch.randn(2, s_k, generator=torch.Generator().manual_seed(6)) * 2
    lows = torch.where(blocks, bias, -1e4)
    infinite = torch.where(empty, bias, -math.inf)
    low_but_seen = torch.where(scattered, bias, -9000.0)
    low_but_seen[:, :3] = 0
    return {
        "scattered": scattered, "whole blocks": blocks, "a batch element": empty, "one key": one, "bias": bias, "bias with -1e4": lows,
        "bias with -inf, a batch element": infinite, "bias with -9000 is not masked": low_but_seen, "bias with a large shift": bias + 200,
    }  # fmt: skip


KEY_MASKS = key_masks()


@pytest.mark.pairs(name=KEY_MASKS, topk=[1, 0.3], causal=[False, True])
def test_key_masks(rand, naive, name, topk, causal):
    q, k, v = qkv(rand, 2, 4, 2, 200, 333, 40)
    mask = KEY_MASKS[name]
    hidden = ~mask if mask.dtype == torch.bool else mask <= -1e4
    # What masked rows hold must not matter: NaN in half of them, infinities in the rest.
    poison = torch.where(torch.arange(333) % 2 == 0, math.nan, math.inf)[None, None, :, None]
    k, v = (torch.where(hidden[:, None, :, None], poison, x) for x in (k, v))
    out, lse, info = sparse_attention(q, k, v, topk=topk, key_mask=mask, causal=causal, return_lse=True, return_info=True)
    blocks = info.block_mask.to_dense()
    naive.check(out, q, k, v, lse=lse, key_mask=mask, causal=causal, blocks=blocks)
    for b in range(2):
        fully = torch.nn.functional.pad(hidden[b], (0, 51), value=True).view(6, 64).all(-1)
        assert not blocks[b, :, :, fully].any(), "a fully masked block is visited"
    if topk == 1:
        naive.check(out, q, k, v, lse=lse, key_mask=mask, causal=causal)
    expected = naive.select(q, torch.where(hidden[:, None, :, None], 0, k), topk=topk, key_mask=mask, causal=causal)
    naive.compare_maps(blocks, expected)
    torch.testing.assert_close(info.density, blocks.sum((-2, -1)) / expected.visible.sum((-2, -1)).clamp_min(1))
    if "batch element" in name:
        assert bool((out[1] == 0).all()) and bool((lse[1] == -math.inf).all()) and bool((info.density[1] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float_bias_in_half_precision(rand, naive, dtype):
    q, k, v = qkv(rand, 2, 2, 2, 200, 333, 64, dtype)
    mask = KEY_MASKS["bias with -inf, a batch element"]
    for given in (mask, mask.to(dtype)):
        out = sparse_attention(q, k, v, topk=1, key_mask=given)
        naive.check(out, q, k, v, key_mask=given)


@pytest.mark.pairs(offset=[0, 1, 63, 64, 300, -1, -64, -130, -500, 5000], lengths=[(1, 1), (200, 200), (333, 200), (200, 333)], topk=[1, 0.3])
def test_causal(rand, naive, lengths, offset, topk):
    q, k, v = qkv(rand, 1, 4, 2, *lengths, 40)
    out, lse, info = sparse_attention(q, k, v, topk=topk, causal=True, causal_offset=offset, return_lse=True, return_info=True)
    naive.check(out, q, k, v, lse=lse, causal=True, causal_offset=offset, blocks=info.block_mask.to_dense())
    if topk == 1:
        naive.check(out, q, k, v, lse=lse, causal=True, causal_offset=offset)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_causal_in_half_precision(rand, naive, dtype):
    q, k, v = qkv(rand, 1, 2, 1, 333, 333, 64, dtype)
    out, lse = sparse_attention(q, k, v, topk=1, causal=True, causal_offset=-5, return_lse=True)
    naive.check(out, q, k, v, lse=lse, causal=True, causal_offset=-5)


# Fewer blocks.


OPTIONS = {
    "topk": dict(topk=0.3),
    "topk mean": dict(topk=0.3, score="mean"),
    "cdf": dict(cdfthreshd=0.6),
    "cdf mean": dict(cdfthreshd=0.6, score="mean"),
    "union": dict(topk=0.2, cdfthreshd=0.5),
    "default": dict(),
    "judge": dict(topk=0.1, simthreshd1=0.3),
    "causal": dict(topk=0.3, causal=True, causal_offset=-30),
    "scale": dict(topk=0.3, scale=0.4),
    "always_keep": dict(topk=0.1, always_keep=[(100, 140)]),
    "no smooth_k": dict(topk=0.3, smooth_k=False),
}


@pytest.mark.parametrize("s_q, s_k", [(1000, 1000), (200, 1000), (63, 63)], ids=["S=1000", "S_q=200,S_k=1000", "S=63"])
@pytest.mark.parametrize("name", OPTIONS)
def test_sparse_output_under_its_own_map(clustered, naive, name, s_q, s_k):
    if name == "always_keep" and s_q < 140:
        pytest.skip("the range lies past the end")
    q, k, v = clustered(1, 1, 2, s_q, 32), clustered(3, 1, 1, s_k, 32), clustered(5, 1, 1, s_k, 32)
    options = OPTIONS[name]
    out, lse, info = sparse_attention(q, k, v, **options, return_lse=True, return_info=True)
    how = {key: options[key] for key in ("causal", "causal_offset", "scale") if key in options}
    blocks = info.block_mask.to_dense()
    naive.check(out, q, k, v, lse=lse, blocks=blocks, **how)
    naive.compare_maps(blocks, naive.select(q, k, **options))
    truth, true_lse, _ = reference.attention(q, k, v, info.block_mask, **how)
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=2e-5 * float(truth.abs().max()))
    naive.check_lse(lse, true_lse)
    selected = {key: value for key, value in options.items()}
    assert torch.equal(select_blocks(q, k, **selected).to_dense(), blocks)
    if s_q == 1000 and s_k == 1000:
        assert info.density.max() < 0.95, "nothing was skipped: the comparison says nothing"


@pytest.mark.parametrize("kind", ["tiles", "hilbert"])
@pytest.mark.parametrize("extra", ["", "mask", "keep"])
def test_order(clustered, naive, kind, extra):
    plan = order.plan(kind, (37, (3, 9, 11), 20, (2, 8, 9), 5))
    s = plan.length
    assert s == 37 + 297 + 20 + 144 + 5
    q, k, v = (clustered(seed, 2, 2, s, 32) for seed in (1, 3, 5))
    options = {}
    if extra == "mask":
        options["key_mask"] = torch.rand(2, s, generator=torch.Generator().manual_seed(1)) > 0.3
    if extra == "keep":
        options["always_keep"] = list(plan.protected)
    out, lse, info = sparse_attention(q, k, v, topk=0.3, order=plan, return_lse=True, return_info=True, **options)
    blocks = info.block_mask.to_dense()
    expected = naive.select(q, k, topk=0.3, perm=plan.perm, **options)
    naive.compare_maps(blocks, expected)
    mask = {"key_mask": options["key_mask"]} if extra == "mask" else {}
    naive.check(out, q, k, v, lse=lse, blocks=blocks, perm=plan.perm, **mask)
    again, again_lse = block_sparse_attention(q, k, v, info.block_mask, order=plan, return_lse=True, **mask)
    assert torch.equal(again, out) and torch.equal(again_lse, lse)
    assert torch.equal(select_blocks(q, k, topk=0.3, order=plan, **options).to_dense(), blocks)
    dense = sparse_attention(q, k, v, topk=1, order=plan, **options)
    naive.check(dense, q, k, v, **mask)
    if extra == "keep":
        tail = torch.zeros(s, dtype=torch.bool)
        for start, end in plan.protected:
            tail[start:end] = True
        place = plan.inverse[tail.nonzero()[:, 0]]
        assert place.min() == s - tail.sum(), "protected spans are not at the end"
        assert blocks[:, :, :, place.min() // 64 :].all() and blocks[:, :, place.min() // 128 :].all()


def test_row_major_plan_changes_nothing(clustered):
    plan = order.plan("row_major", (10, (3, 9, 11)))
    q, k, v = (clustered(seed, 1, 2, plan.length, 32) for seed in (1, 3, 5))
    assert torch.equal(sparse_attention(q, k, v, topk=0.3, order=plan), sparse_attention(q, k, v, topk=0.3))


def test_per_head_tensors(clustered, naive):
    q, k, v = clustered(1, 2, 4, 1000, 32), clustered(3, 2, 2, 1000, 32), clustered(5, 2, 2, 1000, 32)
    topk = torch.tensor([0.1, 0.3, 0.6, 1.0])
    cdf = torch.tensor([0.2, 0.9, 0.4, 0.1], dtype=torch.float64)
    sim = torch.tensor([-1.0, 0.4, 0.9, -0.1])
    pv = torch.tensor([15.0, 1.0, 50.0, 3.0])
    out, info = sparse_attention(q, k, v, topk=topk, cdfthreshd=cdf, simthreshd1=sim, pvthreshd=pv, return_info=True)
    blocks = info.block_mask.to_dense()
    naive.compare_maps(blocks, naive.select(q, k, topk=topk, cdfthreshd=cdf, simthreshd1=sim))
    naive.check(out, q, k, v, blocks=blocks)
    for h in range(4):
        one = select_blocks(q[:, h : h + 1], k[:, h // 2 : h // 2 + 1], topk=float(topk[h]), cdfthreshd=float(cdf[h]), simthreshd1=float(sim[h]))
        assert torch.equal(one.to_dense()[:, 0], blocks[:, h])


def test_pvthreshd_is_only_a_permission(clustered):
    q, k, v = (clustered(seed, 1, 2, 500, 32) for seed in (1, 3, 5))
    out, info = sparse_attention(q * 5, k, v, pvthreshd=0.01, return_info=True)
    assert torch.equal(out, sparse_attention(q * 5, k, v, pvthreshd=50)) and bool((info.pv_skipped == 0).all()) and info.pv_skipped.shape == (1, 2)


# Block masks.


@pytest.mark.pairs(form=["tensor", "BlockMask"], shape=[(1, 1), (1, 4), (2, 1), (2, 4)], causal=[False, True])
def test_block_masks_with_empty_and_full_rows(rand, naive, form, shape, causal):
    q, k, v = qkv(rand, 2, 4, 2, 1000, 700, 40)
    dense = torch.rand(*shape, 8, 11, generator=torch.Generator().manual_seed(3)) > 0.6
    dense[:, :, 1], dense[:, :, 2], dense[:, :, 7], dense[..., 3, :] = False, True, False, torch.arange(11) == 10
    mask = dense if form == "tensor" else BlockMask.from_dense(dense)
    out, lse, info = block_sparse_attention(q, k, v, mask, causal=causal, return_lse=True, return_info=True)
    naive.check(out, q, k, v, lse=lse, blocks=dense, causal=causal)
    assert bool((out[:, :, 128:256] == 0).all()) and bool((lse[:, :, 128:256] == -math.inf).all())
    assert bool((out[:, :, 896:] == 0).all()) and bool((lse[:, :, 896:] == -math.inf).all())
    full = dense.expand(2, 4, -1, -1)
    visible = torch.ones(8, 11, dtype=torch.bool)
    if causal:
        visible = torch.arange(11)[None] * 64 <= (torch.arange(8)[:, None] + 1) * 128 - 1
    expected = (full & visible).sum((-2, -1)) / visible.sum()
    torch.testing.assert_close(info.density, expected.float())
    assert torch.equal(info.block_mask.to_dense(), full & visible)
    torch.testing.assert_close(info.block_mask.density, expected.float())


@pytest.mark.parametrize("s", [1, 63, 200, 1000])
def test_empty_mask_gives_zeros_everywhere(rand, s):
    q, k, v = qkv(rand, 1, 2, 2, s, s, 64)
    mask = torch.zeros(1, 1, -(-s // 128), -(-s // 64), dtype=torch.bool)
    out, lse, info = block_sparse_attention(q, k, v, mask, return_lse=True, return_info=True)
    assert bool((out == 0).all()) and bool((lse == -math.inf).all()) and bool((info.density == 0).all())


def test_blocks_not_kept_are_not_read(rand, naive):
    q, k, v = qkv(rand, 1, 2, 1, 300, 500, 64)
    keep = torch.tensor([[1, 0, 0, 1, 0, 0, 0, 1], [0, 0, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 1]], dtype=torch.bool)[None, None]
    gone = ~keep.any(2)[0, 0]
    rows = gone.repeat_interleave(64)[:500]
    k, v = (x.masked_fill(rows[:, None], math.nan) for x in (k, v))
    out, lse = block_sparse_attention(q, k, v, keep, return_lse=True)
    clean_k, clean_v = (x.masked_fill(rows[:, None], 0) for x in (k, v))
    naive.check(out, q, clean_k, clean_v, lse=lse, blocks=keep)


# LSE.


@pytest.mark.parametrize("topk, smooth_k", [(1, True), (1, False), (0.5, True), (0.5, False)])
def test_two_key_ranges_merge_to_the_whole(rand, naive, topk, smooth_k):
    q, k, v = qkv(rand, 2, 4, 2, 300, 640, 64)
    k[:, :, :320] += 3 * rand(9, 2, 2, 1, 64)  # the ranges have different centres
    k[:, :, 320:] -= 2 * rand(10, 2, 2, 1, 64)
    parts = [sparse_attention(q, k[:, :, r], v[:, :, r], topk=topk, smooth_k=smooth_k, return_lse=True, return_info=True)
             for r in (slice(0, 320), slice(320, 640))]  # fmt: skip
    blocks = torch.cat([part[2].block_mask.to_dense() for part in parts], -1)
    out, lse = merge_lse(*parts[0][:2], *parts[1][:2])
    truth, true_lse = naive.dense(q, k, v, blocks=blocks)
    assert (parts[0][1] - parts[1][1]).abs().max() > 1, "the ranges do not differ: the test says nothing"
    assert ((lse - true_lse).abs() / true_lse.abs().clamp_min(1)).max() <= 1e-5
    assert (out - truth).norm() / truth.norm() <= 1e-5 and lse.dtype == torch.float32


def test_merge_with_ranges_that_hold_nothing(rand, naive):
    q, k, v = qkv(rand, 2, 2, 2, 130, 200, 64)
    a, la = sparse_attention(q, k, v, topk=1, return_lse=True)
    nothing, minus_infinity = torch.zeros_like(a), torch.full_like(la, -math.inf)
    for out, lse in (merge_lse(a, la, nothing, minus_infinity), merge_lse(nothing, minus_infinity, a, la)):
        assert torch.equal(out, a) and torch.equal(lse, la)
    out, lse = merge_lse(nothing, minus_infinity, nothing, minus_infinity)
    assert bool((out == 0).all()) and bool((lse == -math.inf).all())


def test_merge_layout_nhd_and_dtype(rand):
    a, b = rand(1, 2, 130, 3, 8, dtype=torch.bfloat16), rand(2, 2, 130, 3, 8, dtype=torch.bfloat16)
    la, lb = rand(3, 2, 3, 130), rand(4, 2, 3, 130)
    out, lse = merge_lse(a, la, b, lb, layout="NHD")
    w = torch.sigmoid(la.double() - lb.double()).transpose(1, 2)[..., None]
    expected = a.double() * w + b.double() * (1 - w)
    assert out.dtype == torch.bfloat16 and out.shape == a.shape
    assert (out.double() - expected).abs().max() <= 2**-8 * expected.abs().max()
    torch.testing.assert_close(lse.double(), torch.log(la.double().exp() + lb.double().exp()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("topk", [1, 0.3])
def test_smooth_k_changes_nothing_but_rounding(clustered, topk):
    q, k, v = (clustered(seed, 1, 2, 500, 32) for seed in (1, 3, 5))
    k = k + 4 * torch.ones(32)
    a, la, ia = sparse_attention(q, k, v, topk=topk, smooth_k=True, return_lse=True, return_info=True)
    b, lb, ib = sparse_attention(q, k, v, topk=topk, smooth_k=False, return_lse=True, return_info=True)
    assert torch.equal(ia.block_mask.to_dense(), ib.block_mask.to_dense())
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(la, lb, rtol=1e-5, atol=1e-5)


def test_lse_of_large_scores(rand, naive):
    q, k, v = qkv(rand, 1, 1, 1, 130, 200, 64)
    q = q * 30
    for topk in (1, 0.5):
        out, lse, info = sparse_attention(q, k + 5, v, topk=topk, return_lse=True, return_info=True)
        blocks = info.block_mask.to_dense()
        naive.check(out, q, k + 5, v, blocks=blocks)
        truth = naive.dense(q, k + 5, v, blocks=blocks)[1]
        assert (lse - truth).abs().max() <= 1e-5 * truth.abs().max()  # rows near 0 cancel: relative to the largest


# Returns.


def test_return_forms(rand):
    q, k, v = qkv(rand, 1, 2, 2, 200, 200, 64)
    out = sparse_attention(q, k, v)
    assert isinstance(out, torch.Tensor)
    a, lse = sparse_attention(q, k, v, return_lse=True)
    b, info = sparse_attention(q, k, v, return_info=True)
    c, lse_2, info_2 = sparse_attention(q, k, v, return_lse=True, return_info=True)
    assert all(torch.allclose(out, x, atol=1e-6) for x in (a, b, c)) and torch.equal(lse, lse_2)
    assert isinstance(info, AttentionInfo) and info.backend == "torch" and isinstance(info_2.block_mask, BlockMask)
    assert info.density.dtype == torch.float32 and info.density.shape == info.pv_skipped.shape == (1, 2)


@pytest.mark.parametrize("n_k", [1, 5, 40000, 65536], ids=lambda n: f"N_k {n}")
def test_info_reads_lists_of_block_numbers(n_k):
    """The other form in which a backend leaves its map: unsigned 16-bit numbers, of which the first `counts` of a row hold; the rest is unwritten."""
    rows = [[[0, n_k - 1], [n_k // 2]], [[], [n_k - 1]]]
    blocks, counts = torch.full((1, 2, 2, 3), -1, dtype=torch.int16), torch.zeros(1, 2, 2, dtype=torch.int32)
    dense = torch.zeros(1, 2, 2, n_k, dtype=torch.bool)
    for h, i in ((h, i) for h in range(2) for i in range(2)):
        ids = sorted(set(rows[h][i]))
        dense[0, h, i, ids] = True
        counts[0, h, i] = len(ids)
        blocks[0, h, i, : len(ids)] = torch.tensor([x - (1 << 16) if x >= 1 << 15 else x for x in ids], dtype=torch.int16)
    visible = torch.tensor([[[n_k, n_k]]], dtype=torch.int32)
    tiles = torch.tensor([[[3, 4], [0, 0]]], dtype=torch.int32)
    info = AttentionInfo("cuda", KeptBlocks(blocks, counts, visible, n_k), tiles)
    assert torch.equal(info.kept.to_map(), dense) and torch.equal(info.block_mask.to_dense(), dense)
    torch.testing.assert_close(info.density, dense.float().mean((-2, -1)))
    assert info.pv_skipped.tolist() == [[0.75, 0.0]] and info.density.dtype == info.pv_skipped.dtype == torch.float32


def info_of(kept, form: str) -> AttentionInfo:
    """The info of a call that kept these blocks, in the form that a backend leaves; what no backend writes is -1."""
    counts, n_k = kept.sum(-1, dtype=torch.int32), kept.shape[-1]
    blocks = kept
    if form == "lists":
        blocks = torch.full((*counts.shape, int(counts.max()) + 3), -1, dtype=torch.int16)
        for at in ((b, h, i) for b in range(kept.shape[0]) for h in range(kept.shape[1]) for i in range(kept.shape[2])):
            blocks[at][: counts[at]] = torch.from_numpy(kept[at].nonzero()[:, 0].numpy().astype("uint16").view("int16"))
    visible = torch.full((kept.shape[0], 1, kept.shape[2]), n_k)
    return AttentionInfo(form, KeptBlocks(blocks, counts, visible, n_k), torch.zeros(*kept.shape[:2], 2))


@pytest.mark.parametrize("form", ["map", "lists"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 9), (1, 2, 64, 64), (2, 3, 70, 150), (1, 2, 3, 40000)], ids=str)
def test_pooled_picture(shape, form, monkeypatch):
    """Every cell is the share of its own blocks, block by block; in chunks of a head too."""
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < torch.linspace(0, 1, shape[1])[None, :, None, None]
    kept[:, -1, 0] = False  # an empty row
    info = info_of(kept, form)
    pooled = info.pooled()
    rows, columns = (min(64, n) for n in shape[2:])
    assert pooled.dtype == torch.uint8 and pooled.shape == (shape[1], rows, columns)
    for h, r, c in ((h, r, c) for h in range(shape[1]) for r in range(0, rows, 7) for c in range(0, columns, 5)):
        i, j = (slice(n * size // cells, (n + 1) * size // cells) for n, size, cells in ((r, shape[2], rows), (c, shape[3], columns)))
        assert abs(int(pooled[h, r, c]) - 255 * float(kept[:, h, i, j].float().mean())) <= 0.51
    monkeypatch.setattr(block_mask_module, "_POOLED_AT_ONCE", 1)
    assert torch.equal(info.pooled(), pooled) and info.pooled(most=4).shape[1:] == (min(4, rows), min(4, columns))


def test_pooled_picture_of_a_call(clustered):
    q, k, v = (clustered(seed, 2, 3, 1000, 32) for seed in (1, 3, 5))
    _, info = sparse_attention(q, k, v, topk=0.25, return_info=True)
    pooled = info.pooled().double() / 255
    assert pooled.shape == info.kept.to_map().shape[1:]
    torch.testing.assert_close(pooled, info.kept.to_map().double().mean(0), atol=0.002, rtol=0)


@pytest.mark.parametrize("compensate", [False, True], ids=["", "compensate"])
@pytest.mark.parametrize("topk", [1, 0.3])
def test_runs_twice_bitwise_equal_and_leaves_inputs_alone(rand, topk, compensate):
    q, k, v = qkv(rand, 2, 4, 2, 333, 333, 40)
    mask = torch.rand(2, 333, generator=torch.Generator().manual_seed(5)) > 0.2
    before = [x.clone() for x in (q, k, v, mask)]
    runs = [sparse_attention(q, k, v, topk=topk, key_mask=mask, compensate=compensate, return_lse=True) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert all(torch.equal(x, y) for x, y in zip((q, k, v, mask), before, strict=True))


# NaN and Inf stay where they are.


@pytest.mark.pairs(
    options=[dict(topk=1), dict(topk=0.3), dict(cdfthreshd=0.5), dict(topk=0.3, simthreshd1=0.5), dict(topk=0.3, causal=True)],
    where=["q", "k", "v"],
    value=[math.nan, math.inf, -math.inf],
    compensate=[False, True],
)
def test_nan_and_inf_stay_inside_their_head(clustered, value, where, options, compensate):
    q, k, v = clustered(1, 2, 4, 333, 32), clustered(3, 2, 2, 333, 32), clustered(5, 2, 2, 333, 32)
    clean, clean_lse = sparse_attention(q, k, v, **options, compensate=compensate, return_lse=True)
    tensors = {"q": q, "k": k, "v": v}
    if where == "q":
        q[0, 1, 5:140, 3] = value
        hit = torch.zeros(2, 4, dtype=torch.bool)
        hit[0, 1] = True
    else:
        tensors[where][1, 0, 60:200, 3] = value
        hit = torch.zeros(2, 4, dtype=torch.bool)
        hit[1, :2] = True
    out, lse = sparse_attention(q, k, v, **options, compensate=compensate, return_lse=True)
    assert torch.equal(out[~hit], clean[~hit]) and torch.equal(lse[~hit], clean_lse[~hit])
    if options.get("topk") == 1:
        assert not torch.equal(out[hit], clean[hit]), "the bad value changed nothing"
    assert out.shape == q.shape


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_head_full_of_nan_neither_crashes_nor_leaks(rand, value):
    q, k, v = qkv(rand, 2, 3, 3, 200, 200, 40)
    clean = sparse_attention(q, k, v, topk=0.4, cdfthreshd=0.3, simthreshd1=0.2)
    for x in (q, k, v):
        x[1, 2] = value
    out = sparse_attention(q, k, v, topk=0.4, cdfthreshd=0.3, simthreshd1=0.2)
    assert torch.equal(out[0], clean[0]) and torch.equal(out[1, :2], clean[1, :2]) and bool(out[1, 2].isnan().all())


# Memory layouts that 32-bit offsets do not reach.


def _far_apart(shape, strides, dtype):
    """A view of address space that is reserved, not used: only the pages that it touches exist."""
    elements = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    nbytes = elements * torch.empty(0, dtype=dtype).element_size()
    try:
        room = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000))
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            room.madvise(mmap.MADV_NOHUGEPAGE)
    except (OSError, ValueError, AttributeError) as error:
        pytest.skip(f"cannot reserve {nbytes / 2**30:.0f} GiB of address space: {error}")
    return torch.frombuffer(room, dtype=dtype).as_strided(shape, strides)


@pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="needs anonymous mmap")
@pytest.mark.parametrize("topk", [1, 0.3])
@pytest.mark.parametrize("far", ["rows", "heads", "batch"])
def test_offsets_beyond_2_31_elements(rand, naive, far, topk):
    shape = (2, 2, 200, 32)
    step = 2**31 + 4096
    strides = {
        "rows": (64, 32, (2**31 // 150) // 4096 * 4096, 1), "heads": (200 * 32, step, 32, 1), "batch": (step, 200 * 32, 32, 1)
    }[far]  # fmt: skip
    tensors = []
    for seed in range(3):
        view = _far_apart(shape, strides, torch.float16)
        view.copy_(rand(seed, *shape, dtype=torch.float16))
        tensors.append(view)
    out, lse, info = sparse_attention(*tensors, topk=topk, return_lse=True, return_info=True)
    q, k, v = (x.clone(memory_format=torch.contiguous_format) for x in tensors)
    assert torch.equal(q, rand(0, *shape, dtype=torch.float16))
    naive.check(out, q, k, v, lse=lse, blocks=info.block_mask.to_dense())
    assert torch.equal(out, sparse_attention(q, k, v, topk=topk, return_lse=True)[0])


@pytest.mark.parametrize("s_q", [1, 2, 129], ids=lambda n: f"S_q {n}")
def test_blind_row_in_a_short_block(s_q):
    """Causal and a key mask together: a row whose visible keys are all masked gives zeros and -inf, in a block of one row too."""
    q, k, v = (torch.randn(1, 1, n, 16, generator=torch.Generator().manual_seed(n)) for n in (s_q, 200, 200))
    key_mask = torch.ones(1, 200, dtype=torch.bool)
    key_mask[:, :s_q] = False
    out, lse = sparse_attention(q, k, v, topk=1, causal=True, key_mask=key_mask, return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("common", [0.0, 500.0, 7e4])
def test_a_common_part_of_the_bias_costs_no_precision(dtype, common):
    q, k, v = (torch.randn(1, 2, 512, 32, generator=torch.Generator().manual_seed(n)).to(dtype) for n in range(3))
    bias = -30 * torch.rand(1, 512, generator=torch.Generator().manual_seed(9))
    out, lse = sparse_attention(q, k, v, topk=1, key_mask=bias + common, return_lse=True)
    scores = q.double() @ k.double().mT * 32**-0.5 + bias.double()[:, None, None]
    true = scores.softmax(-1) @ v.double()
    assert (out.double() - true).norm() / true.norm() < 0.02
    torch.testing.assert_close(lse.double() - common, scores.logsumexp(-1), rtol=1e-4, atol=5e-2)


def test_autocast_leaves_the_call_alone(rand, clustered):
    q, k = clustered(1, 1, 1, 128, 64), clustered(3, 1, 1, 4096, 64)
    v = 300 * k
    options = dict(topk=0.1, compensate=True)
    plain, blocks = sparse_attention(q, k, v, **options), select_blocks(q, k, topk=0.1).to_dense()
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(sparse_attention(q, k, v, **options), plain)
        assert torch.equal(select_blocks(q, k, topk=0.1).to_dense(), blocks)


@pytest.mark.parametrize("stride", [(400, 64, 1, 1), (1, 64, 0, 1)], ids=["a sliding window", "one row for all"])
def test_overlapping_rows_of_q(rand, stride):
    """An output made like it would not be contiguous in its last dimension."""
    q = rand(0, 400).as_strided((1, 2, 40, 64), stride)
    k, v = rand(1, 1, 2, 100, 64), rand(2, 1, 2, 100, 64)
    out = sparse_attention(q, k, v, topk=1.0)
    assert out.stride(3) == 1 and torch.equal(out, sparse_attention(q.clone(memory_format=torch.contiguous_format), k, v, topk=1.0))
