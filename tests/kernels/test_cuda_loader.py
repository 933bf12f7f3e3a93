"""kernels/cuda/loader.py, nvrtc.py's search, and environment.py: the order of places, what each refusal says, the cache, the table."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import threading
import zlib
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import cubins
import pytest
import torch
from sparge_kernels import environment
from sparge_kernels.config import Variant
from sparge_kernels.cuda import driver as driver_module
from sparge_kernels.cuda import loader as loader_module
from sparge_kernels.cuda import nvrtc
from sparge_kernels.cuda.driver import Kernel, Refused
from sparge_kernels.cuda.loader import Binary, Loader, NoBinary, Places, compatible

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


# ---- which architectures run what ----------------------------------------------------------------------------------------------------------------

BUILT = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120")


@pytest.mark.parametrize(
    "device, built, expected",
    [
        ("sm_80", BUILT, ("sm_80",)),
        ("sm_86", BUILT, ("sm_86", "sm_80")),
        ("sm_87", BUILT, ("sm_86", "sm_80")),
        ("sm_87", ("sm_80", "sm_89"), ("sm_80",)),
        ("sm_88", BUILT, ("sm_86", "sm_80")),
        ("sm_89", BUILT, ("sm_89", "sm_86", "sm_80")),
        ("sm_90", BUILT, ("sm_90a", "sm_90")),
        ("sm_91", BUILT, ("sm_90",)),
        ("sm_100", BUILT, ("sm_100",)),
        ("sm_103", BUILT, ("sm_100",)),
        ("sm_103", ("sm_100", "sm_101"), ("sm_100",)),
        ("sm_101", ("sm_100", "sm_101"), ("sm_101", "sm_100")),
        ("sm_88", ("sm_86", "sm_87"), ("sm_86",)),
        ("sm_110", BUILT, ()),
        ("sm_120", BUILT, ("sm_120",)),
        ("sm_121", BUILT, ("sm_120",)),
        ("sm_75", BUILT, ()),
        ("sm_130", BUILT, ()),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_compatible(device, built, expected):
    assert compatible(device, built) == expected


# ---- packaged ------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device, taken", [("sm_86", "sm_86"), ("sm_87", "sm_86"), ("sm_89", "sm_86"), ("sm_121", "sm_120")])
def test_packaged_binary_comes_first(package, device, taken):
    for arch in ("sm_80", "sm_86", "sm_120"):
        package.add(arch)
    compiler = Compiler()
    assert make(package, compiler).find(device, VARIANT) == Binary(f"toy for {taken}".encode(), taken, f"packaged for {taken}")
    assert compiler.compiled == []


def test_a_variant_that_the_exact_arch_lacks_is_taken_from_a_lower_one(package):
    package.add("sm_80")
    package.add("sm_86", OTHER)
    assert make(package).find("sm_86", VARIANT).arch == "sm_80"


def test_what_is_not_packaged_is_compiled_and_where_nothing_compiles_that_is_said(package):
    package.add("sm_86", OTHER)
    assert make(package, Compiler()).find("sm_87", VARIANT).origin == "compiled by NVRTC 12.8 for sm_87"
    with pytest.raises(NoBinary) as raised:
        make(package).find("sm_86", VARIANT)
    assert str(raised.value) == (
        "no binary of toy for sm_86: none is packaged, it is compiled where it is asked for; "
        "there is no NVRTC to compile one; install a torch built for CUDA, which brings it, or the package nvidia-cuda-nvrtc"
    )


EXACT = Variant("toy", "toy.cuh", ("toy_one", "toy_two"), (("SIZE", 64),), 0, 0, exact="sm_90a")


def test_a_variant_of_one_exact_arch_is_packaged_with_its_devices(package):
    package.add("sm_90", EXACT)
    assert make(package).find("sm_90", EXACT) == Binary(b"toy for sm_90", "sm_90a", "packaged for sm_90a")
    package.add("sm_90", VARIANT)  # the same file, for any device of the major version: stale for the exact one, which has another target
    with pytest.raises(NoBinary, match="it was built from other sources than those beside it"):
        make(package).find("sm_90", EXACT)


@pytest.mark.parametrize("device", ["sm_89", "sm_91", "sm_100", "sm_103", "sm_120"])
def test_a_variant_of_one_exact_arch_is_offered_to_no_other(package, device):
    package.add("sm_90", EXACT)
    compiler = Compiler(archs=("sm_89", "sm_90", "sm_91", "sm_100", "sm_103", "sm_120"))
    with pytest.raises(NoBinary) as raised:
        make(package, compiler).find(device, EXACT)
    assert raised.value.reasons == (
        f"no packaged binary runs on {device} (there are some for sm_90a)",
        f"it cannot be compiled for {device}, because its code is for sm_90a alone",
    )
    assert compiler.compiled == []


def test_a_variant_of_one_exact_arch_is_compiled_for_it(package):
    old, new = Compiler("11.0", archs=("sm_80",)), Compiler(archs=("sm_89", "sm_90", "sm_100"))
    found = make(package, old, new).find("sm_90", EXACT)
    assert (found.arch, found.origin) == ("sm_90a", "compiled by NVRTC 12.8 for sm_90a")
    assert new.compiled == [("toy.cuh", "sm_90a", (("SIZE", 64),))]
    assert make(package, Compiler()).find("sm_90", EXACT).origin == "cached, compiled by NVRTC 12.8 for sm_90a"


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)


@pytest.mark.parametrize(
    "harm, word",
    [
        (damage, ""),
        (lambda f: f.write_bytes(f.read_bytes()[:-6]), "incomplete or truncated"),
        (lambda f: f.write_bytes(zlib.compress(b"something else")), "its checksum is wrong"),
        (lambda f: f.unlink(), "No such file"),
        (lambda f: (f.parents[2] / "src" / "toy_part.cuh").write_text("int newer;\n"), "it was built from other sources than those beside it"),
    ],
    ids=["bit flipped", "cut short", "another binary", "missing", "stale"],
)
def test_an_unusable_packaged_binary_is_passed_by_with_a_reason(package, harm, word):
    harm(package.add("sm_103"))
    compiler = Compiler()
    loader, driver = make(package, compiler), FakeDriver("sm_103")
    assert loader.find("sm_103", VARIANT).origin == "compiled by NVRTC 12.8 for sm_103"
    assert loader.kernel(driver, 0, VARIANT, "toy_one").origin == "toy, cached, compiled by NVRTC 12.8 for sm_103"
    (reason,) = refusals(loader, "sm_103")
    assert re.fullmatch(r"the packaged binary for sm_103 cannot be used \(.+\); reinstall the pack", reason) and word in reason
    with pytest.raises(NoBinary) as raised:
        make(package, cache=None).find("sm_103", VARIANT)
    assert raised.value.reasons[0] == reason


def test_a_damaged_binary_gives_way_to_a_lower_arch(package):
    package.add("sm_80")
    damage(package.add("sm_86"))
    assert make(package).find("sm_86", VARIANT).arch == "sm_80"


@pytest.mark.parametrize(
    "text", [None, "", "[1, 2]", '{"compiler": {}}', '{"cubins": 3', "\x00"], ids=["missing", "empty", "list", "no entry", "cut", "zero"]
)
def test_an_unreadable_manifest_is_a_reason(package, text):
    if text is not None:
        (package.folder / "manifest.json").write_text(text)
    with pytest.raises(NoBinary, match=r"there are no packaged binaries, manifest.json cannot be read \(.*\); reinstall the pack"):
        make(package).find("sm_86", VARIANT)


def test_missing_sources_are_a_reason(package):
    (package.folder / "src" / "toy_part.cuh").unlink()
    with pytest.raises(NoBinary, match=r"the device sources cannot be read \(.*toy_part.cuh.*\); reinstall the pack"):
        make(package, Compiler()).find("sm_100", VARIANT)


# ---- compiled and cached -------------------------------------------------------------------------------------------------------------------------


def test_other_archs_are_compiled_once_and_cached(package):
    package.add("sm_90")
    compiler = Compiler()
    first = make(package, compiler).find("sm_100", VARIANT)
    assert first.origin == "compiled by NVRTC 12.8 for sm_100" and compiler.compiled == [("toy.cuh", "sm_100", (("SIZE", 64),))]
    again = make(package, compiler).find("sm_100", VARIANT)
    assert again == Binary(first.code, "sm_100", "cached, compiled by NVRTC 12.8 for sm_100") and len(compiler.compiled) == 1
    assert [p.suffix for p in (package.folder.parent / "cache").iterdir()] == [".cubin"]


def test_cache_is_keyed_by_everything_that_decides_the_binary(package):
    compiler = Compiler()
    codes = [make(package, compiler).find("sm_100", VARIANT).code, make(package, compiler).find("sm_103", VARIANT).code]
    codes += [make(package, compiler).find("sm_100", OTHER).code, make(package, Compiler("13.0")).find("sm_100", VARIANT).code]
    (package.folder / "src" / "toy_part.cuh").write_text("int newer;\n")
    codes.append(make(package, compiler).find("sm_100", VARIANT).code)
    assert len(set(codes)) == 5 == len(list((package.folder.parent / "cache").iterdir()))


@pytest.mark.parametrize(
    "harm", [damage, lambda f: f.write_bytes(b""), lambda f: f.write_bytes(f.read_bytes()[:40])], ids=["bit flipped", "empty", "cut"]
)
def test_a_damaged_cache_file_is_compiled_anew(package, harm):
    compiler = Compiler()
    first = make(package, compiler).find("sm_100", VARIANT)
    (file,) = (package.folder.parent / "cache").iterdir()
    harm(file)
    assert f"the cached binary {file} is damaged" in refusals(make(package, compiler), "sm_100") and len(compiler.compiled) == 2
    harm(file)
    loader = make(package, compiler)
    assert loader.kernel(FakeDriver("sm_100"), 0, VARIANT, "toy_one").origin == "toy, compiled by NVRTC 12.8 for sm_100"
    assert len(compiler.compiled) == 3
    assert make(package, compiler).find("sm_100", VARIANT).code == first.code and len(compiler.compiled) == 3


def test_a_cache_that_cannot_be_written_is_done_without(package):
    """A file where the folder should be: what a read-only folder is to root, too."""
    (package.folder.parent / "cache").write_text("in the way")
    compiler = Compiler()
    loader = make(package, compiler)
    kernel = loader.kernel(FakeDriver("sm_100"), 0, VARIANT, "toy_one")
    assert kernel.origin == "toy, compiled by NVRTC 12.8 for sm_100"
    assert any(
        re.fullmatch(r"the cache cannot be written \(.*\), so that every start compiles anew; set SPARGE_CACHE_DIR to a folder that can", note)
        for note in refusals(loader, "sm_100")
    )


def test_a_failed_rename_leaves_nothing_behind(package, monkeypatch):
    """On Windows a file that another process has open cannot be replaced."""

    def refuse(source, target):
        raise PermissionError(13, "Access is denied")

    monkeypatch.setattr(loader_module.os, "replace", refuse)
    assert make(package, Compiler()).find("sm_100", VARIANT).code.startswith(b"code of")
    assert list((package.folder.parent / "cache").iterdir()) == []


def test_no_home_folder_means_no_cache(package):
    loader = make(package, Compiler(), cache=None)
    assert any("the user has no home folder; set SPARGE_CACHE_DIR" in reason for reason in refusals(loader, "sm_100"))
    loader.kernel(FakeDriver("sm_100"), 0, VARIANT, "toy_one")


WRITER = """
import sys, types
from pathlib import Path
package = types.ModuleType("sparge_kernels")
package.__path__ = [sys.argv[1]]
sys.modules["sparge_kernels"] = package  # its modules, without what its __init__ imports
from sparge_kernels.cuda import loader
file, reasons = Path(sys.argv[2]), []
for _ in range(60):
    loader._write_cached(file, b"content" * 3000, reasons)
    assert loader._read_cached(file, reasons) == b"content" * 3000
