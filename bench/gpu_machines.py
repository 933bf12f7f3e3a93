"""Machines of the CUDA backend that bench_gpu.py's steps run on: one with binaries other than the loader's own choice, and one that notes what ran;
and what there is to run."""

from __future__ import annotations

from collections.abc import Callable

import gpu_carry
from sparge_kernels import config
from sparge_kernels.cuda import driver


class Held:
    """A machine that runs binaries which somebody hands over; what they do not have, the machine's own loader looks for.

    Parameters
    ----------
    machine : backend.Machine
    arch : str
        Whose kernels these are; the GPU may be another one.
    pv : str
    code : callable
        Variant -> (binary or PTX, where it came from), or None.
    own : bool
        Whether only `code` may serve.
    kernels : dict, optional
        What is loaded, by variant: shared by machines that differ in `pv` alone.
    """

    def __init__(self, machine, arch: str, pv: str, code: Callable, *, own: bool, kernels: dict | None = None):
        self.machine, self.arch, self.pv, self.note = machine, arch, pv, ""
        self._code, self._own, self._kernels = code, own, {} if kernels is None else kernels

    def __getattr__(self, name: str):
        return getattr(self.machine, name)

    def missing(self, variants) -> str | None:
        others = []
        for variant in variants:
            loaded = self._load(variant)
            if isinstance(loaded, Exception):
                return str(loaded)
            if loaded is None:
                others.append(variant)
        if others and self._own:
            return f"there is no binary of {', '.join(v.name for v in others)}"
        return self.machine.missing(tuple(others)) if others else None

    def kernel(self, variant, symbol):
        loaded = self._load(variant)
        if isinstance(loaded, Exception):
            raise loaded
        return self.machine.kernel(variant, symbol) if loaded is None else loaded[symbol]

    def _load(self, variant) -> dict | Exception | None:
        """Its kernels by symbol, why it cannot be had (asked once: a driver needs seconds to refuse a PTX), or None: nobody handed it over."""
        if variant.name not in self._kernels:
            try:
                found = self._code(variant)
                if found is not None:
                    code, origin = found
                    found = driver.driver().load(code, self.machine.index, variant.symbols, f"{variant.name}, {origin}")
            except (gpu_carry.Missing, driver.Refused) as error:
                found = error
            self._kernels[variant.name] = found
        return self._kernels[variant.name]


class Watched:
    """A machine that notes which kernels ran."""

    def __init__(self, machine):
        self.machine, self.ran = machine, set()

    def __getattr__(self, name: str):
        return getattr(self.machine, name)

    def kernel(self, variant, symbol):
        self.ran.add((variant.name, symbol))
        return self.machine.kernel(variant, symbol)


def expected(arch: str, pvs: tuple[str, ...]) -> set[tuple[str, str]]:
    """(variant, kernel) of everything that calls with these forms can launch on `arch`."""
    attention = {config.attention_kernel(arch, pv).variant(dim, pv, masked) for dim in config.DIMS for pv in pvs for masked in (False, True)}
    before = {v for v in config.variants(arch) if not any(s.startswith("sparge_attention") for s in v.symbols)}
    found = {(v.name, symbol) for v in attention | before for symbol in v.symbols}
    persistent = any(config.attention_kernel(arch, pv).persistent for pv in pvs)
    return found if persistent else {(name, symbol) for name, symbol in found if symbol != "sparge_sequence"}


def variants_of(machine) -> list[config.Variant]:
    names = {name for name, _ in expected(machine.arch, (machine.pv,))}
    kernel = config.attention_kernel(machine.arch, machine.pv)
    attention = [kernel.variant(dim, machine.pv, masked) for dim in config.DIMS for masked in (False, True)]
    return [v for v in dict.fromkeys([*config.variants(machine.arch), *attention]) if v.name in names]
