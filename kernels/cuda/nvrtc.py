"""CUDA's run-time compiler through ctypes: where it lies, what it is asked, and the text of one program.

Two users: the loader, in the user's process, with whatever NVRTC the user's torch carries; and the build of the packaged binaries, which runs this
file as a program of its own (`python -I nvrtc.py ...`), one process per binary. It therefore imports the standard library only.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

SOURCES = Path(__file__).resolve().parent / "src"
"""The device code's folder."""

# Constant functions of layout.cuh are called on the device, hence the first. The second keeps the working directory out of the include path.
FLAGS = ("-std=c++17", "-default-device", "-no-source-include")
"""Options of every compilation; arch and definitions come on top."""

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^">]+)[">]', re.MULTILINE)


class CompilerError(RuntimeError):
    """NVRTC is missing, too old for the arch, or refused the program; the message is a sentence for the user."""


@dataclass(frozen=True)
class Program:
    """Everything that decides the bytes of a binary or of PTX, but for the compiler."""

    name: str  # the main file
    files: tuple[tuple[str, str], ...]  # name and text of the main file and of every file it includes, directly or not, the main file first
    arch: str  # "sm_86" for a binary, or a virtual architecture, "compute_86", for PTX, which is text that tests can read
    defines: tuple[tuple[str, int], ...]

    @property
    def options(self) -> tuple[str, ...]:
        """The compiler's options."""
        return (*FLAGS, f"--gpu-architecture={self.arch}", *(f"-D{name}={value}" for name, value in self.defines))

    @property
    def digest(self) -> str:
        """sha256 over options, file names and `bare` texts: a comment makes no binary stale."""
        whole = hashlib.sha256()
        for part in (*self.options, *(part for name, text in self.files for part in (name, bare(text)))):
            data = part.encode()
            whole.update(len(data).to_bytes(8, "little") + data)
        return whole.hexdigest()


_LITERAL = r"""("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|#[ \t]*include[ \t]*<[^>\n]*>)"""
_COMMENT = re.compile(_LITERAL + r"|//[^\n]*|/\*.*?\*/", re.DOTALL)
_BLANK = re.compile(_LITERAL + r"|[ \t\r\f\v\n]+")
_SPLIT = re.compile(r"\\[ \t\r\f\v]+$", re.MULTILINE)


@lru_cache(maxsize=64)
def bare(text: str) -> str:
    """A source without comments and needless blanks; lines that a backslash continues are one, what stands in quotes or <> stays as it is.

    Two texts that are the same so compile to the same bytes, unless they ask for the number of a line (`__LINE__`). A test keeps the sources free of
    that, and of the literals that this does not know (raw strings, digits apart by quotes).
    """
    text = _COMMENT.sub(lambda m: m[1] or " ", text.replace("\\\n", ""))
    return _BLANK.sub(lambda m: m[1] or ("\n" if "\n" in m[0] else " "), text).strip()


def program(name: str, arch: str, defines: tuple[tuple[str, int], ...], folder: Path = SOURCES) -> Program:
    """The program whose main file is `folder / name`.

    Line ends are read as "\\n" however git checked the files out, so that the digest is the same everywhere. Raises OSError or ValueError where a
    file cannot be read, or has a line whose end not all compilers read alike.
    """
    files: dict[str, str] = {}
    open_names = [name]
    while open_names:
        current = open_names.pop(0)
        if current not in files:
            files[current] = (folder / current).read_bytes().decode("utf-8").replace("\r\n", "\n")
            if split := _SPLIT.search(files[current]):
                line = files[current].count("\n", 0, split.start()) + 1
                raise ValueError(f"{current} must have no blank after the backslash that ends a line, got one in line {line}; delete it")
            open_names += _INCLUDE.findall(files[current])
    return Program(name, tuple(files.items()), arch, defines)


class Compiled(NamedTuple):
    """What a compilation gave."""

    code: bytes  # a cubin; PTX, without the NUL at its end, for a virtual architecture
    log: str  # what the compiler said all the same, warnings and remarks, a line each; "" where it had nothing to say


