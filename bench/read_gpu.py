"""Reads what the first minutes on a GPU left: what ran, every table, and what to change next, the largest gain first.

python bench/read_gpu.py results/<gpu>-gpu.json
python bench/read_gpu.py --predictions                        floors and predictions, before any GPU
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import gpu_steps  # noqa: F401, makes sparge_kernels importable where it is not installed
import hopper_candidates

# isort: split
import bench_ceilings
import bench_floors
import bench_hopper
import bench_models
import bench_report
from gpu_run import BROKEN, NO_TIME, NOT_HERE
from sparge_kernels import config

LEFT_OUT = (NO_TIME, NOT_HERE)
COMPARING = ("candidates", "peer")
"""Steps that are wrong when one of several contenders is; their rows are of the others."""
TOPK = 0.5
"""What the nodes ask for unless told otherwise: gains are those of the longest call at the density nearest to it."""
_UNKNOWN = "not measured"


# ---- the file


class Reading:
    """The JSON of a run: steps by name, and what several parts of the report need of them.

    Attributes
    ----------
    steps : dict
        Name -> {"status", "seconds", "reason", "log", "result"}, in the order in which they ran.
    machine : dict
    arch : str or None
        "sm_90".
    """

    def __init__(self, result: dict):
        self.result = result
        self.steps: dict[str, dict] = result.get("steps") or {}
        self.machine: dict = result.get("machine") or {}
        capability = str(self.machine.get("capability", ""))
        self.arch = f"sm_{capability.replace('.', '')}" if re.fullmatch(r"\d+\.\d", capability) else None

    def found(self, prefix: str) -> dict[str, dict]:
        """Step -> result, as far as it came, of steps whose name starts so: no speed is told of what is wrong, which COMPARING steps leave out."""
        fits = {name: step for name, step in self.steps.items() if name.startswith(prefix) and step.get("result")}
        return {name: step["result"] for name, step in fits.items() if step["status"] != "wrong" or name.startswith(COMPARING)}

    def rows(self, prefix: str) -> list[dict]:
        return [row for result in self.found(prefix).values() for row in result.get("rows", ())]

    def skipped(self, prefix: str) -> list[dict]:
        return [item for result in self.found(prefix).values() for item in result.get("skipped", ())]

    @cached_property
    def ceilings(self) -> dict[str, dict]:
        """By name, those that were measured."""
        return {row["name"]: row for row in self.rows("ceilings") if "reason" not in row}

    @cached_property
    def rates(self) -> bench_floors.Rates:
        return bench_floors.rates(self.arch or "", list(self.ceilings.values()))

    @cached_property
    def speeds(self) -> list[dict]:
        """Rows of this project's calls that were also timed launch by launch."""
        rows = [row for row in self.rows("speed ") if row["what"].startswith("sparge ") and row["topk"] is not None]
        return [row for row in rows if attention_ms(row) > 0 and row["ms"]["median"] > 0]

    @cached_property
    def base(self) -> dict | None:
        """The row that gains are told of."""
        rows = [row for row in self.speeds if self.arch and form_of(row) == bench_floors.usual_form(self.arch)] or self.speeds
        return min(rows, key=lambda row: (-row["s_q"] * row["s_k"], abs(row["topk"] - TOPK)), default=None)

    def ghz(self, tile: bench_floors.Tile) -> tuple[float, str] | None:
        """(clock, where it is from): under the products of a tile, else the highest one that nvidia-smi names."""
        held = [self.ceilings[name]["ghz"] for name, _ in tile.products if self.ceilings.get(name, {}).get("ghz")]
        if held:
            return sum(held) / len(held), "as the ceilings held it"
        told = re.match(r"(\d+) MHz", str((self.machine.get("nvidia_smi") or {}).get("clocks.max.sm", "")))
        return (int(told[1]) / 1e3, "the highest that nvidia-smi names, because no ceiling was measured") if told else None

    def cycles(self, ms: float, row: dict, tile: bench_floors.Tile) -> float | None:
        """Of one multiprocessor for each tile, when attention over `row`'s call takes `ms`."""
        clock, processors, tiles = self.ghz(tile), self.machine.get("multiprocessors"), bench_floors.tiles_in(row, tile.keys)
        return ms * processors * clock[0] * 1e6 / tiles if clock and processors and tiles else None

    def tile(self, row: dict) -> bench_floors.Tile | None:
        """What the attention kernel of a row works on; None: its form of P and V does not exist on this arch."""
        pv = form_of(row)
        return bench_floors.tile_of(self.arch, config.padded_dim(row["dim"]), pv) if self.arch and pv in config.forms(self.arch) else None


