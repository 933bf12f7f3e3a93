"""The device code as NVRTC compiled it, on the CPU: PTX of a variant, translated to C++, built with g++, run on CPU tensors.

    machine = PtxMachine("sm_90", "fp8", Schedule(seed=3, copies="random", preempt=20))
    monkeypatch.setattr(backend, "machine_of", lambda device: (machine, None))
    sparse_attention(q, k, v, backend="cuda")

A second reading of the device code, independent of tools/emulator, which has functions of its own in place of the instructions that prim.cuh names:
here they are executed themselves, with what the compiler made of everything else. An error of the device code raises RuntimeError: an
access outside of the tensors or misaligned, a deadlock, a missing fence of the proxies, a descriptor with a wrong field, and the like. But for the
proxies the executor is sequentially consistent, so that a missing fence between threads of the generic proxy is not seen.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cubins
import emulator
import torch
import translate
from required import missing
from sparge_kernels import config
from sparge_kernels.cuda import nvrtc

HERE = Path(__file__).resolve().parent
COPIES = ("at once", "random", "late")
LIBRARY_FLAGS = ("-w", "-shared", "-Ihost")
HEADERS = ("arithmetic.h", "machine.h")
RUNTIME = ("runtime.cpp", "collectives.cpp", "async.cpp")
MANIFEST = cubins.FOLDER / "manifest.json"
MOST_SHARED = 227 << 10
"""Most bytes of shared memory that a CTA may have, on Hopper."""

LIMIT = 120.0
"""Seconds after which a launch counts as hung."""


@dataclass(frozen=True)
class Schedule:
    """What the adversary does within the rules of the machine. Every random choice follows from the seed.

    Attributes
    ----------
    seed : int
        Of the order in which blocks, warps and lanes go on.
    copies : str
        When asynchronous copies land: "at once", "random", or as "late" as they may. Until then their bytes are NaN.
    preempt : int
        A thread is suspended at one in so many memory accesses, on average; 0: only where it waits.
    resident : int
        Blocks that share the machine at a time.
    ulps : int
        ex2, lg2 and rsqrt are off by up to so many units in the last place.
    stall : int
        At any time one warp, or one lane of a warp, stands still, for up to so many turns of warps; then another one. Where nobody else can go
        on it goes on. 0: none does.
    """

    seed: int = 1
    copies: str = "late"
    preempt: int = 0
    resident: int = 2
    ulps: int = 0
    stall: int = 0

    def __post_init__(self):
        if self.copies not in COPIES:
            raise ValueError(f"copies must be one of {COPIES}, got {self.copies!r}")
        if self.resident < 1 or min(self.preempt, self.ulps, self.stall) < 0:
            raise ValueError(f"resident must be at least 1, preempt, ulps and stall at least 0, got {self}")


# ---- PTX and builds ------------------------------------------------------------------------------------------------------------------------------


@functools.cache
def _compiler() -> nvrtc.Compiler:
    library = cubins.pinned_nvrtc()
    if library is None:
        missing(f"the compiler {cubins.NVRTC_PACKAGE} {cubins.NVRTC_VERSION}")
    return nvrtc.open_library(library)


LINE_INFO = "--generate-line-info"


@functools.lru_cache(maxsize=256)
def ptx_of(variant: config.Variant, arch: str) -> str:
    """The PTX of a variant for an architecture, by the compiler and with the options of the packaged binaries. Kept in the emulator's cache; with
    lines of the source (`LINE_INFO` among the options) for these very texts, for a comment moves lines and the digest does not see it.

    Without the pinned compiler the test is skipped; with CI=true it fails.
    """
    program = nvrtc.program(variant.source, variant.target(arch).replace("sm_", "compute_"), variant.defines)
    texts = program.files if LINE_INFO in program.options else ""
    key = hashlib.sha256(f"{program.digest} {cubins.NVRTC_VERSION}{texts}".encode()).hexdigest()[:20]
    return _kept(f"{variant.name}-{key}.ptx", lambda: _compiler().compile(program).code.decode())


def _kept(name: str, make: Callable[[], str]) -> str:
    """A text in the cache, made if it is not there; two processes may do it at the same time."""
    path = emulator.CACHE / name
    if path.exists():
        os.utime(path)
        return path.read_text()
    text = make()
    emulator.CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=emulator.CACHE, prefix="build-") as folder:
        part = Path(folder) / name
        part.write_text(text)
        os.replace(part, path)
    return text


_changes: list[Callable[[config.Variant, str], str]] = []


@contextlib.contextmanager
def altered(change: Callable[[config.Variant, str], str]):
    """Within, every PTX is what `change(variant, text)` makes of it before it is translated."""
    _changes.append(change)
    try:
        yield
    finally:
        _changes.pop()


@functools.cache
def _runtime():
    """The launch function of the runtime, which is loaded once and shared by all kernels."""
    emulator.compiler()
    if os.uname().machine != "x86_64":
        missing("an x86-64 processor, whose instructions change between the executor's threads,")
    files = {f"host/{name}": (HERE / name).read_text() for name in (*HEADERS, "runtime.h", *RUNTIME)}
    files[f"host/{emulator.SWITCH}"] = (emulator.HERE / emulator.SWITCH).read_text()
    units = tuple(f"host/{name}" for name in RUNTIME)
    path = emulator.build("ptx-runtime", (*emulator.compile_flags(), "-O3", "-shared", "-Ihost"), files, units, ".so")
    launch = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL).ptx_launch
    launch.argtypes = [ctypes.POINTER(_Request), ctypes.c_char_p, ctypes.c_uint64]
    return launch


@functools.cache
def _translator() -> str:
    """What the text of a translation depends on besides the PTX."""
    files = [HERE / f"{name}.py" for name in ("parse", "forms", "translate")]
    return hashlib.sha256("".join(file.read_text() for file in files).encode()).hexdigest()


class _Range(ctypes.Structure):
    _fields_ = [("first", ctypes.c_uint64), ("last", ctypes.c_uint64)]


class _Schedule(ctypes.Structure):
    _fields_ = [("seed", ctypes.c_uint64), *((name, ctypes.c_int32) for name in ("copies", "preempt", "resident", "ulps", "stall"))]


class _Request(ctypes.Structure):
    """`ptx::Request` of runtime.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("kernel", "params")),
        *((name, ctypes.c_uint32) for name in ("params_size", "grid", "threads", "shared", "registers")),
        ("tensors", ctypes.POINTER(_Range)),
        ("tensor_count", ctypes.c_uint32),
        ("schedule", _Schedule),
        ("limit", ctypes.c_double),
    ]


