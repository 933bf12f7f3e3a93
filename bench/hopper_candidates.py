"""Ways to build Hopper's attention kernel: what the benchmark builds and times before one of them becomes config.HOPPER_CONFIG."""

from __future__ import annotations

import dataclasses

from sparge_kernels import config
from sparge_kernels.config import HopperConfig


def candidates(dim: int) -> tuple[HopperConfig, ...]:
    """Those for a head size, the shipped one among them."""
    few, some, many = {64: (4, 6, 8), 128: (3, 4, 5)}[dim]
    shapes = [(2, False, False, few), (2, False, False, some), (2, False, False, many), (3, False, False, few)]
    shapes += [(2, False, True, some), (2, True, True, some)]
    found = [HopperConfig(blocks, ones, overlap, split, 0, stages) for ones in (True, False) for blocks, overlap, split, stages in shapes]
    return (*found, HopperConfig(2, True, False, False, 8, some))


def label(chosen: HopperConfig) -> str:
    """In short: "n128 s4 ones"."""
    words = [f"n{64 * chosen.tile_blocks}", f"s{chosen.stages}", *(word for word in ("ones", "overlap", "split") if getattr(chosen, word))]
    return " ".join(words + ([f"poly{chosen.poly}"] if chosen.poly else []))


def variant(dim: int, masked: bool, chosen: HopperConfig) -> config.Variant:
    """The kernel as `chosen`; all but the shipped one carry their label in their name."""
    made = config.hopper({dim: chosen}).variant(dim, "fp8", masked)
    return made if chosen == config.HOPPER_CONFIG[dim] else dataclasses.replace(made, name=f"{made.name}_{label(chosen).replace(' ', '_')}")
