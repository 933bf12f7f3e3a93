"""What is installed: one wheel for every platform that holds the device code, and a source distribution that gives the same wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str, cwd: Path, **variables: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The files that git knows (and those it would add), elsewhere: building leaves traces beside its sources."""
    folder = tmp_path_factory.mktemp("tree")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def device_files() -> set[str]:
    folder = ROOT / "kernels" / "cuda"
    files = [*folder.glob("src/*.cuh"), *folder.glob("cubins/*/*.cubin.z"), folder / "manifest.json"]
    return {f.relative_to(ROOT / "kernels").as_posix() for f in files}


def python_files() -> set[str]:
    return {p.relative_to(ROOT / "kernels").as_posix() for p in (ROOT / "kernels").rglob("*.py")}


def build_wheel(source: Path, out: Path) -> Path:
    run(sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), cwd=out.parent)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return build_wheel(tree, tmp_path_factory.mktemp("wheel") / "out")


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {n: archive.read(n) for n in archive.namelist() if ".dist-info/" not in n}


def test_one_wheel_serves_every_platform_and_python(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_holds_the_package_and_all_the_device_code(wheel):
    names = set(contents(wheel))
    assert names == {f"sparge_kernels/{name}" for name in python_files() | device_files()}
    assert {"sparge_kernels/cuda/src/prim.cuh", "sparge_kernels/cuda/src/layout.cuh", "sparge_kernels/cuda/loader.py"} <= names
    assert wheel.stat().st_size < 5_000_000


def test_source_distribution_gives_the_same_wheel(tree, wheel, tmp_path):
    code = f"import setuptools.build_meta as b; print(b.build_sdist({str(tmp_path)!r}))"
    name = run(sys.executable, "-c", code, cwd=tree).splitlines()[-1]
    with tarfile.open(tmp_path / name) as archive:
        archive.extractall(tmp_path, filter="data")
    assert contents(build_wheel(tmp_path / name.removesuffix(".tar.gz"), tmp_path / "out")) == contents(wheel)


USE = """
import sparge_kernels, sys
from sparge_kernels import config
from sparge_kernels.cuda import loader
from pathlib import Path
assert Path(sparge_kernels.__file__).is_relative_to(sys.argv[1]), sparge_kernels.__file__
for arch in ("sm_87", "sm_103", "sm_121"):
    for variant in config.packaged(arch):
        binary = loader.default().find(arch, variant)
        assert binary.code.startswith(b"\\x7fELF"), binary
        print(binary.origin)
"""


def test_an_installed_wheel_finds_its_binaries(wheel, tmp_path):
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(tmp_path / "site"), str(wheel), cwd=tmp_path)
    said = run(sys.executable, "-c", USE, str(tmp_path), cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"), SPARGE_CACHE_DIR=str(tmp_path / "cache"))
    assert set(said.splitlines()) == {"packaged for sm_86", "packaged for sm_100", "packaged for sm_120"} and not (tmp_path / "cache").exists()


def test_a_clone_finds_its_binaries_under_any_name(tree, tmp_path):
    """As ComfyUI holds it: the folder as it is, imported under a name of its own."""
    (tmp_path / "some_name").symlink_to(tree / "kernels", target_is_directory=True)
    said = run(
        sys.executable, "-c", USE.replace("sparge_kernels", "some_name"), str(tmp_path), cwd=tmp_path, SPARGE_CACHE_DIR=str(tmp_path / "cache")
    )
    assert set(said.splitlines()) == {"packaged for sm_86", "packaged for sm_100", "packaged for sm_120"}
