"""What the hardware allows: rates of the units that the kernels lean on, bandwidths, what a launch costs, and the clock that is held meanwhile.

    python bench/bench_ceilings.py

On any NVIDIA GPU from compute capability 8.0 on; each ceiling says where it exists. The kernels (ceilings_sm80.cuh, ceilings_sm90.cuh) are compiled
here, by the first NVRTC that can. Operands are random: zeros draw less power and run at higher clocks.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bench_host
import bench_timing
import torch
from sparge_kernels import config
from sparge_kernels.backends import cuda as backend
from sparge_kernels.cuda import driver, loader, nvrtc
from torch import Tensor

HERE = Path(__file__).resolve().parent
PORTABLE, HOPPER = "ceilings_sm80.cuh", "ceilings_sm90.cuh"
ROUNDS = 10
COPY_BYTES = 2 << 30
REGION = 16 << 20
"""Bytes that copies out of the L2 cache go round in, at most; never more than half of the cache."""
_OPERANDS = 32768  # bytes that the products' kernels read at most
_SHARED_LOAD = 4 * 16384  # of ceiling_load


class CeilingParams(ctypes.Structure):
    """As in ceilings_prim.cuh."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("data", "out", "cycles")] + [
        ("bytes", ctypes.c_int64), ("rounds", ctypes.c_int32), ("copy", ctypes.c_int32),
    ]  # fmt: skip


def _anywhere(arch: str) -> bool:
    return True


def _packs_int8(arch: str) -> bool:
    return config.number(arch) >= 86


def _packs_e4m3(arch: str) -> bool:
    return config.number(arch) >= 89


def _hopper(arch: str) -> bool:
    return arch == "sm_90"


@dataclass(frozen=True)
class Ceiling:
    """A kernel and what it is run with, one CTA on each multiprocessor.

    Attributes
    ----------
    name : str
    symbol : str
        In `file`.
    work : float
        Of one round of one CTA: operations (two for a multiplication and its addition), exponentials, values converted, or bytes.
    unit : str
        Of 10^12 of them in a second.
    operands : str
        "s8", "fp16", "e4m3" or "fp32": what the random data are; "region": what copies read.
    rounds : int
        Of the same work per CTA.
    exists : callable
        arch -> whether this GPU has what is measured.
    file : str
        PORTABLE or HOPPER.
    threads, shared : int
        Of a CTA; bytes.
    copy : int
        Bytes of one bulk copy.
    """

    name: str
    symbol: str
    work: float
    unit: str
    operands: str
    rounds: int = 20_000
    exists: Callable[[str], bool] = _anywhere
    file: str = PORTABLE
    threads: int = 256
    shared: int = 0
    copy: int = 0

    def rate(self, blocks: int, milliseconds: float) -> float:
        """In `unit`."""
        return blocks * self.rounds * self.work / milliseconds / 1e9


def _products(name: str, symbol: str, depth: int, operands: str) -> Ceiling:
    """mma.sync: 8 warps, 4 x 8 products of 16 x 8 x depth each."""
    unit = "TOPS" if operands == "s8" else "TFLOPS"
    return Ceiling(name, symbol, 8 * 32 * 2.0 * 16 * 8 * depth, unit, operands)


def _on_hopper(name: str, symbol: str, unit: str, operands: str) -> Ceiling:
    """wgmma: two warpgroups, four products of 64 x 128 x 32 each."""
    return Ceiling(name, symbol, 2 * 4 * 2.0 * 64 * 128 * 32, unit, operands, 40_000, _hopper, HOPPER, shared=1024 + _OPERANDS)


def _bulk(size: int, rounds: int) -> Ceiling:
    name = f"bulk copies of {size >> 10} KB from L2"
    return Ceiling(name, "ceiling_copy", size, "TB/s", "region", rounds, _hopper, HOPPER, 32, 256 + 8 * size, size)


