"""The steps of bench_gpu.py, each run in a process of its own: `main` runs one and writes what it found.

The first word of a step's name is a function of STEPS, the rest is what it is given.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gpu_run
from gpu_run import ROOT, say


def ensure_package() -> None:
    """Makes `sparge_kernels` importable where it is not installed: from this repository."""
    if importlib.util.find_spec("sparge_kernels") is None:
        folder = ROOT / "kernels"
        spec = importlib.util.spec_from_file_location("sparge_kernels", folder / "__init__.py", submodule_search_locations=[str(folder)])
        module = sys.modules["sparge_kernels"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


ensure_package()

import bench  # noqa: E402
import bench_check  # noqa: E402
import bench_hopper  # noqa: E402
import bench_peers  # noqa: E402
import bench_report  # noqa: E402
import bench_shapes  # noqa: E402
import bench_timing  # noqa: E402
import gpu_carry  # noqa: E402
import gpu_machines  # noqa: E402
import hopper_candidates  # noqa: E402
import sanitize  # noqa: E402
import torch  # noqa: E402
from sparge_kernels import config  # noqa: E402
from sparge_kernels.backends import cuda as backend  # noqa: E402

MODELS = {"wan14b": 65, "flux": 30, "mochi": 40, "hunyuan": 110}
"""Models at full size, and the seconds that one takes on an H200, estimated."""
LAST_SECONDS = 3.0
"""How long before its limit a step says where it stands."""
COMPARED = (*bench_hopper.SHORT, bench_hopper.SHAPES[2])
"""Calls on which Hopper's candidates are timed: both head sizes, and the longest."""
FAULTS = ("CUDA error", "cuLaunchKernel", "cuStreamSynchronize")
"""How PyTorch's and the driver's messages about a broken context begin, or what they name."""


class Refused(RuntimeError):
    """The step has nothing to do here, and why."""


@dataclass
class Here:
    """Where a step runs.

    Attributes
    ----------
    device : torch.device
    machine : backend.Machine
    clock : callable
        () -> bench_timing.Clock.
    keep : callable
        Writes a result so far: what a step has found when it is ended is not lost.
    bad : tuple of str
        Earlier steps that did not end well.
    rehearsal : tuple of str
        Arguments that a process which runs this program again must be given too.
    limit : float
        Seconds that the step has in all.
    """

    device: torch.device
    machine: object
    clock: Callable[[], bench_timing.Clock]
    keep: Callable[[dict], None]
    bad: tuple[str, ...] = ()
    rehearsal: tuple[str, ...] = ()
    limit: float = 60.0


def own(here: Here, pv: str):
    """The machine with P and V held as `pv`."""
    return here.machine if pv == here.machine.pv else backend.Machine(here.machine.index, here.machine.arch, pv)


# ---- the steps


def machine(here: Here, _: str) -> dict:
    """What the machine is and has; from it follows which steps there are."""
    arch = here.machine.arch
    first, others = gpu_carry.loadable(arch)[:1], gpu_carry.loadable(arch)[1:]
    own = [pv for a in first for pv in config.packaged_forms(a)]
    packaged = [*own, *(f"{a} {pv}" for a in others for pv in config.packaged_forms(a))]
    hopper = arch == "sm_90"
    return {
        "machine": bench_report.machine(here.device), "arch": arch, "packaged": packaged,
        "compiled": [pv for pv in config.forms(arch) if pv not in own], "ptx": list(gpu_carry.by_driver(arch)),
        "speed": [shape.name for shape in bench_shapes.HEADLINE], "candidates": list(candidates_of(here)) if hopper else [],
        "peers": [name for name in bench_peers.PACKAGES if importlib.util.find_spec(name) is not None], "models": MODELS,
        "build": bool(gpu_carry.outdated(gpu_carry.wanted(arch))),
    }  # fmt: skip


def alive(here: Here, _: str) -> dict:
    total = torch.ones(4, device=here.device).sum().item()
    return {"sum": total}


def build_step(here: Here, _: str) -> dict:
    """Compiles what the later steps run beyond the packaged binaries."""
    return gpu_carry.make(gpu_carry.wanted(here.machine.arch))


