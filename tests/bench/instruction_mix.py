"""Instructions that one warp issues for one tile of Hopper's attention kernel, counted in the packaged binary, beside what the other units need.

    python tests/bench/instruction_mix.py [--dim 128] [--nvdisasm PATH]

The way through the loop is the shortest one that takes the integer maxima (no edge cuts the tile), all exponentials, and both products (the tile is
not dropped). nvdisasm comes with the CUDA toolkit, with Triton, or as `pip install nvidia-cuda-nvdisasm`.
"""

from __future__ import annotations

import argparse
import collections
import heapq
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from dataclasses import dataclass, field

from sparge_kernels import config
from sparge_kernels.cuda import build

CONSUMER_WARPS, SCHEDULERS = 8, 4
EXPONENTIALS_A_CYCLE = 16  # of one multiprocessor
MACS_A_CYCLE = 4096  # 8 bit, of one multiprocessor


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
    maxima = next(i for i, block in enumerate(blocks) if block.has("VIMNMX", 9))
    powers = [i for i, block in enumerate(blocks) if block.has("MUFU.EX2", 50)]
    products = [i for i, block in enumerate(blocks) if block.has("QGMMA") and block.has("IGMMA")]
    rounds = []
    for power in powers:
        for product in products:
            parts = [way(blocks, maxima, power), way(blocks, power, product), way(blocks, product, maxima)]
            if None not in parts:
                rounds.append([line for i in parts[0] + parts[1][1:] + parts[2][1:-1] for line in blocks[i].code])
    return min(rounds, key=len)


def operation(line: str) -> str:
    return re.sub(r"^@!?U?P\d+\s+", "", line).split()[0].split(".")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=128, choices=config.DIMS)
    parser.add_argument("--nvdisasm", default=shutil.which("nvdisasm"))
    given = parser.parse_args()
    if given.nvdisasm is None:
        sys.exit("nvdisasm must be on PATH; pip install nvidia-cuda-nvdisasm and give its path with --nvdisasm")
    chosen = config.hopper_config(given.dim)
    name = config.hopper_variant(given.dim, False, chosen).name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(zlib.decompress((build.FOLDER / "cubins" / config.HOPPER / f"{name}.cubin.z").read_bytes()))
        file.flush()
        done = subprocess.run([given.nvdisasm, "-c", file.name], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"nvdisasm refuses {name}: {done.stderr.strip()}")
    code = tile_of(blocks_of(done.stdout))
    keys = 64 * chosen.tile_blocks
    columns = given.dim + 8 * chosen.ones
    print(f"{name}, {chosen.label}: one tile of 128 queries x {keys} keys on one multiprocessor")
    print("| unit | cycles |\n|---|---|")
    print(f"| issue ({len(code)} instructions a warp) | {len(code) * CONSUMER_WARPS // SCHEDULERS:,} |")
    print(f"| products (Q K^T {given.dim}, P V {columns} columns) | {128 * keys * (given.dim + columns) // MACS_A_CYCLE:,} |")
    exponentials = sum(operation(line) == "MUFU" for line in code) * 32 * CONSUMER_WARPS
    print(f"| special functions | {exponentials // EXPONENTIALS_A_CYCLE:,} |")
    counted = collections.Counter(map(operation, code))
    print("instructions: " + ", ".join(f"{count} {name}" for name, count in counted.most_common(12)))


if __name__ == "__main__":
    main()
