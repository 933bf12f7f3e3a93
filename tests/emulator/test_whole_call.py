"""Whole calls of the CUDA backend with its kernels on the emulator: every step between the public functions and the output, against reference.py,
within the bounds that whole_call.py tells."""

from __future__ import annotations

import ctypes
import math

import pytest
import reference
import torch
from sparge_kernels import (
    UnsupportedCall,
    block_sparse_attention,
    merge_lse,
    order,
    select_blocks,
    sparse_attention,
)
from sparge_kernels.backends import choose
from sparge_kernels.backends import cuda as backend
from sparge_kernels.call import Kind
from sparge_kernels.cuda import workspace
from whole_call import ARCHS, FLAT_BOUND, FORMS, check, clustered, falling, normal, qkv

SHAPES = [
    (1, 2, 2, 1, 1, 64),
    (1, 2, 2, 63, 63, 128),
    (1, 2, 1, 200, 200, 64),
    (1, 1, 1, 200, 333, 128),
    (2, 3, 1, 130, 65, 40),
    (1, 1, 1, 1, 200, 96),
    (1, 1, 1, 257, 1, 1),
]
"""Batch, heads, heads of K and V, lengths of Q and K, head_dim."""


@pytest.mark.pairs(shape=SHAPES, form=FORMS, topk=[1, 0.4])
def test_shapes(machine, shape, form, topk):
    used = machine(form)
    q, k, v = qkv(*shape)
    out, lse, info = sparse_attention(q, k, v, topk=topk, backend="cuda", return_lse=True, return_info=True)
    attention = "sparge_attention_sm90" if form == "sm90" else "sparge_attention_mma"
    assert used.launched == ["sparge_statistics", "sparge_prepass", "sparge_select", attention] and info.backend == "cuda"
    assert torch.equal(info.kept.to_map(), select_blocks(q, k, topk=topk, backend="torch").to_dense())
    check(out, lse, info, q, k, v, form=form)
    if topk == 1:
        assert bool((info.density == 1).all())


@pytest.mark.parametrize("masked", [False, True], ids=["causal, D 64", "masked, compensated, D 128"])
@pytest.mark.parametrize("form", ARCHS)
def test_every_shipped_arch(machine, form, masked):
    machine(form)
    q, k, v = qkv(2, 2, 1, 200, 333, 128 if masked else 64)
    how = dict(key_mask=KEY_MASKS["whole blocks"], compensate=True) if masked else dict(causal=True)
    out, lse, info = sparse_attention(q, k, v, topk=0.4, **how, backend="cuda", return_lse=True, return_info=True)
    check(out, lse, info, q, k, v, form=form, flat=not masked, **how)


def test_a_thousand_tokens(machine):
    machine()
    q, k, v = clustered(1, 1, 1, 1000, 64), clustered(3, 1, 1, 1000, 64), clustered(5, 1, 1, 1000, 64)
    out, lse, info = sparse_attention(q, k, v, topk=0.3, backend="cuda", return_lse=True, return_info=True)
    assert torch.equal(info.kept.to_map(), select_blocks(q, k, topk=0.3, backend="torch").to_dense()) and 0.2 < float(info.density) < 0.4
    check(out, lse, info, q, k, v, flat=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [64, 128])
def test_half_precision(machine, dtype, d):
    machine()
    q, k, v = qkv(1, 2, 1, 200, 200, d, dtype)
    out, lse, info = sparse_attention(q, k, v, topk=0.5, backend="cuda", return_lse=True, return_info=True)
    check(out, lse, info, q, k, v)


VIEWS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "offset": lambda x: torch.cat([torch.full((5,), math.nan, dtype=x.dtype), x.flatten()])[5:].view(x.shape),
    "in a buffer of NaN": lambda x: _inside(x),
    "expanded heads": lambda x: x[:, :1].expand(x.shape),
}


