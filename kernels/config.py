"""Which device code serves which call: pure functions from problem and arch to frozen configurations, and the list of everything that is built.

Every figure here is a choice that a measurement may overturn; where one was made, it stands beside the row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

DIMS = (64, 128)
"""Head sizes of the device code; smaller ones are zero-padded by the pre-pass."""

DTYPES = ("float16", "bfloat16", "float32")
"""Input types, in the order of the device constants."""

PV = ("int8", "fp8", "fp16")
"""How P and V are held for the second product, in the order of the device constants."""

SHIPPED = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""Architectures whose binaries are packaged."""

CHECKED = (*SHIPPED, "sm_101")
"""Architectures that everything must compile for. sm_101 is what toolkits before CUDA 13, the packaged binaries' among them, call sm_110."""

THREADS = 256
"""Threads per CTA of every kernel but those of ATTENTION that say otherwise."""


@dataclass(frozen=True)
class Variant:
    """One binary: a source file under fixed definitions."""

    name: str  # file stem
    source: str  # file in kernels/cuda/src
    symbols: tuple[str, ...]  # its kernels
    defines: tuple[tuple[str, int], ...]
    shared: int  # bytes of dynamic shared memory that its kernels ask for at least (0: told at the launch)
    spill_bound: int  # bytes of local memory that the build tolerates
    threads: int = THREADS  # per CTA
    exact: str = ""  # the one architecture that it can be compiled for ("sm_90a"); empty: any

    def target(self, arch: str) -> str:
        """What the compiler is told for a device of `arch`."""
        return self.exact or arch


def variants(arch: str) -> tuple[Variant, ...]:
    """Every binary that exists on `arch` ("sm_86")."""
    return _variants(arch, forms(arch))


def packaged(arch: str) -> tuple[Variant, ...]:
    """Those of them that the package brings: all that a call uses unless the user asks for another form of P and V."""
    return _variants(arch, packaged_forms(arch))


def _variants(arch: str, pvs: tuple[str, ...]) -> tuple[Variant, ...]:
    found = []
    for dim in DIMS:
        for i, dtype in enumerate(DTYPES):
            defines, symbols = (("SPARGE_DIM", dim), ("SPARGE_INPUT", i)), ("sparge_statistics", "sparge_prepass")
            # ptxas stops at 80 registers, three CTAs a multiprocessor, and pays with up to 8 bytes of local memory (fp32 on sm_90 at head_dim 128).
            found.append(Variant(prepass_name(dim, dtype), "prepass.cuh", symbols, defines, prepass_shared(dim), 8))
        found.append(Variant(select_name(dim), "select.cuh", ("sparge_select", "sparge_sequence"), (("SPARGE_DIM", dim),), 0, 0))
        found += [attention_kernel(arch, pv).variant(dim, pv, masked) for pv in pvs for masked in (False, True)]
    return tuple(found)


def number(arch: str) -> int:
    """86 of "sm_86", 90 of "sm_90a"."""
    return int(arch.removeprefix("sm_").rstrip("a"))


def padded_dim(dim: int) -> int:
    """The head size of the device code that serves a caller's `dim` in 1..128."""
    return next(d for d in DIMS if dim <= d)


def prepass_name(dim: int, dtype: str) -> str:
    return f"prepass_d{dim}_{dtype}"


def prepass_shared(dim: int) -> int:
    """Bytes of shared memory of the statistics and the pre-pass kernel (KeyShared of prepass.cuh, which checks it)."""
    return 204 * dim + 288


def select_name(dim: int) -> str:
    return f"select_d{dim}"


SELECT_SHARED = 49 * 1024
"""Bytes up to which the selection keeps its rows in shared memory: two of its CTAs on an SM with 100 KB."""