def packaged(here: Here, which: str) -> dict:
    """`pv` or `arch pv`: every packaged kernel of that form that this GPU can load, against the reference; from the package and nowhere else."""
    arch, _, pv = which.rpartition(" ")
    arch = arch or gpu_carry.loadable(here.machine.arch)[0]
    return checked(here, [gpu_machines.Held(here.machine, arch, pv, lambda variant: gpu_carry.packaged(arch, variant), own=True)])


def compiled(here: Here, pv: str) -> dict:
    """The kernels of a form that nothing is packaged for, as the loader has them compiled."""
    return checked(here, [own(here, pv)])


def ptx(here: Here, arch: str) -> dict:
    """The PTX of another architecture's kernels, compiled by this GPU's driver, against the reference."""
    loaded, code = {}, gpu_carry.Shelf("ptx", arch).code
    machines = [gpu_machines.Held(here.machine, arch, pv, code, own=True, kernels=loaded) for pv in config.forms(arch)]
    every = {variant: used for used in machines for variant in gpu_machines.variants_of(used)}
    gpu_carry.at_once([lambda v=v, used=used: used.missing((v,)) for v, used in every.items()])  # a driver compiles one in seconds
    return checked(here, machines)


def checked(here: Here, machines: list) -> dict:
    """Nasty small calls on every machine, and which of its kernels they ran."""
    found = {"checks": [], "kernels": 0, "of": 0, "missing": []}
    for used in machines:
        reason = used.missing(tuple(gpu_machines.variants_of(used)))
        if reason is not None:
            raise RuntimeError(reason)
        watched = gpu_machines.Watched(used)
        with bench_timing.using(watched):
            for check in bench_check.nasty(used.pv, here.device, bench_check.tiles_of(used)):
                found["checks"].append(vars(check))
                if not check.good:
                    say(str(check))
                here.keep(found)
        there = gpu_machines.expected(used.arch, (used.pv,))
        found["kernels"] += len(watched.ran & there)
        found["of"] += len(there)
        found["missing"] += sorted(f"{name}, {symbol}" for name, symbol in there - watched.ran)
        here.keep(found)
    return found


def beyond_32_bits(here: Here, _: str) -> dict:
    """One call whose q passes 2^31 elements: offsets of 32 bits would wrap."""
    shape = bench_check.BEYOND
    reason = bench.room(shape, here.device, bench_check.beyond_bytes(shape))
    if reason is not None:
        raise Refused(reason)
    with bench_timing.using(here.machine):
        return {"checks": [vars(check) for check in bench_check.beyond(here.machine.pv, here.device, shape)]}


def speed(here: Here, call: str) -> dict:
    """A headline call against PyTorch's dense attention."""
    shape = next(shape for shape in bench_shapes.HEADLINE if shape.name == call)
    return measured(here, shape, bench.SHORT)


def measured(here: Here, shape: bench_shapes.Shape, effort: bench.Effort) -> dict:
    found = {"rows": [], "skipped": []}
    reason = bench.room(shape, here.device)
    if reason is not None:
        raise Refused(f"{shape.name}: {reason}")
    reason = bench.measured(found, shape, None, (here.machine,), here.clock(), here.device, effort=effort, flat=True)
    if reason is not None:
        raise torch.OutOfMemoryError(f"{shape.name}: {reason}")
    return found


def candidates_of(here: Here) -> dict[str, bench_hopper.Candidate]:
    """Ways to build Hopper's kernel, by label."""
    fp8 = own(here, "fp8")
    held = gpu_machines.Held(fp8, "sm_90", "fp8", gpu_carry.Shelf("candidates", "sm_90").code, own=False)
    return bench_hopper.candidates(held, short=True)