def _inside(x):
    margin = (1, 1, 3, 8)
    big = torch.full([n + 2 * m for n, m in zip(x.shape, margin, strict=True)], math.nan, dtype=x.dtype)
    view = big[tuple(slice(m, m + n) for n, m in zip(x.shape, margin, strict=True))]
    view.copy_(x)
    return view


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_views_give_the_same_bits(machine, view, dtype):
    machine()
    q, k, v = (VIEWS[view](x) for x in qkv(2, 2, 2, 130, 200, 40, dtype))
    out, lse = sparse_attention(q, k, v, topk=0.5, backend="cuda", return_lse=True)
    plain, plain_lse = sparse_attention(*(x.contiguous() for x in (q, k, v)), topk=0.5, backend="cuda", return_lse=True)
    assert torch.equal(out, plain) and torch.equal(lse, plain_lse)
    assert out.stride() == torch.empty_like(q).stride()


@pytest.mark.parametrize("form", ["int8", "sm90"])
def test_layout_nhd(machine, form):
    machine(form)
    q, k, v = qkv(2, 4, 2, 200, 130, 64)
    nhd = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    out, lse = sparse_attention(*nhd, topk=0.5, layout="NHD", backend="cuda", return_lse=True)
    plain, plain_lse = sparse_attention(q, k, v, topk=0.5, backend="cuda", return_lse=True)
    assert torch.equal(out.transpose(1, 2), plain) and torch.equal(lse, plain_lse) and out.is_contiguous()


@pytest.mark.pairs(form=["int8", "sm90"], shape=[(200, 333, 64), (333, 200, 128)], offset=[0, 63, -64, -500, 5000, -(1 << 39), 1 << 39])
def test_causal(machine, form, shape, offset):
    machine(form)
    q, k, v = qkv(1, 2, 1, *shape)
    how = dict(causal=True, causal_offset=offset)
    out, lse, info = sparse_attention(q, k, v, topk=0.4, **how, backend="cuda", return_lse=True, return_info=True)
    assert torch.equal(info.kept.to_map(), select_blocks(q, k, topk=0.4, **how, backend="torch").to_dense())
    check(out, lse, info, q, k, v, form=form, **how)


def key_masks(s_k: int):
    scattered = torch.rand(2, s_k, generator=torch.Generator().manual_seed(5)) > 0.4
    blocks = scattered.clone()
    blocks[0, 64:192], blocks[1, :64], blocks[1, -13:] = False, False, False
    empty = blocks.clone()
    empty[1] = False
    bias = 2 * normal(6, 2, s_k)
    return {
        "scattered": scattered, "whole blocks": blocks, "a batch element": empty, "bias": bias, "bias with -1e4": torch.where(blocks, bias, -1e4),
        "bias in bfloat16": torch.where(blocks, bias, -1e4).bfloat16(), "bias with -inf, a batch element": torch.where(empty, bias, -math.inf),
        "bias with a large shift": bias + 200, "expanded": scattered[:1].expand(2, -1), "strided": scattered.repeat_interleave(2, 1)[:, ::2],
    }  # fmt: skip


KEY_MASKS = key_masks(333)


@pytest.mark.pairs(name=KEY_MASKS, causal=[False, True], form=["int8", "sm90"])
def test_key_masks(machine, name, causal, form):
    machine(form)
    q, k, v = qkv(2, 2, 1, 200, 333, 64)
    mask = KEY_MASKS[name]
    hidden = ~mask if mask.dtype == torch.bool else mask <= -9984
    poison = torch.where(torch.arange(333) % 2 == 0, math.nan, math.inf)[None, None, :, None]
    clean = [torch.where(hidden[:, None, :, None], 0, x) for x in (k, v)]
    k, v = (torch.where(hidden[:, None, :, None], poison, x) for x in (k, v))
    out, lse, info = sparse_attention(q, k, v, topk=0.5, key_mask=mask, causal=causal, backend="cuda", return_lse=True, return_info=True)
    assert torch.equal(info.kept.to_map(), select_blocks(q, k, topk=0.5, key_mask=mask, causal=causal, backend="torch").to_dense())
    check(out, lse, info, q, *clean, form=form, key_mask=mask, causal=causal)