def form_of(row: dict) -> str:
    """The form of P and V of "sparge fp8"."""
    return row["what"].split()[-1]


def attention_ms(row: dict) -> float:
    return sum(ms for name, ms in row["kernels"].items() if name.startswith("sparge_attention"))


def nearest(rows: list[dict]) -> list[dict]:
    """Those of the longest call at the density nearest to TOPK."""
    length = lambda row: row["s_q"] * row["s_k"] if "s_q" in row else row["tokens"] ** 2  # noqa: E731
    first = min(rows, key=lambda row: (-length(row), abs(row["topk"] - TOPK)), default=None)
    return [row for row in rows if (row["call"], row["topk"]) == (first["call"], first["topk"])]


# ---- what went wrong


@dataclass(frozen=True)
class Entry:
    """One thing to change, or to find out.

    Attributes
    ----------
    text : str
        A sentence.
    where : str
        File to look at.
    ms : float or None
        The most that it could save of the call that gains are told of; None: that cannot be said.
    """

    text: str
    where: str
    ms: float | None = None

    def __str__(self) -> str:
        return f"{self.text} Look at {self.where}."


_PLACES = (
    ("packaged", "kernels/cuda/src and kernels/cuda/manifest.json"),
    ("ptx", "kernels/cuda/src"),
    ("2^31", "kernels/cuda/src: offsets must be 64-bit"),
    ("candidates", "bench/bench_hopper.py"),
    ("candidate", "kernels/cuda/src/attention_sm90.cuh"),
    ("sanitizer probe", "the step's log: whether compute-sanitizer runs on this machine at all"),
    ("sanitizer", "kernels/cuda/src"),
    ("speed", "kernels/backends/cuda.py and kernels/cuda/src"),
    ("model", "bench/bench_models.py and nodes"),
    ("peer", "bench/bench_peers.py"),
    ("ceilings", "bench/bench_ceilings.py"),
)


def place_of(step: str) -> str:
    return next((place for prefix, place in _PLACES if step.startswith(prefix)), "bench")


def faults(reading: Reading) -> list[Entry]:
    """Everything that is not right, the worst first; of peers last, because they are not this project's."""
    found = []
    for name, step in reading.steps.items():
        told = list(_complaints(step.get("result") or {}))
        worst = step["status"] if step["status"] in BROKEN else "wrong"
        if step["status"] in BROKEN or told:
            reason = step.get("reason") or next((line for line in reversed(step.get("log") or ()) if line.strip()), "no reason was left")
            said = "; ".join(told if told and worst == "wrong" else [reason.rstrip("."), *told])
            found.append((name.startswith("peer"), BROKEN.index(worst), Entry(f"**{worst}**: {name}: {said}.", place_of(name))))
    return [entry for *_, entry in sorted(found, key=lambda item: item[:2])]