_RESULTS = 256 * 32.0  # of a round: 32 a thread
CEILINGS = (
    _products("mma s8 x s8", "ceiling_mma_s8s8", 32, "s8"),
    _products("mma u8 x s8", "ceiling_mma_u8s8", 32, "s8"),
    _products("mma fp16", "ceiling_mma_half", 16, "fp16"),
    _products("mma fp16, sums in fp16", "ceiling_mma_half_short", 16, "fp16"),
    _on_hopper("wgmma s8, operands in shared memory", "ceiling_s8", "TOPS", "s8"),
    _on_hopper("wgmma e4m3, one operand in registers", "ceiling_e4m3", "TFLOPS", "e4m3"),
    Ceiling("exponentials", "ceiling_exp2", _RESULTS, "T/s", "fp32"),
    Ceiling("int32 to fp32", "ceiling_to_float", _RESULTS, "T/s", "fp32"),
    Ceiling("fp32 to int8, values", "ceiling_pack_int8", 4 * _RESULTS, "T/s", "fp32", exists=_packs_int8),
    Ceiling("fp32 to e4m3, values", "ceiling_pack_e4m3", 4 * _RESULTS, "T/s", "fp32", exists=_packs_e4m3),
    Ceiling("16-byte copies from L2", "ceiling_load", 16384.0, "TB/s", "region", shared=_SHARED_LOAD),
    _bulk(8192, 40_000),
    _bulk(16384, 20_000),
)
MEMORY, LAUNCH, CALL_ON_HOST, LAUNCH_ON_HOST = "device memory, copy", "an empty launch", "a call on the host", "a launch on the host"
LAUNCHES = 100
"""Empty launches in a row: few enough that all are queued before the first one runs."""


def ceilings_for(arch: str) -> tuple[Ceiling, ...]:
    """Those of CEILINGS that exist on `arch`, in order."""
    return tuple(ceiling for ceiling in CEILINGS if ceiling.exists(arch))


# ---- compiling


def program(file: str, arch: str) -> nvrtc.Program:
    """PORTABLE or HOPPER with what it includes, from this folder or the kernels'."""
    found, names = {}, [file]
    while names:
        name = names.pop(0)
        if name not in found:
            path = HERE / name
            found[name] = (path if path.is_file() else nvrtc.SOURCES / name).read_text(encoding="utf-8")
            names += re.findall(r"^#include <([\w.]+)>", found[name], re.MULTILINE)
    return nvrtc.Program(file, tuple(found.items()), arch, ())


def compile_ceilings(arch: str) -> dict[str, bytes | str]:
    """File -> its binary for `arch` by the first NVRTC that can, or the sentence that tells why there is none."""
    return {file: _compiled(file, arch) for file in dict.fromkeys(ceiling.file for ceiling in ceilings_for(arch))}


def _compiled(file: str, arch: str) -> bytes | str:
    reasons = []
    for compiler in loader.default().places.compilers():
        if isinstance(compiler, str):
            reasons.append(compiler)
            continue
        try:
            target = config.SM90.arch if file == HOPPER else next(iter(loader.compatible(arch, compiler.archs())), arch)
            return compiler.compile(program(file, target)).code
        except nvrtc.CompilerError as error:
            reasons.append(str(error))
    return "; ".join(reasons) or "there is no NVRTC"


# ---- measuring


def measure(
    machine, device: torch.device, clock: bench_timing.Clock, compiled: dict[str, bytes | str] | None = None, keep: Callable = lambda rows: None
) -> list[dict]:
    """A row for every ceiling of this GPU.

    Parameters
    ----------
    machine : backend.Machine
    device : torch.device
    clock : bench_timing.Clock
    compiled : dict, optional
        `compile_ceilings(machine.arch)`.
    keep : callable
        Gets the rows so far after each ceiling.

    Returns
    -------
    list of dict
        {"name", "unit", "rate" in that unit, "per_cycle": of one multiprocessor (bytes, or what the unit counts), "ghz": cycles that a CTA counted
        over the time of its launch, "ms": spread of ROUNDS runs}, None where something has no meaning; of what failed {"name", "reason"}.
    """
    compiled = compile_ceilings(machine.arch) if compiled is None else compiled
    parts = [(ceiling.name, lambda c=ceiling: [of_kernel(c, machine, device, clock, compiled[c.file])]) for ceiling in ceilings_for(machine.arch)]
    parts += [
        (MEMORY, lambda: [of_memory(device, clock)]),
        (LAUNCH, lambda: [of_launches(machine, device, clock, compiled[PORTABLE])]),
        (CALL_ON_HOST, lambda: of_host(machine, device)),
    ]
    found = []
    for name, part in parts:
        try:
            found += part()
        except Exception as error:  # the driver's, PyTorch's or a compiler's: whatever stops one must not stop the others
            found.append({"name": name, "reason": str(error).strip().split("\n")[0] or type(error).__name__})
        keep(found)
    return found


