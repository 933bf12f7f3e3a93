"""What all tests share: ComfyUI in this process, the pack as ComfyUI would import it, and grids of parameters that cover every pair."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from required import missing

ROOT = Path(__file__).resolve().parents[1]
LONGEST_FIRST = ("web", "workflows", "bench", "nodes", "install", "python_examples", "comfyui", "ring", "ptx", "emulator", "kernels")
"""Folders by how long a file of theirs takes. Processes that share files end together when the last ones are short."""


@pytest.fixture(scope="session")
def comfy():
    """The `comfy` package of the ComfyUI tree in use, on the CPU with PyTorch attention."""
    import comfy_launch
    import install

    tree = install.comfyui_tree()
    if not (tree / "main.py").is_file():
        missing(f"a ComfyUI tree ({tree})")
    comfy_launch.enter(tree)
    import comfy.model_management
    import comfy.sample
    import comfy.sd

    return comfy


@pytest.fixture(scope="session")
def pack(comfy):
    """The pack's root package, imported under a name of its own the way ComfyUI imports a custom node folder."""
    return load_pack("sparge_pack_under_test")


def load_pack(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def pytest_collection_modifyitems(items):
    """Longest files first, then the order as it was; folders that the list does not know come first of all."""
    place = {folder: at for at, folder in enumerate(LONGEST_FIRST, 1)}
    items.sort(key=lambda item: place.get(item.path.parent.name, 0))


def pytest_generate_tests(metafunc):
    """`@pytest.mark.pairs(a=[...], b=[...], c=[...])` is parametrize with the rows of `pairs`, where no three values have to meet."""
    for mark in metafunc.definition.iter_markers("pairs"):
        rows = pairs(*mark.kwargs.values())
        metafunc.parametrize(list(mark.kwargs), rows, ids=["-".join(_label(value) for value in row) for row in rows])


def pairs(*columns: Iterable) -> list[tuple]:
    """Rows with a value of every column, such that any two values of two columns meet in some row; the same rows in every run.

    Each row is the one of the product that brings most pairs that no earlier row has brought; of several the first one, or the one whose values were
    taken least often, whichever needs fewer rows in the end. Two columns give their product.
    """
    columns = [list(column) for column in columns]
    rows = min((_covering([len(column) for column in columns], even) for even in (True, False)), key=len)
    return [tuple(column[at] for column, at in zip(columns, row, strict=True)) for row in sorted(rows)]


def _covering(sizes: list[int], even: bool) -> list[tuple[int, ...]]:
    def met(row: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        return {(a, row[a], b, row[b]) for a, b in itertools.combinations(range(len(row)), 2)}

    product = list(itertools.product(*map(range, sizes)))
    missing, taken, rows = set().union(*map(met, product)), Counter(), []
    while missing:
        rows.append(max(product, key=lambda row: (len(missing & met(row)), -sum(taken[at] for at in enumerate(row)) * even)))
        missing -= met(rows[-1])
        taken.update(enumerate(rows[-1]))
    return rows


def _label(value: object) -> str:
    return value.__name__ if callable(value) else str(value).removeprefix("torch.")
