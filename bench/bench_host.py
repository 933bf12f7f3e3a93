"""What a call costs on the host: everything between the public function and the driver, with launches that do nothing where there is no GPU."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import sparge_kernels
import torch
from bench_timing import using
from sparge_kernels import attention, checks, ops
from sparge_kernels.backends import cuda as backend
from sparge_kernels.cuda import driver, workspace

AIM_US = 100
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


class _Counted:
    """A machine whose launches are counted."""

    def __init__(self, machine):
        self.machine, self.launches = machine, 0

    def __getattr__(self, name: str):
        return getattr(self.machine, name)

    def launch(self, *arguments) -> None:
        self.machine.launch(*arguments)
        self.launches += 1


@dataclass
class Part:
    """Work of a call: what does it, and the seconds that took, less those of other parts inside of it."""

    name: str
    functions: tuple[tuple[object, str], ...]
    seconds: float = 0.0


def _parts() -> list[Part]:
    return [
        Part("checks, making of Call and Rule", ((checks, "tensors"), (attention, "_rule"), (attention, "_call"))),
        Part("choice of the backend", ((attention, "choose"),)),
        Part("finding the known workspace", ((backend, "_carved"),)),
        Part("allocations", ((backend, "_empty"), (backend, "_empty_like"))),
        Part("structs of the kernels", ((workspace.Workspace, "structs"),)),
        Part("launches", ((_Counted, "launch"),)),
    ]


@contextlib.contextmanager
def _timed(parts: list[Part]) -> Iterator[None]:
    """Inside, every function of the parts adds to its part what it takes."""
    inside = [0.0]  # seconds of the functions that the running one called

    def timed(part: Part, function: Callable) -> Callable:
        def run(*arguments, **more):
            before, inside[0] = inside[0], 0.0
            start = time.perf_counter()
            try:
                return function(*arguments, **more)
            finally:
                taken = time.perf_counter() - start
                part.seconds += taken - inside[0]
                inside[0] = before + taken

        return run

    with contextlib.ExitStack() as undo:
        for part in parts:
            for owner, name in part.functions:
                function = getattr(owner, name)
                undo.callback(setattr, owner, name, function)
                setattr(owner, name, timed(part, function))
        yield


@contextlib.contextmanager
def _through_the_operator() -> Iterator[None]:
    """Inside, calls go through the operators, as compiled ones do."""
    before, ops._watched = ops._watched, lambda *values: True
    try:
        yield
    finally:
        ops._watched = before


def cost(machine, device: torch.device) -> dict:
    """Microseconds on the host of a whole call, of its parts ("parts_us") and of one launch, and launches per call; what `return_info` and going
    through the operator add.

    The least of REPEATS batches, which is what the code takes; the median ("call_median_us") also has what else the machine was doing. A part has the
    clock's own time in it.
    """
    q, k, v = (torch.randn(1, 2, 1024, 64, device=device).bfloat16() for _ in range(3))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def repeat(used, **options) -> float:
        with using(used):
            wait()
            start = time.perf_counter()
            for _ in range(CALLS):  # fewer launches than a GPU's queue holds: none waits for the GPU
                sparge_kernels.sparse_attention(q, k, v, topk=0.25, backend="cuda", **options)
            taken = time.perf_counter() - start
            wait()
        return taken / CALLS * 1e6

    def more(**options) -> float:
        return min(repeat(machine, **options) for _ in range(REPEATS)) - min(whole)

    repeat(machine)
    whole = [repeat(machine) for _ in range(REPEATS)]
    counted, found = _Counted(machine), {}
    for _ in range(REPEATS):
        parts = _parts()
        with _timed(parts):
            repeat(counted)
        for part in parts:
            found.setdefault(part.name, []).append(part.seconds / CALLS * 1e6)
    parts_us = {name: min(values) for name, values in found.items()}
    launches = counted.launches / CALLS / REPEATS
    costs = {"call_us": min(whole), "call_median_us": statistics.median(whole), "launch_us": parts_us["launches"] / launches, "launches": launches}
    with _through_the_operator():
        costs["operator_us"] = more()
    return {**costs, "info_us": more(return_info=True), "parts_us": {**parts_us, "the rest": max(0.0, min(whole) - sum(parts_us.values()))}}


def sentence(what: dict) -> str:
    return (
        f"{what['call_us']:.0f} us a call (aim: below {AIM_US}; median {what['call_median_us']:.0f}), {what['launch_us']:.1f} us each of "
        f"{what['launches']:.0f} launches; the least of {REPEATS} times {CALLS} calls"
    )


def table(what: dict) -> list[str]:
    """Where the time goes, a line a part."""
    rows = {**what["parts_us"], "return_info=True adds": what["info_us"], "the operator, in a compiled model, adds": what["operator_us"]}
    return [f"  {name}: {value:.1f} us" for name, value in rows.items()]