assert not reasons, reasons
"""


def test_concurrent_writers_never_show_half_a_file(tmp_path):
    file = tmp_path / "cache" / "toy.cubin"
    kernels = Path(loader_module.__file__).parents[1]
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(kernels), str(file)]) for _ in range(3)]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    assert [p.name for p in file.parent.iterdir()] == ["toy.cubin"]


def test_the_first_compiler_that_can_is_taken_and_each_refusal_is_kept(package):
    first, second = Compiler("11.8", fault="NVRTC 11.8 cannot compile for sm_100"), Compiler("12.9")
    loader = make(package, "/torch/lib/libnvrtc.so.12 could not be loaded: wrong ELF class", first, second)
    assert loader.kernel(FakeDriver("sm_100"), 0, VARIANT, "toy_one").origin == "toy, compiled by NVRTC 12.9 for sm_100"
    reasons = refusals(loader, "sm_100")
    assert "/torch/lib/libnvrtc.so.12 could not be loaded: wrong ELF class" in reasons and first.fault in reasons


@pytest.mark.parametrize("device, target", [("sm_103", "sm_100"), ("sm_121", "sm_120"), ("sm_120", "sm_120")])
def test_an_older_compiler_compiles_for_a_lower_arch(package, device, target):
    compiler = Compiler(archs=("sm_90", "sm_100", "sm_120"))
    assert make(package, compiler).find(device, VARIANT).origin == f"compiled by NVRTC 12.8 for {target}"
    assert make(package, compiler).find(target, VARIANT).origin == f"cached, compiled by NVRTC 12.8 for {target}"


def test_when_everything_fails_every_reason_is_told(package):
    package.add("sm_86")
    with pytest.raises(NoBinary) as raised:
        make(package, "libnvrtc.so.12 could not be loaded: broken").find("sm_100", VARIANT)
    assert raised.value.reasons == (
        "no packaged binary runs on sm_100 (there are some for sm_86)",
        "libnvrtc.so.12 could not be loaded: broken",
        "there is no NVRTC to compile one; install a torch built for CUDA, which brings it, or the package nvidia-cuda-nvrtc",
    )
    assert str(raised.value) == "no binary of toy for sm_100: " + "; ".join(raised.value.reasons)
    with pytest.raises(NoBinary, match="cannot compile for sm_110"):
        make(package, Compiler()).find("sm_110", VARIANT)


# ---- kernels -------------------------------------------------------------------------------------------------------------------------------------


def test_kernels_are_loaded_once_per_device_and_variant(package):
    package.add("sm_86"), package.add("sm_86", OTHER)
    loader, driver = make(package), FakeDriver()
    kernels = [loader.kernel(driver, device, VARIANT, symbol) for device in (0, 1) for symbol in ("toy_one", "toy_two") for _ in range(2)]
    assert len(driver.loads) == 2 and len({id(k) for k in kernels}) == 4
    assert [k.name for k in kernels[::2]] == ["toy_one", "toy_two"] * 2 and {k.origin for k in kernels} == {"toy, packaged for sm_86"}
    assert loader.kernel(driver, 0, OTHER, "toy_one") not in kernels and len(driver.loads) == 3
    assert refusals(loader, "sm_86") == ()


def test_a_binary_that_the_driver_refuses_gives_way_to_the_next(package):
    package.add("sm_80"), package.add("sm_86")
    loader, driver = make(package, Compiler()), FakeDriver("sm_87", refuses=(b"for sm_86", b"for sm_80"))
    assert loader.kernel(driver, 0, VARIANT, "toy_one").origin == "toy, compiled by NVRTC 12.8 for sm_87"
    with pytest.raises(NoBinary) as raised:
        make(package).kernel(driver, 0, VARIANT, "toy_one")
    assert raised.value.reasons[:2] == tuple(
        f"the driver refused the binary packaged for {arch} (CUDA_ERROR_NO_BINARY_FOR_GPU)" for arch in ("sm_86", "sm_80")
    )


def test_a_refusal_is_remembered(package):
    package.add("sm_86")
    loader, driver = make(package), FakeDriver(refuses=(b"toy",))
    for _ in range(3):
        with pytest.raises(NoBinary, match=r"the driver refused the binary packaged for sm_86 \(CUDA_ERROR_NO_BINARY_FOR_GPU\); there is no"):
            loader.kernel(driver, 0, VARIANT, "toy_one")
    assert len(driver.loads) == 1


def test_an_old_driver_is_the_only_reason(package):
    package.add("sm_86")
    driver = FakeDriver(old="an NVIDIA driver for CUDA 12.0 or newer is needed")
    with pytest.raises(NoBinary) as raised:
        make(package).kernel(driver, 0, VARIANT, "toy_one")
    assert raised.value.reasons == (driver.old,) and driver.loads == []


@pytest.mark.parametrize(
    "fault", [torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")], ids=["memory", "fault"]
)
def test_what_is_not_about_the_binary_passes_and_is_not_remembered(package, fault):
    package.add("sm_86")
    loader, driver = make(package), FakeDriver(fault=fault)
    with pytest.raises(type(fault)) as raised:
        loader.kernel(driver, 0, VARIANT, "toy_one")
    assert raised.value is fault
    driver.fault = None
    assert loader.kernel(driver, 0, VARIANT, "toy_one").name == "toy_one"


def test_threads_load_once(package):
    package.add("sm_86")
    loader, driver, found = make(package), FakeDriver(), []
    threads = [threading.Thread(target=lambda: found.append(loader.kernel(driver, 0, VARIANT, "toy_one"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(driver.loads) == 1 and len(found) == 8 and len({id(k) for k in found}) == 1


def test_tables_are_bounded(package, monkeypatch):
    package.add("sm_86")
    monkeypatch.setattr(loader_module, "LIMIT", 6)
    loader, driver = make(package), FakeDriver()
    for device in range(10):
        loader.kernel(driver, device, VARIANT, "toy_one")
    assert len(loader._kernels) == 6 and len(driver.loads) == 10
    assert loader.kernel(driver, 9, VARIANT, "toy_two").device == 9 and len(driver.loads) == 10
    assert loader.kernel(driver, 0, VARIANT, "toy_one").device == 0 and len(driver.loads) == 11


# ---- the loader of this process ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def process(package, monkeypatch):
    """The default loader over the test's package, and the driver that it gets."""
    loader_module.default.cache_clear()
    monkeypatch.setattr(loader_module, "FOLDER", package.folder)
    monkeypatch.setenv("SPARGE_CACHE_DIR", str(package.folder.parent / "cache"))
    compilers = []
    monkeypatch.setattr(loader_module, "_compilers", lambda: iter(compilers))

    def use(driver, *given):
        compilers[:] = given
        monkeypatch.setattr(driver_module, "driver", lambda: driver)

    yield use
    loader_module.default.cache_clear()


