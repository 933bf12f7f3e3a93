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
        ("source-dir=", None, "folder of the device sources (kernels/cuda/src)"),
        ("out-dir=", None, "folder for manifest.json and cubins/ (kernels/cuda)"),
    ]
    boolean_options = ["nvcc"]

    def initialize_options(self):
        self.arch = self.source_dir = self.out_dir = None
        self.nvcc = False

    def finalize_options(self):
        self.archs = tuple(a.strip() for a in self.arch.split(",")) if self.arch else None

    def run(self):
        # The package without its __init__, which imports torch: what builds the binaries needs no more than the standard library.
        package = types.ModuleType("sparge_kernels")
        package.__path__ = [str(ROOT / "kernels")]
        sys.modules["sparge_kernels"] = package
        build = importlib.import_module("sparge_kernels.cuda.build")
        given = {"archs": self.archs, "sources": self.source_dir and Path(self.source_dir), "folder": self.out_dir and Path(self.out_dir)}
        try:
            manifest = build.build(work=ROOT / "build" / "cubins", nvcc=bool(self.nvcc), **{k: v for k, v in given.items() if v})
        except build.BuildError as error:
            sys.exit(str(error))
        for arch, entries in manifest["cubins"].items():
            print(f"{arch}: {len(entries)} binaries")


setup(
    package_dir={"sparge_kernels": "kernels"},
    packages=["sparge_kernels", "sparge_kernels.backends", "sparge_kernels.cuda"],
    package_data={"sparge_kernels.cuda": ["manifest.json", "src/*.cuh", "cubins/*/*.cubin.z"]},
    cmdclass={"cubins": Cubins},
)
