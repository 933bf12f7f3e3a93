"""What bench_gpu.py runs beyond the packaged binaries, compiled ahead of it into .gpu: Hopper's candidates, and other architectures' kernels as PTX,
which the driver compiles for the GPU at hand. To a machine that reaches no package registry the same folder brings ComfyUI's Python files and the
commit.

    python bench/bench_gpu.py --carry      makes .gpu for an H200 and lists what such a machine needs, with sizes
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import bench_hopper
import bench_report
import gpu_run
import hopper_candidates
import torch
from sparge_kernels import config
from sparge_kernels.cuda import loader, nvrtc

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))  # what pyproject.toml gives to pytest
import cubins

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".gpu"
WORK = ROOT / "build" / "gpu"
PACKAGES = ("torch", "numpy", "einops", "psutil", "tqdm", "packaging")
"""What Python must have there; the last four for the whole models alone."""


class Missing(RuntimeError):
    """A binary that is not in .gpu, or not of these sources."""


class Wanted(NamedTuple):
    """Something to be compiled: where it goes ("ptx" or "candidates"), for whose device, and what."""

    shelf: str
    arch: str
    variant: config.Variant

    @property
    def program(self) -> nvrtc.Program:
        return nvrtc.program(self.variant.source, self.variant.target(self.arch), self.variant.defines)

    @property
    def key(self) -> str:
        return f"{self.shelf}/{self.arch}/{self.variant.name}"


def wanted(arch: str) -> tuple[Wanted, ...]:
    """Everything that a GPU of `arch` is asked to run beyond what is packaged."""
    found = [Wanted("ptx", a, as_ptx(a, variant)) for a in by_driver(arch) for variant in config.variants(a)]
    if arch == "sm_90":
        chosen = bench_hopper.chosen_by_label(short=True).values()
        every = ((dim, masked, pair) for pair in chosen for dim in config.DIMS for masked in (False, True))
        variants = dict.fromkeys(hopper_candidates.variant(dim, masked, pair[dim]) for dim, masked, pair in every)
        found += [Wanted("candidates", arch, variant) for variant in variants]
    return tuple(found)


def loadable(arch: str) -> tuple[str, ...]:
    """Packaged architectures whose binaries run on `arch`, its own first."""
    return loader.compatible(arch, config.SHIPPED)


def by_driver(arch: str) -> tuple[str, ...]:
    """Packaged architectures whose binaries do not run on `arch`, but whose PTX its driver can compile."""
    return tuple(a for a in config.SHIPPED if config.number(a) < config.number(arch) and a not in loadable(arch) and a != "sm_90")


def as_ptx(arch: str, variant: config.Variant) -> config.Variant:
    """The variant compiled to the PTX of `arch`, not to its binary."""
    return replace(variant, exact=arch.replace("sm_", "compute_"))


# ---- what is there


class Shelf:
    """One kind of binaries for the devices of one architecture."""

    def __init__(self, name: str, arch: str, folder: Path | None = None):
        self.name, self.arch, self.folder = name, arch, folder or FOLDER

    @cached_property
    def entries(self) -> dict[str, dict]:
        return read_manifest(self.folder)

    def code(self, variant: config.Variant) -> tuple[bytes, str] | None:
        """(binary or PTX, where it came from); None for a candidate's shelf that is asked for another kernel.

        Raises
        ------
        Missing
        """
        if self.name == "ptx":
            variant = as_ptx(self.arch, variant)
        elif not any(symbol == bench_hopper.KERNEL for symbol in variant.symbols):
            return None
        item = Wanted(self.name, self.arch, variant)
        entry = self.entries.get(item.key)
        if entry is None or entry["source"] != item.program.digest:
            raise Missing(f"{item.key} is not in {self.folder.name}, or of other sources; run bench_gpu.py --carry where there is a compiler")
        code = zlib.decompress((self.folder / f"{item.key}.z").read_bytes())
        if hashlib.sha256(code).hexdigest() != entry["sha256"]:
            raise Missing(f"{item.key} is damaged; delete {self.folder.name}")
        return code, ("PTX" if self.name == "ptx" else "compiled") + f" for {variant.target(self.arch)} by {entry['compiler']}"

    def remarks(self, variant: config.Variant) -> list[str]:
        """What the compiler had to say about a candidate."""
        return self.entries.get(Wanted(self.name, self.arch, variant).key, {"remarks": []})["remarks"]


def resources(shelf: Shelf, dim: int, chosen: config.HopperConfig) -> dict[str, int]:
    """Registers, spilled bytes and shared memory of a candidate."""
    variant = hopper_candidates.variant(dim, False, chosen)
    code, _ = shelf.code(variant)
    needs = cubins.inspect(code)[bench_hopper.KERNEL]
    return {"registers": needs.registers, "local": needs.local, "shared": variant.shared}


def packaged(arch: str, variant: config.Variant) -> tuple[bytes, str]:
    """The packaged binary of another architecture than the loader would take."""
    entry = json.loads((cubins.FOLDER / "manifest.json").read_text(encoding="utf-8"))["cubins"][arch][variant.name]
    return zlib.decompress((cubins.FOLDER / "cubins" / entry["file"]).read_bytes()), f"packaged for {arch}"


def read_manifest(folder: Path) -> dict[str, dict]:
    file = folder / "manifest.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def outdated(items: tuple[Wanted, ...], folder: Path | None = None) -> list[Wanted]:
    """Those that must be compiled."""
    entries = read_manifest(folder or FOLDER)
    return [item for item in items if entries.get(item.key, {}).get("source") != item.program.digest]


# ---- making it


def make(items: tuple[Wanted, ...], folder: Path | None = None) -> dict:
    """Compiles what is outdated, as many at a time as there are processors.

    Returns
    -------
    dict
        "made", "there": how many; "compiler"; "remarks": item -> the compiler's.
    """
    folder = folder or FOLDER
    todo = outdated(items, folder)
    entries = {item.key: read_manifest(folder).get(item.key) for item in items}
    if todo:
        tool = cubins.nvrtc_tool(compiler())
        name = " ".join(dict(tool.about)[part] for part in ("name", "version"))
        of = {(item.arch, item.variant): item for item in todo}
        archs = tuple(dict.fromkeys(item.arch for item in todo))
        for built in cubins.compile_all(archs, WORK, tool=tool, variants=lambda arch: tuple(v for a, v in of if a == arch), jobs=os.cpu_count()):
            item = of[built.arch, built.variant]
            path = folder / f"{item.key}.z"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(zlib.compress(built.code, 9))
            entries[item.key] = {"source": built.program.digest, "sha256": hashlib.sha256(built.code).hexdigest(), "compiler": name,
                                 "remarks": cubins.remarks(built.log)}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return {"made": len(todo), "there": len(items) - len(todo), "remarks": {key: e["remarks"] for key, e in entries.items() if e["remarks"]}}


def compiler() -> Path | None:
    """The NVRTC that torch carries, where the pinned one is not installed; None: the pinned one."""
    if cubins.pinned_nvrtc() is not None:
        return None
    folders = (Path(torch.__file__).resolve().parents[1], Path(sysconfig.get_path("platlib")))
    found = nvrtc.library_files(folders)
    if not found:
        raise Missing(f"there is no NVRTC here to compile with, and {FOLDER.name} does not hold what is needed; run bench_gpu.py --carry elsewhere")
    return found[0]


def at_once(calls: list[Callable[[], object]]) -> None:
    """Runs calls that wait for the driver beside each other; what one raises is raised."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for _ in pool.map(lambda call: call(), calls):
            pass


