"""References for the kernel tests: plain fp64, written from the contract, sharing no code with the package; and poisoned memory."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recording import machine  # noqa: F401 - a fixture
from sample_kernels import sources, tool  # noqa: F401 - fixtures
from toy_package import package  # noqa: F401 - a fixture

ROOT = Path(__file__).resolve().parents[2]
BLOCK_Q, BLOCK_K = 128, 64
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@pytest.fixture(autouse=True)
def poisoned():
    """Every tensor that PyTorch hands out unwritten is full of NaN (or the largest integer), so that an unwritten value is seen; one thread.

    One thread because these sizes gain nothing from more and lose much on a busy machine; test_backend_torch.py tries other counts.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory, torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
    torch.set_num_threads(before[2])


def _rand(seed: int, *shape: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * spread).to(dtype)


def _clustered(seed: int, batch: int, heads: int, length: int, dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Tokens that resemble their neighbours (a random walk with noise), so that blocks differ and selection has something to select."""
    centres = _rand(seed, batch, heads, -(-length // 48), dim, dtype=torch.float64).repeat_interleave(48, 2)[:, :, :length]
    return (1.5 * centres + 0.7 * _rand(seed + 1, batch, heads, length, dim, dtype=torch.float64)).to(dtype)


@pytest.fixture(scope="session")
def rand():
    """rand(seed, *shape, dtype, spread): normal values."""
    return _rand


@pytest.fixture(scope="session")
def clustered():
    """clustered(seed, B, H, S, D, dtype): values whose blocks differ."""
    return _clustered


def _bias(key_mask: torch.Tensor | None, batch: int, s_k: int) -> torch.Tensor:
    if key_mask is None:
        return torch.zeros(batch, s_k, dtype=torch.float64)
    if key_mask.dtype == torch.bool:
        return torch.zeros(batch, s_k, dtype=torch.float64).masked_fill(~key_mask, -math.inf)
    bias = key_mask.double()
    return bias.masked_fill(~(bias > -1e4), -math.inf)


def _allowed(q, k, causal, causal_offset, key_mask, blocks, perm) -> torch.Tensor:
    """bool (B, H, S_q, S_k), token by token."""
    batch, heads, s_q, s_k = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    allow = torch.ones(batch, heads, s_q, s_k, dtype=torch.bool)
    if causal:
        allow &= torch.arange(s_k)[None] <= torch.arange(s_q)[:, None] + causal_offset
    allow &= (_bias(key_mask, batch, s_k) > -math.inf)[:, None, None]
    if blocks is not None:
        place = torch.arange(max(s_q, s_k)) if perm is None else torch.argsort(perm)
        i, j = place[:s_q] // BLOCK_Q, place[:s_k] // BLOCK_K
        allow = allow & blocks.expand(batch, heads, -1, -1)[:, :, i][:, :, :, j]
    return allow


def _dense(q, k, v, *, scale=None, causal=False, causal_offset=0, key_mask=None, blocks=None, perm=None):
    """Masked softmax attention in fp64 and its log-sum-exp; blind rows give zeros and -inf. HND."""
    allow = _allowed(q, k, causal, causal_offset, key_mask, blocks, perm)
    bias = _bias(key_mask, k.shape[0], k.shape[2])
    group = q.shape[1] // k.shape[1]
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    hidden = (bias == -math.inf)[:, None, :, None]
    k, v = (x.double().masked_fill(hidden, 0).repeat_interleave(group, 1) for x in (k, v))
    s = torch.einsum("bhid,bhjd->bhij", q.double(), k) * scale + bias.masked_fill(bias == -math.inf, 0)[:, None, None]
    s = s.masked_fill(~allow, -math.inf)
    top = s.amax(-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0)
    e = (s - top).exp()
    total = e.sum(-1, keepdim=True)
    out = torch.einsum("bhij,bhjd->bhid", e, v) / total.masked_fill(total == 0, 1)
    return out, (total.log() + top)[..., 0]


def _sdpa(q, k, v, *, scale=None, causal=False, causal_offset=0, key_mask=None, blocks=None, perm=None):
    """PyTorch's own attention in the inputs' dtype with the whole mask spelled out; NaN rows where nothing is seen."""
    allow = _allowed(q, k, causal, causal_offset, key_mask, blocks, perm)
    bias = _bias(key_mask, k.shape[0], k.shape[2])[:, None, None]
    mask = torch.where(allow, bias, -math.inf).to(q.dtype)
    group = q.shape[1] // k.shape[1]
    hidden = (bias == -math.inf)[:, 0, 0, :, None][:, None]
    k, v = (x.masked_fill(hidden, 0).repeat_interleave(group, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q.contiguous(), k, v, attn_mask=mask, scale=scale)


def _check(got, q, k, v, *, lse=None, **how) -> None:
    """Max error against the fp64 reference <= 2 x that of PyTorch's attention in the same dtype + a rounding term; HND."""
    assert got.shape == q.shape and got.dtype == q.dtype, f"{tuple(got.shape)} {got.dtype} for q {tuple(q.shape)} {q.dtype}"
    truth, true_lse = _dense(q, k, v, **how)
    seen = true_lse > -math.inf
    error = (got.double() - truth).abs()
    assert not error.isnan().any(), f"NaN at {error.isnan().nonzero()[0].tolist()}"
    assert bool((got[~seen] == 0).all()), "a row that sees nothing is not zero"
    peer = (_sdpa(q, k, v, **how).double() - truth).abs()[seen]
    bound = 2 * (peer.max().item() if peer.numel() else 0) + 4 * EPS[q.dtype] * truth.abs().max().item()
    worst = np.unravel_index(int(error.argmax()), error.shape)
    l2 = (error.norm() / truth.norm().clamp_min(1e-30)).item()
    cosine = F.cosine_similarity(got.double().flatten(), truth.flatten(), 0).item()
    assert error.max().item() <= bound, f"max error {error.max().item():.3g} > {bound:.3g} at {worst}; relative L2 {l2:.3g}, cosine {cosine:.8f}"
    if lse is not None:
        _check_lse(lse, true_lse, 1e-5 if q.dtype == torch.float32 else 1e-4)  # half precision: PyTorch's exp is that exact


def _check_lse(lse, truth, tolerance: float = 1e-5) -> None:
    assert lse.dtype == torch.float32 and lse.shape == truth.shape, f"{lse.dtype} {tuple(lse.shape)}"
    blind = truth == -math.inf
    assert bool((lse[blind] == -math.inf).all()) and bool((lse[~blind] > -math.inf).all()), "lse = -inf on other rows than the blind ones"
    error = (lse[~blind].double() - truth[~blind]).abs() / truth[~blind].abs().clamp_min(1)
    assert error.numel() == 0 or error.max().item() <= tolerance, f"lse off by {error.max().item():.3g}, relative"


@pytest.fixture(scope="session")
def naive():
    """The references: dense, sdpa, allowed, check (bound of docs/design/style.md rule 22), check_lse, select, compare_maps."""
    return SimpleNamespace(dense=_dense, sdpa=_sdpa, allowed=_allowed, check=_check, check_lse=_check_lse, select=_select, compare_maps=_compare_maps)


# Selection, from docs/design/algorithm.md, in plain loops.


def _select(q, k, *, topk=None, cdfthreshd=None, simthreshd1=-0.1, causal=False, causal_offset=0, scale=None, key_mask=None, always_keep=None,
            perm=None, score="subblock", smooth_k=True):  # fmt: skip
    """kept, visible, forced, close: bool (B, H, N_q, N_k); `close` marks blocks that the tie rule lets two backends decide differently."""
    batch, heads, s_q, dim = q.shape
    s_k, group = k.shape[2], heads // k.shape[1]
    n_q, n_k = -(-s_q // BLOCK_Q), -(-s_k // BLOCK_K)
    scale = dim**-0.5 if scale is None else scale
    q, k = q.double().numpy(), k.double().numpy()
    bias = _bias(key_mask, batch, s_k).numpy()
    order = np.arange(max(s_q, s_k)) if perm is None else perm.numpy()
    q_tokens = [order[:s_q][i * BLOCK_Q : (i + 1) * BLOCK_Q] for i in range(n_q)]
    k_tokens = [order[:s_k][j * BLOCK_K : (j + 1) * BLOCK_K] for j in range(n_k)]
    if perm is not None:
        assert s_q == s_k
    if topk is None and cdfthreshd is None:
        topk = 0.5
    keep = always_keep if isinstance(always_keep, dict) else {"q": always_keep or [], "k": always_keep or []}

    def of(value, h):
        return None if value is None else float(value[h]) if isinstance(value, torch.Tensor) else value

    def inside(tokens, ranges):
        return any(start <= t < end for t in tokens for start, end in ranges)

    result = SimpleNamespace(**{name: np.zeros((batch, heads, n_q, n_k), bool) for name in ("kept", "visible", "forced", "close")})
    for b in range(batch):
        valid = bias[b] > -np.inf
        weight = np.exp(np.where(valid, bias[b] - (bias[b][valid].max() if valid.any() else 0), -np.inf))
        for h in range(heads):
            kh = k[b, h // group]
            if smooth_k:
                sample = [t for t in (16 * g + (g * g * 1126333 >> 20) % 16 for g in range(-(-s_k // 16))) if t < s_k and valid[t]]
                kh = kh - (kh[sample].mean(0) if sample else 0)
            k_moments = [_moments(kh, tokens[valid[tokens]], weight) for tokens in k_tokens]
            for i, rows in enumerate(q_tokens):
                visible = np.zeros(n_k, bool)
                forced = np.zeros(n_k, bool)
                count = np.zeros(n_k)
                for j, keys in enumerate(k_tokens):
                    reach = keys <= rows.max() + causal_offset if causal else np.ones(len(keys), bool)
                    visible[j] = reach.any() and valid[keys].any()
                    partial = causal and any(t > r + causal_offset for t in keys for r in rows)
                    forced[j] = partial or inside(rows, keep.get("q", [])) or inside(keys, keep.get("k", []))
                    count[j] = weight[keys[reach & valid[keys]]].sum()
                sim = of(simthreshd1, h)
                if sim > 0:
                    forced |= _similarity(q[b, h][rows]) < sim
                    forced |= np.array([_similarity(kh[tokens[valid[tokens]]]) < sim for tokens in k_tokens])
                forced &= visible
                ranks, p = _ranks(q[b, h], rows, k_moments, count, visible, scale, score)
                kept, close = _keep(ranks, p, visible, forced, of(topk, h), of(cdfthreshd, h))
                for name, value in (("kept", kept), ("visible", visible), ("forced", forced), ("close", close)):
                    getattr(result, name)[b, h, i] = value
    return SimpleNamespace(**{name: torch.from_numpy(value) for name, value in vars(result).items()})


def _moments(k, tokens, weight):
    total = weight[tokens].sum()
    if total == 0:
        return np.zeros(k.shape[1]), np.zeros(k.shape[1])
    mean = (weight[tokens, None] * k[tokens]).sum(0) / total
    return mean, (weight[tokens, None] * k[tokens] ** 2).sum(0) / total - mean**2


def _similarity(rows) -> float:
    """Mean of all pairwise cosines, zero rows counting as zero vectors."""
    if len(rows) == 0:
        return 0.0
    norms = np.sqrt((rows**2).sum(1))
    products = np.outer(norms, norms)
    cosines = np.divide(rows @ rows.T, products, out=np.zeros_like(products), where=products > 0)
    return float(cosines.mean())


def _softmax(s):
    if not np.isfinite(s).any():
        return np.zeros_like(s)
    e = np.exp(s - s[np.isfinite(s)].max())
    return e / e.sum()


def _ranks(q, rows, k_moments, count, visible, scale, score):
    """What blocks are ranked by, and the predicted softmax mass."""
    with np.errstate(divide="ignore"):
        log_count = np.where(visible, np.log(count / 64), -np.inf)
    if score == "mean":
        s = np.array([scale * (q[rows].mean(0) @ mean) for mean, _ in k_moments]) + log_count
        return s, _softmax(s)
    p = []
    for first in range(0, len(rows), 32):
        pool = q[rows[first : first + 32]].mean(0)
        s = [scale * (pool @ mean) + min(0.5 * scale**2 * (pool**2 @ variance), 8) for mean, variance in k_moments]
        p.append(_softmax(np.array(s) + log_count))
    p = np.mean(p, axis=0)
    return p, p


def _keep(ranks, p, visible, forced, topk, cdf):
    free = np.flatnonzero(visible & ~forced)
    kept, close = forced.copy(), np.zeros_like(forced)
    best_first = sorted(free, key=lambda j: -ranks[j])
    if topk is not None and len(free):
        n = max(1, int(np.floor(np.float32(topk) * np.float32(len(free)) + np.float32(0.5))))
        kept[best_first[:n]] = True
        edge = ranks[best_first[n - 1]]
        after = ranks[best_first[n]] if n < len(best_first) else -np.inf
        for j in free:
            tolerance = 1e-5 * max(abs(edge), abs(ranks[j])) if np.isfinite(ranks[j]) else 0
            # Only blocks that tie with one on the other side of the edge may differ.
            other = after if kept[j] else edge
            close[j] |= bool(np.isfinite(ranks[j]) and np.isfinite(other) and abs(ranks[j] - other) <= tolerance)
    if cdf is not None:
        mass = p[forced].sum()
        for n, j in enumerate(best_first):
            close[j] |= abs(mass - cdf) <= 1e-5 * cdf
            if mass < cdf or cdf >= 1 or (n == 0 and not forced.any()):
                kept[j] = True
            mass += p[j]
    return kept, close


def _compare_maps(got: torch.Tensor, expected) -> None:
    """Equal but for ties, and ties must be rare."""
    assert got.dtype == torch.bool and got.shape == expected.kept.shape, f"{got.dtype} {tuple(got.shape)} for {tuple(expected.kept.shape)}"
    wrong = (got != expected.kept) & ~expected.close
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} blocks differ, first at {wrong.nonzero()[0].tolist()}: "
        f"got {got[tuple(wrong.nonzero()[0])].item()}, forced {expected.forced[tuple(wrong.nonzero()[0])].item()}"
    )
    assert expected.close.float().mean() < 0.05, "too many ties for the comparison to mean anything"


@pytest.fixture(scope="session")
def load_copy():
    """load_copy(name): the package's folder imported again under another package name, as ComfyUI does it."""

    def load(name: str):
        spec = importlib.util.spec_from_file_location(name, ROOT / "kernels" / "__init__.py", submodule_search_locations=[str(ROOT / "kernels")])
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def profile():
    """profile(call): every allocation in bytes (freed ones negative), the peak, the result, and where asked for the ops with their input shapes."""

    def run(call, ops: bool = False):
        torch.utils.deterministic.fill_uninitialized_memory = False  # it would add ops of its own
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, record_shapes=ops) as prof:
            result = call()
            last = torch.empty(3)  # a marker: the profiler has seen memory events
        del last
        events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
        assert sizes, "the profiler recorded no memory events"
        live = np.cumsum(sizes)
        return SimpleNamespace(ops=list(prof.events()) if ops else [], allocations=sizes, peak=int(live.max()), result=result)

    return run
