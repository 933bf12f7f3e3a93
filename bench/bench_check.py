"""Is it right? Asked before anything is timed.

Small calls against tools/reference.py in fp64: no error beyond twice that of the reference with the same quantisation, plus the rounding of the
output's type. Long calls on sampled rows against dense fp32 attention over the kept blocks.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import sparge_kernels
import torch
from bench_shapes import Shape
from sparge_kernels import config, order
from sparge_kernels.block_mask import BLOCK_K, BLOCK_Q
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))  # what pyproject.toml gives to pytest
import reference

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FLAT_BOUND = {"int8": 0.03, "fp8": 0.05, "fp16": 0.03}
"""Relative L2 error on independent normal q, k and v, where nothing averages errors out. The bound of the tests, for the same data."""
TIES = 0.01
"""Share of blocks that two selections may decide differently: scores that agree to rounding."""
SAMPLED = 32
"""Query rows per head of a long call."""

CASES = (
    # name, dtype, B, H, H_kv, S_q, S_k, D, what is asked for
    ("one token", torch.bfloat16, 1, 2, 2, 1, 1, 64, {}),
    ("200 by 333, GQA, D 128", torch.bfloat16, 1, 4, 2, 200, 333, 128, {"topk": 0.5}),
    ("all blocks, D 40", torch.bfloat16, 2, 2, 2, 130, 200, 40, {"topk": 1.0}),
    ("key mask", torch.bfloat16, 2, 2, 2, 300, 333, 64, {"topk": 0.5, "key_mask": "bool"}),
    ("key bias, D 128", torch.bfloat16, 2, 2, 1, 200, 333, 128, {"topk": 0.5, "key_mask": "bias"}),
    ("causal", torch.bfloat16, 1, 2, 2, 333, 333, 128, {"topk": 0.5, "causal": True}),
    ("causal, key mask", torch.bfloat16, 2, 2, 2, 200, 200, 64, {"topk": 0.5, "causal": True, "key_mask": "bool"}),
    ("fp16", torch.float16, 1, 2, 2, 257, 400, 128, {"topk": 0.5}),
    ("fp32, D 64", torch.float32, 1, 2, 2, 257, 400, 64, {"topk": 0.5}),
)

NASTY = (
    # Every combination of head size, type and mask, which is every binary of an architecture and a form of P and V; each with something else.
    ("causal edge inside a block", torch.float16, 1, 2, 1, 300, 391, 64, {"topk": 0.6, "causal": True, "causal_offset": 91}),
    ("edge before the first key, masked keys", torch.float16, 2, 2, 2, 200, 391, 64,
     {"topk": 0.6, "causal": True, "causal_offset": -40, "key_mask": "bool"}),
    ("mass and judge", torch.bfloat16, 1, 2, 1, 300, 560, 64, {"cdfthreshd": 0.8, "simthreshd1": 0.3}),
    ("PV skipped under a bias", torch.bfloat16, 1, 2, 2, 300, 560, 64, {"topk": 0.5, "key_mask": "bias", "pvthreshd": 3.0, "spread": 2.0}),
    ("rows of 40 channels, token before head", torch.float32, 2, 2, 1, 130, 200, 40, {"topk": 0.5, "nhd": True}),
    ("33 channels, a batch that sees nothing", torch.float32, 2, 2, 2, 130, 200, 33, {"topk": 0.5, "key_mask": "blind"}),
    ("published score, kept tokens", torch.float16, 1, 2, 1, 300, 391, 128,
     {"topk": 0.4, "score": "mean", "always_keep": {"q": [(3, 9)], "k": [(300, 320)]}}),
    ("mass under a mask", torch.float16, 2, 2, 1, 300, 391, 128, {"cdfthreshd": 0.7, "key_mask": "bool"}),
    ("PV skipped", torch.bfloat16, 2, 4, 2, 300, 560, 128, {"topk": 0.6, "pvthreshd": 3.0, "spread": 2.0}),
    ("edge and bias", torch.bfloat16, 1, 2, 2, 300, 391, 128, {"topk": 0.6, "causal": True, "causal_offset": 91, "key_mask": "bias"}),
    ("100 channels, an order", torch.float32, 1, 2, 1, 367, 367, 100, {"topk": 0.5, "order": (97, (3, 9, 10))}),
    ("96 channels, masked keys, no centre", torch.float32, 1, 2, 2, 300, 391, 96, {"topk": 0.5, "key_mask": "bool", "smooth_k": False}),
    # What the kernels decide at run time.
    ("one row, one key", torch.bfloat16, 1, 1, 1, 1, 1, 128, {}),
    ("all blocks, large scores", torch.bfloat16, 1, 2, 1, 300, 391, 128, {"topk": 1.0, "spread": 30.0}),
    ("lists of many lengths", torch.bfloat16, 1, 2, 1, 700, 640, 128, {"lists": (0, 1, 2, 3, 8, 9)}),
    ("lists of many lengths, D 64", torch.bfloat16, 1, 2, 1, 700, 640, 64, {"lists": (9, 0, 3, 1, 8, 2)}),
)  # fmt: skip

MMA_TILES = {64: (16, 128), 128: (16, 64)}
"""Query rows and keys for which attention_mma.cuh decides at a time whether P V is worth it, by padded head size."""

LONG = (2, 33 * 45 * 80 + 256, 128)  # heads, tokens, head size


@dataclass(frozen=True)
class Check:
    """One comparison and what came of it."""

    name: str
    error: float
    bound: float

    @property
    def good(self) -> bool:
        return self.error <= self.bound  # false for NaN

    def __str__(self) -> str:
        return f"{self.name}: {self.error:.2e} of {self.bound:.2e} {'ok' if self.good else 'WRONG'}"


def attend(q: Tensor, k: Tensor, v: Tensor, **how) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, kept) of the CUDA backend."""
    call = sparge_kernels.block_sparse_attention if "block_mask" in how else sparge_kernels.sparse_attention
    out, lse, info = call(q, k, v, **how, backend="cuda", return_lse=True, return_info=True)
    return out, lse, info.kept.to_map()


