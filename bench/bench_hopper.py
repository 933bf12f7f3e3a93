"""The first minutes on a Hopper GPU: what the hardware allows, whether Hopper's own attention kernel is right, how fast each way to build it is, and
how fast its peers are.

    python bench/bench_hopper.py                                  everything, about a quarter of an hour
    python bench/bench_hopper.py --short                          one length, the candidates that differ most, no peers
    python bench/bench_hopper.py --only ceilings,checks           some parts of it; the results of others, from an earlier run, stay
    python bench/bench_hopper.py --table results/<gpu>-hopper.json

Kernels are compiled here, by the NVRTC that PyTorch carries. What was found is written after every step: a run that is cut short loses little.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path

import bench
import bench_ceilings
import bench_check
import bench_peers
import bench_report
import bench_shapes
import bench_timing
import hopper_candidates
import sparge_kernels
import torch
from bench import say
from sparge_kernels import config
from sparge_kernels.backends import cuda as backend
from sparge_kernels.cuda import loader

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))  # what pyproject.toml gives to pytest
import cubins

PARTS = ("ceilings", "checks", "candidates", "peers")
SHAPES = tuple(bench_shapes.Shape(f"{tokens:,}, D {dim}", tokens, tokens, 24, dim) for dim in (128, 64) for tokens in (16384, 32768, 119056))
SHORT = tuple(shape for shape in SHAPES if shape.s_q == 32768)
PEERS_AT = tuple(shape for shape in SHAPES if shape.dim == 128 and shape.s_q > 16384)
TOPK = (0.5, 0.25)
ROUNDS = 10
KERNEL = "sparge_attention_sm90"


# ---- candidates


class Candidate:
    """A machine whose Hopper kernel is built as `chosen` says, by head size; everything else is the machine's own."""

    def __init__(self, machine, chosen: dict[int, config.HopperConfig]):
        self.machine, self.chosen, self.shared = machine, chosen, 0

    def __getattr__(self, name: str):
        return getattr(self.machine, name)

    def variant(self, shipped: config.Variant) -> config.Variant:
        """What stands in for a variant."""
        if KERNEL not in shipped.symbols:
            return shipped
        defines = dict(shipped.defines)
        return hopper_candidates.variant(defines["SPARGE_DIM"], bool(defines["SPARGE_MASKED"]), self.chosen[defines["SPARGE_DIM"]])

    def missing(self, variants):
        return self.machine.missing(tuple(self.variant(variant) for variant in variants))

    def kernel(self, variant, symbol):
        used = self.variant(variant)
        if symbol == KERNEL:
            self.shared = used.shared
        return self.machine.kernel(used, symbol)

    def launch(self, kernel, grid, threads, shared, params, stream):
        self.machine.launch(kernel, grid, threads, self.shared if kernel.name == KERNEL else shared, params, stream)


def chosen_by_label(short: bool) -> dict[str, dict[int, config.HopperConfig]]:
    """Ways to build the kernel, each by head size; those of the two go in pairs. A short list leaves out numbers of stages other than the usual."""
    found = {}
    for pair in zip(*(hopper_candidates.candidates(dim) for dim in config.DIMS), strict=True):
        chosen = dict(zip(config.DIMS, pair, strict=True))
        usual = all(c.stages == config.HOPPER_CONFIG[dim].stages or c.tile_blocks == 3 for dim, c in chosen.items())
        if usual or not short:
            found[" / ".join(dict.fromkeys(hopper_candidates.label(c) for c in reversed(pair)))] = chosen
    return found


def candidates(machine, short: bool) -> dict[str, Candidate]:
    """`chosen_by_label` as machines."""
    return {label: Candidate(machine, chosen) for label, chosen in chosen_by_label(short).items()}


def resources(machine, dim: int, chosen: config.HopperConfig) -> dict[str, int]:
    """Registers, spilled bytes and shared memory of a candidate."""
    variant = hopper_candidates.variant(dim, False, chosen)
    needs = cubins.inspect(loader.default().find(machine.arch, variant).code)[KERNEL]
    return {"registers": needs.registers, "local": needs.local, "shared": variant.shared}


def check(machine: Candidate, device: torch.device) -> list[bench_check.Check]:
    """Small calls, a long one, and one twice."""
    with bench_timing.using(machine):
        found = bench_check.small(machine.pv, device, tiles=bench_check.tiles_of(machine, machine.chosen))
        return [*found, bench_check.long(machine.pv, device), repeatable(device)]


def repeatable(device: torch.device) -> bench_check.Check:
    """Values that differ between two runs of one call whose lists differ in length: none may."""
    shape = bench_shapes.Shape("", 5000, 5000, 8, 128)
    q, k, v = vars(bench.random_inputs(shape, device)).values()
    first, second = (bench_check.attend(q, k, v, cdfthreshd=0.5)[0] for _ in range(2))
    return bench_check.Check("two runs, values that differ", float((first != second).sum()), 0.0)