def candidate(here: Here, label: str) -> dict:
    """One way to build Hopper's kernel: what it needs, and whether it is right."""
    chosen = candidates_of(here)[label]
    reason = chosen.missing(tuple(config.SM90.variant(dim, "fp8", masked) for dim in config.DIMS for masked in (False, True)))
    if reason is not None:
        raise RuntimeError(reason)
    shelf = gpu_carry.Shelf("candidates", "sm_90")
    variants = [hopper_candidates.variant(dim, False, how) for dim, how in chosen.chosen.items()]
    found = {
        "checks": [],
        "resources": {str(dim): gpu_carry.resources(shelf, dim, how) for dim, how in chosen.chosen.items()},
        "remarks": [line for variant in variants for line in shelf.remarks(variant)],
    }
    here.keep(found)
    found["checks"] = [vars(check) for check in bench_hopper.check(chosen, here.device)]
    return found


def candidates(here: Here, _: str) -> dict:
    """Those whose own step ended well, timed in turns, beside the kernel of the other architectures."""
    right = {label: c for label, c in candidates_of(here).items() if f"candidate {label}" not in here.bad}
    machines = {**right, "mma int8": own(here, "int8")}
    found, clock = {"rows": [], "skipped": []}, here.clock()
    for shape in COMPARED:
        for topk in bench_hopper.TOPK:
            rows, skipped = bench_hopper.rows_of(shape, topk, machines, clock, here.device, 5)
            found["rows"] += rows
            found["skipped"] += skipped
            here.keep(found)
    return found