def tiles_of(machine, hopper: dict[int, config.HopperConfig] | None = None) -> dict[int, tuple[int, int]]:
    """As MMA_TILES, for a machine's attention kernel; `hopper` by head size instead of the configurations that are shipped."""
    if config.attention_kernel(machine.arch, machine.pv) is not config.SM90:
        return MMA_TILES
    return {dim: (64, 64 * (hopper[dim] if hopper else config.HOPPER_CONFIG[dim]).tile_blocks) for dim in config.DIMS}


def small(pv: str, device: torch.device, attend: Callable = attend, tiles: dict[int, tuple[int, int]] = MMA_TILES) -> list[Check]:
    """Every small case with P and V held as `pv`: output, log-sum-exp and selection."""
    return [check for case in CASES for check in _alone(_case, case, pv, device, attend, tiles)]


def nasty(pv: str, device: torch.device, tiles: dict[int, tuple[int, int]] = MMA_TILES) -> Iterator[Check]:
    """The small cases that a kernel is most likely to get wrong, and compensation, one check after the other."""
    for case in (*NASTY, *CASES):
        yield from _alone(_case, case, pv, device, attend, tiles)
    for dim in config.DIMS:
        for segments in (None, (97, (3, 9, 10))):
            yield _alone(_compensated, pv, device, dim, segments)


