"""Instructions that one warp issues for one tile of an attention kernel, counted in the packaged binary: what bench_floors.py records.

    python bench/instruction_mix.py [--dim 128] [--arch sm_90] [--pv fp8] [--nvdisasm PATH]

The way through the loop is the shortest one that takes the integer maxima (no edge cuts the tile), all exponentials, both products (its PV is
not skipped), and the copies of a later tile where the same warps start them. nvdisasm comes with the CUDA toolkit, with Triton, or as
`pip install nvidia-cuda-nvdisasm`.
"""

from __future__ import annotations

import argparse
import collections
import heapq
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import bench_floors
from sparge_kernels import config

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))  # what pyproject.toml gives to pytest
import cubins


@dataclass
class Block:
    """Instructions without a way in or out but at the ends, and the numbers of the blocks that may follow."""

    code: list[str] = field(default_factory=list)
    after: list[int] = field(default_factory=list)

    def has(self, word: str, least: int = 1) -> bool:
        return sum(word in line for line in self.code) >= least


def blocks_of(text: str) -> list[Block]:
    """The basic blocks of nvdisasm's output."""
    blocks, places, labels = [Block()], {}, []
    for line in text.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        instruction = re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line)
        if label:
            if blocks[-1].code:
                blocks.append(Block())
            places[label[1]] = len(blocks) - 1
        elif instruction:
            blocks[-1].code.append(instruction[1])
            if re.search(r"\b(BRA(?!\.DIV)|EXIT)\b", instruction[1]):
                blocks.append(Block())
    for i, block in enumerate(blocks):
        last = block.code[-1] if block.code else ""
        labels = [] if "BRA.DIV" in last else re.findall(r"BRA.*?(\.L_x_\d+)", last)
        block.after = [places[name] for name in labels]
        if i + 1 < len(blocks) and "EXIT" not in last and (last.startswith("@") or not labels):
            block.after.append(i + 1)
    return blocks


def way(blocks: list[Block], start: int, end: int) -> list[int] | None:
    """The blocks on the way of fewest instructions from `start` to `end`, both included."""
    best, queue = {start: (0, None)}, [(0, start)]
    while queue:
        cost, at = heapq.heappop(queue)
        for after in blocks[at].after:
            there = cost + len(blocks[after].code)
            if after not in best or there < best[after][0]:
                best[after] = (there, at)
                heapq.heappush(queue, (there, after))
    if end not in best:
        return None
    found = [end]
    while found[-1] != start:
        found.append(best[found[-1]][1])
    return found[::-1]


def tile_of(blocks: list[Block]) -> list[str]:
    """The instructions of one tile."""
    maxima = next(i for i, block in enumerate(blocks) if block.has("IMNMX", 9))  # whole numbers: no edge cuts the tile
    powers = [i for i, block in enumerate(blocks) if block.has("MUFU.EX2", 30)]
    products = [i for i, block in enumerate(blocks) if block.has("MMA", 16) or (block.has("QGMMA") and block.has("IGMMA"))]
    loads = [i for i, block in enumerate(blocks) if block.has("LDGSTS", 2)]  # attention_mma.cuh: in the same warps
    rounds = []
    for power in powers:
        for product in products:
            stops = [maxima, power, product, *(load for load in loads if None not in (way(blocks, product, load), way(blocks, load, maxima))), maxima]
            parts = [way(blocks, start, end) for start, end in itertools.pairwise(stops)]
            if None not in parts:
                rounds.append([line for part in parts for i in part[:-1] for line in blocks[i].code])
    return min(rounds, key=len)


def instructions(arch: str, dim: int, pv: str, nvdisasm: str) -> list[str]:
    """Those of one tile in the packaged binary for `arch` without masks; `nvdisasm` is the program's path.

    Raises
    ------
    ValueError
        nvdisasm refuses the binary.
    """
    name = config.attention_kernel(arch, pv).variant(dim, pv, False).name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(zlib.decompress((cubins.FOLDER / "cubins" / arch / f"{name}.cubin.z").read_bytes()))
        file.flush()
        done = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"nvdisasm refuses {name} for {arch}: {done.stderr.strip()}")
    return tile_of(blocks_of(done.stdout))


def operation(line: str) -> str:
    return re.sub(r"^@!?U?P\d+\s+", "", line).split()[0].split(".")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=128, choices=config.DIMS)
    parser.add_argument("--arch", default="sm_90", choices=config.SHIPPED)
    parser.add_argument("--pv", choices=config.PV, help="by default what that GPU uses")
    parser.add_argument("--nvdisasm", default=shutil.which("nvdisasm"))
    given = parser.parse_args()
    pv = given.pv or bench_floors.usual_form(given.arch)
    if given.nvdisasm is None:
        sys.exit("nvdisasm must be on PATH; pip install nvidia-cuda-nvdisasm and give its path with --nvdisasm")
    if pv not in config.packaged_forms(given.arch):
        sys.exit(f"--pv must be one of {', '.join(config.packaged_forms(given.arch))} for {given.arch}, whose binaries are packaged, got {pv}")
    try:
        code = instructions(given.arch, given.dim, pv, given.nvdisasm)
    except ValueError as error:
        sys.exit(str(error))
    tile = bench_floors.tile_of(given.arch, given.dim, pv)
    name = config.attention_kernel(given.arch, pv).variant(given.dim, pv, False).name
    print(f"{name} for {given.arch}: one tile of 128 queries x {tile.keys} keys")
    counted = collections.Counter(map(operation, code))
    issued, special = bench_floors.issue_cycles(len(code)), counted["MUFU"] * 32 * bench_floors.WARPS // bench_floors.EXPONENTIALS
    print(f"issue: {len(code)} instructions a warp (recorded: {tile.instructions}), {issued:,} cycles; special functions: {special:,} cycles")
    print("instructions: " + ", ".join(f"{count} {name}" for name, count in counted.most_common(12)))


if __name__ == "__main__":
    main()