def _complaints(result: dict) -> Iterator[str]:
    """What a step's result says against the code."""
    checks = result.get("checks", ())
    bad = [check for check in checks if not (check["error"] is not None and check["error"] <= check["bound"])]
    if bad:
        worst = ", ".join(f"{check['name']} (error {_number(check['error'])}, at most {_number(check['bound'])})" for check in bad[:3])
        yield f"{len(bad)} of {len(checks)} checks failed: {worst}" + (", ..." if len(bad) > 3 else "")
    if result.get("missing"):
        names = result["missing"]
        yield f"{result['kernels']} of {result['of']} kernels ran, not " + ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    if result.get("errors"):
        yield f"{result['errors']} errors in {result['calls']} calls: " + " / ".join(result["lines"][:2])
    yield from (f"{item['what']}: {item['reason']}" for item in result.get("skipped", ()) if str(item.get("reason", "")).startswith("WRONG"))


# ---- what could be faster


def gains(reading: Reading) -> list[Entry]:
    """Every part of a call and the most that it could save, the largest first; then what has no time of that call."""
    entries = [
        attention(reading), *(candidate(reading, dim) for dim in reversed(config.DIMS)), form(reading), prepass(reading), selection(reading),
        sequence(reading), gaps(reading), host(reading),
    ]  # fmt: skip
    entries = [entry for entry in entries if entry is not None]
    return sorted(entries, key=lambda entry: math.inf if entry.ms is None else -entry.ms) + models(reading)


def _most(ms: float, row: dict) -> str:
    return f"at most {_number(max(ms, 0.0))} ms ({max(ms, 0.0) / row['ms']['median']:.1%} of the call)"


def attention(reading: Reading) -> Entry:
    """The attention kernel against its floors and what was predicted."""
    row = reading.base
    if row is None:
        return Entry(f"Attention kernel: {_UNKNOWN}, no speed of a call is there.", "the steps whose name starts with speed")
    ms, tile = attention_ms(row), reading.tile(row)
    hopper = tile is not None and config.attention_kernel(reading.arch, form_of(row)) is config.SM90
    place = f"kernels/cuda/src/attention_{'sm90' if hopper else 'mma'}.cuh"
    named = f"Attention kernel, {row['what']}, D {row['dim']}: {_number(ms)} ms of {_number(row['ms']['median'])}"
    cycles = None if tile is None else reading.cycles(ms, row, tile)
    if cycles is None:
        return Entry(f"{named}; cycles a tile: {_UNKNOWN}, no clock is known.", place)
    least = bench_floors.floors(tile, reading.rates)
    bound = bench_floors.largest(least)
    predicted = bench_floors.PREDICTED[tile.dim] if hopper else None
    against = f"{predicted:,} were predicted ({cycles / predicted:.2f} x)" if predicted else "nothing was predicted"
    clock, source = reading.ghz(tile)
    saves = ms * (1 - bound / cycles)
    text = (
        f"{named}, {cycles:,.0f} cycles a tile of 128 x {tile.keys} at {clock:.3f} GHz ({source}); {against}; "
        f"floors: {_floors(tile, least, reading)}; down to the largest floor it is {cycles / bound:.2f} x, {_most(saves, row)}."
    )
    return Entry(text, place, max(saves, 0.0))


def _floors(tile: bench_floors.Tile, least: dict, reading: Reading) -> str:
    """Every unit's floor and whose rate it is."""
    measured = {
        "products": all(name in reading.rates.measured for name, _ in tile.products), "special functions": "exponentials" in reading.rates.measured,
        "issue": True, "L2": True,
    }  # fmt: skip
    unknown = {"issue": "instructions not counted", "L2": _UNKNOWN, "products": _UNKNOWN}
    return ", ".join(
        f"{unit} {unknown[unit]}" if cycles is None else f"{unit} {cycles:,.0f}{'' if measured[unit] else ' (datasheet)'}"
        for unit, cycles in least.items()
    )