def test_always_keep(machine):
    machine()
    q, k, v = (clustered(seed, 1, 2, 450, 64) for seed in (1, 3, 5))
    for ranges in ([(100, 140)], {"k": [(0, 3), (200, 260)]}, {"q": [(300, 301)], "k": [(449, 450)]}, {"q": [(7, 7)]}):
        out, lse, info = sparse_attention(q, k, v, topk=0.2, always_keep=ranges, backend="cuda", return_lse=True, return_info=True)
        assert torch.equal(info.kept.to_map(), select_blocks(q, k, topk=0.2, always_keep=ranges, backend="torch").to_dense())
        check(out, lse, info, q, k, v, flat=False)


@pytest.mark.parametrize("extra", ["", "mask", "keep", "compensate"])
@pytest.mark.parametrize("kind, form", [("tiles", "int8"), ("hilbert", "int8"), ("hilbert", "sm90")])
def test_order(machine, kind, form, extra):
    machine(form)
    plan = order.plan(kind, (37, (3, 9, 11), 20))
    q, k, v = (clustered(seed, 2, 2, plan.length, 64) for seed in (1, 3, 5))
    options = {
        "mask": dict(key_mask=torch.rand(2, plan.length, generator=torch.Generator().manual_seed(1)) > 0.3),
        "keep": dict(always_keep={"k": list(plan.protected)}), "compensate": dict(compensate=True),
    }.get(extra, {})  # fmt: skip
    out, lse, info = sparse_attention(q, k, v, topk=0.3, order=plan, **options, backend="cuda", return_lse=True, return_info=True)
    plain = {key: value for key, value in options.items() if key != "compensate"}
    assert torch.equal(info.kept.to_map(), select_blocks(q, k, topk=0.3, order=plan, **plain, backend="torch").to_dense())
    options.pop("always_keep", None)
    check(out, lse, info, q, k, v, form=form, flat=False, perm=plan.perm, **options)
    again = block_sparse_attention(q, k, v, info.block_mask, order=plan, **options, backend="cuda")
    assert torch.equal(again, out)


@pytest.mark.pairs(shape=[(1, 1), (1, 4), (2, 1), (2, 4)], d=[64, 128], form=["int8", "sm90"])
def test_block_masks_with_empty_and_full_rows(machine, form, d, shape):
    machine(form)
    q, k, v = qkv(2, 4, 2, 300, 333, d)
    dense = torch.rand(*shape, 3, 6, generator=torch.Generator().manual_seed(3)) > 0.6
    dense[:, :, 1], dense[:, :, 2] = False, True
    out, lse, info = block_sparse_attention(q, k, v, dense, backend="cuda", return_lse=True, return_info=True)
    assert torch.equal(info.kept.to_map(), dense.expand(2, 4, -1, -1))
    assert bool((out[:, :, 128:256] == 0).all()) and bool((lse[:, :, 128:256] == -math.inf).all())
    check(out, lse, info, q, k, v, form=form)
    twice, wide = torch.stack([dense, ~dense], 2).flatten(1, 2), torch.cat([dense, ~dense], 3)
    for view in (dense.transpose(2, 3).contiguous().transpose(2, 3), dense.expand(2, 4, -1, -1), twice[:, ::2], wide[..., :6]):
        assert torch.equal(view.expand(2, 4, -1, -1), info.kept.to_map())
        assert torch.equal(block_sparse_attention(q, k, v, view, backend="cuda"), out)


def test_block_mask_with_mask_and_causal(machine):
    machine()
    q, k, v = qkv(2, 2, 2, 200, 333, 64)
    dense = torch.ones(1, 1, 2, 6, dtype=torch.bool)
    mask = KEY_MASKS["whole blocks"]
    out, lse, info = block_sparse_attention(q, k, v, dense, key_mask=mask, causal=True, backend="cuda", return_lse=True, return_info=True)
    plain = block_sparse_attention(q, k, v, dense, key_mask=mask, causal=True, backend="torch", return_info=True)[1]
    assert (
        torch.equal(info.kept.to_map(), plain.kept.to_map())
        and torch.equal(info.kept.visible, plain.kept.visible)
        and torch.equal(info.density, plain.density)
    )
    check(out, lse, info, q, k, v, key_mask=mask, causal=True)


