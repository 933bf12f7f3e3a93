"""Whole calls of the CUDA backend with its kernels on the emulator: every step between the public functions and the output, against reference.py.

Error bound (max and relative L2): twice the error of the quantise-dequantise reference in the same precision, plus the rounding of the output's dtype
and 1e-5 for fp32 sums; and on flat Gaussian data never more than FLAT_BOUND. Everything the backend allocates is full of NaN (or 0x5a) between two
sentinels, so that a value that nobody wrote, or one written outside, is seen.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from types import SimpleNamespace

import emulator
import pytest
import torch
from sparge_kernels import (
    UnsupportedCall,
    block_sparse_attention,
    compensation,
    config,
    merge_lse,
    order,
    quantize,
    reference,
    select_blocks,
    sparse_attention,
)
from sparge_kernels.backends import choose
from sparge_kernels.backends import cuda as backend
from sparge_kernels.cuda import workspace
from sparge_kernels.ops import Call

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FLAT_BOUND = {"int8": 0.03, "fp8": 0.05, "fp16": 0.03}
"""Relative L2 error against exact attention under the same map, on independent normal q, k and v, where nothing averages errors out."""
FORMS = {"int8": ("sm_89", "int8"), "fp16": ("sm_89", "fp16"), "sm90": ("sm_90", "fp8")}
"""The GPU that a test pretends, and how P and V are held there. On sm_90 that is Hopper's own attention kernel."""
ARCHS = {f"{arch} {pv}": (arch, pv) for arch in config.SHIPPED for pv in config.forms(arch) if (arch, pv) not in FORMS.values()}
"""The others for which binaries are packaged."""
DEVICES = {**FORMS, **ARCHS}


class EmulatedMachine:
    """A GPU of two multiprocessors that runs on the CPU: `backend.Machine` for CPU tensors."""

    def __init__(self, form: str, seed: int):
        self.arch, self.pv = DEVICES[form]
        self.processors, self.seed = 2, seed
        self.launched = []

    def missing(self, variants):
        return None

    def kernel(self, variant, symbol):
        return SimpleNamespace(variant=variant, name=symbol)

    def launch(self, kernel, grid, threads, shared, params, stream):
        self.launched.append(kernel.name)
        emulator.library(kernel.variant, arch=self.arch).launch(kernel.name, grid, params, shared=shared, threads=threads, seed=self.seed)

    def here(self):
        return contextlib.nullcontext()

    def stream(self):
        return 0


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    """Allocations of the backend between sentinels, checked after the test."""
    held = []
    plain = torch.empty_like

    def empty(shape, dtype, device):
        held.append(emulator.guarded(tuple(shape), dtype))
        return held[-1]

    def empty_like(x):
        model = plain(x)
        held.append(emulator.guarded((model.numel(),), model.dtype))
        return held[-1].as_strided(model.shape, model.stride())

    monkeypatch.setattr(backend, "_empty", empty)
    monkeypatch.setattr(backend, "_empty_like", empty_like)
    yield
    emulator.check_guards(*held)


@pytest.fixture
def machine(monkeypatch):
    """machine(form, seed): the GPU that every device is taken for from then on."""

    def use(form: str = "int8", seed: int = 0) -> EmulatedMachine:
        made = EmulatedMachine(form, seed)
        monkeypatch.setattr(backend, "machine_of", lambda device: (made, None))
        return made

    return use


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(b, h, h_kv, s_q, s_k, d, dtype=torch.float32, seed=0):
    return normal(seed, b, h, s_q, d, dtype=dtype), normal(seed + 1, b, h_kv, s_k, d, dtype=dtype), normal(seed + 2, b, h_kv, s_k, d, dtype=dtype)


