"""The CUDA backend on this machine's GPU: is it right, how fast is it, against PyTorch's dense attention and every peer that is installed.

Run with `make bench`, `make bench SHORT=1` (within a minute) or `make bench ACTIVATIONS=file.safetensors` (q, k, v of shape (B, H, S, D) from a
model). Without a GPU it tells what a call costs on the host. `python bench/bench.py --table results/<gpu>.json` prints an earlier result.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import bench_check
import bench_host
import bench_peers
import bench_report
import bench_shapes
import bench_timing
import torch
from sparge_kernels import config
from sparge_kernels.backends import cuda as backend

RESULTS = Path(__file__).resolve().parent / "results"
LEAST_ROUNDS, MOST_ROUNDS = 5, 40


@dataclass(frozen=True)
class Effort:
    """How much is measured of a call beside PyTorch's dense attention and ours.

    Attributes
    ----------
    dense, sparse : dict
        Peers, as in bench_peers.
    seconds : float
        What the rounds of a call may take together.
    """

    dense: dict
    sparse: dict
    seconds: float


WHOLE = Effort(bench_peers.DENSE, bench_peers.SPARSE, 10)
SHORT = Effort({}, {}, 4)


def against(package: str) -> Effort:
    """Against the peers of one package alone."""
    dense, sparse = ({name: build for name, build in table.items() if bench_peers.PACKAGE_OF[name] == package}
                     for table in (bench_peers.DENSE, bench_peers.SPARSE))  # fmt: skip
    return Effort(dense, sparse, 4)


class Wrong(RuntimeError):
    """A result beyond its bound: no speed of it is told."""


def say(text: str = "") -> None:
    print(text, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 when a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="two shapes, PyTorch only, within a minute")
    parser.add_argument("--activations", type=Path, help="a safetensors file with q, k and v, instead of random data")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--table", type=Path, help="print the table of this JSON, measure nothing")
    options = parser.parse_args(arguments)
    if options.table:
        print(bench_report.table(json.loads(options.table.read_text(encoding="utf-8"))))
        return 0
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    machine, reason = backend.machine_of(device)
    about = bench_report.machine(None if machine is None and device.type == "cpu" else device)
    for name, value in about.items():
        say(f"{name}: {value if not isinstance(value, dict) else ', '.join(f'{k} {v}' for k, v in value.items()) or 'not there'}")
    cost = {"stub": bench_host.cost(bench_host.StubMachine(), torch.device("cpu"))}
    say(f"host, against a stub driver: {bench_host.sentence(cost['stub'])}")
    for line in bench_host.table(cost["stub"]):
        say(line)
    if machine is None:
        why = "there is no GPU that PyTorch can use" if device.type == "cpu" else reason
        say(f"Nothing else was measured, because {why}.")
        return 0
    try:
        return on_gpu(options, device, machine, about, cost)
    except Wrong as error:
        say(f"WRONG: {error}. No speeds are told.")
        return 1


def on_gpu(options, device: torch.device, machine, about: dict, cost: dict) -> int:
    deadline = time.monotonic() + 40 if options.short else None
    pvs = config.forms(machine.arch)
    machines = {p: machine if p == machine.pv else backend.Machine(device.index, machine.arch, p) for p in pvs}
    result = {
        "date": datetime.date.today().isoformat(), "commit": about["commit"], "short": options.short, "machine": about, "host": cost,
        "activations": options.activations.stem if options.activations else None, "binaries": bench_report.binaries(machine, pvs),
        "packages": bench_peers.packages(), "checks": [], "rows": [], "skipped": [],
        "data": f"q, k, v from {options.activations.name}" if options.activations else "normal random data",
    }  # fmt: skip
    for title in ("binaries", "packages"):
        for name, value in result[title].items():
            say(f"{name}: {value}")
    for check in checks(machines, device):
        result["checks"].append({"name": check.name, "error": check.error, "bound": check.bound})
    say(f"{len(result['checks'])} checks passed")
    cost["gpu"] = bench_host.cost(machine, device)
    say(f"host, on this GPU: {bench_host.sentence(cost['gpu'])}")
    clock = bench_timing.cuda_clock(device)
    calls = [from_file(options.activations, device)] if options.activations else [(shape, None) for shape in bench_shapes.shapes(options.short)]
    for shape, inputs in calls:
        reason = room(shape, device) if inputs is None else None
        if reason is None and deadline is not None and time.monotonic() > deadline:
            reason = "the minute of a short run is over"
        if reason is None:
            every = options.activations is not None or shape == bench_shapes.MOCHI
            used = tuple(machines.values()) if every else (machine,)
            effort = SHORT if options.short else WHOLE
            reason = measured(result, shape, inputs, used, clock, device, effort=effort, flat=options.activations is None)
        if reason is not None:
            result["skipped"].append({"call": shape.name, "what": "everything", "reason": reason})
            say(f"{shape.name}: skipped, {reason}")
    about["nvidia_smi_after"] = bench_report.smi(device)
    say(f"afterwards: {', '.join(f'{k} {v}' for k, v in about['nvidia_smi_after'].items())}")
    say(f"written: {bench_report.save(result, options.results)}")
    say()
    print(bench_report.table(result))
    return 0


def checks(machines: dict, device: torch.device) -> list[bench_check.Check]:
    """All checks, of which none failed.

    Raises
    ------
    Wrong
    """
    found = []
    for pv, machine in machines.items():
        with bench_timing.using(machine):
            found += bench_check.small(pv, device, tiles=bench_check.tiles_of(machine))
            found.append(bench_check.long(pv, device))
    for check in found:
        if not check.good or "tokens" in check.name:
            say(f"check: {check}")
    wrong = [check for check in found if not check.good]
    if wrong:
        raise Wrong(f"{len(wrong)} of {len(found)} checks failed")
    return found


def room(shape: bench_shapes.Shape, device: torch.device, needed: int | None = None) -> str | None:
    """None, or that the shape does not fit into this GPU's memory; `needed`: bytes, unless all of what is measured of a shape."""
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    needed = needed or shape.memory()
    return None if needed <= free else f"it needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def from_file(path: Path, device: torch.device) -> tuple[bench_shapes.Shape, bench_peers.Inputs]:
    """The call whose q, k and v a file holds; fp32 becomes bf16, which the baselines need."""
    from safetensors.torch import load_file

    held = load_file(path)
    if not {"q", "k", "v"} <= held.keys():
        raise SystemExit(f"{path} must hold the tensors q, k and v of shape (B, H, S, D), it has {', '.join(sorted(held)) or 'none'}")
    q, k, v = (held[name] if held[name].dtype in (torch.float16, torch.bfloat16) else held[name].bfloat16() for name in "qkv")
    if any(x.dim() != 4 for x in (q, k, v)):
        raise SystemExit(f"q, k and v in {path} must have four dimensions (B, H, S, D), they have {q.dim()}, {k.dim()}, {v.dim()}")
    shape = bench_shapes.Shape(path.stem, q.shape[2], k.shape[2], q.shape[1], q.shape[3], k.shape[1], q.shape[0])
    return shape, bench_peers.Inputs(*(x.to(device).contiguous() for x in (q, k, v)))