def attention_ms(parts: list) -> float:
    """Of the launches that `bench_timing.Split` saw, those of attention."""
    return sum(start.elapsed_time(end) for name, start, end in parts if name.startswith("sparge_attention"))


def timed(calls: dict, clock: bench_timing.Clock, run, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of the attention kernel on each of the machines `calls`, which take turns in `run()`."""
    times = {label: [] for label in calls}
    for round_ in range(rounds + 1):
        recorded = []
        for label, machine in calls.items():
            recorder = bench_timing.Split(machine, clock)
            clock.before()
            with bench_timing.using(recorder):
                run()
            recorded.append((label, recorder.launches))
        for label, launches in recorded:
            launches[-1][2].synchronize()
            if round_ > 0:
                times[label].append(attention_ms(launches))
    return times


def rows_of(shape: bench_shapes.Shape, topk: float, machines: dict, clock, device: torch.device, rounds: int) -> tuple[list[dict], list[dict]]:
    """(rows, what was left out): every machine's result checked on sampled rows, then all timed in turns."""
    inputs = bench.random_inputs(shape, device)
    taking_part, errors, skipped, density = {}, {}, [], 0.0
    truth = None
    for label, machine in machines.items():
        reason = None
        try:
            contender = bench_peers.ours(inputs, topk, machine)
            out = contender.run()
            if truth is None:  # the selection is the same for all
                truth, density = bench_check.sampled(inputs.q, inputs.k, inputs.v, contender.kept()), contender.density
            errors[label] = bench_check.relative_l2(out, truth)
            bound = bench_check.flat_bound(machine.pv, out.dtype)
            if not errors[label] <= bound:
                reason = f"WRONG: off by {errors[label]:.2g} from attention over the same blocks, at most {bound:.2g} allowed"
        except sparge_kernels.UnsupportedCall as error:
            reason = str(error)
        if reason is None:
            taking_part[label] = machine
        else:
            skipped.append({"call": shape.name, "what": f"{label}, topk {topk}", "reason": reason})
    times = timed(taking_part, clock, lambda: bench_peers.whole_call(inputs, topk), rounds)
    rows = []
    for label in taking_part:
        ms = bench_timing.spread(times[label])
        rows.append({
            "call": shape.name, "tokens": shape.s_q, "heads": shape.heads, "dim": shape.dim, "topk": topk, "density": density, "what": label,
            "ms": ms, "tflops": shape.flop(density) / ms["median"] / 1e9, "error": errors[label],
        })  # fmt: skip
    return rows, skipped


# ---- the program


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 when a kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one length, the candidates that differ most, no peers")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, with commas between them: {', '.join(PARTS)}")
    parser.add_argument("--results", type=Path, default=bench.RESULTS, help="folder for the JSON")
    parser.add_argument("--table", type=Path, help="print the table of this JSON, measure nothing")
    options = parser.parse_args(arguments)
    options.only = tuple(options.only.split(","))
    unknown = [part for part in options.only if part not in PARTS]
    if unknown:
        parser.error(f"--only takes {', '.join(PARTS)}, got {', '.join(unknown)}")
    if options.table:
        print(table(json.loads(options.table.read_text(encoding="utf-8"))))
        return 0
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    machine, reason = backend.machine_of(device)
    if device.type == "cpu":
        reason = "there is no GPU that PyTorch can use"
    elif machine is not None and machine.arch != "sm_90":
        reason = f"this GPU is {machine.arch}, the kernel is for sm_90"
    if reason is not None:
        say(f"Nothing was measured, because {reason}.")
        return 0
    return on_gpu(options, device, backend.Machine(machine.index, machine.arch, "fp8"))


