"""The kernels of samples.cuh as a library, and the call."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import emulator
import torch


class Source(NamedTuple):
    """What `emulator.library` reads of a variant."""

    name: str
    source: str
    defines: tuple = ()
    shared: int = 0


class SampleParams(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("a", "b", "c", "out")] + [("n", ctypes.c_int32), ("which", ctypes.c_int32)]


def launch(symbol: str, *, a=None, b=None, c=None, out=None, n: int = 0, which: int = 0, grid: int = 1, shared: int = 0, threads: int = 256,
           seed: int = 0, limit: float = 60, replace: tuple = ()) -> None:  # fmt: skip
    lib = emulator.library(Source("samples", str(emulator.HERE / "samples.cuh")), replace=replace)
    pointers = (t.data_ptr() if isinstance(t, torch.Tensor) else None for t in (a, b, c, out))
    lib.launch(symbol, grid, SampleParams(*pointers, n, which), shared=shared, threads=threads, seed=seed, limit=limit)
