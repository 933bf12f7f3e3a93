"""A package of toy binaries, and stand-ins for NVRTC and the driver: what the loader's tests load from."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from sparge_kernels.config import Variant
from sparge_kernels.cuda import nvrtc
from sparge_kernels.cuda.driver import Kernel, Refused
from sparge_kernels.cuda.loader import Loader, Places

VARIANT = Variant("toy", "toy.cuh", ("toy_one", "toy_two"), (("SIZE", 64),), 0, 0)
OTHER = Variant("other", "toy.cuh", ("toy_one",), (("SIZE", 128),), 0, 0)


class Compiler:
    """Stands in for `nvrtc.Compiler`: notes what it compiles."""

    def __init__(self, version="12.8", fault=None, archs=("sm_87", "sm_100", "sm_103")):
        self.version, self.path, self.fault, self._archs, self.compiled = version, f"/lib/nvrtc-{version}", fault, archs, []

    def archs(self):
        return self._archs

    def compile(self, source):
        if self.fault or source.arch.rstrip("a") not in self._archs:
            raise nvrtc.CompilerError(self.fault or f"NVRTC {self.version} cannot compile for {source.arch}")
        self.compiled.append((source.name, source.arch, source.defines))
        return nvrtc.Compiled(f"code of {source.digest} by {self.version}".encode(), "a remark")


class FakeDriver:
    """Stands in for `driver.Driver` with one kind of GPU; refuses binaries that hold any of `refuses`."""

    def __init__(self, arch="sm_86", refuses=(), old=None, fault=None):
        self._arch, self.refuses, self.old, self.fault, self.loads = arch, refuses, old, fault, []

    def arch(self, device):
        return self._arch

    def why_not(self, arch):
        return self.old

    def load(self, code, device, symbols, origin):
        self.loads.append((code, device, symbols, origin))
        if self.fault is not None:
            raise self.fault
        if any(part in code for part in self.refuses):
            raise Refused("CUDA_ERROR_NO_BINARY_FOR_GPU")
        return {s: Kernel(s, device, len(self.loads), 1000, origin, self) for s in symbols}


@pytest.fixture
def package(tmp_path):
    """A package folder: `add(arch, variant)` puts a binary into it, whose content names its architecture."""
    folder = tmp_path / "package"
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "toy.cuh").write_text("#include <toy_part.cuh>\n")
    (folder / "src" / "toy_part.cuh").write_text("// nothing\n")
    manifest = {"compiler": {}, "cubins": {}}

    def add(arch, variant=VARIANT):
        code = f"{variant.name} for {arch}".encode()
        (folder / "cubins" / arch).mkdir(parents=True, exist_ok=True)
        (folder / "cubins" / arch / f"{variant.name}.cubin.z").write_bytes(zlib.compress(code))
        manifest["cubins"].setdefault(arch, {})[variant.name] = {
            "file": f"{arch}/{variant.name}.cubin.z",
            "sha256": hashlib.sha256(code).hexdigest(),
            "source_sha256": nvrtc.program(variant.source, variant.target(arch), variant.defines, folder / "src").digest,
            "symbols": {},
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder / "cubins" / arch / f"{variant.name}.cubin.z"

    return SimpleNamespace(folder=folder, add=add)


def make(package, *compilers, cache="cache") -> Loader:
    return Loader(Places(package.folder, cache and package.folder.parent / cache, lambda: iter(compilers)))


def refusals(loader: Loader, arch: str) -> tuple[str, ...]:
    """What stood in the way of the binary that is found."""
    reasons: list[str] = []
    next(loader._binaries(arch, VARIANT, reasons))
    return tuple(reasons)


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)