class _Kernel(ctypes.Structure):
    """The beginning of `ptx::Kernel` of machine.h."""

    _fields_ = [("name", ctypes.c_char_p), ("run", ctypes.c_void_p), ("threads", ctypes.c_uint32), ("params_size", ctypes.c_uint32)]


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Attributes
    ----------
    grid, threads : int
        Blocks, and threads of a block.
    shared : int
        Bytes of dynamic shared memory.
    registers : int
        Per thread: what setmaxnreg shares out anew.
    limit : float
        Seconds after which it counts as hung.
    """

    grid: int
    threads: int
    shared: int = 0
    registers: int = 168
    limit: float = LIMIT


_one_at_a_time = threading.Lock()


class Library:
    """The kernels of one PTX text, translated and built.

    Parameters
    ----------
    text : str
    name : str
        How the builds are called in the cache.

    Raises
    ------
    translate.UnknownInstruction, parse.ParseError
        The text has something that is not known.
    """

    def __init__(self, text: str, name: str):
        self.text = text
        body = hashlib.sha256((_translator() + text).encode()).hexdigest()[:20]
        code = _kept(f"ptx-{name}-{body}.cpp", lambda: translate.translate(text))
        files = {"unit.cpp": code} | {f"host/{header}": (HERE / header).read_text() for header in HEADERS}
        _runtime()  # whose symbols the library needs
        self._dll = ctypes.CDLL(str(emulator.build(f"ptx-{name}", (*emulator.compile_flags(), *LIBRARY_FLAGS), files, ("unit.cpp",), ".so")))

    def launch(
        self, symbol: str, launch: Launch, params: ctypes.Structure, schedule: Schedule, tensors: Sequence[torch.Tensor] | None = None
    ) -> None:
        """Runs a kernel to its end.

        Every global access must lie inside of one of `tensors`; without them, of a live CPU tensor that a word of `params` points into.

        Raises
        ------
        RuntimeError
            The first errors of the device code, each with its line of the PTX.
        """
        kernel = _Kernel.in_dll(self._dll, translate.symbol_of(symbol))
        size = ctypes.sizeof(params)
        if launch.threads > kernel.threads or launch.threads % 32 or size != kernel.params_size or launch.shared > MOST_SHARED:
            limits = f"up to {kernel.threads} threads, {kernel.params_size} bytes of parameters and up to {MOST_SHARED} of shared memory"
            raise RuntimeError(f"{symbol} takes {limits}, got {launch.threads}, {size} and {launch.shared}")
        ranges = _tensors_of(params) if tensors is None else [_memory_of(tensor) for tensor in tensors]
        held = (_Range * len(ranges))(*ranges)
        how = _Schedule(schedule.seed, COPIES.index(schedule.copies), schedule.preempt, schedule.resident, schedule.ulps, schedule.stall)
        request = _Request(ctypes.addressof(kernel), ctypes.addressof(params), ctypes.sizeof(params), launch.grid, launch.threads, launch.shared,
                           launch.registers, held, len(ranges), how, launch.limit)  # fmt: skip
        error = ctypes.create_string_buffer(16384)
        with _one_at_a_time:
            count = _runtime()(ctypes.byref(request), error, len(error))
        if count:
            raise RuntimeError(f"{symbol}, {count} {'errors' if count > 1 else 'error'}:\n{self._quoted(error.value.decode(errors='replace'))}")

    def _quoted(self, errors: str) -> str:
        """With the line of the PTX after each error that names one at its start."""
        lines = self.text.split("\n")
        return re.sub(r"^line (\d+)\b.*", lambda found: f"{found[0]} | {lines[int(found[1]) - 1].strip()[:160]}", errors, flags=re.MULTILINE)


def _tensors_of(params: ctypes.Structure) -> list[tuple[int, int]]:
    """The memory of each live CPU tensor that a word of `params` points into; a view keeps the tensor alive that it is of."""
    words = [word for word in (ctypes.c_uint64 * (ctypes.sizeof(params) // 8)).from_buffer_copy(params) if word]
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    plain = [t for t in tensors if t.device.type == "cpu" and t.layout == torch.strided and t.numel()]
    return sorted({(first, last) for first, last in map(_memory_of, plain) if any(first <= word < last for word in words)})


def _memory_of(tensor: torch.Tensor) -> tuple[int, int]:
    """The address of the first element, and that behind the last."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + span * tensor.itemsize