def sanitizer(here: Here, tool: str) -> dict:
    """NVIDIA's compute-sanitizer over a call of every kernel; `probe`: whether it works here at all."""
    path = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    if path is None:
        raise Refused("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    if "sanitizer probe" in here.bad:
        raise Refused("compute-sanitizer does not work here (see its probe)")
    if tool == "probe":
        program = [str(Path(__file__).with_name("sanitizer_probe.py"))]
    else:
        program = [str(Path(__file__).with_name("bench_gpu.py")), "--step", "sanitized", "--result", os.devnull, "--limit", "1e6", *here.rehearsal]
    ours = ["--kernel-name", "kns=sparge_"] if tool in ("memcheck", "synccheck", "racecheck") else []  # initcheck must see what PyTorch writes
    command = [path, "--tool", "memcheck" if tool == "probe" else tool, *ours, "--error-exitcode", "1", sys.executable, *program]
    # Each tensor an allocation of its own, so that an access beyond it is seen.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        running = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
        try:
            status = running.wait(15 if tool == "probe" else here.limit - 12)
        except subprocess.TimeoutExpired:
            running.kill()
            status = None
        log.seek(0)
        output = log.read()
    say(output[-20000:])
    found = sanitize.read(output, status)
    if tool == "probe" and (status != 0 or found["errors"]):
        why = "it did not end in time" if status is None else (found["lines"] or ["it printed nothing"])[-1]
        raise Refused(f"compute-sanitizer does not work on this machine: {why}")
    here.keep(found)
    if status is None and not found["errors"]:
        raise RuntimeError(f"it was not through after {here.limit - 12:.0f} s: {found['calls']} calls without an error")
    return found


def sanitized(here: Here, _: str) -> dict:
    """What compute-sanitizer looks at: every kernel of the form of P and V that is used here, for one input type."""
    wrong = sanitize.run({here.machine.pv: here.machine}, here.device, ("bfloat16",))
    return {"checks": [{"name": f"{name} is finite", "error": 1.0, "bound": 0.0} for name in wrong]}


def peer(here: Here, name: str) -> dict:
    """One other package, on two calls."""
    found = {"rows": [], "skipped": []}
    for shape in bench_shapes.AGAINST_PEERS:
        part = measured(here, shape, bench.against(name))
        found["rows"] += part["rows"]
        found["skipped"] += part["skipped"]
        here.keep(found)
    return found


def model(here: Here, key: str) -> dict:
    """A whole model at full size with random weights."""
    import bench_models

    gpu_carry.point_to_comfyui()
    small = ["--tiny"] if here.device.type == "cpu" else []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model.json"
        try:
            bench_models.main(["--models", key, "--steps", "1", "--topk", ".5,.25", "--out", str(out), *small])
        except SystemExit as error:  # there is no ComfyUI
            raise Refused(str(error)) from error
        if not out.is_file():
            raise RuntimeError("bench_models.py measured nothing; it says why above")
        found = json.loads(out.read_text(encoding="utf-8"))
    reasons = "; ".join(item["reason"] for item in found["skipped"])
    if not found["rows"]:
        raise torch.OutOfMemoryError(reasons) if "did not fit" in reasons else Refused(reasons)
    return found


def ceilings(here: Here, _: str) -> dict:
    """What the hardware allows."""
    import bench_ceilings

    return {"rows": bench_ceilings.measure(here.machine, here.device, here.clock(), keep=lambda rows: here.keep({"rows": rows}))}


STEPS: dict[str, Callable[[Here, str], dict]] = {
    "machine": machine, "alive": alive, "build": build_step, "packaged": packaged, "compiled": compiled, "ptx": ptx,
    "2^31": beyond_32_bits, "speed": speed,
    "candidate": candidate, "candidates": candidates, "sanitizer": sanitizer, "sanitized": sanitized,
    "peer": peer, "model": model, "ceilings": ceilings,
}  # fmt: skip


# ---- one step in this process


def wrong(result: dict) -> str | None:
    """What in a result is wrong; None: nothing."""
    bad = [c for c in result.get("checks", ()) if not c["error"] <= c["bound"]]  # not <=: NaN is wrong
    told = [f"{len(bad)} of {len(result['checks'])} checks failed, the first: {bench_check.Check(**bad[0])}"] if bad else []
    if result.get("missing"):
        told.append(f"these kernels ran in no check: {', '.join(result['missing'])}")
    told += [f"{item['call']}, {item['what']}: {item['reason']}" for item in result.get("skipped", ()) if item["reason"].startswith("WRONG")]
    if result.get("errors"):
        told.append(f"{result['errors']} errors")
    return "; ".join(told) or None


def main(options: argparse.Namespace) -> int:
    """Runs one step, writes {"reason", "result"} to options.result, and ends the process with the status that says how it went."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(1.0, options.limit - LAST_SECONDS))
    # For a supervisor that was itself killed: nobody else would end this process.
    alone = threading.Timer(options.limit + LAST_SECONDS, lambda: os._exit(1))
    alone.daemon = True
    alone.start()
    kept = {"reason": None, "result": None}

    def keep(result: dict) -> None:
        kept["result"] = result
        gpu_run.write(options.result, kept)

    word, _, rest = options.step.partition(" ")
    status = gpu_run.FAILED
    with contextlib.ExitStack() as stack:
        try:
            found = here
            if options.rehearse is not None:
                import gpu_rehearsal

                found = stack.enter_context(gpu_rehearsal.pretended())
                gpu_rehearsal.inject(options.rehearse, options.step)
            result = STEPS[word](found(keep, tuple(json.loads(options.bad)), options.limit), rest)
            keep(result)
            kept["reason"] = wrong(result)
            status = gpu_run.WRONG if kept["reason"] else gpu_run.OK
        except Refused as error:
            status, kept["reason"] = gpu_run.NOT_HERE, str(error)
        except bench.Wrong as error:
            status, kept["reason"] = gpu_run.WRONG, str(error)
        except torch.OutOfMemoryError as error:
            status, kept["reason"] = gpu_run.MEMORY, str(error).strip().split("\n")[0]
        except Exception as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0][:400]
            status, kept["reason"] = gpu_run.FAULT if any(word in text for word in FAULTS) else gpu_run.FAILED, text
        gpu_run.write(options.result, kept)
    code = next((code for code, name in gpu_run.EXITS.items() if name == status), 1)
    sys.stdout.flush()
    sys.stderr.flush()
    if word != "sanitized":  # compute-sanitizer reports when the process ends as others do
        os._exit(code)  # what a broken context would still do on the way out tells nothing and may hang
    return code


def here(keep: Callable[[dict], None], bad: tuple[str, ...], limit: float) -> Here:
    """This process's GPU.

    Raises
    ------
    Refused
    """
    if not torch.cuda.is_available():
        raise Refused("there is no GPU that PyTorch can use")
    device = torch.device("cuda", torch.cuda.current_device())
    found, reason = backend.machine_of(device)
    if found is None:
        raise Refused(reason)
    return Here(device, found, lambda: bench_timing.cuda_clock(device), keep, bad, (), limit)
