"""Rules of Hopper that hold on every way through a kernel or not at all, read off its PTX (parse.py): no run can show that one is broken.

Each rule returns a sentence for every place that breaks it, an empty list for a kernel that keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import parse
from parse import Entry, Instruction


class Product(NamedTuple):
    """What one matrix product of a warpgroup holds in registers: its sums, and A, unless that lies in shared memory."""

    sums: frozenset[str]
    a: frozenset[str]

    @property
    def registers(self) -> frozenset[str]:
        return self.sums | self.a


def product_of(instruction: Instruction) -> Product | None:
    """None for any other instruction."""
    if not instruction.opcode.startswith("wgmma.mma_async"):
        return None
    sums, a = instruction.operands[:2]
    return Product(parse.registers(sums), parse.registers(a) if a.startswith("{") else frozenset())


def products_in_flight(entry: Entry) -> list[str]:
    """Between a product and the wait for it, on no way, does another instruction touch its registers, nor does the kernel end.

    Another product may have the same sums, whose order the hardware keeps, or read the same A.
    """
    found = []
    for start, product in _products(entry):
        where = f"the product of line {entry.instructions[start].line}"
        for at, _ in walk(entry, start, 0, _until_waited_for):
            if at == len(entry.instructions):
                found.append(f"{where} is never waited for")
                continue
            other, instruction = product_of(entry.instructions[at]), entry.instructions[at]
            if other is None:
                touched = (instruction.reads | instruction.writes) & product.registers
            else:
                touched = (other.sums & product.sums if other.sums != product.sums else frozenset()) | other.a & product.sums | other.sums & product.a
            if touched:
                found.append(f"line {instruction.line}, {instruction.opcode}, touches {min(touched)} of {where}, which is in flight")
    return found


def products_unfenced(entry: Entry) -> list[str]:
    """Since the last fence before a product, on no way, has another instruction touched its registers; and there is such a fence."""
    found, touched = [], _touched_since_the_fence(entry)
    for at, product in _products(entry):
        where = f"the product of line {entry.instructions[at].line}"
        if None in touched[at]:
            found.append(f"{where} has no fence before it")
        elif early := touched[at] & product.registers:
            found.append(f"{min(early)} of {where} is touched between the fence and the product")
    return found


def released_unfenced(entry: Entry, is_load: Callable[[Instruction], bool], is_release: Callable[[Instruction], bool]) -> list[str]:
    """Between a plain load of what a bulk copy will write again and the arrival that allows the copy, on every way, the thread fences the proxies."""
    loads = [i for i, instruction in enumerate(entry.instructions) if is_load(instruction)]
    releases = {i for i, instruction in enumerate(entry.instructions) if is_release(instruction)}
    assert loads and releases, "what to look for is not found in the PTX"

    def until_fenced(instruction: Instruction, state: None) -> tuple[bool, None]:
        return not instruction.opcode.startswith("fence.proxy.async"), state

    found = [(load, at) for load in loads for at in releases & {at for at, _ in walk(entry, load, None, until_fenced)}]
    lines = [(entry.instructions[load].line, entry.instructions[at].line) for load, at in found]
    return [f"line {given} gives back what line {loaded} has loaded, without a fence between" for loaded, given in lines]


def walk(entry: Entry, start: int, state, step: Callable) -> Iterator[tuple[int, object]]:
    """(index, state) of everything that may come after the instruction at `start`, each pair once; the end of the entry is one past the last index.

    `step(instruction, state)` says whether the way goes on behind an instruction, and in which state.
    """
    ahead, seen = [(i, state) for i in _next(entry, start)], set()
    while ahead:
        at, state = ahead.pop()
        if (at, state) in seen:
            continue
        seen.add((at, state))
        yield at, state
        if at < len(entry.instructions):
            goes_on, after = step(entry.instructions[at], state)
            ahead += [(i, after) for i in _next(entry, at) if goes_on]


def _next(entry: Entry, at: int) -> tuple[int, ...]:
    leaves = entry.instructions[at].parts[0] in ("ret", "exit")
    return (*entry.successors(at), *[len(entry.instructions)] * leaves)


def _products(entry: Entry) -> Iterator[tuple[int, Product]]:
    for i, instruction in enumerate(entry.instructions):
        if product := product_of(instruction):
            yield i, product


def _until_waited_for(instruction: Instruction, groups: int) -> tuple[bool, int]:
    """`groups`: how many were committed since, the product's own among them."""
    if instruction.opcode.startswith("wgmma.commit_group"):
        return True, min(groups + 1, _MOST_GROUPS)
    if instruction.opcode.startswith("wgmma.wait_group"):
        return groups <= int(instruction.operands[0]), groups
    return True, groups


_MOST_GROUPS = 8
"""More groups than any wait leaves open: counting ends here, so that loops do."""


def _touched_since_the_fence(entry: Entry) -> list[frozenset]:
    """For every instruction: registers of products that some way there has touched outside of a product since its last fence; None among them stands
    for a way without a fence."""
    of_products = frozenset().union(*(product.registers for _, product in _products(entry)))
    before: list[frozenset | None] = [None] * len(entry.instructions)
    ahead = [(0, frozenset({None}))]
    while ahead:
        at, touched = ahead.pop()
        if before[at] is not None and touched <= before[at]:
            continue
        before[at] = touched = touched | (before[at] or frozenset())
        instruction = entry.instructions[at]
        if instruction.opcode.startswith("wgmma.fence"):
            touched = frozenset()
        elif product_of(instruction) is None:
            touched |= (instruction.reads | instruction.writes) & of_products
        ahead += [(i, touched) for i in entry.successors(at)]
    return [touched or frozenset() for touched in before]
