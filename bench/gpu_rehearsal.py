"""An emulated H200 for bench_gpu.py: the steps are the real ones and so are the kernels, on the CPU (tools/emulator), with tiny calls and a clock
that counts launches; and the accidents that a GPU may have, put into the steps that are named."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bench
import bench_ceilings
import bench_check
import bench_hopper
import bench_host
import bench_peers
import bench_report
import bench_shapes
import bench_timing
import gpu_carry
import gpu_steps
import torch
from sparge_kernels import config
from sparge_kernels.backends import cuda as backend
from sparge_kernels.cuda import driver

CPU = torch.device("cpu")
LAUNCH_MS, ATTENTION_MS, DENSE_MS = 1.0, 8.0, 100.0
ACCIDENTS = ("hang", "crash", "fault", "memory", "wrong")
LABELS = ("usual", "usual again")


def accidents(spec: str) -> dict[str, str]:
    """Step -> what happens in it, of "speed Mochi 22k=hang,2^31=memory"."""
    found = dict(part.rpartition("=")[::2] for part in spec.split(",") if part)
    unknown = [what for what in found.values() if what not in ACCIDENTS]
    if unknown:
        sys.exit(f"--rehearse takes STEP=WHAT with WHAT one of {', '.join(ACCIDENTS)}, got {', '.join(unknown)}")
    return found


def inject(spec: str, step: str) -> None:
    """Has the accident of this step, if one is put into it."""
    what = accidents(spec).get(step)
    if what == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:  # as a kernel that waits for what never comes
            time.sleep(1)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "fault":
        raise RuntimeError("cuLaunchKernel (sparge_select) failed: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered")
    if what == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB")
    if what == "wrong":
        right = bench_check.nasty
        bench_check.nasty = lambda *given: (replace(check, error=2.0) for check in right(*given))


class Event:
    """An event of a device whose time is what its launches add up to."""

    def __init__(self, now: list[float]):
        self.now, self.at = now, 0.0

    def record(self) -> None:
        self.at = self.now[0]

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: Event) -> float:
        return later.at - self.at


class Emulated(bench_host.StubMachine):
    """A Hopper GPU of two multiprocessors that runs on the CPU."""

    def __init__(self, now: list[float], arch: str = "sm_90", pv: str = "fp8"):
        super().__init__(arch, pv)
        self.processors, self.now, self.index = 2, now, 0

    def kernel(self, variant, symbol):
        return SimpleNamespace(variant=variant, name=symbol, origin=f"{variant.name}, emulated")

    def launch(self, kernel, grid, threads, shared, params, stream):
        import emulator

        emulator.library(kernel.variant).launch(kernel.name, grid, params, shared=shared, threads=threads, seed=2)
        self.now[0] += ATTENTION_MS if "attention" in kernel.name else LAUNCH_MS


class Shelf(gpu_carry.Shelf):
    """Hands over the variant itself: the emulated driver needs no binary."""

    def code(self, variant):
        return (variant, "emulated") if self.name == "ptx" or bench_hopper.KERNEL in variant.symbols else None


def _refuse(reason: str) -> None:
    raise RuntimeError(reason)


def _dense(now: list[float]) -> Callable:
    def contender(inputs):
        def run():
            now[0] += DENSE_MS
            return torch.nn.functional.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v)

        return bench_peers.Contender("sdpa flash", run)

    return contender


@contextlib.contextmanager
def pretended() -> Iterator[Callable]:
    """Inside, everything that a step asks of a GPU is answered by an emulated one; gives what stands in for gpu_steps.here."""
    sys.path.append(str(bench_report.ROOT / "tools" / "emulator"))
    import samples

    now = [0.0]
    clock = bench_timing.Clock(lambda: Event(now), lambda: None)
    machine = Emulated(now)
    about = {"gpu": "Emulated H200", "multiprocessors": 2, "capability": "9.0", "memory_gib": 1.0, "driver_cuda": 13.0, "nvidia_smi": {},
             "host": "this one", "python": "3", "torch": str(torch.__version__), "torch_cuda": "none", "commit": bench_report.commit()}  # fmt: skip
    small = {shape: replace(shape, s_q=300, s_k=300, heads=1) for shape in (*bench_shapes.HEADLINE, *gpu_steps.COMPARED)}
    usual = {dim: config.HOPPER_CONFIG[dim] for dim in config.DIMS}
    ceilings = {file: samples.Source(Path(file).stem, str(bench_ceilings.HERE / file)) for file in (bench_ceilings.PORTABLE, bench_ceilings.HOPPER)}
    without = lambda *given: _refuse("there is nothing to time on an emulated GPU")  # noqa: E731
    load = lambda code, index, symbols, origin: {s: SimpleNamespace(variant=code, name=s, origin=origin) for s in symbols}  # noqa: E731
    changes = {
        backend: dict(machine_of=lambda device: (machine, None), Machine=lambda index, arch, pv: Emulated(now, arch, pv)),
        bench: dict(LEAST_ROUNDS=1, MOST_ROUNDS=1, room=lambda shape, device, needed=None: None),
        bench_ceilings: dict(
            CEILINGS=tuple(replace(ceiling, rounds=2) for ceiling in bench_ceilings.CEILINGS), ROUNDS=1, LAUNCHES=2, region=lambda device: 1 << 16,
            compile_ceilings=lambda arch: ceilings, of_memory=without, of_host=without,
        ),
        bench_check: dict(CASES=(), NASTY=bench_check.NASTY[:12], LONG=(1, 300, 64), BEYOND=bench_shapes.Shape("small", 300, 200, 2, 128)),
        bench_hopper: dict(
            chosen_by_label=lambda short: dict.fromkeys(LABELS, usual), TOPK=(0.5,),
            repeatable=lambda device: bench_check.Check("two runs, values that differ", 0.0, 0.0),
        ),
        bench_peers: dict(BASELINES={"sdpa cudnn": bench_peers.sdpa_cudnn, "sdpa flash": _dense(now)}),
        bench_report: dict(machine=lambda device: about, smi=lambda device: {}),
        bench_shapes: dict(HEADLINE=tuple(small[s] for s in bench_shapes.HEADLINE), AGAINST_PEERS=(), TOPK=(1.0, 0.5)),
        driver: dict(driver=lambda: SimpleNamespace(load=load, version=13000)),
        gpu_carry: dict(Shelf=Shelf, outdated=lambda items: [], packaged=lambda arch, variant: (variant, "emulated"),
                        resources=lambda shelf, dim, chosen: {"registers": 0, "local": 0, "shared": 0}),
        gpu_steps: dict(COMPARED=tuple(small[s] for s in gpu_steps.COMPARED), MODELS={"flux": 5}),
    }  # fmt: skip
    before = [(owner, name, getattr(owner, name)) for owner, names in changes.items() for name in names]
    for owner, names in changes.items():
        for name, value in names.items():
            setattr(owner, name, value)
    try:
        yield lambda keep, bad, limit: gpu_steps.Here(CPU, machine, lambda: clock, keep, bad, ("--rehearse", ""), limit)
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