def _alone(check: Callable, *arguments):
    """A check on one thread: the reference's tensors are tiny, and more threads only wait for each other, fifty times as long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return check(*arguments)
    finally:
        torch.set_num_threads(threads)


def _case(case: tuple, pv: str, device: torch.device, attend: Callable, tiles: dict[int, tuple[int, int]]) -> list[Check]:
    name, dtype, b, h, h_kv, s_q, s_k, d, asked = case
    generator = torch.Generator().manual_seed(0)
    how = dict(asked)
    q = (_clustered(generator, b, h, s_q, d) * how.pop("spread", 1.0)).to(dtype)
    k, v = (_clustered(generator, b, h_kv, s_k, d).to(dtype) for _ in range(2))
    if "key_mask" in how:
        how["key_mask"] = _key_mask(generator, how["key_mask"], b, s_k)
    if "order" in how:
        how["order"] = order.plan("hilbert", how["order"])
    if "lists" in how:
        how["block_mask"] = _lists(generator, how.pop("lists"), b, h, -(-s_q // BLOCK_Q), -(-s_k // BLOCK_K))
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)] if how.pop("nhd", False) else [q, k, v]
    on_device = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in how.items()}
    out, lse, kept = (x.cpu() for x in attend(*(x.to(device) for x in views), **on_device))
    return [Check(f"{name}, {part}, {pv}", *numbers) for part, numbers in _compare(q, k, v, out, lse, kept, pv, how, tiles).items()]


def _compare(q, k, v, out, lse, kept, pv, how, tiles) -> dict[str, tuple[float, float]]:
    """Part -> (error, bound)."""
    rows, keys = tiles[config.padded_dim(q.shape[3])]
    selecting = {key: value for key, value in how.items() if key not in ("block_mask", "pvthreshd")}
    selected = how["block_mask"] if "block_mask" in how else sparge_kernels.select_blocks(q, k, **selecting, backend="torch").to_dense()
    if "order" in how:  # the map is in plan order, and so is the reference
        perm = how["order"].perm
        q, k, v, out, lse = q[:, :, perm], k[:, :, perm], v[:, :, perm], out[:, :, perm], lse[:, :, perm]
    common = {key: how[key] for key in ("causal", "causal_offset", "key_mask") if key in how}
    rounding = dict(qk="int8", pv=pv, row_group=rows, key_tile=keys, pvthreshd=how.get("pvthreshd", 15.0), smooth_k=how.get("smooth_k", True))
    exact, exact_lse, _ = reference.attention(q, k, v, kept, **common)
    rounded, rounded_lse, _ = reference.attention(q, k, v, kept, **common, **rounding)
    error, allowed = (out.double() - exact).abs(), (rounded - exact).abs()
    norm = exact.norm().clamp_min(1e-30)
    seen = exact_lse > -math.inf
    off, bound = (lse.double() - exact_lse)[seen].abs(), (rounded_lse - exact_lse)[seen].abs()
    return {
        "largest error": (float(error.max()), 2 * float(allowed.max()) + (EPS[q.dtype] + 1e-5) * float(exact.abs().max())),
        "relative L2": (float(error.norm() / norm), 2 * float(allowed.norm() / norm) + EPS[q.dtype] + 1e-5),
        "lse": (float(off.max()), 2 * float(bound.max()) + 1e-4),
        "rows that see nothing": (float((out[~seen] != 0).sum() + (lse[~seen] != -math.inf).sum()), 0.0),
        "selection": (float((kept != selected).float().mean()), TIES),
    }


def _compensated(pv: str, device: torch.device, dim: int, segments: tuple | None) -> Check:
    """Skipped blocks in the softmax, against the torch backend's over the same blocks."""
    tokens = 367
    generator = torch.Generator().manual_seed(2)
    q, k, v = (_clustered(generator, 1, 2, tokens, dim).bfloat16() for _ in range(3))
    how = {} if segments is None else {"order": order.plan("hilbert", segments)}
    out, _, kept = attend(q.to(device), k.to(device), v.to(device), topk=0.4, compensate=True, **how)
    truth = sparge_kernels.block_sparse_attention(q.float(), k.float(), v.float(), kept.cpu(), compensate=True, backend="torch", **how)
    error = float((out.cpu().float() - truth).norm() / truth.norm())
    return Check(f"compensated, D {dim}{', an order' if segments else ''}, relative L2, {pv}", error, flat_bound(pv, q.dtype))


def _lists(generator, lengths: tuple[int, ...], batch: int, heads: int, n_q: int, n_k: int) -> Tensor:
    """A map whose rows keep so many blocks, chosen at random."""
    kept = torch.zeros(batch, heads, n_q, n_k, dtype=torch.bool)
    for row, count in zip(kept.view(-1, n_k), lengths * (batch * heads * n_q), strict=False):
        row[torch.randperm(n_k, generator=generator)[:count]] = True
    return kept


