"""Device code on the CPU: builds a .cuh file with g++ against prim.cuh of this folder and runs its kernels on CPU tensors.

    lib = emulator.library(variant)
    out = emulator.guarded((2, 64), torch.float32)
    lib.launch("sparge_select", grid, params, shared=4096, seed=3)
    emulator.check_guards(out)

An error of the device code (threads that meet in different places, a hang, an access outside shared memory, a broken condition of prim.cuh) raises
RuntimeError. Wrong results under some seeds only are a missing barrier or wait: run every test under several.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from sparge_kernels import config

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PRIMITIVES = {"prim.cuh": ("prim.cuh", "runtime.h"), "prim_sm90.cuh": ("prim_sm90.cuh", "runtime_sm90.h")}
"""Sources of the kernels that this folder has a form of its own of, with the files that such a form consists of."""
SWITCH = "switch.h"
"""How a host thread changes stacks, for this runtime and that of tools/ptx."""
RUNTIME = (
    "runtime.cpp",
    "runtime_launch.cpp",
    "runtime_warp.cpp",
    "record.cpp",
    "sm90.cpp",
    "sm90_barriers.cpp",
    "sm90_products.cpp",
    "sm90_registers.cpp",
    "sm90_watch.cpp",
)
"""What these forms call, but for the headers machine.h, record.h and sm90.h."""
SOURCES = ROOT / "kernels" / "cuda" / "src"
CACHE = ROOT / ".emulator"

FLAGS = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-fno-math-errno",
    "-ftls-model=initial-exec",
    "-pthread",
)
# What the device finds in a variable that nothing was written to is not zero either. The directory of a build does not become a part of it.
KERNEL_FLAGS = ("-ftrivial-auto-var-init=pattern", "-Werror=return-type", "-fno-working-directory")
WATCH_FLAGS = ("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-nodefaultlibs")
"""Every access of Hopper's kernels to memory calls a function of sm90_watch.cpp; ThreadSanitizer itself, whose calls these are, stays out."""
SANITIZE_FLAGS = ("-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
SANITIZED_EXIT = 99
KEPT_DAYS = 7
"""How long the cache keeps a build that nobody uses."""
GUARD = 4096
"""Bytes of the sentinels before and after a guarded tensor."""


@dataclass(frozen=True)
class Configuration:
    """What a build takes from the device that it pretends, where devices and compilers differ.

    Attributes
    ----------
    arch : str
        `__CUDA_ARCH__`. What is written for Hopper alone is built for Hopper whatever this says.
    contract : bool
        The compiler makes one operation of a * b + c, rounded once, where it likes, as NVRTC does.
    salt : int
        Not 0: exp2_of, log2_of and inverse_root are off by up to twice what they may be on a device, by the same for the same argument; another
        number, other errors.
    """

    arch: str = "sm_89"
    contract: bool = False
    salt: int = 0

    @property
    def flags(self) -> tuple[str, ...]:
        # The pass that makes fused products is one of g++'s expensive ones.
        return ("-ffp-contract=fast", "-fexpensive-optimizations") if self.contract else ("-ffp-contract=off",)

    @property
    def defines(self) -> tuple[str, ...]:
        return f"-D__CUDA_ARCH__={10 * config.number(self.arch)}", f"-DEMULATOR_SALT={self.salt}"


class BuildError(Exception):
    """g++ refuses the sources."""


def sanitised() -> bool:
    """Whether this process runs under AddressSanitizer (see `run_sanitised`)."""
    return hasattr(ctypes.CDLL(None), "__asan_init")


@functools.cache
def compiler() -> str:
    """Path of g++ 12 or later, on Linux. Without one the test is skipped; under CI=true it fails."""
    found = shutil.which("g++") if sys.platform == "linux" else None
    version = subprocess.run([found, "-dumpversion"], capture_output=True, text=True, check=True).stdout if found else "0"
    if int(version.split(".")[0]) < 12:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("g++ 12 on Linux is missing: the emulator builds the kernels with it")
    return found


@functools.cache
def _machine_flags() -> tuple[str, ...]:
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    cpu = Path("/proc/cpuinfo")
    features = set(re.findall(r"^flags.*", cpu.read_text(), re.MULTILINE)[0].split()) if cpu.exists() and os.uname().machine == "x86_64" else set()
    arch = ("-march=x86-64-v3",) if {"avx2", "fma", "f16c", "bmi2", "movbe", "abm"} <= features else ()
    return (*arch, f"-DEMULATOR_COMPILER={hashlib.sha256(version.encode()).hexdigest()[:8]}")


def _preprocessed(name: str, flags: tuple[str, ...], files: dict[str, str], unit: str) -> str:
    """`unit` with all that it includes."""
    with tempfile.TemporaryDirectory() as folder:
        _write(folder, files)
        done = subprocess.run([compiler(), *flags, "-E", unit], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"g++ refuses {name}:\n{done.stderr[-20000:]}")
    return done.stdout


def _write(folder: str, files: dict[str, str]) -> None:
    for file, text in files.items():
        path = Path(folder, file)
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def build(name: str, flags: tuple[str, ...], files: dict[str, str], units: tuple[str, ...], suffix: str) -> Path:
    """Compiles `units` with `files` around them, once per content; two processes may do it at the same time."""
    key = hashlib.sha256(repr((flags, sorted(files.items()), units)).encode()).hexdigest()[:20]
    target = CACHE / f"{name}-{key}{suffix}"
    if target.exists():
        os.utime(target)
        return target
    CACHE.mkdir(exist_ok=True)
    for old in CACHE.iterdir():
        with suppress(FileNotFoundError):  # of another process
            if time.time() - old.stat().st_mtime > KEPT_DAYS * 86400:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="build-") as folder:
        _write(folder, files)
        done = subprocess.run([compiler(), *flags, *units, "-o", "built"], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"g++ refuses {name}:\n{done.stderr[-20000:]}")
        os.replace(Path(folder, "built"), target)
    return target