def random_inputs(shape: bench_shapes.Shape, device: torch.device) -> bench_peers.Inputs:
    generator = torch.Generator(device).manual_seed(0)
    sizes = ((shape.heads, shape.s_q), (shape.key_heads, shape.s_k), (shape.key_heads, shape.s_k))
    return bench_peers.Inputs(
        *(torch.randn(shape.batch, h, s, shape.dim, generator=generator, device=device, dtype=torch.bfloat16) for h, s in sizes)
    )


def measured(result: dict, shape, inputs, machines: tuple, clock, device: torch.device, *, effort: Effort, flat: bool) -> str | None:
    """Adds the rows of one shape to the result; None, or why there are none.

    Raises
    ------
    Wrong
    """
    started = time.monotonic()
    try:
        rows, skipped = measure(shape, inputs or random_inputs(shape, device), machines, clock, effort=effort, flat=flat)
    except torch.cuda.OutOfMemoryError:
        return "out of memory"
    result["rows"] += rows
    result["skipped"] += skipped
    say(f"{shape.name}: {len(rows)} rows of {rows[0]['ms']['runs']} runs, {time.monotonic() - started:.0f} s")
    return None


def measure(shape: bench_shapes.Shape, inputs: bench_peers.Inputs, machines: tuple, clock: bench_timing.Clock, *, effort: Effort,
            flat: bool) -> tuple[list[dict], list[dict]]:  # fmt: skip
    """(rows, what was left out) of one shape: every contender checked, then all of them in turns, then our calls launch by launch.

    `flat` says that the data are independent normal values, for which the errors have bounds.
    """
    skipped = []
    dense = bench_check.sampled(inputs.q, inputs.k, inputs.v)
    taking_part, errors = {}, {}

    def enter(name: str, topk: float | None, build) -> None:
        """Lets a contender in after one run of it; whatever goes wrong with one that is not ours is the reason why it is left out."""
        try:
            contender = build()
            out = contender.hnd(contender.run())
            error = bench_check.relative_l2(out, dense)
            if topk is None and flat and not error <= bench_check.FLAT_BOUND["fp8"]:
                raise bench_peers.Refused(f"its result is off by {error:.2g} (relative L2)")
        except Exception as problem:
            text = str(problem).strip().split("\n")[0][:200]
            reason = text if isinstance(problem, bench_peers.Refused) else f"{type(problem).__name__}: {text}"
            skipped.append({"call": shape.name, "what": name if topk is None else f"{name}, topk {topk}", "reason": reason})
            return
        taking_part[contender.name, topk], errors[contender.name, topk] = contender, error

    for name, build in (bench_peers.BASELINES | effort.dense).items():
        enter(name, None, lambda build=build: build(inputs))
    own = {}
    for topk in bench_shapes.TOPK:
        for machine in machines:
            contender = bench_peers.ours(inputs, topk, machine)
            key = contender.name, topk
            out = contender.run()
            error = bench_check.relative_l2(out, bench_check.sampled(inputs.q, inputs.k, inputs.v, contender.kept()))
            if flat and not error <= bench_check.flat_bound(machine.pv, out.dtype):
                raise Wrong(f"{shape.name}, {contender.name}, topk {topk}: off by {error:.2g} from attention over the same blocks")
            taking_part[key], errors[key], own[key] = contender, bench_check.relative_l2(out, dense), (machine, error)
        for name, build in effort.sparse.items() if topk < 1 else ():
            enter(name, topk, lambda build=build, topk=topk: build(inputs, topk))

    calls = {key: contender.run for key, contender in taking_part.items()}
    round_ms = sum(bench_timing.once(clock, call) for call in calls.values())
    rounds = bench_timing.rounds_for(round_ms, effort.seconds, LEAST_ROUNDS, MOST_ROUNDS)
    times = bench_timing.alternate(clock, calls, rounds=rounds)
    rows = []
    for key, contender in taking_part.items():
        parts = {"kernels": {}, "outside": None}
        if key in own:
            parts = bench_timing.split(clock, own[key][0], lambda topk=key[1]: bench_peers.whole_call(inputs, topk), rounds=min(rounds, 10))
        ms = bench_timing.spread(times[key])
        base = {name: times[name, None] for name in bench_peers.BASELINES if (name, None) in times}
        row = {
            "call": shape.name, "s_q": shape.s_q, "s_k": shape.s_k, "heads": shape.heads, "kv_heads": shape.key_heads, "dim": shape.dim,
            "batch": shape.batch, "what": contender.name, "topk": contender.topk, "density": contender.density, "note": contender.note, "ms": ms,
            "tflops": shape.flop(contender.density) / ms["median"] / 1e9, "error": errors[key],
            "error_same_blocks": own[key][1] if key in own else None, "kernels": parts["kernels"], "outside": parts["outside"],
            "speedup": {name: statistics.median(b / t for b, t in zip(values, times[key], strict=True)) for name, values in base.items()},
        }  # fmt: skip
        rows.append(row)
    return rows, skipped


if __name__ == "__main__":
    sys.exit(main())