def candidate(reading: Reading, dim: int) -> Entry | None:
    """The fastest way to build Hopper's kernel against the shipped one."""
    if reading.arch != "sm_90":
        return None
    place, shipped = "kernels/config.py, HOPPER_CONFIG", hopper_candidates.label(config.HOPPER_CONFIG[dim])
    labels = {hopper_candidates.label(chosen) for chosen in hopper_candidates.candidates(dim)}
    rows = nearest([row for row in reading.rows("candidates") if row["dim"] == dim and label_of(row) in labels])
    own = next((row for row in rows if label_of(row) == shipped), None)
    others = [row for row in rows if row is not own]
    if own is None or not others:
        what = "the shipped one" if own is None else "any other"
        return Entry(f"Candidates, D {dim}: {_UNKNOWN}, {what} has no row.", place)
    best = min(others, key=lambda row: row["ms"]["median"])
    mine, fastest = own["ms"], best["ms"]
    share = 1 - fastest["median"] / mine["median"]
    times = f"{label_of(best)} takes {_number(fastest['median'])} ms, the shipped {shipped} {_number(mine['median'])}"
    there = f"{own['call']}, topk {own['topk']:g}: {times}"
    if fastest["high"] >= mine["low"]:
        return Entry(f"Candidates, D {dim}: none is faster beyond the spread of its runs; {there}.", place, 0.0)
    base = reading.base
    known = base is not None and config.padded_dim(base["dim"]) == dim and config.attention_kernel(reading.arch, form_of(base)) is config.SM90
    saves = share * attention_ms(base) if known else None
    most = _most(saves, base) if known else "what that saves of a whole call of such heads was not measured"
    beyond = f"{mine['low'] / fastest['high']:.2f} x between the nearest quartiles"
    return Entry(f"Candidates, D {dim}: {there}: {mine['median'] / fastest['median']:.2f} x as fast, {beyond}; {most}.", place, saves)


def label_of(row: dict) -> str:
    """The head size's part of a candidate's label, which names those of both: "n128 s4 ones / n128 s6 ones" is that of 128, then that of 64."""
    parts = row["what"].split(" / ")
    return parts[0] if row["dim"] == 128 else parts[-1]


def form(reading: Reading) -> Entry:
    """The form of P and V in use against the others."""
    place, base = "kernels/config.py, ATTENTION", reading.base
    shipped = bench_floors.usual_form(reading.arch) if reading.arch else None
    calls = {(row["call"], row["topk"]) for row in reading.speeds if form_of(row) != shipped}
    rows = nearest([row for row in reading.speeds if (row["call"], row["topk"]) in calls])
    own = next((row for row in rows if form_of(row) == shipped), None)
    if own is None or len(rows) < 2:
        return _form_of_candidates(reading) or Entry(f"Other forms of P and V than {shipped or 'the one in use'}: {_UNKNOWN} beside it.", place)
    best = min((row for row in rows if row is not own), key=lambda row: row["ms"]["median"])
    mine, other = own["ms"]["median"], best["ms"]["median"]
    there = f"{own['call']}, topk {own['topk']:g}: {form_of(best)} takes {_number(other)} ms, {shipped} {_number(mine)}"
    if best["ms"]["high"] >= own["ms"]["low"]:
        return Entry(f"Forms of P and V: none is faster than {shipped} beyond the spread of its runs; {there}.", place, 0.0)
    errors = f"its error {_number(best.get('error_same_blocks'))} against {_number(own.get('error_same_blocks'))}"
    saves = (1 - other / mine) * base["ms"]["median"]
    same = "" if own["call"] == base["call"] else ", if the longest call gains the same share"
    return Entry(f"Forms of P and V: {there}: {mine / other:.2f} x as fast, {errors}; {_most(saves, base)}{same}.", place, saves)


