"""What a call costs on the host: everything between the public function and the driver, with launches that do nothing where there is no GPU."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import sys
import time
from types import SimpleNamespace

import sparge_kernels
import torch
from bench_timing import using
from sparge_kernels.cuda import driver

AIM_US = 40
CALLS, REPEATS = 20, 60


class StubMachine:
    """A GPU that does nothing: `backend.Machine` for CPU tensors.

    The driver's launch function is a function of the C library that takes a null handle and returns 0, so that the cost of handing over its
    eleven arguments is a real one.
    """

    def __init__(self, arch: str = "sm_89", pv: str = "int8"):
        self.arch, self.pv, self.processors = arch, pv, 128
        function = (ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)).labs
        function.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]
        self.driver = SimpleNamespace(launch_function=function)
        self.kernels = {}

    def missing(self, variants):
        return None

    def kernel(self, variant, symbol):
        key = (variant.name, symbol)
        if key not in self.kernels:
            self.kernels[key] = driver.Kernel(symbol, 0, 0, 99 << 10, f"{variant.name}, a stub", self.driver)
        return self.kernels[key]

    def launch(self, kernel, grid, threads, shared, params, stream):
        driver.launch(kernel, grid, threads, shared, params, stream)

    def here(self):
        return contextlib.nullcontext()

    def stream(self):
        return 0


class _Stopwatch:
    """A machine whose launches are timed on the host."""

    def __init__(self, machine):
        self.machine, self.seconds, self.launches = machine, 0.0, 0

    def __getattr__(self, name: str):
        return getattr(self.machine, name)

    def launch(self, *arguments) -> None:
        start = time.perf_counter()
        self.machine.launch(*arguments)
        self.seconds += time.perf_counter() - start
        self.launches += 1


def cost(machine, device: torch.device) -> dict[str, float]:
    """Microseconds on the host of a whole call and of one launch, and launches per call.

    The least of REPEATS batches, which is what the code takes; the median ("call_median_us") also has what else the machine was doing.
    """
    q, k, v = (torch.randn(1, 2, 1024, 64, device=device).bfloat16() for _ in range(3))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def repeat(used) -> float:
        with using(used):
            wait()
            start = time.perf_counter()
            for _ in range(CALLS):  # fewer launches than a GPU's queue holds: none waits for the GPU
                sparge_kernels.sparse_attention(q, k, v, topk=0.25, backend="cuda")
            taken = time.perf_counter() - start
            wait()
        return taken / CALLS * 1e6

    repeat(machine)
    whole = [repeat(machine) for _ in range(REPEATS)]
    launch = []
    for _ in range(REPEATS):
        stopwatch = _Stopwatch(machine)
        repeat(stopwatch)
        launch.append(stopwatch.seconds / stopwatch.launches * 1e6)
    return {"call_us": min(whole), "call_median_us": statistics.median(whole), "launch_us": min(launch), "launches": stopwatch.launches / CALLS}


def sentence(what: dict[str, float]) -> str:
    return (
        f"{what['call_us']:.0f} us a call (aim: below {AIM_US}; median {what['call_median_us']:.0f}), {what['launch_us']:.1f} us each of "
        f"{what['launches']:.0f} launches; the least of {REPEATS} times {CALLS} calls"
    )