# ---- another machine


def point_to_comfyui() -> None:
    """ComfyUI from .gpu, where there is no other."""
    if not os.environ.get("COMFYUI_PATH") and not (ROOT / ".comfyui").is_dir() and (FOLDER / "comfyui").is_dir():
        os.environ["COMFYUI_PATH"] = str(FOLDER / "comfyui")


def copy_comfyui(to: Path) -> None:
    """The Python files of the ComfyUI tree in use: whole models need no more."""
    sys.path.append(str(ROOT / "tools/comfyui"))
    import install

    tree = install.comfyui_tree()
    if not (tree / "comfy").is_dir():
        raise Missing(f"there is no ComfyUI tree in {tree}; run make setup, or name one with COMFYUI_PATH")
    shutil.rmtree(to, ignore_errors=True)
    for path in sorted(tree.rglob("*.py")):
        inside = path.relative_to(tree)
        if inside.parts[0] in ("comfy", "comfy_api", "comfy_execution", "comfy_config", "utils") or len(inside.parts) == 1:
            (to / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to / inside)


def size(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


def tracked() -> list[Path]:
    """The files of the working tree that git does not ignore."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode:
        raise Missing("git does not know this folder, so that nobody can tell what belongs to the working tree; run it in a clone")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def main() -> int:
    """Makes .gpu and lists what another machine needs."""
    try:
        return _main()
    except (Missing, cubins.BuildError) as error:
        print(error)
        return 1


def _main() -> int:
    done = make(wanted("sm_90"))
    print(f"{FOLDER.name}: {done['made']} binaries compiled, {done['there']} were there", flush=True)
    copy_comfyui(FOLDER / "comfyui")
    (FOLDER / "commit").write_text(f"{bench_report.commit()} {gpu_run.sources()}\n", encoding="utf-8")
    rows = [("the working tree (what git tracks, and what it does not ignore)", size(tracked()))]
    rows += [(f"{FOLDER.name}/{name}: {what}", size(list((FOLDER / name).rglob("*")))) for name, what in {
        "candidates": "Hopper's kernel, built in every way", "ptx": "the kernels of sm_80, sm_86 and sm_89 for the driver to compile",
        "comfyui": "ComfyUI's Python files, for the whole models",
    }.items()]  # fmt: skip
    for what, number in (*rows, ("in all", sum(number for _, number in rows))):
        print(f"{number / 2**20:7.2f} MiB  {what}")
    print(f"Packages that Python has there: {', '.join(PACKAGES)}; a driver for CUDA 12.0 or newer. Then: python bench/bench_gpu.py")
    return 0
