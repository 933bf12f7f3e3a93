"""Problems for sparge_statistics and sparge_prepass, and their launches on the emulator."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import emulator
import layouts
import torch
from sparge_kernels import config, selection
from sparge_kernels.cuda.params import PrepassParams, StatisticsParams, Strides

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class Case:
    """One problem; q, k, v (B, H, S, D) with any strides."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None = None
    perm: torch.Tensor | None = None
    pv: str = "int8"
    smooth_k: bool = True
    splits: int = 2
    scale: float = 0.1
    extras: bool = True  # everything that may be null is asked for
    dim: int = field(init=False)

    def __post_init__(self):
        self.dim = config.padded_dim(self.q.shape[3])
        self.keys = selection.Keys.from_mask(self.mask)
        self.dtype = next(name for name, dtype in DTYPES.items() if dtype == self.q.dtype)

    @property
    def library(self):
        found = {v.name: v for v in config.variants("sm_89")}[config.prepass_name(self.dim, self.dtype)]
        return emulator.library(found)

    def split_length(self) -> int:
        return 16 * math.ceil(self.k.shape[2] / self.splits / 16)

    def masks(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """key_valid and key_bias as the kernels take them."""
        if self.mask is None:
            return None, None
        if self.mask.dtype == torch.bool:
            return self.mask.to(torch.uint8), None
        bias = self.mask.float() - self.keys.top[:, None]
        return None, torch.where(self.keys.valid, bias, -math.inf)


def pointer(x: torch.Tensor | None):
    return None if x is None else x.data_ptr()


def strides(x: torch.Tensor) -> Strides:
    assert x.stride(3) == 1 or x.shape[3] == 1
    return Strides(*x.stride()[:3])


def statistics(case: Case, seed: int = 0, library=None) -> SimpleNamespace:
    batch, kv_heads, s_k, dim = case.k.shape
    length = case.split_length()
    valid, bias = case.masks()
    rows = (batch, kv_heads, case.splits)
    out = SimpleNamespace(
        k_sum=emulator.guarded((*rows, case.dim), torch.float32),
        k_count=emulator.guarded(rows, torch.float32),
        v_absmax=emulator.guarded((*rows, case.dim), torch.int32),
    )
    params = StatisticsParams(
        k=case.k.data_ptr(), v=case.v.data_ptr(), k_stride=strides(case.k), v_stride=strides(case.v), key_valid=pointer(valid),
        key_bias=pointer(bias), **{n: t.data_ptr() for n, t in vars(out).items()}, kv_heads=kv_heads, s_k=s_k, dim=dim, splits=case.splits,
        split_length=length, batch=batch,
    )  # fmt: skip
    (library or case.library).launch("sparge_statistics", batch * kv_heads * case.splits, params, seed=seed)
    emulator.check_guards(*vars(out).values())
    return out


def layout(case: Case) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every output of the pre-pass, from layout.cuh."""
    batch, heads, s_q, _ = case.q.shape
    kv_heads, s_k, e = case.k.shape[1], case.k.shape[2], case.dim
    n_q, n_k = -(-s_q // 128), -(-s_k // 64)
    q, k = (batch, heads), (batch, kv_heads)
    v8 = ((*k, n_k * 64, e), torch.float16) if case.pv == "fp16" else ((*k, n_k, e, 64), torch.int8)
    return {
        "q8": ((*q, n_q * 128, e), torch.int8),
        "q_scale": ((*q, n_q * 128), torch.float32),
        "k8": ((*k, n_k * 64, e), torch.int8),
        "k_scale": ((*k, n_k), torch.float32),
        "v8": v8,
        "v_scale": ((*k, e), torch.float32),
        "bias2": ((batch, n_k * 64), torch.float32),
        "q_mean": ((*q, n_q * 4, 2, e), torch.float16),
        "q_square": ((*q, n_q * 4, 2, e), torch.float16),
        "q_pool_scale": ((*q, n_q * 4, 2), torch.float32),
        "k_mean": ((*k, n_k, 2, e), torch.float16),
        "k_variance": ((*k, n_k, 2, e), torch.float16),
        "k_pool_scale": ((*k, n_k, 2), torch.float32),
        "k_weight": ((batch, n_k), torch.float32),
        "q_sim": ((*q, n_q), torch.float32),
        "k_sim": ((*k, n_k), torch.float32),
        "v_mean": ((*k, n_k, e), torch.float32),
        "lse_shift": ((*q, s_q), torch.float32),
    }


OPTIONAL = ("bias2", "q_sim", "k_sim", "v_mean", "lse_shift")


def prepass(case: Case, stats: SimpleNamespace, seed: int = 0, library=None) -> SimpleNamespace:
    """The outputs; q8, k8 and v8 with the bytes of a row in order."""
    batch, heads, s_q, dim = case.q.shape
    kv_heads, s_k = case.k.shape[1], case.k.shape[2]
    valid, bias = case.masks()
    out = {n: emulator.guarded(*how) for n, how in layout(case).items() if case.extras or n not in OPTIONAL}
    if case.mask is None:
        out.pop("bias2", None)
    params = PrepassParams(
        q=case.q.data_ptr(), k=case.k.data_ptr(), v=case.v.data_ptr(), q_stride=strides(case.q), k_stride=strides(case.k), v_stride=strides(case.v),
        perm=pointer(case.perm), key_valid=pointer(valid), key_bias=pointer(bias), **{n: t.data_ptr() for n, t in vars(stats).items()},
        **{n: t.data_ptr() for n, t in out.items()}, scale=case.scale, batch=batch, heads=heads, kv_heads=kv_heads, s_q=s_q, s_k=s_k, dim=dim,
        splits=case.splits, smooth_k=int(case.smooth_k), pv=config.PV.index(case.pv),
    )  # fmt: skip
    grid = batch * heads * -(-s_q // 128) + batch * kv_heads * -(-s_k // 64)
    (library or case.library).launch("sparge_prepass", grid, params, seed=seed)
    emulator.check_guards(*out.values())
    return SimpleNamespace(**{n: layouts.swizzled(t) if n in ("q8", "k8", "v8") else t for n, t in out.items()})


def run(case: Case, seed: int = 0, library=None) -> SimpleNamespace:
    stats = statistics(case, seed, library)
    return SimpleNamespace(**vars(stats), **vars(prepass(case, stats, seed, library)))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.dtype.itemsize])


def assert_same(a: SimpleNamespace, b: SimpleNamespace, *, but: tuple[str, ...] = ()) -> None:
    """Every tensor that both have, bit by bit."""
    for name in vars(a).keys() & vars(b).keys() - set(but):
        assert torch.equal(bits(getattr(a, name)), bits(getattr(b, name))), f"{name} differs"


def rand(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask_of(kind: str | None, batch: int, s_k: int) -> torch.Tensor | None:
    if kind is None:
        return None
    valid = torch.rand(batch, s_k, generator=torch.Generator().manual_seed(s_k)) < 0.7
    valid[0, 64:128] = False  # a whole block of the first element, and all of the last one
    if batch > 1:
        valid[-1] = False
    if kind == "bool":
        return valid
    return torch.where(valid, 3 * rand(s_k, batch, s_k) - 5, -math.inf)


def problem(dtype: str, dim: int, s: int, *, batch: int = 2, heads: int = 2, kv_heads: int = 1, s_k: int | None = None, mask: str | None = None,
            perm: bool = False, **how) -> Case:  # fmt: skip
    s_k = s_k or s
    spread = torch.linspace(0.2, 3, dim)
    q = rand(1, batch, heads, s, dim) * spread
    k = rand(2, batch, kv_heads, s_k, dim) + 2 * rand(3, dim) + rand(4, batch, kv_heads, -(-s_k // 16), dim).repeat_interleave(16, 2)[:, :, :s_k]
    v = rand(5, batch, kv_heads, s_k, dim) * spread
    order = torch.randperm(s, generator=torch.Generator().manual_seed(6)) if perm else None
    q, k, v = (x.to(DTYPES[dtype]) for x in (q, k, v))
    return Case(q, k, v, mask_of(mask, batch, s_k), order, **how)