RULES = {
    "cdf": dict(cdfthreshd=0.6), "union": dict(topk=0.2, cdfthreshd=0.5), "mean": dict(topk=0.3, score="mean"),
    "mean, cdf": dict(cdfthreshd=0.6, score="mean"), "judge": dict(topk=0.2, simthreshd1=0.3), "scale": dict(topk=0.3, scale=0.4),
    "no smooth_k": dict(topk=0.3, smooth_k=False), "default": dict(),
    "per head": dict(
        topk=torch.tensor([0.1, 9, 0.5])[::2], simthreshd1=torch.tensor([-1.0, 9, 0.2])[::2],
        pvthreshd=torch.tensor([15.0, 9, 2.0], dtype=torch.float64)[::2],
    ),
    "per head, both": dict(topk=torch.tensor([0.2, 0.4]), cdfthreshd=torch.tensor([0.9, 0.3], dtype=torch.float64)),
}  # fmt: skip


@pytest.mark.parametrize("form", ["int8", "sm90"])
@pytest.mark.parametrize("name", RULES)
def test_rules(machine, name, form):
    used = machine(form)
    q, k, v = clustered(1, 1, 2, 333, 64), clustered(3, 1, 1, 400, 64), clustered(5, 1, 1, 400, 64)
    rule = dict(RULES[name])
    out, lse, info = sparse_attention(q, k, v, **rule, backend="cuda", return_lse=True, return_info=True)
    # Only where lists may differ in length they are put into order.
    assert ("sparge_sequence" in used.launched) == (form == "sm90" and not rule.keys().isdisjoint({"cdfthreshd", "simthreshd1"}))
    how = {key: rule[key] for key in ("scale", "smooth_k", "pvthreshd") if key in rule}
    rule.pop("pvthreshd", None)
    assert torch.equal(info.kept.to_map(), select_blocks(q, k, **rule, backend="torch").to_dense()) and info.density.min() < 0.95
    check(out, lse, info, q, k, v, form=form, flat=False, **how)


def test_smooth_k_reaches_the_judge(machine):
    """Self-similarity is not shift-invariant: with a common part in K, centring decides which blocks are mixed."""
    machine()
    q, k = clustered(1, 1, 2, 333, 64), clustered(3, 1, 2, 400, 64) + 2
    maps = []
    for smooth_k in (True, False):
        mine, plain = (select_blocks(q, k, topk=0.2, simthreshd1=0.3, smooth_k=smooth_k, backend=name).to_dense() for name in ("cuda", "torch"))
        assert torch.equal(mine, plain)
        maps.append(mine)
    assert not torch.equal(*maps)


def test_select_blocks(machine):
    used = machine()
    q, k = clustered(1, 2, 4, 333, 64), clustered(3, 2, 2, 400, 64)
    mine, plain = (select_blocks(q, k, topk=0.3, backend=name) for name in ("cuda", "torch"))
    assert used.launched == ["sparge_statistics", "sparge_prepass", "sparge_select"]
    assert torch.equal(mine.to_dense(), plain.to_dense()) and torch.equal(mine.visible, plain.visible)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("form", FORMS)
def test_tiles_really_are_skipped(machine, form, d):
    """Late keys far below early ones: tiles drop out, as many as in the reference, and the error stays within the bound of it."""
    machine(form)
    q, k, v = falling(d)
    out, lse, info = sparse_attention(q, k, v, topk=1, pvthreshd=4.0, backend="cuda", return_lse=True, return_info=True)
    assert 0.1 < float(info.pv_skipped.min()) and float(info.pv_skipped.max()) < 0.95
    check(out, lse, info, q, k, v, form=form, flat=False, pvthreshd=4.0)