def test_why_not_loads_everything_or_tells(process, package):
    package.add("sm_86"), package.add("sm_86", OTHER)
    driver = FakeDriver()
    process(driver)
    assert loader_module.why_not(0, (VARIANT, OTHER)) is None and len(driver.loads) == 2
    assert loader_module.kernel(0, OTHER, "toy_one").name == "toy_one" and len(driver.loads) == 2
    assert loader_module.default().find("sm_86", OTHER).code == b"other for sm_86"


def test_why_not_without_a_driver_or_a_binary(process, package):
    process("no NVIDIA driver: libcuda.so.1 could not be loaded")
    assert loader_module.why_not(0, (VARIANT,)) == "no binary of toy for device 0: no NVIDIA driver: libcuda.so.1 could not be loaded"
    process(FakeDriver("sm_100"))
    assert "there is no NVRTC" in loader_module.why_not(1, (VARIANT,))


def test_cache_folder_of_the_default_loader(process, package):
    process(FakeDriver("sm_100"), Compiler())
    assert loader_module.why_not(0, (VARIANT,)) is None
    assert len(list((package.folder.parent / "cache").iterdir())) == 1


# ---- where NVRTC lies ----------------------------------------------------------------------------------------------------------------------------


def lay(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def found(folder: Path, platform: str) -> list[str]:
    return [f.relative_to(folder).as_posix() for f in nvrtc.library_files((folder,), platform)]


def test_libraries_on_linux(tmp_path):
    lay(tmp_path, "torch/lib/libnvrtc-1a2b3c4d.so.12", "torch/lib/libnvrtc-builtins.so.12.4", "torch/lib/libtorch.so")
    lay(tmp_path / "nvidia" / "cuda_nvrtc" / "lib", "libnvrtc.so.12", "libnvrtc.alt.so.12", "libnvrtc-builtins.so.12.8")
    lay(tmp_path / "nvidia" / "cu13" / "lib", "libnvrtc.so.13", "libnvrtc-builtins.so.13.0")
    lay(tmp_path / "nvidia" / "cudnn" / "lib", "libcudnn.so.9")
    assert found(tmp_path, "linux") == ["torch/lib/libnvrtc-1a2b3c4d.so.12", "nvidia/cu13/lib/libnvrtc.so.13", "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"]


def test_libraries_on_windows(tmp_path):
    lay(tmp_path / "torch" / "lib", "nvrtc64_120_0.dll", "nvrtc64_120_0.alt.dll", "nvrtc-builtins64_128.dll", "nvrtc64_130_0.dll")
    lay(tmp_path / "nvidia" / "cuda_nvrtc" / "bin", "nvrtc64_120_0.dll")
    lay(tmp_path / "nvidia" / "cu13" / "bin" / "x86_64", "nvrtc64_130_0.dll", "nvrtc-builtins64_130.dll")
    assert found(tmp_path, "win32") == [
        "torch/lib/nvrtc64_130_0.dll",
        "torch/lib/nvrtc64_120_0.dll",
        "nvidia/cuda_nvrtc/bin/nvrtc64_120_0.dll",
        "nvidia/cu13/bin/x86_64/nvrtc64_130_0.dll",
    ]
    assert set(nvrtc.plain_names("win32")) == {"nvrtc64_130_0.dll", "nvrtc64_120_0.dll"}


class Nvrtc:
    """Stands in for the library: version 12.8, architectures 80 and 90."""

    def __init__(self, status=0):
        self.status = status
        self.nvrtcGetErrorString = type("Function", (), {"__call__": lambda self, status: b"NVRTC_ERROR_OF_THE_TEST"})()

    def nvrtcVersion(self, major, minor):
        major._obj.value, minor._obj.value = 12, 8
        return self.status

    def nvrtcGetNumSupportedArchs(self, count):
        count._obj.value = 2
        return 0

    def nvrtcGetSupportedArchs(self, numbers):
        numbers[0], numbers[1] = 80, 90
        return 0


def test_the_companion_is_loaded_before_the_first_compilation(tmp_path):
    lay(tmp_path, "libnvrtc.so.12", "libnvrtc-builtins.so.12.8", "libnvrtc-builtins.alt.so.12.8")
    loaded = []

    def load(path):
        loaded.append(PurePosixPath(path).name)
        return Nvrtc()

    compiler = nvrtc.open_library(tmp_path / "libnvrtc.so.12", load)
    assert loaded == ["libnvrtc-builtins.so.12.8", "libnvrtc.so.12"] and compiler.version == "12.8" and compiler.archs() == ("sm_80", "sm_90")
    nvrtc.open_library("libnvrtc.so.12", load)
    assert loaded[2:] == ["libnvrtc.so.12"]


def test_compiler_refusals_are_sentences(tmp_path):
    def missing(path):
        raise OSError("no such file")

    with pytest.raises(nvrtc.CompilerError, match=r"libnvrtc.so.12 could not be loaded: no such file"):
        nvrtc.open_library("libnvrtc.so.12", missing)
    with pytest.raises(nvrtc.CompilerError, match=r"nvrtcVersion of lib failed: NVRTC_ERROR_OF_THE_TEST"):
        nvrtc.open_library("lib", lambda _: Nvrtc(5))
    lay(tmp_path, "toy.cuh")
    for arch in ("sm_103", "sm_100a"):
        with pytest.raises(nvrtc.CompilerError, match=rf"NVRTC 12.8 \(lib\) cannot compile for {arch}; install a torch built for a newer CUDA"):
            nvrtc.open_library("lib", lambda _: Nvrtc()).compile(nvrtc.program("toy.cuh", arch, (), tmp_path))


class Willing(Nvrtc):
    """Compiles everything, and says `log`."""

    def __init__(self, log=""):
        super().__init__()
        self.options, self.alive = [], 0
        self.texts = {"ProgramLog": log.encode() + b"\0", "CUBIN": b"a binary\0\0", "PTX": b"a text\0"}

    def __getattr__(self, name):
        what = name.removeprefix("nvrtcGet")
        if what.removesuffix("Size") not in self.texts:
            raise AttributeError(name)
        text = self.texts[what.removesuffix("Size")]

        def size(handle, out):
            out._obj.value = len(text)
            return 0

        def copy(handle, data):
            data[: len(text)] = text
            return 0

        return size if what.endswith("Size") else copy

    def nvrtcCreateProgram(self, handle, *rest):
        self.alive += 1
        return 0

    def nvrtcCompileProgram(self, handle, count, options):
        self.options += [option.decode() for option in options]
        return 0

    def nvrtcDestroyProgram(self, handle):
        self.alive -= 1
        return 0


@pytest.mark.parametrize("log", ["", "line one\nptxas info : (C7510) line two"], ids=["silent", "talks"])
def test_what_a_successful_compilation_says_is_kept(tmp_path, log):
    lay(tmp_path, "toy.cuh")
    library = Willing(log)
    compiled = nvrtc.open_library("lib", lambda _: library).compile(nvrtc.program("toy.cuh", "sm_90a", (), tmp_path))
    assert compiled == nvrtc.Compiled(b"a binary\0\0", log) and library.alive == 0
    assert cubins.remarks(compiled.log) == (("ptxas info : (C7510) line two",) if log else ())


def test_a_virtual_architecture_gives_text(tmp_path):
    lay(tmp_path, "toy.cuh")
    library = Willing("words")
    compiler = nvrtc.open_library("lib", lambda _: library)
    for arch in ("compute_80", "compute_90a"):
        assert compiler.compile(nvrtc.program("toy.cuh", arch, (), tmp_path)) == nvrtc.Compiled(b"a text", "words")
        assert f"--gpu-architecture={arch}" in library.options
    with pytest.raises(nvrtc.CompilerError, match=r"NVRTC 12.8 \(lib\) cannot compile for compute_103; install a torch built for a newer CUDA"):
        compiler.compile(nvrtc.program("toy.cuh", "compute_103", (), tmp_path))


def test_search_goes_through_torchs_folder_then_the_systems_names(monkeypatch, tmp_path):
    lay(tmp_path, "torch/__init__.py", "torch/lib/libnvrtc.so.12")
    asked = []

    def opened(path, load=None):
        asked.append(path)
        if path == "libnvrtc.so.13":
            return "a compiler"
        raise nvrtc.CompilerError(f"{path} could not be loaded")

    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(loader_module.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(nvrtc, "open_library", opened)
    monkeypatch.setattr(nvrtc, "library_files", lambda folders, plain=nvrtc.library_files: plain(folders, "linux"))
    monkeypatch.setattr(nvrtc, "plain_names", lambda plain=nvrtc.plain_names: plain("linux"))
    library = tmp_path / "torch" / "lib" / "libnvrtc.so.12"
    assert list(loader_module._compilers()) == [f"{library} could not be loaded", "a compiler"]
    assert asked == [library, *nvrtc.plain_names()]


# ---- environment variables -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "platform, variables, expected",
    [
        ("linux", {}, "{home}/.cache/sparge_kernels"),
        ("linux", {"XDG_CACHE_HOME": "/elsewhere"}, "/elsewhere/sparge_kernels"),
        ("darwin", {}, "{home}/Library/Caches/sparge_kernels"),
        ("win32", {"LOCALAPPDATA": "/users/me/AppData/Local"}, "/users/me/AppData/Local/sparge_kernels"),
        ("win32", {}, "{home}/AppData/Local/sparge_kernels"),
        ("linux", {"SPARGE_CACHE_DIR": "/mine"}, "/mine"),
        ("win32", {"SPARGE_CACHE_DIR": "~/mine", "LOCALAPPDATA": "/users"}, "{home}/mine"),
    ],
)
def test_cache_dir(monkeypatch, tmp_path, platform, variables, expected):
    for name in ("SPARGE_CACHE_DIR", "LOCALAPPDATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.cache_dir(platform) == Path(expected.format(home=tmp_path))


def test_cache_dir_without_a_home(monkeypatch):
    for name in ("SPARGE_CACHE_DIR", "LOCALAPPDATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(environment.Path, "home", homeless)
    assert [environment.cache_dir(platform) for platform in ("linux", "darwin", "win32")] == [None] * 3


def test_pv(monkeypatch):
    monkeypatch.delenv("SPARGE_PV", raising=False)
    assert environment.pv() is None
    for value in ("int8", "fp8", "fp16"):
        monkeypatch.setenv("SPARGE_PV", value)
        assert environment.pv() == value
    monkeypatch.setenv("SPARGE_PV", "FP8")
    with pytest.raises(ValueError, match="SPARGE_PV must be one of int8, fp8, fp16, got 'FP8'; correct it or unset it"):
        environment.pv()


def test_environment_variables_live_in_one_module():
    folder = Path(environment.__file__).parent
    users = {p.relative_to(folder).as_posix() for p in folder.rglob("*.py") if re.search(r"os\.(environ|getenv)", p.read_text(encoding="utf-8"))}
    assert users == {"environment.py"}
    assert set(re.findall(r'"(SPARGE_\w+)"', Path(environment.__file__).read_text(encoding="utf-8"))) == {
        "SPARGE_CACHE_DIR",
        "SPARGE_LOG",
        "SPARGE_PV",
    }
