"""Explores the protocol of Hopper's kernel as it is built and may be built, with both warpgroups whole: `make proof`, which takes a while.

Prints states and depth of every search, and ends with status 1 where something is wrong, with the story of it.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import hopper_candidates
from explorer import Found, Search, explore, story
from ring_protocol import of
from sparge_kernels import config


class Case(NamedTuple):
    """A search: `warps` of a warpgroup, which are 4 in the kernel."""

    stages: int
    overlap: bool
    warps: int = 4
    search: Search = Search()

    @property
    def label(self) -> str:
        lanes = "".join(f", two lanes in group {group}" for group in self.search.two_lanes)
        drops = "" if self.search.drops else ", none dropped"
        return f"{self.stages} stages, {'overlap' if self.overlap else 'turns'}, {self.warps} warps{lanes}{drops}"

    def protocol(self):
        return of(config.HopperConfig(tile_blocks=2, ones=True, overlap=self.overlap, split=False, poly=0, stages=self.stages), self.warps)


def cases() -> list[Case]:
    """2 to 4 stages and all that the kernel may be built with, whole; and warps of two lanes in every group, with fewer warps."""
    built = {(chosen.stages, chosen.overlap) for dim in config.DIMS for chosen in (config.HOPPER_CONFIG[dim], *hopper_candidates.candidates(dim))}
    whole = built | {(stages, overlap) for stages in (2, 3, 4) for overlap in (False, True)}
    lanes = [Case(2, overlap, 2, Search(two_lanes=(group,))) for overlap in (False, True) for group in (1, 2)]
    plain = Search(fuse=False, alike=False)
    return [Case(2, overlap, 1, plain) for overlap in (False, True)] + lanes + [Case(*shape) for shape in sorted(whole)]


def search(case: Case) -> tuple[Case, Found, float]:
    """With the processor's seconds."""
    start = time.process_time()
    found = explore(case.protocol(), case.search)
    return case, found, time.process_time() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    jobs = parser.parse_args().jobs
    wrong, sums = [], [0, 0, 0.0]
    with ProcessPoolExecutor(jobs) as pool:
        for case, found, seconds in pool.map(search, cases()):
            size = f"{found.states:>8} states, {found.steps:>8} steps, depth {found.depth:>3}, {seconds:>5.0f} s"
            print(f"{case.label:<60}{size}  {found.wrong or 'nothing wrong'}", flush=True)
            sums = [sums[0] + found.states, sums[1] + found.steps, sums[2] + seconds]
            wrong += [case] if found.wrong else []
    print(f"together: {sums[0]} states, {sums[1]} steps, {sums[2]:.0f} s of one processor")
    for case in wrong:
        again = case.search._replace(shift=False)
        print(case.label, *story(case.protocol(), again, explore(case.protocol(), again)), sep="\n  ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
