"""The kernels' parameter structs are the same in Python as compiled, and every kernel has one."""

from __future__ import annotations

import ctypes
import re

import emulator
import pytest
from samples import Source
from sparge_kernels.config import CHECKED, variants
from sparge_kernels.cuda import params

STRUCTS = {struct.__name__: struct for struct in (params.Strides, *params.SYMBOLS.values())}


@pytest.fixture(scope="module")
def compiled():
    return emulator.library(Source("layout", "layout.cuh")).layout()


def test_every_struct_is_mirrored(compiled):
    assert set(compiled) == set(STRUCTS)


@pytest.mark.parametrize("name", STRUCTS)
def test_struct(name, compiled):
    struct = STRUCTS[name]
    mirrored = {field: (getattr(struct, field).offset, getattr(struct, field).size) for field, _ in struct._fields_}
    size, fields = compiled[name]
    assert list(mirrored) == list(fields), "names, in order"
    assert mirrored == fields, "offsets and sizes"
    assert ctypes.sizeof(struct) == size


def test_every_kernel_has_its_struct():
    """What the sources declare is what Python launches."""
    text = {path.name: path.read_text() for path in emulator.SOURCES.glob("*.cuh") if path.name != "prim.cuh"}
    declared = {
        (name, symbol, struct) for name, t in text.items() for symbol, _, struct in re.findall(r"^KERNEL\((\w+), (\w+), (\w+)\)", t, re.MULTILINE)
    }
    assert {(symbol, struct) for _, symbol, struct in declared} == {(symbol, struct.__name__) for symbol, struct in params.SYMBOLS.items()}
    listed = {(variant.source, symbol) for arch in CHECKED for variant in variants(arch) for symbol in variant.symbols}
    assert listed == {(name, symbol) for name, symbol, _ in declared}