def _form_of_candidates(reading: Reading) -> Entry | None:
    """The attention kernel of the other architectures against Hopper's own, which are timed together with the candidates."""
    rows = {label_of(row): row for row in nearest([row for row in reading.rows("candidates") if row["dim"] == 128])}
    own, other = rows.get(hopper_candidates.label(config.HOPPER_CONFIG[128])), rows.get("mma int8")
    if own is None or other is None or reading.base is None:
        return None
    place, mine, theirs = "kernels/config.py, ATTENTION", own["ms"]["median"], other["ms"]["median"]
    there = f"attention alone, {own['call']}, topk {own['topk']:g}: int8 on mma.sync takes {_number(theirs)} ms, fp8 on wgmma {_number(mine)}"
    if other["ms"]["high"] >= own["ms"]["low"]:
        return Entry(f"Forms of P and V: none is faster than fp8 beyond the spread of its runs; {there}.", place, 0.0)
    saves = (1 - theirs / mine) * attention_ms(reading.base)
    return Entry(f"Forms of P and V: {there}: {mine / theirs:.2f} x as fast; {_most(saves, reading.base)}.", place, saves)


def prepass(reading: Reading) -> Entry:
    """Statistics and pre-pass against the bytes that they must move."""
    place, row = "kernels/cuda/src/prepass.cuh", reading.base
    if row is None:
        return Entry(f"Statistics and pre-pass: {_UNKNOWN}.", place)
    ms = row["kernels"].get("sparge_statistics", 0.0) + row["kernels"].get("sparge_prepass", 0.0)
    moved = bench_floors.prepass_bytes(row, form_of(row))
    named = f"Statistics and pre-pass: {_number(ms)} ms for the {moved / 1e9:.2f} GB that they must move"
    copy = reading.ceilings.get(bench_ceilings.MEMORY)
    if copy is None:
        return Entry(f"{named}; the bandwidth of a copy: {_UNKNOWN}.", place)
    least = moved / copy["rate"] / 1e9
    return Entry(f"{named}, {_number(least)} ms at the {copy['rate']:.2f} TB/s of a copy ({ms / least:.2f} x); {_most(ms - least, row)}.", place,
                 max(ms - least, 0.0))  # fmt: skip


def selection(reading: Reading) -> Entry:
    """The selection against its products alone."""
    place, row = "kernels/cuda/src/select.cuh", reading.base
    if row is None:
        return Entry(f"Selection: {_UNKNOWN}.", place)
    ms = row["kernels"].get("sparge_select", 0.0)
    named = f"Selection: {_number(ms)} ms ({ms / row['ms']['median']:.1%} of the call)"
    products = reading.ceilings.get("mma fp16")
    if products is None:
        return Entry(f"{named}; the rate of its products: {_UNKNOWN}.", place)
    least = bench_floors.select_flop(row) / products["rate"] / 1e9
    assumed = f"{_number(least)} ms if its fp16 products at the measured {products['rate']:.0f} TFLOPS were all of it, which is assumed"
    return Entry(f"{named}, {assumed} ({ms / least:.2f} x); {_most(ms - least, row)}.", place, max(ms - least, 0.0))


def sequence(reading: Reading) -> Entry | None:
    """The launch that puts query blocks into order, where there is one."""
    row = reading.base
    if row is None or "sparge_sequence" not in row["kernels"]:
        return None
    ms = row["kernels"]["sparge_sequence"]
    return Entry(f"Order of the query blocks: {_number(ms)} ms, all of it without that launch: {_most(ms, row)}.", "kernels/cuda/src/select.cuh", ms)


def gaps(reading: Reading) -> Entry:
    """What lies between the launches."""
    place, row = "kernels/backends/cuda.py", reading.base
    if row is None or row["outside"] is None or not row["outside"] < 1:
        return Entry(f"Between the launches: {_UNKNOWN}.", place)
    between = max(attention_ms(row) / (1 - row["outside"]) - sum(row["kernels"].values()), 0.0)
    launch = reading.ceilings.get(bench_ceilings.LAUNCH)
    count = len(row["kernels"])
    least = f"{count} empty launches take {_number(count * launch['rate'] / 1e3)} ms" if launch else f"the cost of an empty launch: {_UNKNOWN}"
    return Entry(f"Between the {count} launches: {_number(between)} ms, events around each included; {least}; {_most(between, row)}.", place, between)