def clustered(seed, batch, heads, length, dim, dtype=torch.float32):
    """Tokens that resemble their neighbours, so that selection has something to select."""
    centres = normal(seed, batch, heads, -(-length // 48), dim, dtype=torch.float64).repeat_interleave(48, 2)[:, :, :length]
    return (1.5 * centres + 0.7 * normal(seed + 1, batch, heads, length, dim, dtype=torch.float64)).to(dtype)


def expected(q, k, v, blocks, *, form, compensate=False, perm=None, key_mask=None, causal=False, scale=None, **how):
    """(exact, quantised) of (out, lse, pv_skipped) under a block map; with compensation what was skipped is merged into both."""
    inverse = None
    centre = None  # of K, in the caller's order whatever the plan
    if compensate and how.get("smooth_k", True):
        centre = quantize.key_centre(k, None if key_mask is None else _valid(key_mask))
    if perm is not None:  # a plan: attention in plan order, rows back
        inverse = torch.argsort(perm)
        q, k, v = (x[:, :, perm] for x in (q, k, v))
        key_mask = None if key_mask is None else key_mask[:, perm]
    dim, (arch, pv) = config.padded_dim(q.shape[3]), DEVICES[form]
    rows, tile_blocks = (64, config.hopper_config(dim).tile_blocks) if config.on_hopper_kernel(arch, pv) else (16, config.TILE_BLOCKS[dim])
    common = dict(key_mask=key_mask, causal=causal, scale=scale, causal_offset=how.get("causal_offset", 0))
    exact = reference.attention(q, k, v, blocks, **common)
    rules = dict(qk="int8", pv=pv, row_group=rows, key_tile=64 * tile_blocks, smooth_k=how.get("smooth_k", True))
    rounded = reference.attention(q, k, v, blocks, **common, **rules, pvthreshd=how.get("pvthreshd", 15.0))
    results = []
    for out, lse, skipped in (exact, rounded):
        if compensate:
            out, lse = _with_skipped(q, k, v, out, lse, blocks, key_mask, causal, scale, centre)
        if inverse is not None:
            out, lse = out[:, :, inverse], lse[:, :, inverse]
        results.append((out, lse, skipped))
    return results


def _valid(key_mask: torch.Tensor) -> torch.Tensor:
    return key_mask if key_mask.dtype == torch.bool else key_mask > -1e4


def _with_skipped(q, k, v, out, lse, blocks, key_mask, causal, scale, centre):
    scale = q.shape[3] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    centre = k.new_zeros(k.shape[0], k.shape[1], 1, k.shape[3]) if centre is None else centre
    outs, lses = [], []
    for b in range(q.shape[0]):
        kb = (k[b].float() - centre[b]).repeat_interleave(group, 0)
        vb, frame = v[b].float().repeat_interleave(group, 0), scale * (q[b].float() @ centre[b].repeat_interleave(group, 0).mT)[..., 0]
        n_q, n_k = blocks.shape[2:]
        visible = torch.ones(n_q, n_k, dtype=torch.bool)
        weight = None
        if key_mask is not None:
            valid = _valid(key_mask)
            visible = visible & torch.nn.functional.pad(valid[b], (0, n_k * 64 - k.shape[2])).view(n_k, 64).any(-1)
            bias = torch.zeros(k.shape[2]) if key_mask.dtype == torch.bool else key_mask[b].float()
            top = bias[valid[b]].max()
            weight = torch.where(valid[b], (bias - top).exp(), 0)
            frame = frame + top
        if causal:  # whole blocks only
            visible = visible & ((torch.arange(n_k) + 1)[None] * 64 - 1 <= torch.arange(n_q)[:, None] * 128)
        state = compensation.skipped_state(q[b], kb, vb, weight, visible & ~blocks[b], scale, shift=not causal)
        o, l = compensation.merge(out[b].float(), (lse[b].float() - frame), q[b], state, scale)
        outs.append(o)
        lses.append(l + frame)
    return torch.stack(outs).double(), torch.stack(lses).double()


def falling(dim, s_q=200, s_k=400, dtype=torch.float32):
    """q, k, v whose late keys lie far below the early ones, so that tiles drop out."""
    q, k, v = qkv(1, 2, 1, s_q, s_k, dim)
    q = 2 * normal(9, 1, 2, 1, dim) + 0.3 * q
    k[:, :, :64] += 1.5 * q.mean((1, 2), keepdim=True)
    return tuple(x.to(dtype) for x in (q, k, v))


def check(out, lse, info, q, k, v, *, form="int8", flat=True, **how):
    """The bounds of this file's first paragraph, the log-sum-exp, and the skipped tiles; with one kv head `pvthreshd` may be a tensor, one a head."""
    if isinstance(how.get("pvthreshd"), torch.Tensor):
        for h, threshold in enumerate(how.pop("pvthreshd").tolist()):
            one = SimpleNamespace(kept=info.kept[:, h : h + 1], pv_skipped=info.pv_skipped[:, h : h + 1])
            mine = (x[:, h : h + 1] for x in (out, lse))
            check(*mine, one, q[:, h : h + 1], k, v, form=form, flat=flat, pvthreshd=threshold, **how)
        return None
    blocks = info.kept
    exact, rounded = expected(q, k, v, blocks, form=form, **how)
    assert out.shape == q.shape and out.dtype == q.dtype and bool(out.isfinite().all())
    size = exact[0].abs().max().item()
    slack = (EPS[q.dtype] + 1e-5) * size
    error, allowed = (out.double() - exact[0]).abs(), (rounded[0] - exact[0]).abs()
    l2 = (error.norm() / exact[0].norm().clamp_min(1e-30)).item()
    l2_allowed = 2 * (allowed.norm() / exact[0].norm().clamp_min(1e-30)).item() + EPS[q.dtype] + 1e-5
    worst = torch.tensor(error.shape).numel() and tuple(int(x) for x in torch.unravel_index(error.argmax(), error.shape))
    told = f"max {error.max():.3g} at {worst} of {2 * allowed.max() + slack:.3g}; relative L2 {l2:.3g} of {l2_allowed:.3g}"
    assert error.max() <= 2 * allowed.max() + slack and l2 <= l2_allowed, told
    if flat:
        assert l2 <= FLAT_BOUND[DEVICES[form][1]], told
    blind = exact[1] == -math.inf
    assert bool((out[blind] == 0).all())
    if lse is not None:
        assert lse.dtype == torch.float32 and torch.equal(lse == -math.inf, blind)
        off, bound = (lse.double() - exact[1])[~blind].abs(), (rounded[1] - exact[1])[~blind].abs()
        assert off.numel() == 0 or off.max() <= 2 * bound.max() + 1e-4, f"lse off by {off.max():.3g}"
    torch.testing.assert_close(info.pv_skipped, rounded[2], rtol=0, atol=0)
    return exact, rounded


SHAPES = [
    pytest.param(1, 2, 2, 1, 1, 64, id="S 1"),
    pytest.param(1, 2, 2, 63, 63, 128, id="S 63, D 128"),
    pytest.param(1, 2, 1, 200, 200, 64, id="S 200, GQA 2 to 1"),
    pytest.param(1, 1, 1, 200, 333, 128, id="S_q 200, S_k 333, D 128"),
    pytest.param(2, 3, 1, 130, 65, 40, id="batch 2, MQA, S_q 130, S_k 65, D 40"),
    pytest.param(1, 1, 1, 1, 200, 96, id="S_q 1, S_k 200, D 96"),
    pytest.param(1, 1, 1, 257, 1, 1, id="S_q 257, S_k 1, D 1"),
]


@pytest.mark.parametrize("topk", [1, 0.4])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("b, h, h_kv, s_q, s_k, d", SHAPES)
def test_shapes(machine, b, h, h_kv, s_q, s_k, d, form, topk):
    used = machine(form)
    q, k, v = qkv(b, h, h_kv, s_q, s_k, d)
    out, lse, info = sparse_attention(q, k, v, topk=topk, backend="cuda", return_lse=True, return_info=True)
    attention = "sparge_attention_sm90" if form == "sm90" else "sparge_attention_mma"
    assert used.launched == ["sparge_statistics", "sparge_prepass", "sparge_select", attention] and info.backend == "cuda"
    assert torch.equal(info.kept, select_blocks(q, k, topk=topk, backend="torch").to_dense())
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
    assert torch.equal(info.kept, select_blocks(q, k, topk=0.3, backend="torch").to_dense()) and 0.2 < float(info.density) < 0.4
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


@pytest.mark.parametrize("offset", [0, 63, -64, -500, 5000, -(1 << 39), 1 << 39])
@pytest.mark.parametrize("s_q, s_k, d", [(200, 333, 64), (333, 200, 128)], ids=str)
@pytest.mark.parametrize("form", ["int8", "sm90"])
def test_causal(machine, form, s_q, s_k, d, offset):
    machine(form)
    q, k, v = qkv(1, 2, 1, s_q, s_k, d)
    how = dict(causal=True, causal_offset=offset)
    out, lse, info = sparse_attention(q, k, v, topk=0.4, **how, backend="cuda", return_lse=True, return_info=True)
    assert torch.equal(info.kept, select_blocks(q, k, topk=0.4, **how, backend="torch").to_dense())
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


@pytest.mark.parametrize("form", ["int8", "sm90"])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("name", KEY_MASKS)
def test_key_masks(machine, name, causal, form):
    machine(form)
    q, k, v = qkv(2, 2, 1, 200, 333, 64)
    mask = KEY_MASKS[name]
    hidden = ~mask if mask.dtype == torch.bool else mask <= -9984
    poison = torch.where(torch.arange(333) % 2 == 0, math.nan, math.inf)[None, None, :, None]
    clean = [torch.where(hidden[:, None, :, None], 0, x) for x in (k, v)]
    k, v = (torch.where(hidden[:, None, :, None], poison, x) for x in (k, v))
    out, lse, info = sparse_attention(q, k, v, topk=0.5, key_mask=mask, causal=causal, backend="cuda", return_lse=True, return_info=True)
    assert torch.equal(info.kept, select_blocks(q, k, topk=0.5, key_mask=mask, causal=causal, backend="torch").to_dense())
    check(out, lse, info, q, *clean, form=form, key_mask=mask, causal=causal)


def test_always_keep(machine):
    machine()
    q, k, v = (clustered(seed, 1, 2, 450, 64) for seed in (1, 3, 5))
    for ranges in ([(100, 140)], {"k": [(0, 3), (200, 260)]}, {"q": [(300, 301)], "k": [(449, 450)]}, {"q": [(7, 7)]}):
        out, lse, info = sparse_attention(q, k, v, topk=0.2, always_keep=ranges, backend="cuda", return_lse=True, return_info=True)
        assert torch.equal(info.kept, select_blocks(q, k, topk=0.2, always_keep=ranges, backend="torch").to_dense())
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
    assert torch.equal(info.kept, select_blocks(q, k, topk=0.3, order=plan, **plain, backend="torch").to_dense())
    options.pop("always_keep", None)
    check(out, lse, info, q, k, v, form=form, flat=False, perm=plan.perm, **options)
    again = block_sparse_attention(q, k, v, info.block_mask, order=plan, **options, backend="cuda")
    assert torch.equal(again, out)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("form", ["int8", "sm90"])
def test_block_masks_with_empty_and_full_rows(machine, form, d, shape):
    machine(form)
    q, k, v = qkv(2, 4, 2, 300, 333, d)
    dense = torch.rand(*shape, 3, 6, generator=torch.Generator().manual_seed(3)) > 0.6
    dense[:, :, 1], dense[:, :, 2] = False, True
    out, lse, info = block_sparse_attention(q, k, v, dense, backend="cuda", return_lse=True, return_info=True)
    assert torch.equal(info.kept, dense.expand(2, 4, -1, -1))
    assert bool((out[:, :, 128:256] == 0).all()) and bool((lse[:, :, 128:256] == -math.inf).all())
    check(out, lse, info, q, k, v, form=form)
    twice, wide = torch.stack([dense, ~dense], 2).flatten(1, 2), torch.cat([dense, ~dense], 3)
    for view in (dense.transpose(2, 3).contiguous().transpose(2, 3), dense.expand(2, 4, -1, -1), twice[:, ::2], wide[..., :6]):
        assert torch.equal(view.expand(2, 4, -1, -1), info.kept)
        assert torch.equal(block_sparse_attention(q, k, v, view, backend="cuda"), out)


def test_block_mask_with_mask_and_causal(machine):
    machine()
    q, k, v = qkv(2, 2, 2, 200, 333, 64)
    dense = torch.ones(1, 1, 2, 6, dtype=torch.bool)
    mask = KEY_MASKS["whole blocks"]
    out, lse, info = block_sparse_attention(q, k, v, dense, key_mask=mask, causal=True, backend="cuda", return_lse=True, return_info=True)
    plain = block_sparse_attention(q, k, v, dense, key_mask=mask, causal=True, backend="torch", return_info=True)[1]
    assert torch.equal(info.kept, plain.kept) and torch.equal(info.visible, plain.visible) and torch.equal(info.density, plain.density)
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
    assert torch.equal(info.kept, select_blocks(q, k, **rule, backend="torch").to_dense()) and info.density.min() < 0.95
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
    plain = reference.attention(q, k, v, info.kept, **how)[0]
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
        workspace.plan.cache_clear()
        key_mask = None if mask is None else KEY_MASKS[mask]
        found.append(sparse_attention(q, k, v, topk=0.3, key_mask=key_mask, compensate=True, backend="cuda", return_lse=True))
    workspace.plan.cache_clear()
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


@pytest.mark.parametrize("form", ["int8", "sm90"])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
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
        runs.append((out, lse, info.kept, info.counts, info.visible, info.skips))
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
    # Two multiprocessors; each block draws once more than there are items for it.
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
        assert torch.equal(info.kept, plain_info.kept) and torch.equal(info.counts, plain_info.counts)
    torch._dynamo.reset()


def test_asked_before_the_torch_backend_and_with_limits_of_its_own(machine):
    machine()
    device = torch.device("cpu")
    assert choose(Call(device)) == "cuda" and choose(Call(device, dim=192)) == "torch" and choose(Call(device, "torch")) == "torch"
    with pytest.raises(UnsupportedCall, match="head_dim 129"):
        sparse_attention(*(torch.zeros(1, 1, 5, 129) for _ in range(3)), backend="cuda")
