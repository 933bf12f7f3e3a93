"""kernels/cuda/nvrtc.py: where its library lies on each system, what it is asked and what it refuses."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import cubins
import pytest
import torch
from sparge_kernels.cuda import loader as loader_module
from sparge_kernels.cuda import nvrtc


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
