"""`python setup.py cubins`: in a copy of the tree, with NVRTC and with nvcc, and without its tools."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import cubins
import pytest
from cubins import BuildError
from sparge_kernels import config

ROOT = Path(__file__).resolve().parents[2]


TWO = ("sm_86", "sm_120")
STAND_IN = 'extern "C" __global__ void __launch_bounds__(256) {name}(int* p) {{ *p = SPARGE_DIM; }}\n'


def command(*arguments: str, cwd: Path, path: str = "") -> subprocess.CompletedProcess:
    """`python setup.py cubins ...` in a copy of the tree, where importing torch is an error."""
    (cwd / "no_torch").mkdir(exist_ok=True)
    (cwd / "no_torch" / "torch.py").write_text("raise SystemExit('the build imports torch')\n")
    env = {**os.environ, "PYTHONPATH": str(cwd / "no_torch"), "PATH": path + os.environ["PATH"], "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, "setup.py", "cubins", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def tree(tool, tmp_path_factory):
    """What the command needs of the repository, with small kernels of the real names and two architectures; built."""
    folder = tmp_path_factory.mktemp("tree")
    (folder / "tools").mkdir()
    for file in ("setup.py", "pyproject.toml", "README.md", "tools/cubins.py"):
        shutil.copy(ROOT / file, folder / file)
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__", "src", "cubins", "manifest.json"))
    text = (folder / "kernels" / "config.py").read_text(encoding="utf-8")
    (folder / "kernels" / "config.py").write_text(text + f"\nSHIPPED = {TWO!r}\n", encoding="utf-8")
    (folder / "kernels" / "cuda" / "src").mkdir()
    for variant in config.variants("sm_120"):
        code = "".join(STAND_IN.format(name=name) for name in variant.symbols)
        (folder / "kernels" / "cuda" / "src" / variant.source).write_text(code)
    done = command(cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_setup_py_cubins_builds_without_torch(tree):
    file = tree / "kernels" / "cuda" / "manifest.json"
    told = json.loads(file.read_text())
    assert {arch: set(entries) for arch, entries in told["cubins"].items()} == {a: {v.name for v in config.packaged(a)} for a in TWO}
    assert told["compiler"] == {"name": "NVRTC", "version": "12.8", "package": f"{cubins.NVRTC_PACKAGE} {cubins.NVRTC_VERSION}"}

    source = tree / "kernels" / "cuda" / "src" / "select.cuh"
    source.write_text(source.read_text().replace("SPARGE_DIM", "SPARGE_DIM + 1"))
    assert command("--arch", "sm_120", cwd=tree).returncode == 0
    again = json.loads(file.read_text())["cubins"]
    changed = {(a, n) for a, entries in told["cubins"].items() for n, e in entries.items() if e != again[a][n]}
    assert changed == {("sm_120", config.select_name(dim)) for dim in config.DIMS}

    assert command("--check", "--arch", "sm_120", cwd=tree).returncode == 0
    before = {path: path.read_bytes() for path in (tree / "kernels").rglob("*") if path.is_file()}
    done = command("--check", cwd=tree)
    assert done.returncode == 1 and {path: path.read_bytes() for path in (tree / "kernels").rglob("*") if path.is_file()} == before
    stale = [f"sm_86/{config.select_name(dim)}.cubin.z" for dim in config.DIMS]
    assert {line.partition(" ")[0] for line in done.stderr.splitlines() if line.startswith("sm_")} == set(stale)

    done = command("--arch", "sm_75", cwd=tree)
    assert done.returncode == 1 and "no binaries are shipped for sm_75; choose from sm_86, sm_120" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for nvcc is a POSIX script")
def test_setup_py_cubins_with_nvcc(tree, tmp_path):
    """nvcc gets the same sources and definitions, and the manifest says that it was nvcc."""
    script = tmp_path / "nvcc"
    script.write_text(f"""#!{sys.executable}
import pathlib, shutil, sys
if "--version" in sys.argv:
    print("Cuda compilation tools, release 13.0, V13.0.48")
else:
    out = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
    with open({str(tmp_path / "commands")!r}, "a") as log:
        print(*sys.argv[1:], file=log)
    shutil.copy(pathlib.Path({str(tree / "build" / "cubins" / "nvrtc")!r}, out.parent.name, out.name), out)
""")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    before = (tree / "kernels" / "cuda" / "manifest.json").read_bytes()
    done = command("--nvcc", "--source-dir", "kernels/cuda/src", "--out-dir", "out", cwd=tree, path=f"{tmp_path}:")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tree / "out" / "manifest.json").read_text())
    assert told["compiler"] == {"name": "nvcc", "version": "13.0"} and (tree / "kernels" / "cuda" / "manifest.json").read_bytes() == before
    lines = [line for line in (tmp_path / "commands").read_text().splitlines() if "sm_120/attention_mma_d64_int8_masked.cubin" in line]
    source = tree / "kernels" / "cuda" / "src"
    assert len(lines) == 1 and lines[0].startswith(
        f"-cubin -std=c++17 --expt-relaxed-constexpr -arch=sm_120 -I {source} -DSPARGE_DIM=64 -DSPARGE_MASKED=1 -DSPARGE_PV=0 "
        f"-x cu {source}/attention_mma.cuh -o "
    )


def test_missing_tools_are_sentences(monkeypatch):
    def nothing(name):
        raise cubins.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cubins.importlib.metadata, "distribution", nothing)
    monkeypatch.setattr(cubins.shutil, "which", lambda _: None)
    with pytest.raises(BuildError, match="nvidia-cuda-nvrtc-cu12 12.8.93 is not installed; run pip install nvidia-cuda-nvrtc-cu12==12.8.93 ninja"):
        cubins.nvrtc_tool()
    with pytest.raises(BuildError, match="there is no nvcc on PATH"):
        cubins.nvcc_tool()
    with pytest.raises(BuildError, match="ninja is not installed; run pip install ninja"):
        cubins._ninja()
    monkeypatch.setattr(cubins.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert cubins._ninja() == ["/usr/bin/ninja"]
