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

PV_EVERYWHERE = "int8"
"""The form that is used where no other is better or available."""

SHIPPED = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""Architectures whose binaries are packaged."""

CHECKED = (*SHIPPED, "sm_101")
"""Architectures that everything must compile for. sm_101 is what toolkits before CUDA 13, the packaged binaries' among them, call sm_110."""

THREADS = 256
"""Threads per block of every kernel but Hopper's own."""

HOPPER, HOPPER_EXACT = "sm_90", "sm_90a"
"""The architecture that has a kernel of its own, and what that kernel is compiled for: its instructions exist on compute capability 9.0 alone."""

HOPPER_THREADS = 384
"""Threads per block of Hopper's kernel: a warpgroup that fetches and two that compute."""

HOPPER_SHARED = 227 << 10
"""Most bytes of shared memory that a block may have there."""


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
    threads : int
        Threads per block.
    exact : str
        The one architecture that it can be compiled for ("sm_90a"); empty: any.
    """

    name: str
    source: str
    symbols: tuple[str, ...]
    defines: tuple[tuple[str, int], ...]
    shared: int
    spill_bound: int
    threads: int = THREADS
    exact: str = ""

    def target(self, arch: str) -> str:
        """What the compiler is told for a device of `arch`."""
        return self.exact or arch


def variants(arch: str) -> tuple[Variant, ...]:
    """Every binary that exists on `arch` ("sm_86")."""
    found = []
    for dim in DIMS:
        for i, dtype in enumerate(DTYPES):
            defines, symbols = (("SPARGE_DIM", dim), ("SPARGE_INPUT", i)), ("sparge_statistics", "sparge_prepass")
            # ptxas stops at 80 registers, three blocks a multiprocessor, and pays with up to 16 bytes of local memory (fp32 on sm_100 and sm_120).
            # There it takes 105 for 16-bit inputs at head_dim 128: two blocks (what that costs is not measured).
            found.append(Variant(prepass_name(dim, dtype), "prepass.cuh", symbols, defines, prepass_shared(dim), 32))
        found.append(Variant(select_name(dim), "select.cuh", ("sparge_select", "sparge_sequence"), (("SPARGE_DIM", dim),), 0, 0))
        found += [attention_variant(arch, dim, pv, masked) for pv in forms(arch) for masked in (False, True)]
    return tuple(found)


def forms(arch: str) -> tuple[str, ...]:
    """How P and V can be held on `arch`: FP8 on Hopper alone, by wgmma. With mma.sync it is less exact than INT8 and not known to be faster anywhere:
    a GeForce card has half the rate with sums in fp32, sm_90 and sm_100 convert to fp16 and back."""
    return tuple(pv for pv in PV if pv != "fp8" or arch == HOPPER)


def on_hopper_kernel(arch: str, pv: str) -> bool:
    """Whether attention runs on attention_sm90.cuh rather than attention_mma.cuh."""
    return arch == HOPPER and pv == "fp8"


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


def attention_variant(arch: str, dim: int, pv: str, masked: bool) -> Variant:
    """The attention kernel's binary on `arch`."""
    if on_hopper_kernel(arch, pv):
        return hopper_variant(dim, masked, hopper_config(dim))
    name, defines = attention_name(dim, pv, masked), (("SPARGE_DIM", dim), ("SPARGE_PV", PV.index(pv)), ("SPARGE_MASKED", int(masked)))
    return Variant(name, "attention_mma.cuh", ("sparge_attention_mma",), defines, attention_shared(dim, pv), 64)


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
    """The form of P and V on `arch`: INT8 with unsigned P is the most exact 8-bit form, and mma.sync has it everywhere; wgmma on Hopper takes FP8,
    whose sums need no conversion (not measured)."""
    return "fp8" if arch == HOPPER else PV_EVERYWHERE