@pytest.mark.parametrize("form", ["int8", "sm90"])
@pytest.mark.parametrize("case", ["", "mask", "bias", "causal", "GQA, D 128", "no smooth_k", "lse off"])
def test_compensation(machine, case, form):
    """V follows K inside the blocks (V = K W + noise): the shift of the value is what the pooled state is about."""
    machine(form)
    d, heads = (128, 4) if case == "GQA, D 128" else (40, 2)
    q, k = clustered(1, 2, heads, 300, d), clustered(3, 2, 2, 450, d)
    v = k @ (normal(7, d, d) / d**0.5) + 0.3 * normal(8, *k.shape)
    how = {
        "mask": dict(key_mask=torch.rand(2, 450, generator=torch.Generator().manual_seed(5)) > 0.3), "bias": dict(key_mask=normal(6, 2, 450)),
        "causal": dict(causal=True),
    }.get(case, {})  # fmt: skip
    smooth = dict(smooth_k=False) if case == "no smooth_k" else {}
    got = sparse_attention(q, k, v, topk=0.3, compensate=True, **how, **smooth, backend="cuda", return_lse=case != "lse off", return_info=True)
    out, lse, info = got[0], None if case == "lse off" else got[1], got[-1]
    exact, _ = check(out, lse, info, q, k, v, form=form, flat=False, compensate=True, **how, **smooth)
    plain = reference.attention(q, k, v, info.kept.to_map(), **how)[0]
    dense = reference.attention(q, k, v, **how)[0]
    assert (exact[0] - dense).norm() < 0.9 * (plain - dense).norm(), "compensation repairs nothing here: the comparison says nothing"


@pytest.mark.parametrize("mask", [None, "scattered", "bias"])
def test_compensation_in_chunks_gives_the_same_bits(machine, monkeypatch, mask):
    """Chunks of one kv head, and of heads of two batch elements."""
    machine()
    q, k, v = qkv(2, 6, 3, 200, 333, 40, torch.float16)
    found = []
    for heads in (1, 2, 4, 6):
        monkeypatch.setattr(workspace, "CHUNK_ELEMENTS", heads * 400 * 40)  # a kv head has 400 rows of queries
        monkeypatch.setattr(backend, "_CARVED", {})
        key_mask = None if mask is None else KEY_MASKS[mask]
        found.append(sparse_attention(q, k, v, topk=0.3, key_mask=key_mask, compensate=True, backend="cuda", return_lse=True))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


def test_two_key_ranges_merge_to_the_whole(machine):
    machine()
    q, k, v = qkv(1, 2, 2, 200, 384, 64)
    k[:, :, :192] += 2 * normal(9, 1, 2, 1, 64)
    k[:, :, 192:] -= normal(10, 1, 2, 1, 64)
    parts = [sparse_attention(q, k[:, :, r], v[:, :, r], topk=1, backend="cuda", return_lse=True) for r in (slice(0, 192), slice(192, 384))]
    out, lse = merge_lse(*parts[0], *parts[1])
    exact, exact_lse, _ = reference.attention(q, k, v)
    assert (parts[0][1] - parts[1][1]).abs().max() > 1, "the ranges do not differ: the test says nothing"
    assert (out - exact).norm() / exact.norm() < FLAT_BOUND["int8"] and (lse - exact_lse).abs().max() < 0.05


@pytest.mark.pairs(value=[math.nan, math.inf, -math.inf], where=["q", "k", "v"], form=["int8", "sm90"])
def test_nan_and_inf_stay_inside_their_head(machine, value, where, form):
    machine(form)
    q, k, v = clustered(1, 2, 4, 200, 64), clustered(3, 2, 2, 200, 64), clustered(5, 2, 2, 200, 64)
    clean = sparse_attention(q, k, v, topk=0.5, backend="cuda")
    {"q": q, "k": k, "v": v}[where][1, 0, 5:140, 3] = value
    hit = torch.zeros(2, 4, dtype=torch.bool)
    hit[1, : 1 if where == "q" else 2] = True
    out = sparse_attention(q, k, v, topk=0.5, backend="cuda")
    assert torch.equal(out[~hit], clean[~hit]) and not torch.equal(out[hit], clean[hit])


@pytest.mark.parametrize("form", ["int8", "sm90"])
@pytest.mark.parametrize("compensate", [False, True], ids=["", "compensate"])
def test_any_order_of_threads_gives_the_same_bits_and_leaves_inputs_alone(machine, compensate, form):
    tensors = qkv(2, 4, 2, 333, 333, 64)
    mask = torch.rand(2, 333, generator=torch.Generator().manual_seed(5)) > 0.2
    before = [x.clone() for x in (*tensors, mask)]
    runs = []
    for seed in (0, 1):
        machine(form, seed)
        out, lse, info = sparse_attention(
            *tensors, topk=0.3, key_mask=mask, compensate=compensate, pvthreshd=3.0, backend="cuda", return_lse=True, return_info=True
        )
        runs.append((out, lse, info.kept.to_map(), info.kept.counts, info.kept.visible, info.pv_tiles))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(x, y) for x, y in zip((*tensors, mask), before, strict=True))