def of_kernel(ceiling: Ceiling, machine, device: torch.device, clock: bench_timing.Clock, code: bytes | str) -> dict:
    """The row of one kernel.

    Raises
    ------
    RuntimeError
        With what the compiler, the driver or the GPU said.
    """
    kernel = _loaded(code, machine, ceiling.symbol)
    operands = data(ceiling.operands, device)
    out, cycles = (torch.zeros(machine.processors, dtype=dtype, device=device) for dtype in (torch.int32, torch.int64))
    params = CeilingParams(operands.data_ptr(), out.data_ptr(), cycles.data_ptr(), operands.numel(), ceiling.rounds, ceiling.copy)
    run = lambda: machine.launch(kernel, machine.processors, ceiling.threads, ceiling.shared, params, machine.stream())  # noqa: E731
    times = bench_timing.alternate(clock, {"": run}, rounds=ROUNDS)[""]
    counted = int(cycles.median())  # of the last run
    ms = bench_timing.spread(times)
    row = {"name": ceiling.name, "unit": ceiling.unit, "rate": ceiling.rate(machine.processors, ms["median"])}
    return {**row, "per_cycle": ceiling.rounds * ceiling.work / counted, "ghz": counted / times[-1] / 1e6, "ms": ms}


def of_memory(device: torch.device, clock: bench_timing.Clock) -> dict:
    """A copy in device memory: bytes read and bytes written."""
    size = min(COPY_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    ms = bench_timing.spread(bench_timing.alternate(clock, {"": lambda: copy.copy_(source)}, rounds=ROUNDS)[""])
    return {"name": MEMORY, "unit": "TB/s", "rate": 2 * size / ms["median"] / 1e9, "per_cycle": None, "ghz": None, "ms": ms}


def of_launches(machine, device: torch.device, clock: bench_timing.Clock, code: bytes | str) -> dict:
    """One of many empty launches in a row, on the device."""
    kernel, params = _loaded(code, machine, "ceiling_empty"), CeilingParams()

    def run() -> None:
        for _ in range(LAUNCHES):
            machine.launch(kernel, 1, 32, 0, params, machine.stream())

    ms = bench_timing.spread(bench_timing.alternate(clock, {"": run}, rounds=ROUNDS)[""])
    return {"name": LAUNCH, "unit": "us", "rate": ms["median"] * 1e3 / LAUNCHES, "per_cycle": None, "ghz": None, "ms": ms}


def of_host(machine, device: torch.device) -> list[dict]:
    """What a call and one launch of it take on the host."""
    cost = bench_host.cost(machine, device)
    named = {CALL_ON_HOST: cost["call_us"], LAUNCH_ON_HOST: cost["launch_us"]}
    return [{"name": name, "unit": "us", "rate": rate, "per_cycle": None, "ghz": None, "ms": None} for name, rate in named.items()]


def data(operands: str, device: torch.device) -> Tensor:
    """Random operands as bytes, the same in every run."""
    generator = torch.Generator(device).manual_seed(0)
    if operands == "fp16":
        return torch.randn(_OPERANDS // 2, generator=generator, device=device).half().view(torch.int8)
    if operands == "e4m3":
        return torch.randn(_OPERANDS, generator=generator, device=device).to(torch.float8_e4m3fn).view(torch.int8)
    if operands == "fp32":
        return torch.rand(_OPERANDS // 4, generator=generator, device=device).view(torch.int8)
    size = region(device) if operands == "region" else _OPERANDS
    return torch.randint(-127, 128, (size,), generator=generator, device=device, dtype=torch.int8)


def region(device: torch.device) -> int:
    """Bytes, whole pieces of every size of copy."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 2 * REGION)
    return max(1, min(REGION, cache // 2) >> 16) << 16


def _loaded(code: bytes | str, machine, symbol: str) -> driver.Kernel:
    """The kernel; each on its own, so that one that a compiler leaves out does not take the others with it."""
    if isinstance(code, str):
        raise nvrtc.CompilerError(code)
    return driver.driver().load(code, machine.index, (symbol,), "compiled for the benchmark")[symbol]


# ---- the report


def table(rows: list[dict]) -> str:
    """The rows as Markdown, and under them what could not be measured."""
    lines = ["| ceiling | rate | a cycle and multiprocessor | GHz | ms |", "|---|---|---|---|---|"]
    for row in (row for row in rows if "reason" not in row):
        ms = row["ms"]["median"] if row["ms"] else None
        cells = [row["name"], f"{row['rate']:.4g} {row['unit']}", *(_number(value) for value in (row["per_cycle"], row["ghz"], ms))]
        lines.append("| " + " | ".join(cells) + " |")
    failed = [f"- not measured: {row['name']}: {row['reason']}" for row in rows if "reason" in row]
    return "\n".join(lines + (["", *failed] if failed else []))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def main() -> int:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    machine, reason = backend.machine_of(device)
    if device.type == "cpu":
        reason = "there is no GPU that PyTorch can use"
    if reason is not None:
        print(f"Nothing was measured, because {reason}.")
        return 0
    print(f"{torch.cuda.get_device_name(device)}, {machine.processors} multiprocessors, {machine.arch}\n")
    print(table(measure(machine, device, bench_timing.cuda_clock(device))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
