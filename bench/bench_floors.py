"""What a tile of attention, the pre-pass and the selection must cost at least, and what was predicted of Hopper's kernel before it was measured.

Cycles are those of one multiprocessor for a tile: 128 queries against the keys that a CTA takes at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import hopper_candidates
from sparge_kernels import config
from sparge_kernels.block_mask import BLOCK_K, BLOCK_Q, num_blocks

WARPS, SCHEDULERS = 8, 4
"""Warps that compute, and warps that can issue in a cycle."""
EXPONENTIALS = 16
"""A cycle of one multiprocessor, on every arch from sm_80 on, by NVIDIA's table of throughputs."""

# Names of bench_ceilings.CEILINGS.
_WGMMA_S8, _WGMMA_E4M3 = "wgmma s8, operands in shared memory", "wgmma e4m3, one operand in registers"
_S8, _VALUES = "mma s8 x s8", {"int8": "mma u8 x s8", "fp16": "mma fp16"}
_BULK, _LOADS = "bulk copies of 8 KB from L2", "16-byte copies from L2"

DATASHEET = {
    "sm_80": {_S8: 2048, _VALUES["int8"]: 2048, _VALUES["fp16"]: 1024},
    "sm_86": {_S8: 1024, _VALUES["int8"]: 1024, _VALUES["fp16"]: 256},
    "sm_89": {_S8: 1024, _VALUES["int8"]: 1024, _VALUES["fp16"]: 256},
    "sm_90": {_WGMMA_S8: 4096, _WGMMA_E4M3: 4096},
    "sm_120": {_S8: 1024, _VALUES["int8"]: 1024, _VALUES["fp16"]: 256},
}
"""Multiplications with addition a cycle of one multiprocessor: A100, RTX 3090, RTX 4090, H100 and RTX 5090. Workstation cards of sm_86, sm_89 and
sm_120 take twice as many with sums in fp32. What mma.sync reaches on sm_90 and sm_100 no datasheet tells."""

INSTRUCTIONS = {
    ("sm_80", "int8"): {128: 746, 64: 898}, ("sm_80", "fp16"): {128: 568, 64: 777},
    ("sm_86", "int8"): {128: 649, 64: 798}, ("sm_86", "fp16"): {128: 534, 64: 709},
    ("sm_89", "int8"): {128: 649, 64: 798}, ("sm_89", "fp16"): {128: 534, 64: 709},
    ("sm_90", "int8"): {128: 638, 64: 768}, ("sm_90", "fp8"): {128: 518, 64: 474}, ("sm_90", "fp16"): {128: 521, 64: 700},
    ("sm_100", "int8"): {128: 669, 64: 787}, ("sm_100", "fp16"): {128: 542, 64: 714},
    ("sm_120", "int8"): {128: 704, 64: 850}, ("sm_120", "fp16"): {128: 601, 64: 795},
}  # fmt: skip
"""Of each warp for a tile, as instruction_mix.py counts them in the packaged binaries."""


# ---- attention


@dataclass(frozen=True)
class Tile:
    """What one tile asks of a multiprocessor.

    Attributes
    ----------
    dim : int
    keys : int
    products : tuple of (str, int)
        The ceiling that bounds a product, and its multiplications.
    exponentials : int
    instructions : int or None
        Of each of WARPS warps; None: not counted.
    nbytes : int
        K and V, from the L2 cache.
    copies : str
        The ceiling of the copies that bring them.
    """

    dim: int
    keys: int
    products: tuple[tuple[str, int], ...]
    exponentials: int
    instructions: int | None
    nbytes: int
    copies: str

    @property
    def flop(self) -> float:
        """Of the two products without what rows of ones add."""
        return 4.0 * BLOCK_Q * self.keys * self.dim


def usual_form(arch: str) -> str:
    """How P and V are held on `arch` unless the user says otherwise."""
    return config.attention_kernels(arch)[0].forms[0]


