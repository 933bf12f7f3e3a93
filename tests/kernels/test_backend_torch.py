"""The torch backend: it really skips, its memory stays within what its docstring says, and thread counts do not change the result."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from sparge_kernels import UnsupportedCall, backends, block_sparse_attention, order, sparse_attention
from sparge_kernels.backends import choose
from sparge_kernels.backends import torch as backend
from sparge_kernels.call import Kind

FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"


def pairs(profiled) -> int:
    """Query-key pairs that went through PyTorch's attention."""
    total = 0
    for op in profiled.ops:
        if op.name == FLASH:
            (b, h, s_q, _), (_, _, s_k, _) = op.input_shapes[:2]
            total += b * h * s_q * s_k
    return total


@pytest.mark.parametrize("lse", [False, True], ids=["", "lse"])
@pytest.mark.parametrize("case", ["topk 1", "topk 0.5", "topk 0.1", "cdf", "causal", "order", "empty rows", "tail", "mask", "NHD"])
def test_work_is_proportional_to_density(clustered, profile, case, lse):
    s = 2048 + (70 if case == "tail" else 0)
    q, k, v = (clustered(n, 1, 2, s, 32) for n in (1, 3, 5))
    options = {
        "topk 1": dict(topk=1), "topk 0.5": dict(topk=0.5), "topk 0.1": dict(topk=0.1), "cdf": dict(cdfthreshd=0.5),
        "causal": dict(topk=0.3, causal=True), "order": dict(topk=0.2, order=order.plan("tiles", ((8, 16, 16),))), "tail": dict(topk=0.2),
        "mask": dict(topk=0.2), "NHD": dict(topk=0.2),
    }.get(case)  # fmt: skip
    if case == "mask":
        options["key_mask"] = torch.arange(s)[None] >= 640
    if case == "NHD":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        options["layout"] = "NHD"
    if case == "empty rows":
        mask = torch.rand(1, 2, 16, 32, generator=torch.Generator().manual_seed(1)) > 0.8
        mask[:, :, 3:9] = False
        done = profile(lambda: block_sparse_attention(q, k, v, mask, return_info=True, return_lse=lse), ops=True)
    else:
        done = profile(lambda: sparse_attention(q, k, v, **options, return_info=True, return_lse=lse), ops=True)
    info = done.result[-1]
    kept = info.kept.to_map()
    n_q, n_k = kept.shape[2:]
    rows = torch.full((n_q,), 128).clamp_max(s - torch.arange(n_q) * 128)
    keys = torch.full((n_k,), 64).clamp_max(s - torch.arange(n_k) * 64)
    expected = int((kept * rows[:, None] * keys[None]).sum())
    assert pairs(done) == expected, f"{pairs(done)} query-key pairs for {expected} in kept blocks"
    assert not any(op.name == "aten::_scaled_dot_product_attention_math" for op in done.ops)
    if case not in ("topk 1", "causal"):
        assert expected < 0.65 * 2 * s * s


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("density", [0.1, 0.4])
def test_any_number_of_threads_gives_the_same(clustered, naive, density, threads):
    torch.set_num_threads(threads)  # the fixture puts it back
    q, k, v = (clustered(n, 1, 2, 1000, 32) for n in (1, 3, 5))
    out, lse, info = sparse_attention(q, k, v, topk=density, return_lse=True, return_info=True)
    naive.check(out, q, k, v, lse=lse, blocks=info.block_mask.to_dense())
    mask = torch.rand(1, 2, 8, 16, generator=torch.Generator().manual_seed(1)) < density
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
    naive.check(out, q, k, v, lse=lse, blocks=mask)


