"""Whole calls of the CUDA backend with its kernels on the emulator, and what they must give, for every test that makes some.

Error bound (max and relative L2): twice the error of the quantise-dequantise reference in the same precision, plus the rounding of the output's dtype
and 1e-5 for fp32 sums; and on flat Gaussian data never more than FLAT_BOUND. Everything the backend allocates is full of NaN (or 0x5a) between two
sentinels, so that a value that nobody wrote, or one written outside, is seen.
"""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import emulator
import pytest
import reference
import torch
from sparge_kernels import BlockMask, centring, compensation, config
from sparge_kernels.backends import cuda as backend

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
        return SimpleNamespace(variant=variant, name=symbol, origin=f"{variant.name}, emulated")

    def launch(self, kernel, grid, threads, shared, params, stream):
        self.launched.append(kernel.name)
        emulator.library(kernel.variant, arch=self.arch).launch(kernel.name, grid, params, shared=shared, threads=threads, seed=self.seed)

    def here(self):
        return contextlib.nullcontext()

    def stream(self):
        return 0


@pytest.fixture
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
def machine(guards, monkeypatch):
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
        centre = centring.key_centre(k, None if key_mask is None else _valid(key_mask))
    if perm is not None:  # a token order: attention in plan order, rows back
        inverse = torch.argsort(perm)
        q, k, v = (x[:, :, perm] for x in (q, k, v))
        key_mask = None if key_mask is None else key_mask[:, perm]
    dim, (arch, pv) = config.padded_dim(q.shape[3]), DEVICES[form]
    on_hopper = config.attention_kernel(arch, pv) is config.SM90
    rows, tile_blocks = (64, config.HOPPER_CONFIG[dim].tile_blocks) if on_hopper else (16, config.TILE_BLOCKS[dim])
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
        state = compensation.pooled_state(compensation.Heads(q[b], kb, vb, weight, visible & ~blocks[b]), scale, shift=not causal)
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
            one = SimpleNamespace(block_mask=BlockMask.from_dense(info.kept.to_map()[:, h : h + 1]), pv_skipped=info.pv_skipped[:, h : h + 1])
            mine = (x[:, h : h + 1] for x in (out, lse))
            check(*mine, one, q[:, h : h + 1], k, v, form=form, flat=flat, pvthreshd=threshold, **how)
        return None
    blocks = info.block_mask.to_dense()
    exact, rounded = expected(q, k, v, blocks, form=form, **how)
    assert out.shape == q.shape and out.dtype == q.dtype, f"the output is {tuple(out.shape)} of {out.dtype}"
    assert bool(out.isfinite().all()), "the output is not finite"
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
    assert bool((out[blind] == 0).all()), "rows that see no key are not 0"
    if lse is not None:
        assert lse.dtype == torch.float32 and torch.equal(lse == -math.inf, blind), "lse of rows that see no key"
        off, bound = (lse.double() - exact[1])[~blind].abs(), (rounded[1] - exact[1])[~blind].abs()
        assert off.numel() == 0 or off.max() <= 2 * bound.max() + 1e-4, f"lse off by {off.max():.3g}"
    torch.testing.assert_close(info.pv_skipped, rounded[2], rtol=0, atol=0)
    return exact, rounded