def host(reading: Reading) -> Entry:
    """Whether the host keeps up with the shortest call."""
    place, call = "kernels/backends/cuda.py", reading.ceilings.get(bench_ceilings.CALL_ON_HOST)
    if call is None:
        return Entry(f"A call on the host: {_UNKNOWN}.", place)
    row = min(reading.speeds, key=lambda row: row["ms"]["median"], default=None)
    if row is None:
        return Entry(f"A call on the host: {call['rate']:.0f} us; against which time on the GPU: {_UNKNOWN}.", place)
    left = call["rate"] / 1e3 - row["ms"]["median"]
    against = f"the shortest one, {row['call']} at topk {row['topk']:g}, takes {_number(row['ms']['median'])} ms on the GPU"
    hidden = "the host is ahead" if left <= 0 else f"the GPU waits {_number(left)} ms"
    saves = max(call["rate"] / 1e3 - reading.base["ms"]["median"], 0.0)
    return Entry(f"A call on the host: {call['rate']:.0f} us, {against}: {hidden}; {_most(saves, reading.base)}.", place, saves)


def models(reading: Reading) -> list[Entry]:
    """What attention still is of whole models."""
    found, place = [], "bench/bench_models.py for the rest of a model call"
    for row in reading.rows("model "):
        dense, sparse = row["dense"], min(row["sparse"], key=lambda part: abs(part["topk"] - TOPK), default=None)
        named = f"{row['title']}: attention takes {dense['attention_share']:.0%} of the dense call of {_number(dense['seconds']['median'])} s"
        if sparse is None or not sparse["main_seconds"]:
            found.append(Entry(f"{named}; what is left of it: {_UNKNOWN}.", place))
            continue
        whole, part = sparse["seconds"]["median"], sparse["main_seconds"]
        rest = f"{whole / (whole - part):.2f} x as fast at most, were it free" if whole > part else "nothing else takes time"
        left = f"at topk {sparse['topk']:g} {part / whole:.0%} of {_number(whole)} s ({sparse['ratio']:.2f} x dense)"
        found.append(Entry(f"{named}, {left}; {rest}.", place))
    if not found:
        found.append(Entry(f"Whole models: {_UNKNOWN}.", place))
    return found


# ---- the report


def report(result: dict) -> str:
    """The whole of it as Markdown."""
    reading = Reading(result)
    parts = [bench_report.heading(result) if "gpu" in reading.machine else "No machine is named.", status(reading)]
    parts += [f"## {title}\n\n{text}" for title, text in tables(reading) if text]
    return "\n\n".join([*parts, change(reading)])


def status(reading: Reading) -> str:
    """How many steps ran well, the names of the others, and a line for each."""
    by_status: dict[str, list[str]] = {}
    for name, step in reading.steps.items():
        by_status.setdefault(step["status"], []).append(name)
    good = len(by_status.pop("ok", ()))
    named = [f"; {what}: {', '.join(by_status[what])}" for what in (*BROKEN, *LEFT_OUT) if what in by_status]
    lines = [f"{good} of {len(reading.steps)} steps ok{''.join(named)}.", "", "| step | status | s | reason |", "|---|---|---|---|"]
    for name, step in reading.steps.items():
        reason = (step.get("reason") or "").replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {name} | {step['status']} | {_number(step.get('seconds'))} | {reason} |")
    return "\n".join(lines)