def tile_of(arch: str, dim: int, pv: str) -> Tile:
    """A tile of the attention kernel that serves `arch` with that form of P and V; `dim` 64 or 128."""
    counted = INSTRUCTIONS.get((arch, pv), {}).get(dim)
    rows = 2 * 32 * WARPS  # exponentials of a tile that are not scores: what O decays by, two rows a thread
    if config.attention_kernel(arch, pv) is config.SM90:
        chosen = config.HOPPER_CONFIG[dim]
        keys = BLOCK_K * chosen.tile_blocks
        products = ((_WGMMA_S8, BLOCK_Q * keys * dim), (_WGMMA_E4M3, BLOCK_Q * keys * (dim + 8 * chosen.ones)))
        return Tile(dim, keys, products, BLOCK_Q * keys + rows, counted, 2 * keys * dim, _BULK)
    keys = BLOCK_K * config.TILE_BLOCKS[dim]
    products = ((_S8, BLOCK_Q * keys * dim), (_VALUES[pv], BLOCK_Q * keys * dim))
    nbytes = keys * dim * (3 if pv == "fp16" else 2)
    return Tile(dim, keys, products, BLOCK_Q * keys + rows * (2 if pv == "int8" else 1), counted, nbytes, _LOADS)


@dataclass(frozen=True)
class Rates:
    """What one multiprocessor does in a cycle.

    Attributes
    ----------
    products : dict
        Ceiling -> multiplications with addition.
    exponentials : float
    from_l2 : dict
        Ceiling -> bytes; empty where nothing is measured.
    measured : frozenset of str
        Which ceilings are measured; the others are the datasheets'.
    """

    products: dict[str, float]
    exponentials: float = EXPONENTIALS
    from_l2: dict[str, float] = field(default_factory=dict)
    measured: frozenset[str] = field(default_factory=frozenset)


def rates(arch: str, ceilings: list[dict] = ()) -> Rates:
    """Of the datasheets, and in their place what `ceilings` (rows of bench_ceilings.measure) holds."""
    cycle = {row["name"]: row["per_cycle"] for row in ceilings if row.get("per_cycle")}
    products = DATASHEET.get(arch, {}) | {name: value / 2 for name, value in cycle.items() if name.startswith(("mma ", "wgmma "))}
    l2 = {name: cycle[name] for name in (_BULK, _LOADS) if name in cycle}
    return Rates(products, cycle.get("exponentials", EXPONENTIALS), l2, frozenset(cycle))


def issue_cycles(instructions: int) -> int:
    return instructions * WARPS // SCHEDULERS


def floors(tile: Tile, given: Rates) -> dict[str, float | None]:
    """Unit -> the fewest cycles that the tile can take there; None: its rate, or how many instructions there are, is not known."""
    parts = [(given.products.get(name), work) for name, work in tile.products]
    return {
        "products": None if any(rate is None for rate, _ in parts) else sum(work / rate for rate, work in parts),
        "special functions": tile.exponentials / given.exponentials,
        "issue": None if tile.instructions is None else issue_cycles(tile.instructions),
        "L2": tile.nbytes / given.from_l2[tile.copies] if tile.copies in given.from_l2 else None,
    }


def tiles_in(row: dict, keys: int) -> float:
    """Tiles of `keys` keys that a call works on; `row`: density, heads, dim, and s_q and s_k or tokens."""
    s_q, s_k = row.get("s_q", row.get("tokens")), row.get("s_k", row.get("tokens"))
    blocks = row["density"] * num_blocks(s_q, BLOCK_Q) * num_blocks(s_k, BLOCK_K) * row["heads"] * row.get("batch", 1)
    return blocks * BLOCK_K / keys


# ---- before attention

# Bytes for each token and channel, as the head of prepass.cuh tells: 16-bit q, k and v are read, v twice, k once and for its mean a sixteenth of it.
_BYTES_Q = 2 + 1 + 8 / 32
_BYTES_K = 2 / 16 + 2 + 1 + 8 / 64
_BYTES_V = 2 + 2 + 1


def prepass_bytes(row: dict, pv: str) -> float:
    """What statistics and pre-pass must read and write in device memory for 16-bit tensors; `row` as bench.measure makes it."""
    dim = config.padded_dim(row["dim"])
    keys = row["batch"] * row["kv_heads"] * row["s_k"] * dim
    return row["batch"] * row["heads"] * row["s_q"] * dim * _BYTES_Q + keys * (_BYTES_K + _BYTES_V + (1 if pv == "fp16" else 0))