def _closure(source: Path) -> dict[str, Path]:
    """The source and what it includes from its own folder or kernels/cuda/src, by name; the primitives are the emulator's."""
    found, queue = {}, [source]
    while queue:
        path = queue.pop()
        if path.name in found:
            continue
        found[path.name] = path
        names = [name for name in re.findall(r'#include\s*[<"]([\w.]+)[>"]', path.read_text()) if name not in PRIMITIVES]
        queue += [path.with_name(name) if path.with_name(name).exists() else SOURCES / name for name in names]
    return found


def fields_of(layout: str) -> dict[str, list[str]]:
    """Field names of every struct in the text of layout.cuh."""
    text = re.sub(r"//[^\n]*", "", layout)
    found = {}
    for struct, body in re.findall(r"struct\s+(\w+)\s*\{(.*?)\};", text, re.DOTALL):
        found[struct] = [name for line in body.split(";") for name in re.findall(r"(\w+)\s*(?:,|$)", line.strip())]
    return found


def _unit(source: str, layout: str | None) -> str:
    lines = ["#include <prim.cuh>", f"#include <{source}>", "struct Field { const char *owner, *name; int64_t offset, size; };"]
    lines += ['extern "C" __attribute__((visibility("default"))) const Field emulator_fields[] = {']
    for struct, names in fields_of(layout or "").items():
        lines += [f'  {{"{struct}", "", 0, sizeof({struct})}},']
        lines += [f'  {{"{struct}", "{n}", __builtin_offsetof({struct}, {n}), sizeof((({struct}*)0)->{n})}},' for n in names]
    return "\n".join([*lines, "  {nullptr, nullptr, 0, 0}};", ""])


class _Field(ctypes.Structure):
    _fields_ = [("owner", ctypes.c_char_p), ("name", ctypes.c_char_p), ("offset", ctypes.c_int64), ("size", ctypes.c_int64)]


class Record(NamedTuple):
    """What a thread did at a barrier.

    Attributes
    ----------
    block, thread : int
    event : str
        One of EVENTS.
    where : int
        The barrier's shared address, or the hardware barrier's number; of a copy its destination.
    amount : int
        Arrivals that a new barrier counts, bytes that an arrival announces or a copy has, the parity of a wait, threads that meet.
    other : int
        Of a copy its barrier, of a vote what the thread itself says.
    """

    block: int
    thread: int
    event: str
    where: int
    amount: int
    other: int


EVENTS = ("init", "arrive", "wait", "copy", "sync_threads", "arrive_threads", "any_thread")
"""In the order of `Event` of record.h."""


class _Record(ctypes.Structure):
    _fields_ = [("block", ctypes.c_int64), ("thread", ctypes.c_int32), ("event", ctypes.c_int32), ("where", ctypes.c_uint32),
                ("amount", ctypes.c_int32), ("other", ctypes.c_uint32)]  # fmt: skip


@contextmanager
def _recorded(to: list[Record] | None):
    """Within, what threads do at barriers is noted down for `to`."""
    if to is None:
        yield
        return
    note, found = _runtime_library().emulator_record, ctypes.POINTER(_Record)()
    note.restype = ctypes.c_int64
    note(1, ctypes.byref(found))
    try:
        yield
    finally:
        for one in found[: note(0, ctypes.byref(found))]:
            to.append(Record(one.block, one.thread, EVENTS[one.event], one.where, one.amount, one.other))


