"""Installs the folder `kernels/` as the package `sparge_kernels`; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    package_dir={"sparge_kernels": "kernels"},
    packages=["sparge_kernels", "sparge_kernels.backends"],
)