def test_rows_batched_into_one_call_equal_single_rows(clustered, monkeypatch, naive):
    q, k, v = (clustered(n, 1, 2, 1500, 32) for n in (1, 3, 5))
    bias = torch.randn(1, 1500, generator=torch.Generator().manual_seed(1))
    for options in (dict(), dict(causal=True), dict(key_mask=bias), dict(causal=True, key_mask=bias)):
        results = []
        for size in (1, 700, 4096, 1 << 20):
            monkeypatch.setattr(backend, "_KEYS_A_CALL", size)
            results.append(sparse_attention(q, k, v, topk=0.15, **options, return_lse=True))
        for out, lse in results[1:]:
            torch.testing.assert_close(out, results[0][0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(lse, results[0][1], rtol=1e-5, atol=1e-6)


SIZES = {
    "1 head, S=8192, D=64": ((1, 1, 8192, 64), torch.float32, 8.0),
    "1 head, S=8192, fp16": ((1, 1, 8192, 64), torch.float16, 8.0),
    "16 heads, S=2048": ((1, 16, 2048, 128), torch.float32, 1.0),
    "16 heads, S=2048, bf16": ((1, 16, 2048, 128), torch.bfloat16, 1.0),
}
KINDS = {
    "sparse": dict(topk=0.1), "mean": dict(topk=0.1, score="mean"), "cdf": dict(cdfthreshd=0.1), "lse": dict(topk=0.1, return_lse=True),
    "dense": dict(topk=1), "causal": dict(topk=0.1, causal=True), "judge": dict(topk=0.1, simthreshd1=0.01), "mask": dict(topk=0.1),
    "order": dict(topk=0.1), "compensate": dict(topk=0.1, compensate=True),
}  # fmt: skip


@pytest.mark.parametrize("size, kind", [(s, k) for s in SIZES for k in KINDS if "1 head" in s or k in ("sparse", "lse", "mask", "order", "judge")])
def test_memory_beyond_the_output(rand, profile, size, kind):
    """The module docstring: at most 8 times the bytes of q for one head (and 6 fp32 copies of it with `compensate`); the bytes of q, and 32 MB, for
    16 heads or more; never S_q x S_k.

    The 32 MB are for small calls: these sizes do without them, and granting them here would hide fp32 copies of every head.
    """
    shape, dtype, times = SIZES[size]
    times += 6 * 4 / dtype.itemsize if kind == "compensate" else 0
    q, k, v = (rand(n, *shape, dtype=dtype) for n in range(3))
    options = dict(KINDS[kind])
    if kind == "mask":
        options["key_mask"] = torch.arange(shape[2]).expand(shape[0], -1) % 3 > 0
    if kind == "order":
        options["order"] = order.plan("tiles", ((8, shape[2] // 128, 16),))
    done = profile(lambda: sparse_attention(q, k, v, **options))
    of_q = q.numel() * q.element_size()
    extra = done.peak - sum(x.numel() * x.element_size() for x in (done.result if isinstance(done.result, tuple) else (done.result,)))
    largest = max(done.allocations)
    assert largest < max(shape[2] ** 2, 2.1 * of_q), f"one allocation of {largest} bytes: as large as a bool map of S_q x S_k"
    assert extra <= times * of_q, f"{extra / of_q:.2f} times the bytes of q beyond the output, {times} promised"


def test_no_map_of_all_pairs_at_any_point(rand, profile):
    """S large against D, so that S_q x S_k stands out from everything linear in S."""
    q, k, v = (rand(n, 1, 1, 12288, 8) for n in range(3))
    for options in (dict(topk=0.1), dict(topk=0.1, causal=True), dict(topk=0.1, key_mask=torch.arange(12288)[None] > 99),
                    dict(topk=0.1, compensate=True), dict(topk=0.05, return_lse=True), dict(cdfthreshd=0.1, simthreshd1=0.1)):  # fmt: skip
        done = profile(lambda options=options: sparse_attention(q, k, v, **options))
        assert max(done.allocations) < 12288**2 // 16, f"{options}: one allocation of {max(done.allocations)} bytes"
        assert done.peak < 12288**2 // 4


def test_chosen_by_itself_on_the_cpu_only():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose(Kind(cpu)) == "torch" and choose(Kind(gpu, "torch")) == "torch"
    with pytest.raises(UnsupportedCall) as caught:
        choose(Kind(gpu))
    assert "cuda" in caught.value.reasons["torch"]


def test_report():
    status = backends()
    assert list(status) == ["cuda", "torch"] and status["torch"].available and isinstance(status["torch"].reason, str)
    assert not status["torch"].quantised and not status["torch"].skips_pv


def test_out_of_memory_passes_unchanged(rand, monkeypatch):
    q = rand(0, 1, 1, 300, 16)

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(F, "scaled_dot_product_attention", fail)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        sparse_attention(q, q, q)


def test_exact_not_quantised(rand, naive):
    q, k, v = (rand(n, 1, 1, 300, 64) for n in range(3))
    k[..., 0] *= 1000  # an outlier channel that 8 bits would not survive
    q[..., 0] /= 1000
    naive.check(sparse_attention(q, k, v, topk=1), q, k, v)


def test_dense_helper_gives_zeros_on_blind_rows(rand):
    q, k, v = rand(0, 1, 1, 5, 8), rand(1, 1, 1, 7, 8), rand(2, 1, 1, 7, 8)
    bias = torch.zeros(1, 1, 5, 7)
    bias[:, :, 2] = -math.inf
    for want in (False, True):
        out, lse = backend.dense(q, k, v, bias, 0.3, want)
        assert (out[0, 0, 2] == 0).all() and out.isfinite().all() and (lse is None) == (not want)
        if want:
            assert lse[0, 0, 2] == -math.inf and lse[0, 0, [0, 1, 3, 4]].isfinite().all()