class Library:
    """The kernels of one build."""

    def __init__(self, path: Path, shared: int = 0):
        self.path = path
        self._shared = shared
        self._launch = _runtime()
        self._dll = ctypes.CDLL(str(path))

    def launch(
        self, symbol: str, grid: int, params: ctypes.Structure, *, shared: int = 0, threads: int = 256, seed: int = 0, limit: float = 120.0,
        record: list[Record] | None = None,
    ) -> None:  # fmt: skip
        """Runs one kernel on the whole grid and returns when it is done.

        Parameters
        ----------
        symbol : str
            The name given to KERNEL.
        grid : int
            Blocks.
        params : ctypes.Structure
            The kernel's argument, with `tensor.data_ptr()` of CPU tensors, which the caller keeps alive.
        shared : int
            Bytes of dynamic shared memory; 0 means what the variant asks for.
        threads : int
            Threads per block, at most the number given to KERNEL.
        seed : int
            Order in which blocks, warps and lanes run. Under even seeds every asynchronous copy or product comes to its end as late as it may, under
            odd ones some do early.
        limit : float
            Seconds after which the launch counts as hung.
        record : list of Record, optional
            Gets what threads do at barriers, each thread's operations in their order.

        Raises
        ------
        RuntimeError
            The kernel, the block, the thread and what went wrong, and where all threads were.
        """
        kernel = ctypes.byref(ctypes.c_char.in_dll(self._dll, symbol))
        error = ctypes.create_string_buffer(8192)
        workers = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        arguments = (kernel, grid, threads, shared or self._shared, ctypes.byref(params), ctypes.sizeof(params), seed, workers, limit)
        with _recorded(record):
            failed = self._launch(*arguments, error, len(error))
        if failed:
            raise RuntimeError(error.value.decode(errors="replace"))

    def layout(self) -> dict[str, tuple[int, dict[str, tuple[int, int]]]]:
        """struct -> (size, field -> (offset, size)) of layout.cuh as compiled."""
        fields = ctypes.cast(ctypes.byref(ctypes.c_char.in_dll(self._dll, "emulator_fields")), ctypes.POINTER(_Field))
        found, i = {}, 0
        while fields[i].owner:
            owner, name = fields[i].owner.decode(), fields[i].name.decode()
            if name:
                found[owner][1][name] = (fields[i].offset, fields[i].size)
            else:
                found[owner] = (fields[i].size, {})
            i += 1
        return found


def library(variant, *, arch: str | None = None, sanitize: bool = False, replace: tuple[tuple[str, str], ...] = ()) -> Library:
    """The build of one variant for this CPU, from the cache where it is there.

    Parameters
    ----------
    variant : config.Variant
        Its `source` is a file in kernels/cuda/src, or an absolute path.
    arch : str
        The device to pretend; by default that of the configuration (see `configured`).
    sanitize : bool
        With AddressSanitizer and UndefinedBehaviorSanitizer, which only a process under `run_sanitised` can load; there it is always on.
    replace : tuple of (old, new)
        Changes to the text of the sources; each `old` must be there exactly once.
    """
    if sanitize and not sanitised():
        raise RuntimeError("a sanitised build can only be loaded by a process that run_sanitised started")
    used = _configurations[-1]
    return _library(variant, used if arch is None else dataclasses.replace(used, arch=arch), tuple(replace), tuple(_alterations))


_alterations: list[tuple[str, str, str]] = []
_configurations = [Configuration()]


@contextmanager
def altered(file: str, old: str, new: str):
    """Within, every library that is made of `file` of kernels/cuda/src has `new` in place of `old`, which must be there exactly once."""
    _alterations.append((file, old, new))
    try:
        yield
    finally:
        _alterations.pop()


@contextmanager
def configured(configuration: Configuration):
    """Within, every library is built so."""
    _configurations.append(configuration)
    try:
        yield
    finally:
        _configurations.pop()


@functools.cache
def _runtime_library() -> ctypes.CDLL:
    """The runtime, which is loaded once and holds the stacks that all libraries' threads run on."""
    names = (*itertools.chain(*PRIMITIVES.values()), "machine.h", "record.h", "sm90.h", SWITCH, *RUNTIME)
    files = {f"host/{name}": (HERE / name).read_text() for name in names}
    used = Configuration()
    flags, units = (*compile_flags(used), *used.defines, "-O3", "-shared", "-Ihost"), tuple(f"host/{name}" for name in RUNTIME)
    return ctypes.CDLL(str(build("runtime", flags, files, units, ".so")), mode=ctypes.RTLD_GLOBAL)


@functools.cache
def _runtime():
    """Its launch function."""
    launch = _runtime_library().emulator_launch
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    what, how = [pointer, long, ctypes.c_int, long, pointer, long], [ctypes.c_uint64, ctypes.c_int, ctypes.c_double]
    launch.argtypes = [*what, *how, ctypes.c_char_p, long]
    return launch