def select_flop(row: dict) -> float:
    """Of the fp16 products of the scores: four pools of a query block against each key block, a mean and a variance, three products each."""
    pairs = row["batch"] * row["heads"] * 4 * num_blocks(row["s_q"], BLOCK_Q) * num_blocks(row["s_k"], BLOCK_K)
    return 2.0 * pairs * config.padded_dim(row["dim"]) * 2 * 3


# ---- predictions

PREDICTED = {64: 1400, 128: 1400}
"""Head size -> cycles of Hopper's kernel for 128 queries x 128 keys, before anything was measured."""


@dataclass(frozen=True)
class Version:
    """A way to build Hopper's kernel and what was predicted of it.

    Attributes
    ----------
    what, prediction : str
    changes : dict
        Fields of config.HopperConfig that differ from the shipped one.
    """

    what: str
    prediction: str
    changes: dict

    def label(self, dim: int) -> str:
        """That of the candidate; of several the one with as many stages as the shipped one, or as near to it as there is."""
        shipped = config.HOPPER_CONFIG[dim]
        wanted = replace(shipped, **self.changes)
        fits = [c for c in hopper_candidates.candidates(dim) if replace(c, stages=wanted.stages) == wanted]
        return hopper_candidates.label(min(fits, key=lambda c: abs(c.stages - wanted.stages)))


VERSIONS = (
    Version(
        "tiles of 128 keys, turns, ones row, 4 stages (64: 6 stages)",
        f"{PREDICTED[128]:,} cycles a tile: three quarters of the rate that the floors allow",
        {},
    ),
    Version("the same without the ones row: 4 accumulators fewer, 64 more additions a thread", "slower at 64, even at 128", {"ones": False}),
    Version("overlap with P V in halves, no turns", "slower: more instructions, 8 bytes of spill", {"overlap": True, "split": True}),
    Version("tiles of 192 keys", "head_dim 64: a tenth faster; 128: spills 192 bytes, slower", {"tile_blocks": 3}),
    Version("head_dim 64 with an eighth of the exponentials as polynomials", "5 % faster", {"poly": 8}),
)


def hopper_table() -> str:
    """Floors of Hopper's kernel as Markdown."""
    lines = [
        "| head_dim | products | special functions | issue (instructions a warp) | from L2 | a tile's work |",
        "|---|---|---|---|---|---|",
    ]
    for dim in reversed(config.DIMS):
        tile = tile_of("sm_90", dim, "fp8")
        least = floors(tile, rates("sm_90"))
        cells = [f"{least['products']:,.0f}", f"{least['special functions']:,.0f}", f"{least['issue']:,} ({tile.instructions})"]
        lines.append("| " + " | ".join([str(dim), *cells, f"{tile.nbytes >> 10} KB", f"{tile.flop / 1e6:.2f} MFLOP"]) + " |")
    return "\n".join(lines)


def versions_table(outcomes: dict[str, str] | None = None) -> str:
    """VERSIONS as Markdown; `outcomes`: what a version turned out to be, by its `what`."""
    told = outcomes or {}
    lines = ["| version | prediction | outcome |", "|---|---|---|"]
    return "\n".join(lines + [f"| {v.what} | {v.prediction} | {told.get(v.what, 'not measured')} |" for v in VERSIONS])


def portable_table() -> str:
    """Floors of attention_mma.cuh at the rates of the datasheets, as Markdown."""
    lines = [
        "| GPU | P and V | head_dim | keys a tile | products | special functions | issue (instructions a warp) | from L2 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arch in config.SHIPPED:
        for pv in config.forms(arch):
            for dim in () if arch == "sm_90" else reversed(config.DIMS):
                tile = tile_of(arch, dim, pv)
                least = floors(tile, rates(arch))
                products = "not known" if least["products"] is None else f"{least['products']:,.0f}"
                cells = [arch, pv, str(dim), str(tile.keys), products, f"{least['special functions']:,.0f}"]
                lines.append("| " + " | ".join([*cells, f"{least['issue']:,} ({tile.instructions})", f"{tile.nbytes >> 10} KB"]) + " |")
    return "\n".join(lines)


def largest(least: dict[str, float | None]) -> float:
    """The floor that bounds, of those that are known."""
    return max((cycles for cycles in least.values() if cycles is not None), default=math.nan)
