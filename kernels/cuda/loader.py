"""From (device, binary, kernel) to something that can be launched.

A binary is looked for in this order, and every place that cannot give it leaves a sentence:
1. the package: the exact architecture, else the highest lower one of the same major version, which NVIDIA's binaries run on;
2. the user's cache, for what 3. compiled before with the same sources, options and compiler;
3. NVRTC, which torch carries, on the packaged sources.
A binary that the driver does not take counts as not found, and the search goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

from .. import environment
from ..config import Variant, number
from . import driver as driver_module
from . import nvrtc
from .driver import Driver, Kernel, Refused

FOLDER = Path(__file__).resolve().parent
TEGRA = ("sm_87", "sm_101")
"""Orin and Thor, as compilers before CUDA 13 call the latter: NVIDIA's binaries for them run nowhere else."""

LIMIT = 1024
"""Most kernels in a table: more than 16 devices with every binary of an architecture have."""


class NoBinary(RuntimeError):
    """Nothing can run this kernel here; `reasons` has a sentence for every place that was asked."""

    def __init__(self, variant: str, arch: str, reasons: tuple[str, ...]):
        self.reasons = reasons
        super().__init__(f"no binary of {variant} for {arch}: " + "; ".join(reasons))


class NotNow(RuntimeError):
    """What is asked for would have to be loaded during the capture of a CUDA graph. Nothing remembers it: after the capture it is loaded."""

    def __init__(self):
        super().__init__(
            "its kernels are not loaded yet and a CUDA graph is being captured, which must not be interrupted; "
            "run the same call once before the capture"
        )


class Binary(NamedTuple):
    """Device code and where it came from."""

    code: bytes  # a cubin
    arch: str  # what it was compiled for: the device's own architecture or one whose binaries run on it
    origin: str  # "packaged for sm_86", "compiled by NVRTC 12.8 for sm_100", or "cached, compiled by ..."


class Places(NamedTuple):
    """Where a loader looks."""

    folder: Path  # holds `manifest.json`, `cubins/` and `src/`
    cache: Path | None  # may not exist yet, may be read-only; None: no cache
    compilers: Callable[[], Iterator[nvrtc.Compiler | str]]  # for every NVRTC on this machine; a sentence tells why one cannot be used


def compatible(device: str, built: tuple[str, ...]) -> tuple[str, ...]:
    """The architectures of `built` whose binaries run on `device`, the best first.

    A binary runs on its own and on higher minor versions of the same major one. One of an "a" architecture, or of TEGRA, runs on that alone.
    """
    major, minor = _split(device)
    anywhere = [a for a in built if not a.endswith("a") and a not in TEGRA]
    fits = [a for a in built if _split(a) == (major, minor) or (a in anywhere and _split(a)[0] == major and _split(a)[1] < minor)]
    return tuple(sorted(fits, key=lambda a: (_split(a), a), reverse=True))


