"""Fixtures of the tests that execute PTX: the machine, and the kernels one by one."""

from __future__ import annotations

import emulator
import pytest
from executor import PtxMachine, Schedule
from sparge_kernels import config
from sparge_kernels.backends import cuda as backend
from whole_call import guards  # noqa: F401 - a fixture


@pytest.fixture
def machine(guards, monkeypatch):  # noqa: F811
    """machine(arch, pv, ...): the GPU that every device is taken for from then on; arguments as PtxMachine's."""

    def use(*how, **more) -> PtxMachine:
        made = PtxMachine(*how, **more)
        monkeypatch.setattr(backend, "machine_of", lambda device: (made, None))
        return made

    return use


class PtxLibrary:
    """The kernels of one variant: `emulator.Library` as far as tests of single kernels use it."""

    def __init__(self, variant: config.Variant, arch: str):
        self.variant, self.arch = variant, arch

    def launch(self, symbol: str, grid: int, params, *, shared: int = 0, threads: int = config.THREADS, seed: int = 0) -> None:
        used = PtxMachine(self.arch, config.attention_kernels(self.arch)[0].forms[0], Schedule(seed=seed))
        used.launch(used.kernel(self.variant, symbol), grid, threads, shared or self.variant.shared, params, used.stream())


@pytest.fixture
def alone(monkeypatch):
    """alone(arch): from then on a test of tests/emulator launches the kernels' PTX for `arch` where it builds their sources."""

    def use(arch: str) -> None:
        monkeypatch.setattr(emulator, "library", lambda variant: PtxLibrary(variant, arch))

    return use
