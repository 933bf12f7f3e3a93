"""Is it right? Asked before anything is timed.

Small calls against kernels/reference.py in fp64: no error beyond twice that of the reference with the same quantisation, plus the rounding of the
output's type. Long calls on sampled rows against dense fp32 attention over the kept blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import sparge_kernels
import torch
from sparge_kernels import config, reference
from sparge_kernels.block_mask import BLOCK_K, BLOCK_Q
from torch import Tensor

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
    out, lse, info = sparge_kernels.sparse_attention(q, k, v, **how, backend="cuda", return_lse=True, return_info=True)
    return out, lse, info.kept


def tiles_of(machine, hopper: dict[int, config.HopperConfig] | None = None) -> dict[int, tuple[int, int]]:
    """As MMA_TILES, for a machine's attention kernel; `hopper` by head size instead of the configurations that are shipped."""
    if not config.on_hopper_kernel(machine.arch, machine.pv):
        return MMA_TILES
    return {dim: (64, 64 * (hopper[dim] if hopper else config.hopper_config(dim)).tile_blocks) for dim in config.DIMS}


def small(pv: str, device: torch.device, attend: Callable = attend, tiles: dict[int, tuple[int, int]] = MMA_TILES) -> list[Check]:
    """Every small case with P and V held as `pv`: output, log-sum-exp and selection."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the reference's tensors are tiny: more threads only wait for each other, fifty times as long on a busy machine
    try:
        return [check for case in CASES for check in _case(case, pv, device, attend, tiles)]
    finally:
        torch.set_num_threads(threads)


def _case(case: tuple, pv: str, device: torch.device, attend: Callable, tiles: dict[int, tuple[int, int]]) -> list[Check]:
    name, dtype, b, h, h_kv, s_q, s_k, d, asked = case
    generator = torch.Generator().manual_seed(0)
    q = _clustered(generator, b, h, s_q, d).to(dtype)
    k, v = (_clustered(generator, b, h_kv, s_k, d).to(dtype) for _ in range(2))
    how = {key: value for key, value in asked.items() if key != "key_mask"}
    if "key_mask" in asked:
        how["key_mask"] = _key_mask(generator, asked["key_mask"], b, s_k)
    on_device = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in how.items()}
    out, lse, kept = (x.cpu() for x in attend(q.to(device), k.to(device), v.to(device), **on_device))
    return [Check(f"{name}, {part}, {pv}", *numbers) for part, numbers in _compare(q, k, v, out, lse, kept, pv, how, tiles).items()]


def _compare(q, k, v, out, lse, kept, pv, how, tiles) -> dict[str, tuple[float, float]]:
    """Part -> (error, bound)."""
    common = {key: how[key] for key in ("causal", "key_mask") if key in how}
    rows, keys = tiles[config.padded_dim(q.shape[3])]
    exact, exact_lse, _ = reference.attention(q, k, v, kept, **common)
    rounded, rounded_lse, _ = reference.attention(q, k, v, kept, **common, qk="int8", pv=pv, row_group=rows, key_tile=keys, pvthreshd=15.0)
    error, allowed = (out.double() - exact).abs(), (rounded - exact).abs()
    norm = exact.norm().clamp_min(1e-30)
    selected = sparge_kernels.select_blocks(q, k, topk=how.get("topk"), **common, backend="torch").to_dense()
    seen = exact_lse > -math.inf
    return {
        "largest error": (float(error.max()), 2 * float(allowed.max()) + (EPS[q.dtype] + 1e-5) * float(exact.abs().max())),
        "relative L2": (float(error.norm() / norm), 2 * float(allowed.norm() / norm) + EPS[q.dtype] + 1e-5),
        "lse": (float((lse.double() - exact_lse)[seen].abs().max()), 2 * float((rounded_lse - exact_lse)[seen].abs().max()) + 1e-4),
        "selection": (float((kept != selected).float().mean()), TIES),
    }


def _clustered(generator, batch: int, heads: int, length: int, dim: int) -> Tensor:
    """Tokens that resemble their neighbours, so that selection has something to select."""
    centres = torch.randn(batch, heads, -(-length // 48), dim, generator=generator).repeat_interleave(48, 2)[:, :, :length]
    return 1.5 * centres + 0.7 * torch.randn(batch, heads, length, dim, generator=generator)


def _key_mask(generator, kind: str, batch: int, s_k: int) -> Tensor:
    seen = torch.rand(batch, s_k, generator=generator) > 0.3
    seen[0, 64:128] = False  # a block that nobody sees
    return seen if kind == "bool" else torch.where(seen, 2 * torch.randn(batch, s_k, generator=generator), -1e4)


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