class Loader:
    """A search over fixed places, and the table of what it loaded."""

    def __init__(self, places: Places):
        self.places = places
        self._kernels: dict[tuple[int, str, str], Kernel] = {}
        self._refused: dict[tuple[int, str], tuple[str, str, tuple[str, ...]]] = {}
        self._lock = threading.Lock()

    def find(self, arch: str, variant: Variant) -> Binary:
        """The first binary of `variant` that may run on a device of `arch`. Raises `NoBinary`."""
        reasons: list[str] = []
        for binary in self._binaries(arch, variant, reasons):
            return binary
        raise NoBinary(variant.name, arch, tuple(reasons))

    def _binaries(self, arch: str, variant: Variant, reasons: list[str]) -> Iterator[Binary]:
        yield from self._packaged(arch, variant, reasons)
        yield from self._compiled(arch, variant, reasons)

    def _packaged(self, arch: str, variant: Variant, reasons: list[str]) -> Iterator[Binary]:
        manifest = self._manifest
        if isinstance(manifest, str):
            reasons.append(manifest)
            return
        built = {variant.target(a): entries[variant.name] for a, entries in manifest.items() if variant.name in entries}
        fits = compatible(arch, tuple(built))
        if not built:
            reasons.append("none is packaged, it is compiled where it is asked for")
        elif not fits:
            reasons.append(f"no packaged binary runs on {arch} (there are some for {', '.join(sorted(built, key=_split))})")
        for candidate in fits:
            try:
                yield Binary(self._unpack(candidate, variant, built[candidate]), candidate, f"packaged for {candidate}")
            except (OSError, ValueError, KeyError, TypeError, zlib.error) as error:
                reasons.append(f"the packaged binary for {candidate} cannot be used ({error}); reinstall the pack")

    def _unpack(self, arch: str, variant: Variant, entry: dict) -> bytes:
        if self._program(arch, variant).digest != entry["source_sha256"]:
            raise ValueError("it was built from other sources than those beside it")
        code = zlib.decompress((self.places.folder / "cubins" / entry["file"]).read_bytes())
        if hashlib.sha256(code).hexdigest() != entry["sha256"]:
            raise ValueError("its checksum is wrong")
        return code

    @cached_property
    def _manifest(self) -> dict[str, dict[str, dict]] | str:
        try:
            return json.loads((self.places.folder / "manifest.json").read_text(encoding="utf-8"))["cubins"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"there are no packaged binaries, manifest.json cannot be read ({error}); reinstall the pack"

    def _compiled(self, arch: str, variant: Variant, reasons: list[str]) -> Iterator[Binary]:
        if variant.exact and not compatible(arch, (variant.exact,)):
            reasons.append(f"it cannot be compiled for {arch}, because its code is for {variant.exact} alone")
            return
        seen = False
        for compiler in self.places.compilers():
            if isinstance(compiler, str):
                reasons.append(compiler)
                continue
            seen = True
            try:
                # A compiler older than the GPU may know an architecture whose binaries run on it.
                source = self._program(variant.exact or next(iter(compatible(arch, compiler.archs())), arch), variant)
                origin = f"compiled by NVRTC {compiler.version} for {source.arch}"
                file = self._cache_file(variant, source, compiler)
                kept = _read_cached(file, reasons)
                if kept is not None:
                    yield Binary(kept, source.arch, f"cached, {origin}")
                code = compiler.compile(source).code
            except nvrtc.CompilerError as error:
                reasons.append(str(error))
                continue
            except (OSError, ValueError) as error:
                reasons.append(f"the device sources cannot be read ({error}); reinstall the pack")
                return
            _write_cached(file, code, reasons)
            yield Binary(code, source.arch, origin)
        if not seen:
            reasons.append("there is no NVRTC to compile one; install a torch built for CUDA, which brings it, or the package nvidia-cuda-nvrtc")

    def _program(self, arch: str, variant: Variant) -> nvrtc.Program:
        return nvrtc.program(variant.source, arch, variant.defines, self.places.folder / "src")

    def _cache_file(self, variant: Variant, source: nvrtc.Program, compiler: nvrtc.Compiler) -> Path | None:
        if self.places.cache is None:
            return None
        key = hashlib.sha256(f"{source.digest} {source.arch} {compiler.version}".encode()).hexdigest()
        return self.places.cache / f"{variant.name}-{source.arch}-{key}.cubin"

    def kernel(self, driver: Driver, device: int, variant: Variant, symbol: str) -> Kernel:
        """The kernel `symbol` of `variant`, loaded on `device` (torch's number of it).

        Raises
        ------
        NoBinary
            Also when asked again: what is missing stays missing for the life of the process.
        NotNow
        torch.cuda.OutOfMemoryError, RuntimeError
            What the driver says that is not about the binary.
        """
        found = self._kernels.get((device, variant.name, symbol))
        return found if found is not None else self._load(driver, device, variant)[symbol]

    def _load(self, driver: Driver, device: int, variant: Variant) -> dict[str, Kernel]:
        with self._lock:
            loaded = {symbol: self._kernels.get((device, variant.name, symbol)) for symbol in variant.symbols}
            if all(loaded.values()):
                return loaded
            key = (device, variant.name)
            if key in self._refused:
                raise NoBinary(*self._refused[key])
            if driver_module.capturing(device):
                raise NotNow
            arch = driver.arch(device)
            reason = driver.why_not(arch)
            reasons = [] if reason is None else [reason]
            for binary in self._binaries(arch, variant, reasons) if reason is None else ():
                try:
                    loaded = driver.load(binary.code, device, variant.symbols, f"{variant.name}, {binary.origin}")
                    break
                except Refused as error:
                    reasons.append(f"the driver refused the binary {binary.origin} ({error})")
            else:
                _keep(self._refused, key, (variant.name, arch, tuple(reasons)))
                raise NoBinary(*self._refused[key])
            for symbol, kernel in loaded.items():
                _keep(self._kernels, (device, variant.name, symbol), kernel)
            return loaded


@lru_cache(maxsize=1)
def default() -> Loader:
    """The loader over the real places."""
    return Loader(Places(FOLDER, environment.cache_dir(), _compilers))


def kernel(device: int, variant: Variant, symbol: str) -> Kernel:
    """`Loader.kernel` of the default loader and this machine's driver; a table look-up after the first time."""
    driver = driver_module.driver()
    if isinstance(driver, str):
        raise NoBinary(variant.name, f"device {device}", (driver,))
    return default().kernel(driver, device, variant, symbol)


def why_not(device: int, variants: Sequence[Variant]) -> str | None:
    """None when every kernel of `variants` is loaded on `device`, else every reason in a text. Loads them, but not while a CUDA graph is captured."""
    try:
        for variant in variants:
            for symbol in variant.symbols:
                kernel(device, variant, symbol)
    except (NoBinary, NotNow) as error:
        return str(error)
    return None


def _compilers() -> Iterator[nvrtc.Compiler | str]:
    import torch

    folders = (Path(torch.__file__).resolve().parents[1], Path(sysconfig.get_path("platlib")), Path(sysconfig.get_path("purelib")))
    for file in nvrtc.library_files(tuple(dict.fromkeys(folders))):
        try:
            yield nvrtc.open_library(file)
        except nvrtc.CompilerError as error:
            yield str(error)
    for name in nvrtc.plain_names():  # that a name is unknown to the system is no news
        try:
            yield nvrtc.open_library(name)
        except nvrtc.CompilerError:
            continue


_HEAD = hashlib.sha256().digest_size * 2
"""Bytes at the head of a file of the cache: the checksum of the rest in hex. The rest is the cubin."""


def _read_cached(file: Path | None, reasons: list[str]) -> bytes | None:
    if file is None:
        reasons.append("there is no cache, because the user has no home folder; set SPARGE_CACHE_DIR to a folder to have one")
        return None
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        reasons.append(f"the cache cannot be read ({error}); set SPARGE_CACHE_DIR to a folder that can")
        return None
    if hashlib.sha256(data[_HEAD:]).hexdigest().encode() == data[:_HEAD]:
        return data[_HEAD:]
    reasons.append(f"the cached binary {file} is damaged")
    return None


def _write_cached(file: Path | None, code: bytes, reasons: list[str]) -> None:
    """Writes a file of its own and renames it, so that a reader sees all of it or nothing, however many processes write it at once."""
    if file is None:
        return
    part = None
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=file.stem, suffix=".part", dir=file.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(hashlib.sha256(code).hexdigest().encode() + code)
        os.replace(part, file)
    except OSError as error:
        reasons.append(f"the cache cannot be written ({error}), so that every start compiles anew; set SPARGE_CACHE_DIR to a folder that can")
        if part is not None:
            Path(part).unlink(missing_ok=True)


def _keep(table: dict, key, value) -> None:
    """Puts a value into a table of at most LIMIT, which loses its oldest entry when it is full."""
    if len(table) >= LIMIT:
        del table[next(iter(table))]
    table[key] = value


def _split(arch: str) -> tuple[int, int]:
    """(8, 6) of "sm_86", (12, 0) of "sm_120", (9, 0) of "sm_90a"."""
    return divmod(number(arch), 10)
