"""The first ten minutes on an NVIDIA GPU: every question that only a GPU can answer, the most valuable first, within nine minutes.

    make gpu                                     (or: python bench/bench_gpu.py, where Python has torch already)
    make gpu-carry                               what another machine needs for it, made and listed with its size
    make gpu-rehearsal                           all of it on an emulated GPU, with a hang, a crash, a fault and a lack of memory put in
    python bench/read_gpu.py FILE          the tables of a result, and what to change next

Every step is a process with a time limit of its own: what hangs or crashes costs that step alone and is reported. The result is written after every
step; the same command again goes on where the last run ended, for the same sources on the same GPU. This program itself imports no torch and opens no
driver, so that nothing can take it along.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from gpu_run import BROKEN, NOT_HERE, OK, ROOT, Run, Step, alone, say, sources

RESULTS = Path(__file__).resolve().parent / "results"
MINUTES = 9.0
SANITIZERS = ("memcheck", "synccheck", "racecheck", "initcheck")


def steps(machine: dict) -> list[Step]:
    """What is worth knowing of a machine, the most valuable first.

    Parameters
    ----------
    machine : dict
        What the step "machine" found: "build" (whether there is something to compile), lists of names "packaged", "compiled", "ptx", "speed",
        "candidates" and "peers", and "models": name -> seconds that one takes.
    """
    found = [Step("build", 200, beside=True)] if machine["build"] else []
    built = tuple(step.name for step in found)
    found += [Step(f"packaged {name}", 60, beside=True) for name in machine["packaged"]]
    found += [Step(f"compiled {name}", 150, beside=True) for name in machine["compiled"]]
    found += [Step("2^31", 60, beside=True)]
    found += [Step(f"ptx {arch}", 120, beside=True, after=built) for arch in machine["ptx"]]
    found += [Step(f"speed {call}", 45, 8) for call in machine["speed"]]
    found += [Step("ceilings", 40, 8)]  # seconds, and all that the reader says of gains rests on them
    found += [Step(f"candidate {label}", 45, beside=True, after=built) for label in machine["candidates"]]
    if machine["candidates"]:
        found += [Step("candidates", 75, 15, after=tuple(f"candidate {label}" for label in machine["candidates"]))]
    found += [Step("sanitizer probe", 40)]
    found += [Step(f"sanitizer {tool}", 75, 30, beside=True, after=("sanitizer probe",)) for tool in SANITIZERS]
    found += [Step(f"peer {name}", 45, 10) for name in machine["peers"]]
    return found + [Step(f"model {name}", 150, least) for name, least in machine["models"].items()]


def selected(every: list[Step], words: list[str]) -> list[Step]:
    """The steps whose names begin with one of the words, and what they come after; all of them without words.

    Raises
    ------
    ValueError
    """
    unknown = [word for word in words if not any(step.name.startswith(word) for step in every)]
    if unknown:
        raise ValueError(f"--only takes the first words of {', '.join(step.name for step in every)}; got {', '.join(unknown)}")
    wanted = {step.name for step in every if not words or step.name.startswith(tuple(words))}
    for step in reversed(every):
        wanted |= set(step.after) if step.name in wanted else set()
    return [step for step in every if step.name in wanted]


def file_of(folder: Path, gpu: str) -> Path:
    return folder / (re.sub(r"[^a-z0-9]+", "-", f"{gpu} gpu".lower()).strip("-") + ".json")


def earlier(file: Path, source: str) -> dict:
    """The steps of an earlier run with these sources; a file that cannot be read is moved aside."""
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        return before["steps"] if before["sources"] == source else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        aside = file.with_suffix(".damaged")
        file.replace(aside)
        say(f"{file} cannot be read ({type(error).__name__}: {error}); it is {aside.name} now")
        return {}


def tables(file: Path) -> str:
    """What the reader makes of a result: in a process of its own, because it imports torch, and the result is worth something without it."""
    try:
        command = [sys.executable, str(Path(__file__).with_name("read_gpu.py")), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    except subprocess.TimeoutExpired:
        return "The reader took more than a minute and was ended."
    return done.stdout if done.returncode == 0 else f"The reader failed:\n{done.stderr[-2000:]}"


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"time for everything, {MINUTES:g} unless told")
    parser.add_argument("--only", default="", help="steps whose names begin with one of these words, with commas between: speed,ceilings")
    parser.add_argument("--again", action="store_true", help="begin anew, also what an earlier run has settled")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--rehearse", metavar="STEP=WHAT,...", help="on an emulated GPU; what happens in which step: hang, crash, fault, memory")
    parser.add_argument("--carry", action="store_true", help="make what another machine needs for it, and list it with its size")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--bad", default="[]", help=argparse.SUPPRESS)  # steps that did not end well, as JSON
    options = parser.parse_args(given)
    if not options.minutes > 0:
        parser.error(f"--minutes must be above 0, got {options.minutes:g}")
    if not (options.step or options.carry):
        try:
            options.results.mkdir(parents=True, exist_ok=True)
            (options.results / ".part").write_text("")
            (options.results / ".part").unlink()
        except OSError as error:
            parser.error(f"--results must be a folder that can be written, got {options.results} ({error}); name another")
    return options


def main(given: list[str] | None = None) -> int:
    """Returns 1 when a step found something wrong, hung, crashed or failed."""
    options = arguments(given)
    if options.step:
        import gpu_steps

        return gpu_steps.main(options)
    if options.carry:
        import gpu_carry

        return gpu_carry.main()
    return supervise(options)


def supervise(options: argparse.Namespace) -> int:
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside; the result so far is kept, the same command goes on"))
    rehearsal = ["--rehearse", options.rehearse] if options.rehearse is not None else []
    result = {"program": "gpu", "date": datetime.date.today().isoformat(), "started": time.strftime("%H:%M:%S"), "sources": sources(),
              "seconds": 0.0, "steps": {}}  # fmt: skip
    every: list[Step] = []

    def command(step: Step, into: Path, limit: float) -> list[str]:
        bad = [other.name for other in every if result["steps"].get(other.name, {}).get("status") != OK]
        given = {"--step": step.name, "--result": into, "--limit": limit, "--bad": json.dumps(bad)}
        return [sys.executable, str(Path(__file__).resolve()), *(str(part) for pair in given.items() for part in pair), *rehearsal]

    run = Run(options.results / "unknown-gpu.json", result, command, began + 60 * options.minutes, min(4, os.cpu_count() or 1))
    entry = alone(Step("machine", 60), command)
    if entry["status"] == NOT_HERE:
        say(f"Nothing was measured, because {entry['reason']}.")
        return 0
    if entry["status"] != OK:
        run.keep("machine", entry)
        say("\n".join(entry["log"]))
        return 1
    about = entry["result"]
    every += impatient(rehearsal, steps(about))
    try:
        wanted = selected(every, [word.strip() for word in options.only.split(",") if word.strip()])
    except ValueError as error:
        sys.exit(str(error))
    run.file = file_of(options.results, about["machine"]["gpu"])
    if not options.again:
        result["steps"] |= earlier(run.file, result["sources"])
    result |= {"machine": about["machine"], "commit": about["machine"]["commit"], "data": "normal random data"}
    say(f"{about['machine']['gpu']}, commit {result['commit']}; {options.minutes:g} minutes, {len(result['steps'])} steps are there from before")
    run.keep("machine", entry)
    run.all(wanted)
    say(f"written: {run.file}; {time.monotonic() - began:.0f} s in all")
    say()
    say(tables(run.file))
    return int(any(e["status"] in BROKEN for e in result["steps"].values()))


def impatient(rehearsal: list[str], wanted: list[Step]) -> list[Step]:
    """The steps, in a rehearsal with less patience for those that are made to hang."""
    spec = f",{rehearsal[1]}," if rehearsal else ""
    return [replace(step, limit=4.0) if f",{step.name}=hang," in spec else step for step in wanted]


if __name__ == "__main__":
    sys.exit(main())