def test_every_form_has_the_same_block_map(machine):
    q, k, v = (clustered(seed, 2, 4, 400, 64) for seed in (1, 3, 5))
    for rule in (dict(topk=0.3), dict(cdfthreshd=0.5, causal=True), dict(topk=0.2, simthreshd1=0.3)):
        maps, outs = [], []
        for form in FORMS:
            machine(form)
            out, info = sparse_attention(q, k, v, **rule, backend="cuda", return_info=True)
            maps.append(info.block_mask)
            outs.append(out)
        for other, out in zip(maps, outs, strict=True):
            assert torch.equal(other.to_dense(), maps[0].to_dense()) and torch.equal(other.visible, maps[0].visible)
            assert float((out - outs[0]).norm() / outs[0].norm()) < FLAT_BOUND["fp8"]


@pytest.mark.parametrize("rule", [dict(topk=0.4), dict(cdfthreshd=0.6)], ids=["one length", "lists of any length"])
def test_hopper_counts_its_items_anew_in_every_call(machine, monkeypatch, rule):
    """Two calls with one workspace: the second finds in it the counter as the first one left it."""
    used, counters, spaces = machine("sm90"), [], []
    plain, launch = backend._empty, used.launch

    def empty(shape, dtype, device):
        if dtype != torch.uint8:
            return plain(shape, dtype, device)
        spaces.append(spaces[0] if spaces else plain(shape, dtype, device))
        return spaces[-1]

    def launch_and_look(kernel, grid, threads, shared, params, stream):
        launch(kernel, grid, threads, shared, params, stream)
        if kernel.name == "sparge_attention_sm90":
            counters.append((grid, threads, ctypes.c_int32.from_address(params.counter).value))

    monkeypatch.setattr(backend, "_empty", empty)
    monkeypatch.setattr(used, "launch", launch_and_look)
    q, k, v = (clustered(seed, 2, 2, 400, 64) for seed in (1, 3, 5))
    first, second = (sparse_attention(q, k, v, **rule, backend="cuda") for _ in range(2))
    assert torch.equal(first, second) and len(spaces) == 2
    # Two multiprocessors; each CTA fetches once more than there are items for it.
    assert counters == [(2, 384, 2 * 2 * 4 + 2)] * 2
    steps = ["sparge_statistics", "sparge_prepass", "sparge_select", *["sparge_sequence"] * ("cdfthreshd" in rule), "sparge_attention_sm90"]
    assert used.launched == 2 * steps


def test_compiled_with_changing_lengths_and_numbers(machine):
    machine()
    torch._dynamo.reset()
    run = torch.compile(
        lambda q, k, v, topk: sparse_attention(q, k, v, topk=topk, backend="cuda", return_lse=True, return_info=True), fullgraph=True,
        backend="aot_eager",
    )  # fmt: skip
    for s, topk in ((200, 0.3), (333, 0.3), (65, 0.5), (333, 0.7)):
        q, k, v = qkv(1, 2, 2, s, s, 64)
        out, lse, info = run(q, k, v, topk)
        plain, plain_lse, plain_info = sparse_attention(q, k, v, topk=topk, backend="cuda", return_lse=True, return_info=True)
        assert torch.equal(out, plain) and torch.equal(lse, plain_lse) and info.backend == "cuda"
        assert torch.equal(info.kept.to_map(), plain_info.kept.to_map()) and torch.equal(info.kept.counts, plain_info.kept.counts)
    torch._dynamo.reset()


def test_asked_before_the_torch_backend_and_with_limits_of_its_own(machine):
    machine()
    device = torch.device("cpu")
    assert choose(Kind(device)) == "cuda" and choose(Kind(device, dim=192)) == "torch" and choose(Kind(device, "torch")) == "torch"
    with pytest.raises(UnsupportedCall, match="head_dim 129"):
        sparse_attention(*(torch.zeros(1, 1, 5, 129) for _ in range(3)), backend="cuda")