def _clustered(generator, batch: int, heads: int, length: int, dim: int) -> Tensor:
    """Tokens that resemble their neighbours, so that selection has something to select."""
    centres = torch.randn(batch, heads, -(-length // 48), dim, generator=generator).repeat_interleave(48, 2)[:, :, :length]
    return 1.5 * centres + 0.7 * torch.randn(batch, heads, length, dim, generator=generator)


def _key_mask(generator, kind: str, batch: int, s_k: int) -> Tensor:
    seen = torch.rand(batch, s_k, generator=generator) > 0.3
    seen[0, 64:128] = False  # a block that nobody sees
    if kind == "blind":
        seen[-1] = False
    return seen if kind != "bias" else torch.where(seen, 2 * torch.randn(batch, s_k, generator=generator), -1e4)


# ---- long calls


def rows(s_q: int) -> Tensor:
    """Sampled query rows, the first and the last among them."""
    return torch.linspace(0, s_q - 1, min(SAMPLED, s_q)).long()


def sampled(q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None = None) -> Tensor:
    """Attention of the sampled rows in fp32, (B, H, rows, D): over the kept blocks, or over everything."""
    chosen = rows(q.shape[2]).to(q.device)
    batch, heads, _, dim = q.shape
    group = heads // k.shape[1]
    out = torch.empty(batch, heads, len(chosen), dim, device=q.device)
    for b in range(batch):
        for h in range(heads):
            s = q[b, h, chosen].float() @ k[b, h // group].float().mT * dim**-0.5
            if kept is not None:
                allowed = kept[b, h, chosen // BLOCK_Q].repeat_interleave(BLOCK_K, -1)[:, : k.shape[2]]
                s = s.masked_fill(~allowed, -math.inf)
            out[b, h] = s.softmax(-1) @ v[b, h // group].float()
    return out


def relative_l2(out: Tensor, truth: Tensor) -> float:
    """Of the sampled rows of `out` (B, H, S_q, D) against what `sampled` gave; NaN when either holds one."""
    got = out[:, :, rows(out.shape[2]).to(out.device)].float()
    return float((got - truth).norm() / truth.norm())


def flat_bound(pv: str, dtype: torch.dtype) -> float:
    """Largest relative L2 error on independent normal data, the output's rounding included."""
    return FLAT_BOUND[pv] + EPS[dtype]


def long(pv: str, device: torch.device, attend: Callable = attend) -> Check:
    """A video's length, on sampled rows."""
    heads, tokens, dim = LONG
    generator = torch.Generator(device).manual_seed(1)
    q, k, v = (torch.randn(1, heads, tokens, dim, generator=generator, device=device).bfloat16() for _ in range(3))
    out, _, kept = attend(q, k, v, topk=0.25)
    error = relative_l2(out, sampled(q, k, v, kept))
    return Check(f"{tokens} tokens, {min(SAMPLED, tokens)} rows of {heads} heads, relative L2, {pv}", error, flat_bound(pv, q.dtype))


BEYOND = Shape("q of more than 2^31 elements", 131_200, 640, 130, 128, kv_heads=2)


def beyond_bytes(shape: Shape) -> int:
    """What `beyond` takes: q and the output of two bytes, q in 8 bits and pooled, their lists, and 2 GiB for everything else."""
    return 6 * shape.heads * shape.s_q * shape.dim + (2 << 30)


def beyond(pv: str, device: torch.device, shape: Shape) -> list[Check]:
    """A call whose offsets need 64 bits: sampled rows of every head, the first and the last among them, and no value anywhere that is no number."""
    generator = torch.Generator(device).manual_seed(3)
    q = torch.randn(1, shape.heads, shape.s_q, shape.dim, generator=generator, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(1, shape.key_heads, shape.s_k, shape.dim, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(2))
    out, lse, kept = attend(q, k, v, topk=0.5)
    error = relative_l2(out, sampled(q, k, v, kept))
    lost = sum(int((~out[:, head].isfinite()).sum()) + int((~lse[:, head].isfinite()).sum()) for head in range(shape.heads))
    return [
        Check(f"{shape.name} ({q.numel():,}), relative L2, {pv}", error, flat_bound(pv, q.dtype)),
        Check(f"{shape.name}, values that are no numbers, {pv}", float(lost), 0.0),
    ]
