"""The centre of K; the reference of the 8-bit forms (quantized.py): round trips, zero rows and channels, masked rows."""

from __future__ import annotations

import math

import pytest
import quantized
import torch
from sparge_kernels import centring


@pytest.mark.parametrize("s", [1, 63, 200, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_q_per_row(rand, s, dtype):
    q = rand(1, 2, 3, s, 40, dtype=dtype) * torch.linspace(0.1, 30, s)[:, None].to(dtype)
    out = quantized.quantize_q(q)
    assert out.values.dtype == torch.int8 and out.values.shape == q.shape and out.scale.shape == (2, 3, s, 1) and out.scale.dtype == torch.float32
    absmax = q.float().abs().amax(-1, keepdim=True)
    torch.testing.assert_close(out.scale, absmax / 127)
    assert ((out.dequantize() - q.float()).abs() <= out.scale * 0.5001).all()
    assert (out.values.abs().amax(-1) == 127).all() and out.values.min() >= -127


@pytest.mark.parametrize("s", [1, 63, 64, 65, 200, 1000])
def test_k_per_64_rows(rand, s):
    k = rand(1, 2, 3, s, 40) * torch.linspace(0.1, 30, s)[:, None] + 5
    centre = centring.key_centre(k)
    out = quantized.quantize_k(k, centre)
    n = -(-s // 64)
    assert out.values.dtype == torch.int8 and out.values.shape == k.shape and out.scale.shape == (2, 3, n, 1)
    back = out.dequantize()
    assert back.shape == k.shape
    for j in range(n):
        rows = slice(j * 64, (j + 1) * 64)
        block = k[:, :, rows] - centre
        scale = block.abs().amax((-2, -1)) / 127
        torch.testing.assert_close(out.scale[:, :, j, 0], scale)
        assert ((back[:, :, rows] - block).abs() <= scale[..., None, None] * 0.5001 + 1e-7).all()
    plain = quantized.quantize_k(k).dequantize()
    assert (plain - k).abs().max() <= quantized.quantize_k(k).scale.max() * 0.5001


@pytest.mark.parametrize("dtype, levels", [("int8", 127), ("fp8", 448)])
@pytest.mark.parametrize("s", [1, 63, 1000])
def test_v_per_channel(rand, s, dtype, levels):
    v = rand(1, 2, 3, s, 40) * torch.linspace(0.01, 30, 40)
    out = quantized.quantize_v(v, dtype)
    assert out.values.dtype == (torch.int8 if dtype == "int8" else torch.float8_e4m3fn) and out.scale.shape == (2, 3, 1, 40)
    absmax = v.abs().amax(-2, keepdim=True)
    torch.testing.assert_close(out.scale, absmax / levels)
    error = (out.dequantize() - v).abs()
    allowed = out.scale * 0.5001 if dtype == "int8" else v.abs() / 16 * 1.001 + out.scale * 2.0**-9
    assert (error <= allowed).all()
    assert (out.values.float().abs().amax(-2) == levels).all()


def test_zero_rows_blocks_and_channels_are_zero_not_nan(rand):
    x = rand(1, 1, 1, 200, 8)
    q, k, v = x.clone(), x.clone(), x.clone()
    q[:, :, 7] = 0
    k[:, :, 64:128] = 0
    v[..., 3] = 0
    for out, zero in (
        (quantized.quantize_q(q), (..., slice(7, 8), slice(None))),
        (quantized.quantize_k(k), (..., slice(64, 128), slice(None))),
        (quantized.quantize_v(v), (..., slice(None), 3)),
        (quantized.quantize_v(v, "fp8"), (..., slice(None), 3)),
    ):
        back = out.dequantize()
        assert not back.isnan().any() and not out.scale.isnan().any()
        assert (back[zero] == 0).all() and (out.scale == 0).sum() == 1


@pytest.mark.parametrize("what", [math.nan, math.inf, 1e30])
def test_masked_rows_are_stored_as_zero_and_widen_nothing(rand, what):
    x = rand(1, 2, 1, 200, 8)
    valid = torch.rand(2, 200, generator=torch.Generator().manual_seed(1)) > 0.3
    valid[1, 64:128] = False
    bad = torch.where(valid[:, None, :, None], x, what)
    zero = torch.where(valid[:, None, :, None], x, 0)
    for good, out in (
        (quantized.quantize_k(zero), quantized.quantize_k(bad, None, valid)),
        (quantized.quantize_v(zero), quantized.quantize_v(bad, "int8", valid)),
        (quantized.quantize_v(zero, "fp8"), quantized.quantize_v(bad, "fp8", valid)),
    ):
        assert torch.equal(good.values.float(), out.values.float()) and torch.equal(good.scale, out.scale)
        assert (out.values.float()[~valid[:, None].expand(2, 1, 200)] == 0).all()


@pytest.mark.parametrize("s", [1, 15, 16, 17, 200, 1000])
def test_centre_is_the_mean_of_one_unmasked_key_of_each_16(rand, s):
    k = rand(1, 2, 3, s, 8) + 2
    chosen = [t for t in (16 * g + g * g * 1126333 // 2**20 % 16 for g in range(-(-s // 16))) if t < s]
    assert chosen[0] == 0 and centring.sampled_keys(s, k.device).tolist() == chosen
    expected = torch.stack([k[:, :, t] for t in chosen]).mean(0)
    centre = centring.key_centre(k)
    assert centre.shape == (2, 3, 1, 8) and centre.dtype == torch.float32
    torch.testing.assert_close(centre[:, :, 0], expected)
    valid = torch.rand(2, s, generator=torch.Generator().manual_seed(s)) > 0.4
    masked = centring.key_centre(k.masked_fill(~valid[:, None, :, None], math.nan), valid)
    for b in range(2):
        sampled = [t for t in chosen if valid[b, t]]
        mean = k[b][:, sampled].mean(1) if sampled else torch.zeros(3, 8)
        torch.testing.assert_close(masked[b, :, 0], mean)


@pytest.mark.parametrize("s", [*range(1, 40), 1000, 4096, 4111])
def test_every_group_of_16_has_one_key_but_the_last_which_may_be_cut_short(s):
    chosen = centring.sampled_keys(s, torch.device("cpu"))
    groups = (chosen // 16).tolist()
    assert chosen.dtype == torch.int64 and groups == list(range(len(groups))) and len(groups) - s // 16 in (0, 1)
    assert chosen[0] == 0 and chosen[-1] < s


def test_places_of_the_largest_groups_do_not_overflow():
    """Of the last groups of 2 ** 31 tokens; the product passes 2 ** 63."""
    groups = torch.arange(2**27 - 999, 2**27)
    expected = [g * g * 1126333 // 2**20 % 16 for g in groups.tolist()]
    assert centring.place_in_group(groups).tolist() == [centring.place_in_group(g) for g in groups.tolist()] == expected


def test_the_centre_compiles_for_any_length():
    torch.compiler.reset()
    compiled = torch.compile(centring.key_centre, fullgraph=True, dynamic=True, backend="eager")
    for s in (100, 117, 333, 4096):
        k = torch.randn(1, 2, s, 8, generator=torch.Generator().manual_seed(s))
        assert torch.equal(compiled(k), centring.key_centre(k))


def off_centre(chosen: torch.Tensor, length: int, width: int) -> float:
    """Distance of the sampled mean from the true one in root mean square distances of a key from it, where every column has a vector of its own.

    Vectors that are independent: the mean of `chosen` is off by the differences of the columns' shares, each in a direction of its own.
    """
    column = torch.arange(length) % width
    share = torch.bincount(column, minlength=width) / length
    sampled = torch.bincount(column[chosen], minlength=width) / len(chosen)
    return float(((sampled - share).square().sum() / (1 - share.square().sum())).sqrt())


@pytest.mark.parametrize("length, bound", [(4096, 0.07), (8192, 0.05), (75600, 0.02)])
def test_the_centre_is_near_the_true_mean_on_grids_of_every_width(length, bound):
    """The bound halves with four times the keys, as that of keys drawn at random would; a fixed place in each 16 is off by 1 at width 16."""
    chosen = centring.sampled_keys(length, torch.device("cpu"))
    off = {width: off_centre(chosen, length, width) for width in range(16, 129)}
    assert max(off.values()) < bound, max(off, key=off.get)
    fixed = torch.arange(0, length, 16)
    assert off_centre(fixed, length, 16) > 0.9 and off_centre(fixed, length, 80) > 0.4


def test_the_centre_of_a_real_tensor_with_columns(rand):
    """The same with vectors and noise: a video of 80 columns."""
    columns = rand(1, 1, 2, 80, 64)
    k = columns.repeat(1, 1, 400, 1)[:, :, :32000] + 0.3 * rand(2, 1, 2, 32000, 64)
    mean = k.mean(2, keepdim=True)
    off = (centring.key_centre(k) - mean).norm(dim=-1) / (k - mean).square().sum(-1).mean(-1, keepdim=True).sqrt()
    fixed = (k[:, :, ::16].mean(2, keepdim=True) - mean).norm(dim=-1) / (k - mean).square().sum(-1).mean(-1, keepdim=True).sqrt()
    assert off.max() < 0.05 < 0.4 < fixed.min()


def test_centre_of_large_fp16_values():
    centre = centring.key_centre(torch.full((1, 1, 4096, 2), 60000.0, dtype=torch.float16))
    assert (centre == 60000).all() and centre.dtype == torch.float32
    masked = centring.key_centre(torch.full((1, 1, 64, 2), 3.0, dtype=torch.bfloat16), torch.ones(1, 64, dtype=torch.bool))
    assert (masked == 3).all() and masked.dtype == torch.float32


def test_errors():
    with pytest.raises(ValueError, match="dtype must be 'int8' or 'fp8', got 'fp4'"):
        quantized.quantize_v(torch.ones(1, 1, 2, 2), "fp4")