def compile_flags(configuration: Configuration = Configuration()) -> tuple[str, ...]:
    """What everything is compiled with that this process loads; but for its definitions."""
    return (*FLAGS, *configuration.flags, *_machine_flags(), *(SANITIZE_FLAGS if sanitised() else ()))


@functools.cache
def _library(variant, configuration: Configuration, replace: tuple[tuple[str, str], ...], alterations: tuple[tuple[str, str, str], ...]) -> Library:
    source = SOURCES / variant.source
    texts = {name: path.read_text() for name, path in _closure(source).items()}
    own = {"prim.cuh"} | {name for name in PRIMITIVES for text in texts.values() if f"<{name}>" in text}
    interface = {f"host/{name}": (HERE / name).read_text() for used in sorted(own) for name in PRIMITIVES[used]}
    changes = [(set(texts), old, new) for old, new in replace]
    changes += [({file}, old, new) for file, old, new in alterations if file in texts]
    for where, old, new in changes:
        places = [name for name in where for _ in range(texts[name].count(old))]
        if len(places) != 1:
            raise ValueError(f"the text to replace must be in the sources of {variant.name} exactly once, got {len(places)} in {places}: {old!r}")
        texts[places[0]] = texts[places[0]].replace(old, new)
    files = {**interface, **{f"source/{name}": text for name, text in texts.items()}, "unit.cpp": _unit(source.name, texts.get("layout.cuh"))}
    for_hopper = "prim_sm90.cuh" in own
    if for_hopper:
        configuration = dataclasses.replace(configuration, arch="sm_90")
    flags = (*compile_flags(configuration), *KERNEL_FLAGS, *(WATCH_FLAGS if for_hopper and not sanitised() else ()))
    defines = (*(f"-D{name}={value}" for name, value in variant.defines), *configuration.defines)
    # Builds are told apart by what is left of the text: that of one arch is mostly that of another.
    text = _preprocessed(variant.name, (*flags, *defines, "-Ihost", "-Isource"), files, "unit.cpp")
    return Library(build(variant.name, (*flags, "-shared"), {"unit.ii": text}, ("unit.ii",), ".so"), variant.shared)


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor full of NaN (integers: of bytes 0x5a) between two sentinels, for a kernel to write to."""
    size = torch.Size(shape).numel() * dtype.itemsize
    memory = torch.empty(size + 2 * GUARD, dtype=torch.uint8)
    memory[:GUARD] = memory[GUARD + size :] = torch.arange(GUARD, dtype=torch.int32).remainder(251).to(torch.uint8)
    memory[GUARD : GUARD + size] = 0x5A
    tensor = memory[GUARD : GUARD + size].view(dtype).view(shape)
    if dtype.is_floating_point:
        tensor.fill_(float("nan"))
    if sanitised():
        _poison(memory, size, True)
    return tensor


def check_guards(*tensors: torch.Tensor) -> None:
    """Fails where something was written before or after one of these tensors (views of them will do)."""
    expected = torch.arange(GUARD, dtype=torch.int32).remainder(251).to(torch.uint8)
    for i, tensor in enumerate(tensors):
        memory = torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())
        size = memory.numel() - 2 * GUARD
        if sanitised():
            _poison(memory, size, False)
        before, after = memory[:GUARD] != expected, memory[GUARD + size :] != expected
        assert not before.any(), f"tensor {i}: written {GUARD - int(before.nonzero()[0])} bytes before its start"
        assert not after.any(), f"tensor {i}: written {int(after.nonzero()[-1]) + 1} bytes past its end"
        if sanitised():
            _poison(memory, size, True)


def _poison(memory: torch.Tensor, size: int, on: bool) -> None:
    """Makes AddressSanitizer report an access to the sentinels at once."""
    run = ctypes.CDLL(None)
    act = run.__asan_poison_memory_region if on else run.__asan_unpoison_memory_region
    start = memory.data_ptr()
    for at in (start, start + GUARD + size):
        act(ctypes.c_void_p(at), ctypes.c_size_t(GUARD))


def run_sanitised(*arguments: str) -> subprocess.CompletedProcess:
    """Runs pytest with these arguments in a process where every build is sanitised and every tensor stands alone.

    A finding ends that process with `SANITIZED_EXIT` and a report on stderr.
    """
    preload = subprocess.run([compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    options = f"detect_leaks=0:detect_stack_use_after_return=0:exitcode={SANITIZED_EXIT}:allocator_may_return_null=1"
    env = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": options, "UBSAN_OPTIONS": f"print_stacktrace=1:exitcode={SANITIZED_EXIT}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