def tables(reading: Reading) -> Iterator[tuple[str, str]]:
    """(title, Markdown) of everything measured; empty where nothing was."""
    for title, prefix in (("Speed", "speed "), ("Peers", "peer ")):
        rows, skipped = reading.rows(prefix), reading.skipped(prefix)
        yield title, bench_report.speeds(rows, skipped) if rows or skipped else ""
    yield "Attention, cycles a tile", cycles_table(reading)
    candidates = reading.rows("candidates")
    needs = {name.removeprefix("candidate "): result.get("resources") or {} for name, result in reading.found("candidate ").items()}
    yield "Candidates", bench_hopper.candidate_table(candidates, needs) if candidates else ""
    yield "Predictions", bench_floors.versions_table(outcomes(reading)) if candidates else ""
    rows, skipped = reading.rows("model "), reading.skipped("model ")
    whole = {"machine": reading.machine, "date": reading.result.get("date", ""), "data": bench_models.DATA, "rows": rows, "skipped": skipped}
    yield "Models", bench_models.table(whole) if (rows or skipped) and "gpu" in reading.machine else ""
    ceilings = reading.rows("ceilings")
    yield "Ceilings", bench_ceilings.table(ceilings) if ceilings else ""


def cycles_table(reading: Reading) -> str:
    """Cycles a tile of every call."""
    lines = []
    for row in reading.speeds:
        tile = reading.tile(row)
        cycles = None if tile is None else reading.cycles(attention_ms(row), row, tile)
        if cycles is not None:
            bound = bench_floors.largest(bench_floors.floors(tile, reading.rates))
            cells = [row["call"], row["what"], f"{row['density']:.3f}", _number(attention_ms(row)), f"128 x {tile.keys}", f"{cycles:,.0f}"]
            lines.append("| " + " | ".join([*cells, f"{cycles / bound:.2f}"]) + " |")
    head = ["| call | what | density | attention ms | tile | cycles | x largest floor |", "|---|---|---|---|---|---|---|"]
    return "\n".join(head + lines) if lines else ""


def outcomes(reading: Reading) -> dict[str, str]:
    """What each of bench_floors.VERSIONS turned out to be."""
    found = {}
    for version in bench_floors.VERSIONS:
        told = []
        for dim in reversed(config.DIMS):
            tile = bench_floors.tile_of("sm_90", dim, "fp8")
            rows = nearest([row for row in reading.rows("candidates") if row["dim"] == dim])
            labelled = {label_of(row): row for row in rows}
            row, shipped = labelled.get(version.label(dim)), labelled.get(hopper_candidates.label(config.HOPPER_CONFIG[dim]))
            cycles = None if row is None else reading.cycles(row["ms"]["median"], row, tile)
            if cycles is not None:
                ratio = f", {shipped['ms']['median'] / row['ms']['median']:.2f} x as fast as shipped" if shipped and shipped is not row else ""
                told.append(f"{dim}: {cycles:,.0f} cycles for 128 x {tile.keys}{ratio}")
        if told:
            found[version.what] = "; ".join(told)
    return found


def change(reading: Reading) -> str:
    """What is wrong, then what could be faster, as one numbered list."""
    base = reading.base
    about = "No speed of a call was measured."
    if base is not None:
        about = f"Gains are those of {base['call']} at topk {base['topk']:g} with {base['what']}: {_number(base['ms']['median'])} ms."
    entries = [*faults(reading), *gains(reading)]
    return "\n".join(["## What to change next", "", about, "", *(f"{i}. {entry}" for i, entry in enumerate(entries, 1))])


def predictions() -> str:
    """Floors and predictions of Hopper's kernel, then the floors of the portable one, as Markdown."""
    return "\n\n".join([bench_floors.hopper_table(), bench_floors.versions_table(), bench_floors.portable_table()])


def _number(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="the JSON of a run")
    parser.add_argument("--predictions", action="store_true", help="print floors and predictions")
    options = parser.parse_args(arguments)
    if options.predictions:
        print(predictions())
    elif options.file is None:
        parser.error("a JSON must be named, or --predictions given")
    else:
        try:
            result = json.loads(options.file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            parser.error(f"the file must be the JSON of a run, got {options.file} ({error}); name one that bench_gpu.py wrote")
        print(report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