def select_shared(dim: int, n_k: int) -> tuple[int, bool]:
    """Bytes of shared memory of the selection kernel over `n_k` key blocks, and whether its rows of ranks lie there (`row_in_shared`)."""
    fixed = {64: 9648, 128: 5168}[dim]
    rows = max(2 * 16384, THREADS // 32 * 4 * n_k)  # over the tiles of key pools
    in_shared = fixed + rows <= SELECT_SHARED
    return fixed + (rows if in_shared else 2 * 16384), in_shared


@dataclass(frozen=True)
class AttentionKernel:
    """One attention kernel: a row of ATTENTION. All take the same parameters (`AttentionParams`) and read what the pre-pass has written."""

    # Stem of its source (attention_sm90.cuh), its symbol (sparge_attention_sm90) and its binaries (attention_sm90_d64_fp8_masked).
    name: str
    # How it can hold P and V, of PV. The first is packaged, and is what its architectures use; others are compiled when the user asks for them.
    forms: tuple[str, ...]
    # What it needs: "sm_80" or any higher one. With an "a" at the end ("sm_90a") it is compiled for that, and devices of sm_90 alone can run it.
    arch: str
    threads: int  # per CTA
    persistent: bool  # its CTAs, as many as the device holds at once, fetch query blocks from a counter; otherwise each CTA has one of its own
    shared: Callable[[int, str], int]  # (dim, pv) -> bytes of shared memory
    defines: Callable[[int, str], tuple[tuple[str, int], ...]]  # (dim, pv) -> definitions beside SPARGE_DIM and SPARGE_MASKED
    spill_bound: int  # as in `Variant`

    @property
    def symbol(self) -> str:
        return f"sparge_{self.name}"

    @property
    def exact(self) -> str:
        """As in `Variant`."""
        return self.arch if self.arch.endswith("a") else ""

    def runs_on(self, arch: str) -> bool:
        """Whether devices of `arch` ("sm_86") have its instructions."""
        return number(arch) == number(self.arch) if self.exact else number(arch) >= number(self.arch)

    def variant(self, dim: int, pv: str, masked: bool) -> Variant:
        """Its binary for a head size of DIMS and one of its forms, with or without a key mask."""
        name = f"{self.name}_d{dim}_{pv}{'_masked' if masked else ''}"
        defines = (("SPARGE_DIM", dim), ("SPARGE_MASKED", int(masked)), *self.defines(dim, pv))
        return Variant(name, f"{self.name}.cuh", (self.symbol,), defines, self.shared(dim, pv), self.spill_bound, self.threads, self.exact)

    def grid(self, items: int, processors: int) -> int:
        """CTAs for so many query blocks of all heads, on so many multiprocessors."""
        return min(items, processors) if self.persistent else items


STAGES = 3
"""Tiles of K and V in flight or in use in attention_mma.cuh."""

TILE_BLOCKS = {64: 2, 128: 1}
"""64-key blocks per tile there, by head size: what keeps a tile at 128 matrix instructions a warp."""

MMA = AttentionKernel(
    name="attention_mma",
    forms=("int8", "fp16"),
    arch="sm_80",
    threads=THREADS,
    persistent=False,
    shared=lambda dim, pv: STAGES * TILE_BLOCKS[dim] * 64 * dim * (1 + (2 if pv == "fp16" else 1)),
    defines=lambda dim, pv: (("SPARGE_PV", PV.index(pv)),),
    spill_bound=64,
)
"""INT8 with unsigned P is the most exact 8-bit form, and mma.sync has it everywhere. fp16 is more exact still; on sm_80 it may not be slower (not
measured). FP8 by mma.sync is less exact than INT8 and not known to be faster anywhere: a GeForce card has half the rate with sums in fp32, sm_90 and
sm_100 convert to fp16 and back."""


@dataclass(frozen=True)
class HopperConfig:
    """How attention_sm90.cuh is built."""

    tile_blocks: int  # 64-key blocks per tile: 2 or 3
    ones: bool  # eight more rows of V hold ones, so that the product P V also gives the row sums
    overlap: bool  # a warpgroup starts the next tile's Q K^T before this tile's P V, instead of taking turns with the other warpgroup
    split: bool  # P V in two halves of the channels, for fewer registers
    poly: int  # one in so many exponentials is a polynomial; 0: none
    stages: int  # tiles of K and V in flight or in use

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        """For the compiler."""
        return tuple((f"SPARGE_{name.upper()}", int(value)) for name, value in vars(self).items())


HOPPER_SLOTS = 2
"""Query blocks whose Q is there or on its way in attention_sm90.cuh."""


def hopper(chosen: dict[int, HopperConfig]) -> AttentionKernel:
    """The row of attention_sm90.cuh, built as `chosen` says by head size."""

    def shared(dim: int, pv: str) -> int:
        """What aligns it to 1 KB, the queries, the tiles, and 2 KB for barriers and what a tile must be told of."""
        one = chosen[dim]
        return 1024 + HOPPER_SLOTS * 128 * dim + one.stages * one.tile_blocks * 64 * (2 * dim + 8 * one.ones) + 2048

    return AttentionKernel(
        name="attention_sm90",
        forms=("fp8",),
        arch="sm_90a",
        threads=384,  # a warpgroup that fetches and two that compute
        persistent=True,
        shared=shared,
        defines=lambda dim, pv: chosen[dim].defines,
        spill_bound=0,
    )


HOPPER_CONFIG = {
    64: HopperConfig(tile_blocks=2, ones=True, overlap=False, split=False, poly=0, stages=6),  # not measured
    128: HopperConfig(tile_blocks=2, ones=True, overlap=False, split=False, poly=0, stages=4),  # not measured
}
"""How Hopper's kernel is packaged, by head size."""

SM90 = hopper(HOPPER_CONFIG)
"""wgmma takes FP8, whose sums need no conversion (not measured)."""

ATTENTION = (SM90, MMA)
"""The attention kernels, the best first: of those that run on an architecture, the first one's first form is used there, or the next one's where that
cannot be had. The last runs on all."""


def attention_kernels(arch: str) -> tuple[AttentionKernel, ...]:
    """The rows of ATTENTION that run on `arch`, the best first."""
    return tuple(kernel for kernel in ATTENTION if kernel.runs_on(arch))


def attention_kernel(arch: str, pv: str) -> AttentionKernel:
    """The one that holds P and V as `pv` on `arch`, which is one of `forms(arch)`."""
    return next(kernel for kernel in attention_kernels(arch) if pv in kernel.forms)


def forms(arch: str) -> tuple[str, ...]:
    """How P and V can be held on `arch`, in the order of PV."""
    return tuple(pv for pv in PV if any(pv in kernel.forms for kernel in attention_kernels(arch)))


def packaged_forms(arch: str) -> tuple[str, ...]:
    """Those of them that the package has binaries for, in the order of PV."""
    return tuple(pv for pv in forms(arch) if attention_kernel(arch, pv).forms[0] == pv)
