"""Installs the folder `kernels/` as the package `sparge_kernels`; `python setup.py cubins` builds its device binaries.

Everything else is in pyproject.toml.
"""

import importlib
import sys
import types
from pathlib import Path

from setuptools import Command, setup

ROOT = Path(__file__).resolve().parent


class Cubins(Command):
    """Compiles the device code; needs `pip install .[build]`, but neither torch nor a GPU."""

    description = "build the packaged device binaries (kernels/cuda/cubins and manifest.json)"
    user_options = [
        ("arch=", None, "architectures, with commas between them (all that are shipped)"),
        ("nvcc", None, "compile with the nvcc on PATH instead of the pinned NVRTC"),
        ("check", None, "build elsewhere and name the packaged files that differ; nothing is written"),
        ("source-dir=", None, "folder of the device sources (kernels/cuda/src)"),
        ("out-dir=", None, "folder for manifest.json and cubins/ (kernels/cuda)"),
    ]
    boolean_options = ["nvcc", "check"]

    def initialize_options(self):
        self.arch = self.source_dir = self.out_dir = None
        self.nvcc = self.check = False

    def finalize_options(self):
        self.archs = tuple(a.strip() for a in self.arch.split(",")) if self.arch else None

    def run(self):
        # The package without its __init__, which imports torch: what builds the binaries needs no more than the standard library.
        package = types.ModuleType("sparge_kernels")
        package.__path__ = [str(ROOT / "kernels")]
        sys.modules["sparge_kernels"] = package
        sys.path.append(str(ROOT / "tools"))
        cubins = importlib.import_module("cubins")
        given = {"archs": self.archs, "sources": self.source_dir and Path(self.source_dir), "folder": self.out_dir and Path(self.out_dir)}
        given = {"nvcc": bool(self.nvcc), **{name: value for name, value in given.items() if value}}
        try:
            if self.check:
                wrong = cubins.check(**given)
                sys.exit("\n".join(wrong) if wrong else 0)
            manifest = cubins.build(work=ROOT / "build" / "cubins", **given)
        except cubins.BuildError as error:
            sys.exit(str(error))
        for arch, entries in manifest["cubins"].items():
            print(f"{arch}: {len(entries)} binaries")


setup(
    package_dir={"sparge_kernels": "kernels"},
    packages=["sparge_kernels", "sparge_kernels.backends", "sparge_kernels.cuda"],
    package_data={"sparge_kernels.cuda": ["manifest.json", "src/*.cuh", "cubins/*/*.cubin.z"]},
    cmdclass={"cubins": Cubins},
)
