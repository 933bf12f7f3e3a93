"""What published implementations get wrong: each of docs/design/algorithm.md's last list is a test that the faulty behaviour would fail."""

from __future__ import annotations

import math

import pytest
import quantized
import reference
import torch
from sparge_kernels import block_sparse_attention, compat, select_blocks, sparse_attention


def test_causal_rows_see_no_future_token(rand, naive):
    """Up to 127 future tokens inside the diagonal block."""
    q, k, v = (rand(n, 1, 2, 700, 32) for n in range(3))
    for call in (
        lambda v: sparse_attention(q, k, v, topk=0.4, causal=True),
        lambda v: compat.spas_sage2_attn_meansim_topk_cuda(q, k, v, is_causal=True),
        lambda v: compat.spas_sage2_attn_meansim_cuda(q, k, v, is_causal=True),
        lambda v: block_sparse_attention(q, k, v, torch.ones(1, 1, 6, 11, dtype=torch.bool), causal=True),
    ):
        out = call(v)
        for edge in (1, 127, 128, 333, 699):
            future = v.clone()
            future[:, :, edge:] = 1e4
            assert torch.equal(call(future)[:, :, :edge], out[:, :, :edge]), edge
        assert torch.allclose(out[:, :, 0], v[:, :, 0])


def test_smooth_k_false_works(rand):
    q, k, v = (rand(n, 1, 2, 300, 32) for n in range(3))
    a, b = (compat.spas_sage2_attn_meansim_topk_cuda(q, k, v, smooth_k=s) for s in (True, False))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_argument_is_ignored_in_silence(rand, naive):
    q, k, v = (rand(n, 2, 2, 300, 32) for n in range(3))
    call = compat.spas_sage2_attn_meansim_topk_cuda
    plain = call(q, k, v, topk=1.0)
    mask = torch.arange(300).expand(2, 300) < 150
    masked = call(q, k, v, topk=1.0, attn_mask=mask[:, None, None])
    naive.check(masked, q, k, v, key_mask=mask)
    assert not torch.equal(plain, masked)
    with pytest.raises(ValueError, match="dropout_p"):
        call(q, k, v, dropout_p=0.5)
    assert call(q, k, v, output_dtype=torch.bfloat16).dtype == torch.bfloat16
    grouped = call(q, k[:, :1], v[:, :1], topk=1.0)
    naive.check(grouped, q, k[:, :1], v[:, :1])


def test_the_user_s_scale_reaches_the_map(clustered, naive):
    q, k = clustered(1, 1, 2, 700, 16), clustered(3, 1, 2, 700, 16)
    maps = [select_blocks(q, k, cdfthreshd=0.6, scale=s) for s in (0.05, 0.25, 1.0)]
    for mask, s in zip(maps, (0.05, 0.25, 1.0), strict=True):
        naive.compare_maps(mask.to_dense(), naive.select(q, k, cdfthreshd=0.6, scale=s))
    assert maps[0].density.mean() > maps[1].density.mean() > maps[2].density.mean()