# ---- the machine ---------------------------------------------------------------------------------------------------------------------------------


@functools.cache
def _binaries() -> dict:
    return json.loads(MANIFEST.read_text(encoding="utf-8"))["cubins"]


def registers_of(arch: str, variant: config.Variant, symbol: str) -> int:
    """Registers that a thread of a packaged kernel is launched with; of others, as many as its threads share the multiprocessor's among them."""
    entry = _binaries().get(arch, {}).get(variant.name)
    used = entry["symbols"][symbol]["registers"] if entry else min(255, 65536 // variant.threads)
    return -(-used // 8) * 8 if entry else used // 8 * 8


@functools.lru_cache(maxsize=256)
def _library(name: str, body: str) -> Library:
    return Library(body, name)


@dataclass(frozen=True)
class _MachineKernel:
    """What `PtxMachine.kernel` hands to its `launch`."""

    variant: config.Variant
    name: str
    library: Library
    origin: str = "its PTX, executed"


class PtxMachine:
    """A GPU that runs the compiled device code on the CPU: `backend.Machine` for CPU tensors.

    Parameters
    ----------
    arch : str
        "sm_86".
    pv : str
        How P and V are held, one of `config.PV`.
    schedule : Schedule
    processors : int
        Multiprocessors.

    Attributes
    ----------
    launched : list of str
        The kernels that ran, in order.
    """

    index, note = 0, ""

    def __init__(self, arch: str, pv: str, schedule: Schedule = Schedule(), processors: int = 3):
        self.arch, self.pv, self.schedule, self.processors = arch, pv, schedule, processors
        self.launched: list[str] = []

    def missing(self, variants: tuple[config.Variant, ...]) -> str | None:
        """None: everything can be had."""
        return None

    def kernel(self, variant: config.Variant, symbol: str) -> _MachineKernel:
        """A kernel, built if it is not in the cache."""
        text = ptx_of(variant, self.arch)
        for change in _changes:
            text = change(variant, text)
        return _MachineKernel(variant, symbol, _library(variant.name, _without_header(text)))

    def launch(self, kernel: _MachineKernel, grid: int, threads: int, shared: int, params: ctypes.Structure, stream: int) -> None:
        """Runs a kernel to its end. RuntimeError as `Library.launch`, with the variant and the architecture."""
        if threads != kernel.variant.threads:
            raise RuntimeError(f"{kernel.name} of {kernel.variant.name} is for {kernel.variant.threads} threads, got {threads}")
        how = Launch(grid, threads, shared, registers_of(self.arch, kernel.variant, kernel.name))
        self.launched.append(kernel.name)
        try:
            kernel.library.launch(kernel.name, how, params, self.schedule)
        except RuntimeError as error:
            raise RuntimeError(f"{kernel.variant.name} for {self.arch}: {error}") from None

    def here(self):
        """Nothing to enter."""
        return contextlib.nullcontext()

    def stream(self) -> int:
        """The one stream."""
        return 0


def _without_header(text: str) -> str:
    """Without what says for which device it is, so that texts for two devices that are otherwise equal are built once."""
    return re.sub(r"^\.(?:version|target)\b.*$", "", text, flags=re.MULTILINE)