def on_gpu(options, device: torch.device, machine) -> int:
    about = bench_report.machine(device)
    result = {
        "program": "hopper", "date": datetime.date.today().isoformat(), "commit": about["commit"], "short": options.short, "activations": None,
        "machine": about, "data": "normal random data", "ceilings": [], "checks": [], "resources": {}, "rows": [], "peers": [], "skipped": [],
        "clocks": [],
    }  # fmt: skip
    file = options.results / bench_report.file_name(result)
    if file.is_file():  # an earlier run's other parts
        before = json.loads(file.read_text(encoding="utf-8"))
        held = {"ceilings": "ceilings", "checks": "checks", "candidates": "rows", "peers": "peers"}
        result |= {key: before[key] for part, key in held.items() if part not in options.only} | {"resources": before["resources"]}
    say(f"{about['gpu']}, commit {about['commit']}, {about['nvidia_smi']}")
    clock = bench_timing.cuda_clock(device)

    def keep(what: str) -> None:
        result["clocks"].append({"after": what, **bench_report.smi(device)})
        bench_report.save(result, options.results)

    if "ceilings" in options.only:
        result["ceilings"] = bench_ceilings.measure(machine, device, clock)
        say(bench_ceilings.table(result["ceilings"]))
        keep("ceilings")
    wrong, right = [], {}
    if {"checks", "candidates"} & set(options.only):
        right = built(candidates(machine, options.short), result)
    if "checks" in options.only:
        for label, candidate in list(right.items()):
            found = check(candidate, device)
            bad = [one for one in found if not one.good]
            result["checks"] += [{"what": label, "name": one.name, "error": one.error, "bound": one.bound} for one in found]
            say(f"{label}: {len(found) - len(bad)} of {len(found)} checks passed" + "".join(f"\n  {one}" for one in bad))
            if bad:
                wrong.append(label)
                del right[label]
            keep(f"checks of {label}")
    if "candidates" in options.only:
        wrong += compare({**right, "mma int8": backend.Machine(machine.index, machine.arch, "int8")}, result, options.short, device, clock, keep)
    if "peers" in options.only and not options.short and not wrong:
        into = {"rows": result["peers"], "skipped": result["skipped"]}
        for shape in PEERS_AT:
            reason = bench.room(shape, device) or bench.measured(into, shape, None, (machine,), clock, device, effort=bench.WHOLE, flat=True)
            if reason is not None:
                result["skipped"].append({"call": shape.name, "what": "peers", "reason": reason})
            keep(f"peers, {shape.name}")
    say(f"written: {file}")
    print(table(result))
    if wrong:
        say(f"WRONG: {', '.join(wrong)}")
    return int(bool(wrong))


def built(found: dict[str, Candidate], result: dict) -> dict[str, Candidate]:
    """The candidates that compile; into the result what they need, or why they are left out."""
    right = {}
    for label, candidate in found.items():
        reason = candidate.missing(tuple(config.attention_kernel(candidate.arch, "fp8").variant(dim, "fp8", False) for dim in config.DIMS))
        if reason is None:
            right[label] = candidate
            result["resources"][label] = {str(dim): resources(candidate, dim, chosen) for dim, chosen in candidate.chosen.items()}
        else:
            result["skipped"].append({"call": "every call", "what": label, "reason": reason})
    return right


def compare(machines: dict, result: dict, short: bool, device: torch.device, clock, keep) -> list[str]:
    """Times the machines on every shape, into the result; returns who was wrong."""
    wrong = []
    for shape in SHORT if short else SHAPES:
        for topk in TOPK:
            reason = bench.room(shape, device)
            left_out = [] if reason is None else [{"call": shape.name, "what": f"everything, topk {topk}", "reason": reason}]
            rows, skipped = rows_of(shape, topk, machines, clock, device, ROUNDS) if reason is None else ([], left_out)
            result["rows"] += rows
            result["skipped"] += skipped
            wrong += [item["what"] for item in skipped if item["reason"].startswith("WRONG")]
            best = max(rows, key=lambda row: row["tflops"], default=None)
            say(f"{shape.name}, topk {topk}: " + (f"{best['what']}, {best['tflops']:.0f} TFLOPS" if best else "nothing was measured"))
            keep(f"{shape.name}, topk {topk}")
    return wrong


def table(result: dict) -> str:
    """Ceilings, candidates and peers as Markdown."""
    lines = [f"{result['machine']['gpu']}, commit {result['commit']}, {result['date']}; {result['data']}.", ""]
    lines += [bench_ceilings.table(result["ceilings"]), ""] if result["ceilings"] else []
    lines.append(candidate_table(result["rows"], result["resources"]))
    if result["peers"]:
        lines += ["", "| call | density | what | ms | TFLOPS |", "|---|---|---|---|---|"]
        for row in result["peers"]:
            lines.append(f"| {row['call']} | {row['density']:.3f} | {row['what']} | {row['ms']['median']:.3g} | {row['tflops']:.0f} |")
    lines += ["", *(f"- not measured: {item['call']}, {item['what']}: {item['reason']}" for item in result["skipped"])]
    return "\n".join(lines).rstrip()


def candidate_table(rows: list[dict], resources: dict[str, dict]) -> str:
    """Rows of `rows_of` as Markdown; `resources`: label -> head size as text -> what `resources` says."""
    lines = ["| call | density | kernel | registers, spilled | ms | quartiles | TFLOPS | L2 |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        needs, ms = resources.get(row["what"], {}).get(str(row["dim"])), row["ms"]
        cells = [row["call"], f"{row['density']:.3f}", row["what"], f"{needs['registers']}, {needs['local']} B" if needs else ""]
        cells += [f"{ms['median']:.3g}", f"{ms['low']:.3g} to {ms['high']:.3g}", f"{row['tflops']:.0f}", f"{row['error']:.3g}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