@pytest.mark.parametrize("s", [129, 200, 1000, 1025])
def test_an_odd_length_makes_no_block_special(rand, s):
    """Neither is the last query block dense nor the last key block always kept. Tokens here are all alike but for small noise."""
    base = rand(1, 1, 1, 1, 16)
    q, k = base + 0.05 * rand(2, 1, 1, s, 16), base + 0.05 * rand(3, 1, 1, s, 16)
    n_k = -(-s // 64)
    k[:, :, (n_k - 1) * 64 :] *= 0.5  # the last key block is nobody's choice
    kept = select_blocks(q, k, topk=0.2, simthreshd1=0.5, smooth_k=False).to_dense()[0, 0]
    count = max(1, math.floor(0.2 * n_k + 0.5))
    assert kept.sum(-1).tolist() == [count] * -(-s // 128) and not kept[:, -1].any()


def test_causal_topk_half_keeps_half_of_the_visible(clustered):
    q, k, v = (clustered(n, 1, 1, 4096, 16) for n in (1, 3, 5))
    density = float(sparse_attention(q, k, v, topk=0.5, causal=True, return_info=True)[1].density)
    assert 0.5 <= density < 0.55, f"{density}: 0.75 is the published fault"


@pytest.mark.parametrize("shape", [(1, 2, 4, 4), (1, 2, 8, 8), (1, 2, 4, 8), (1, 2, 3, 6), (2, 2, 3, 5)], ids=str)
def test_a_mask_of_another_shape_is_refused(rand, shape):
    q, k, v = (rand(n, 1, 2, 300, 16) for n in range(3))
    for call in (lambda m: block_sparse_attention(q, k, v, m), lambda m: compat.block_sparse_sage2_attn_cuda(q, k, v, mask_id=m)):
        with pytest.raises(ValueError, match=r"3, 5\)"):
            call(torch.ones(shape, dtype=torch.bool))
        call(torch.ones(1, 2, 3, 5, dtype=torch.bool))


def test_rows_without_kept_blocks_are_written(rand):
    """Poisoned memory (conftest.py) would show NaN."""
    q, k, v = (rand(n, 2, 2, 300, 16) for n in range(3))
    mask = torch.ones(2, 2, 3, 5, dtype=torch.bool)
    mask[:, :, 1] = False
    mask[1, 1] = False
    for out, lse in (block_sparse_attention(q, k, v, mask, return_lse=True), block_sparse_attention(q, k, v, mask, causal=True, return_lse=True)):
        assert (out[:, :, 128:256] == 0).all() and (out[1, 1] == 0).all() and out.isfinite().all()
        assert (lse[:, :, 128:256] == -math.inf).all() and (lse[1, 1] == -math.inf).all()
    assert (compat.block_sparse_sage2_attn_cuda(q, k, v, mask_id=mask)[:, :, 128:256] == 0).all()


def test_poison_is_on():
    assert torch.empty(7).isnan().all() and torch.empty_like(torch.ones(3)).isnan().all()


def test_an_all_zero_value_channel_gives_zero(rand, naive):
    q, k, v = (rand(n, 1, 2, 300, 16) for n in range(3))
    v[..., 5] = 0
    assert (sparse_attention(q, k, v, topk=0.4)[..., 5] == 0).all()
    for pv in ("int8", "fp8"):
        out = reference.attention(q, k, v, qk="int8", pv=pv)[0]
        assert out.isfinite().all() and (out[..., 5] == 0).all()
        assert (quantized.quantize_v(v, pv).dequantize()[..., 5] == 0).all()


def test_the_mask_is_used_by_every_path(rand, naive):
    """A masked call differs from an unmasked one and is right, for text-sized and long keys."""
    for s_q, s_k in ((300, 77), (77, 300), (300, 300)):
        q, k, v = rand(0, 2, 2, s_q, 16), rand(1, 2, 2, s_k, 16), rand(2, 2, 2, s_k, 16)
        mask = torch.arange(s_k)[None] < torch.tensor([[s_k // 3], [s_k // 2]])
        for options in (dict(topk=1), dict(topk=1, compensate=True), dict(topk=1, causal=True), dict(topk=1, return_lse=True)):
            out = sparse_attention(q, k, v, key_mask=mask, **options)
            out = out[0] if isinstance(out, tuple) else out
            naive.check(out, q, k, v, key_mask=mask, causal=options.get("causal", False))
        full = torch.ones(1, 1, -(-s_q // 128), -(-s_k // 64), dtype=torch.bool)
        naive.check(block_sparse_attention(q, k, v, full, key_mask=mask), q, k, v, key_mask=mask)


def test_any_head_dim_mask_and_cross_length_is_taken(rand, naive):
    """Odd head sizes, masks and cross lengths."""
    for d, s_q, s_k in ((40, 300, 77), (72, 77, 300), (160, 130, 200)):
        q, k, v = rand(0, 2, 3, s_q, d), rand(1, 2, 3, s_k, d), rand(2, 2, 3, s_k, d)
        mask = torch.arange(s_k).expand(2, -1) % 4 > 0
        out, info = sparse_attention(q, k, v, topk=0.5, key_mask=mask, return_info=True)
        naive.check(out, q, k, v, key_mask=mask, blocks=info.block_mask.to_dense())


def test_text_rows_can_be_kept_dense(clustered, naive):
    """`always_keep` makes their query blocks dense and their key blocks kept."""
    q, k, v = (clustered(n, 1, 2, 1000, 16) for n in (1, 3, 5))
    out, info = sparse_attention(q, k, v, topk=0.1, always_keep=[(900, 1000)], return_info=True)
    kept = info.block_mask.to_dense()
    assert kept[:, :, 7].all() and kept[..., 14:].all() and kept[:, :, :7, :14].float().mean() < 0.2
    naive.check(out[:, :, 900:], q[:, :, 900:], k, v)


def test_batches_of_different_content(clustered, naive):
    """Each batch element has its own map, and no key is added."""
    q, k, v = (clustered(n, 3, 2, 333, 16) for n in (1, 3, 5))
    out, lse, info = sparse_attention(q, k, v, topk=0.3, return_lse=True, return_info=True)
    blocks = info.block_mask.to_dense()
    naive.check(out, q, k, v, lse=lse, blocks=blocks)
    assert not torch.equal(blocks[0], blocks[1])
    for b in range(3):
        assert torch.equal(sparse_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], topk=0.3)[0], out[b])
