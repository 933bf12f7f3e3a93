"""kernels/cuda/loader.py: what is compiled where nothing is packaged, the compiler that is taken, and the cache of it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from sparge_kernels.cuda import loader as loader_module
from sparge_kernels.cuda.loader import Binary, NoBinary
from toy_package import OTHER, VARIANT, Compiler, FakeDriver, damage, make, refusals


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
