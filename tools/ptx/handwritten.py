"""PTX that tests write by hand, and its launch on numpy arrays.

program = Program("sums")
program.entry("double", "ld.global.u32 %r1, [%given]; add.s32 %r2, %r1, %r1; st.global.u32 [%out], %r2;")
out = program.run("double", np.array([21], np.uint32), np.uint32, 1)
"""

from __future__ import annotations

import ctypes
from functools import cached_property

import executor
import numpy as np
import torch

HEADER = ".version 8.7\n.target sm_90a\n.address_size 64\n.extern .shared .align 1024 .b8 memory[];\n"
REGISTERS = ".reg .b32 %r<240>; .reg .f32 %f<240>; .reg .b64 %rd<60>; .reg .pred %p<40>; .reg .b16 %rs<40>; .reg .b64 %given, %out, %smem;"


HOPPER = ("wgmma.", "mbarrier.", "cp.async.bulk.", "setmaxnreg.", "fence.")
"""How the instructions begin that test_ptx_hopper.py tries, and test_ptx_instructions.py does not."""

FILL = 0x5A
"""What every byte of the output holds that no kernel writes."""

PARAM_BYTES = bytes(range(0x70, 0x90))
"""What every kernel finds in its third parameter."""


class Params(ctypes.Structure):
    """What every kernel takes: where its input and its output lie, and `PARAM_BYTES`."""

    _fields_ = [("given", ctypes.c_void_p), ("out", ctypes.c_void_p), ("constants", ctypes.c_uint8 * len(PARAM_BYTES))]


class Program:
    """Entries that are built together.

    Parameters
    ----------
    name : str
        Of the build in the cache.
    """

    def __init__(self, name: str):
        self._name, self._entries = name, []

    def entry(self, name: str, body: str, threads: int = 32) -> None:
        """Adds a kernel. Its body finds the addresses in %given, %out and %smem, the thread in %r0, and all registers that it may want."""
        constants = f".param .align 16 .b8 {name}_param_2[{len(PARAM_BYTES)}]"
        head = f".visible .entry {name}(.param .u64 {name}_param_0, .param .u64 {name}_param_1, {constants})\n.maxntid {threads}, 1, 1\n"
        start = f"ld.param.u64 %given, [{name}_param_0]; ld.param.u64 %out, [{name}_param_1]; mov.u64 %smem, memory; mov.u32 %r0, %tid.x;"
        self._entries.append(f"{head}{{\n{REGISTERS}\n{start}\n{body}\nret;\n}}\n")

    @property
    def text(self) -> str:
        """The whole PTX."""
        return HEADER + "".join(self._entries)

    @cached_property
    def _library(self) -> executor.Library:
        return executor.Library(self.text, self._name)

    def run(self, name: str, given: np.ndarray, kind: type, count: int, *, schedule: executor.Schedule | None = None, **launch) -> np.ndarray:
        """The `count` elements of type `kind` that a kernel writes to %out; `launch` goes to `executor.Launch` (one block of 32 threads)."""
        source = torch.from_numpy(np.ascontiguousarray(given).view(np.uint8).reshape(-1).copy())
        out = torch.full((count * np.dtype(kind).itemsize,), FILL, dtype=torch.uint8)
        how = executor.Launch(**{"grid": 1, "threads": 32, "shared": 65536, "limit": 20.0, **launch})
        params = Params(source.data_ptr(), out.data_ptr(), (ctypes.c_uint8 * len(PARAM_BYTES))(*PARAM_BYTES))
        self._library.launch(name, how, params, schedule or executor.Schedule(), [source, out])
        return out.numpy().view(kind)


def row_of_thread(bytes_each: int, register: str, base: str, scratch: str) -> str:
    """The address of the thread's own bytes, in `register`; `scratch` is a 64-bit register that is overwritten."""
    return f"mul.wide.u32 {scratch}, %r0, {bytes_each}; add.s64 {register}, {base}, {scratch};\n"


def load_words(count: int, first: int = 10) -> str:
    """The thread's `count` words of the input in %r10, %r11, .."""
    loads = "".join(f"ld.global.u32 %r{first + i}, [%rd4+{4 * i}];\n" for i in range(count))
    return row_of_thread(4 * count, "%rd4", "%given", "%rd3") + loads


def store_words(names: list[str]) -> str:
    """Registers of 32 bits to the thread's words of the output."""
    stores = "".join(f"st.global.{'f32' if name.startswith('%f') else 'u32'} [%rd6+{4 * i}], {name};\n" for i, name in enumerate(names))
    return row_of_thread(4 * len(names), "%rd6", "%out", "%rd5") + stores