class Compiler:
    """One loaded NVRTC, of a library object (ctypes.CDLL, or a test's) and the path that it came from, for messages."""

    def __init__(self, library, path: str):
        self._library, self.path = library, path
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
        self.version = f"{major.value}.{minor.value}"

    def archs(self) -> tuple[str, ...]:
        """What it can compile for: ("sm_75", "sm_80", ...)."""
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "nvrtcGetNumSupportedArchs")
        numbers = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(numbers), "nvrtcGetSupportedArchs")
        return tuple(f"sm_{n}" for n in numbers)

    def compile(self, source: Program) -> Compiled:
        """The binary of `source`, or its PTX where the architecture is a virtual one. Raises `CompilerError` with the compiler's log."""
        virtual = source.arch.startswith("compute_")
        if source.arch.replace("compute_", "sm_").rstrip("a") not in self.archs():
            raise CompilerError(f"NVRTC {self.version} ({self.path}) cannot compile for {source.arch}; install a torch built for a newer CUDA")
        library, handle = self._library, ctypes.c_void_p()
        (_, text), *headers = source.files
        count = len(headers)
        names = (ctypes.c_char_p * count)(*(name.encode() for name, _ in headers))
        texts = (ctypes.c_char_p * count)(*(body.encode() for _, body in headers))
        options = (ctypes.c_char_p * len(source.options))(*(option.encode() for option in source.options))
        self._check(library.nvrtcCreateProgram(ctypes.byref(handle), text.encode(), source.name.encode(), count, texts, names), "nvrtcCreateProgram")
        try:
            status = library.nvrtcCompileProgram(handle, len(options), options)
            log = self._bytes(handle, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
            if status:
                raise CompilerError(f"NVRTC {self.version} ({self.path}) refused {source.name} for {source.arch}: {log or self._name(status)}")
            return Compiled(self._bytes(handle, "PTX").rstrip(b"\0") if virtual else self._bytes(handle, "CUBIN"), log)
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(handle))

    def _bytes(self, handle, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(handle, ctypes.byref(size)), f"nvrtcGet{what}Size")
        data = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(handle, data), f"nvrtcGet{what}")
        return data.raw

    def _name(self, status: int) -> str:
        return self._library.nvrtcGetErrorString(status).decode()

    def _check(self, status: int, call: str) -> None:
        if status:
            raise CompilerError(f"{call} of {self.path} failed: {self._name(status)}")


def library_files(folders: tuple[Path, ...], platform: str = sys.platform) -> tuple[Path, ...]:
    """Every NVRTC inside `folders` (site-packages): torch's own first, then NVIDIA's packages; the newest of a folder first."""
    patterns = ("nvrtc64_*.dll",) if platform == "win32" else ("libnvrtc.so.*", "libnvrtc-*.so*")
    found = []
    for folder in folders:
        inner = (sorted(folder.glob(f"nvidia/*/{name}")) for name in ("lib", "bin", "bin/x86_64"))
        for place in (folder / "torch" / "lib", *(place for places in inner for place in places)):
            found += sorted((f for pattern in patterns for f in _files(place, pattern) if "builtins" not in f.name), reverse=True)
    return tuple(dict.fromkeys(found))


def plain_names(platform: str = sys.platform) -> tuple[str, ...]:
    """Names that the system's own search may resolve (a CUDA toolkit, or what torch has loaded already)."""
    return ("nvrtc64_130_0.dll", "nvrtc64_120_0.dll") if platform == "win32" else ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


def open_library(path: Path | str, load: Callable[[str], Any] = ctypes.CDLL) -> Compiler:
    """The compiler at `path`; raises `CompilerError`.

    Its companion, which it opens by bare name at the first compilation, is loaded before it: so it is found wherever the two lie.
    """
    try:
        if isinstance(path, Path):
            for pattern in ("nvrtc-builtins64_*.dll", "libnvrtc-builtins*.so*"):
                for companion in _files(path.parent, pattern):
                    load(str(companion))
        return Compiler(load(str(path)), str(path))
    except (OSError, AttributeError) as error:
        raise CompilerError(f"{path} could not be loaded: {error}") from error


def _files(folder: Path, pattern: str) -> list[Path]:
    """Without the slower builds that lie beside the real ones under `.alt.` names."""
    return sorted(f for f in folder.glob(pattern) if ".alt." not in f.name)


def main() -> None:
    """Compiles one file; the build's worker."""
    parser = argparse.ArgumentParser(description="Compile one device source with NVRTC.")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--arch", required=True)
    parser.add_argument("--define", action="append", default=[], help="NAME=NUMBER")
    parser.add_argument("--out", type=Path, required=True, help="the binary")
    parser.add_argument("--log", type=Path, required=True, help="what the compiler said")
    given = parser.parse_args()
    defines = tuple((name, int(value)) for name, _, value in (d.partition("=") for d in given.define))
    try:
        compiled = open_library(given.library).compile(program(given.source, given.arch, defines, given.folder))
    except CompilerError as error:
        parser.exit(1, f"{error}\n")
    for file, data in ((given.log, compiled.log.encode()), (given.out, compiled.code)):
        part = file.with_name(file.name + ".part")
        part.write_bytes(data)
        os.replace(part, file)


if __name__ == "__main__":
    main()