# ---- Hopper's own kernel -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HopperConfig:
    """How attention_sm90.cuh is built.

    Attributes
    ----------
    tile_blocks : int
        64-key blocks per tile: 2 or 3.
    ones : bool
        Eight more rows of V hold ones, so that the product P V also gives the row sums.
    overlap : bool
        A warpgroup starts the next tile's Q K^T before this tile's P V, instead of taking turns with the other warpgroup.
    split : bool
        P V in two halves of the channels, for fewer registers.
    poly : int
        One in so many exponentials is a polynomial; 0: none.
    stages : int
        Tiles of K and V in flight or in use.
    """

    tile_blocks: int
    ones: bool
    overlap: bool
    split: bool
    poly: int
    stages: int

    @property
    def label(self) -> str:
        """In short: "n128 s4 ones"."""
        words = [f"n{64 * self.tile_blocks}", f"s{self.stages}", *(word for word in ("ones", "overlap", "split") if getattr(self, word))]
        return " ".join(words + ([f"poly{self.poly}"] if self.poly else []))

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        """For the compiler."""
        names = ("tile_blocks", "ones", "overlap", "split", "poly", "stages")
        return tuple((f"SPARGE_{name.upper()}", int(getattr(self, name))) for name in names)


_HOPPER = {
    64: HopperConfig(tile_blocks=2, ones=True, overlap=False, split=False, poly=0, stages=6),  # not measured
    128: HopperConfig(tile_blocks=2, ones=True, overlap=False, split=False, poly=0, stages=4),  # not measured
}


@dataclass(frozen=True)
class HopperRing:
    """What the warps of attention_sm90.cuh agree on however it is built; tests/ring proves it, and holds the kernel to it.

    Attributes
    ----------
    slots : int
        Items whose Q is there or on its way.
    fills : int
        Arrivals that a stage or a slot is full after, beside the bytes that they announce: the producer's first lane.
    frees : int
        Arrivals that a stage or a slot is empty after: one of each warp that computes.
    turn, vote : int
        Hardware barriers of the first warpgroup that computes; the second one's are the next.
    turn_threads, vote_threads : int
        Threads that meet there: those of both warpgroups, those of one.
    """

    slots: int = 2
    fills: int = 1
    frees: int = 8
    turn: int = 1
    vote: int = 3
    turn_threads: int = 256
    vote_threads: int = 128


HOPPER_RING = HopperRing()


def hopper_config(dim: int) -> HopperConfig:
    """How Hopper's kernel is built for `dim`."""
    return _HOPPER[dim]


def hopper_candidates(dim: int) -> tuple[HopperConfig, ...]:
    """What the benchmark builds and times before one of them becomes `hopper_config`."""
    few, some, many = {64: (4, 6, 8), 128: (3, 4, 5)}[dim]
    shapes = [(2, False, False, few), (2, False, False, some), (2, False, False, many), (3, False, False, few)]
    shapes += [(2, False, True, some), (2, True, True, some)]
    found = [HopperConfig(blocks, ones, overlap, split, 0, stages) for ones in (True, False) for blocks, overlap, split, stages in shapes]
    return (*found, HopperConfig(2, True, False, False, 8, some))


def hopper_shared(dim: int, chosen: HopperConfig) -> int:
    """Bytes of shared memory: what aligns it to 1 KB, the queries of items, the tiles, and 2 KB for barriers and what a tile must be told of."""
    block = 64 * dim + 64 * (dim + 8 * chosen.ones)
    return 1024 + HOPPER_RING.slots * 128 * dim + chosen.stages * chosen.tile_blocks * block + 2048


def hopper_variant(dim: int, masked: bool, chosen: HopperConfig) -> Variant:
    """Hopper's kernel as `chosen`; all but `hopper_config` carry their label in their name."""
    name = f"attention_sm90_d{dim}_fp8{'_masked' if masked else ''}"
    if chosen != hopper_config(dim):
        name = f"{name}_{chosen.label.replace(' ', '_')}"
    defines = (("SPARGE_DIM", dim), ("SPARGE_MASKED", int(masked)), *chosen.defines)
    shared = hopper_shared(dim, chosen)
    return Variant(name, "attention_sm90.cuh", ("sparge_attention_sm90",), defines, shared, 0, HOPPER_THREADS, HOPPER_EXACT)
