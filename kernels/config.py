"""Which device code serves which call: pure functions from problem and arch to frozen configurations, and the list of everything that is built.

Every figure here is a choice that a measurement may overturn; where one was made, it stands beside the row.
"""

from __future__ import annotations

from dataclasses import dataclass

DIMS = (64, 128)
"""Head sizes of the device code; smaller ones are zero-padded by the pre-pass."""

DTYPES = ("float16", "bfloat16", "float32")
"""Input types, in the order of the device constants."""

PV = ("int8", "fp8", "fp16")
"""How P and V are held for the second product, in the order of the device constants."""

SHIPPED = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
"""Architectures whose binaries are packaged."""

CHECKED = (*SHIPPED, "sm_100")
"""Architectures that everything must compile for."""

THREADS = 256
"""Threads per block of every kernel."""


@dataclass(frozen=True)
class Variant:
    """One binary: a source file under fixed definitions.

    Attributes
    ----------
    name : str
        File stem.
    source : str
        File in kernels/cuda/src.
    symbols : tuple of str
        Its kernels.
    defines : tuple of (str, int)
    shared : int
        Bytes of dynamic shared memory that its kernels ask for at least (0: told at the launch).
    spill_bound : int
        Bytes of local memory that the build tolerates.
    """

    name: str
    source: str
    symbols: tuple[str, ...]
    defines: tuple[tuple[str, int], ...]
    shared: int
    spill_bound: int


def variants(arch: str) -> tuple[Variant, ...]:
    """Every binary that exists on `arch` ("sm_86")."""
    found = []
    for dim in DIMS:
        for i, dtype in enumerate(DTYPES):
            defines, symbols = (("SPARGE_DIM", dim), ("SPARGE_INPUT", i)), ("sparge_statistics", "sparge_prepass")
            # ptxas stops at 80 registers, three blocks a multiprocessor, and on some archs pays with up to 8 bytes of local memory.
            found.append(Variant(prepass_name(dim, dtype), "prepass.cuh", symbols, defines, prepass_shared(dim), 32))
        found.append(Variant(select_name(dim), "select.cuh", ("sparge_select",), (("SPARGE_DIM", dim),), 0, 0))
        for i, pv in enumerate(PV):
            for masked in (False, True):
                if pv != "fp8" or has_fp8(arch):
                    defines = (("SPARGE_DIM", dim), ("SPARGE_PV", i), ("SPARGE_MASKED", int(masked)))
                    found.append(
                        Variant(
                            attention_name(dim, pv, masked), "attention_mma.cuh", ("sparge_attention_mma",), defines, attention_shared(dim, pv), 64
                        )
                    )
    return tuple(found)


def has_fp8(arch: str) -> bool:
    """Whether FP8 P and V pay on `arch`: elsewhere mma.sync has them only as conversions around fp16, or not at all."""
    return number(arch) == 89 or number(arch) // 10 == 12


def number(arch: str) -> int:
    """86 of "sm_86"."""
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
"""Bytes up to which the selection keeps its rows in shared memory: two of its blocks on an SM with 100 KB."""


def select_shared(dim: int, n_k: int) -> tuple[int, bool]:
    """Bytes of shared memory of the selection kernel over `n_k` key blocks, and whether its rows of ranks lie there (`row_in_shared`)."""
    fixed = {64: 9648, 128: 5168}[dim]
    rows = max(2 * 16384, THREADS // 32 * 4 * n_k)  # over the tiles of key pools
    in_shared = fixed + rows <= SELECT_SHARED
    return fixed + (rows if in_shared else 2 * 16384), in_shared


def attention_name(dim: int, pv: str, masked: bool) -> str:
    return f"attention_mma_d{dim}_{pv}{'_masked' if masked else ''}"


STAGES = 3
"""Tiles of K and V in flight or in use in the attention kernel."""

TILE_BLOCKS = {64: 2, 128: 1}
"""64-key blocks per tile of the attention kernel, by head size: what keeps a tile at 128 matrix instructions a warp."""


def attention_shared(dim: int, pv: str) -> int:
    """Bytes of shared memory of the attention kernel."""
    keys = 64 * TILE_BLOCKS[dim]
    return STAGES * keys * dim * (1 + (2 if pv == "fp16" else 1))


def pv_for(arch: str) -> str:
    """The form of P and V on `arch`: INT8 with unsigned P is both the most exact 8-bit form and the only one on every arch."""
    return "int8"
