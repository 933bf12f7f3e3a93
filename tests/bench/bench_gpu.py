"""The first ten minutes on an NVIDIA GPU: every question that only a GPU can answer, the most valuable first, within nine minutes.

    make gpu                                     (or: python tests/bench/bench_gpu.py, where Python has torch already)
    make gpu-carry                               what another machine needs for it, made and listed with its size
    make gpu-rehearsal                           all of it on an emulated GPU, with a hang, a crash, a fault and a lack of memory put in
    python tests/bench/read_gpu.py FILE          the tables of a result, and what to change next

Every step is a process with a time limit of its own: what hangs or crashes costs that step alone and is reported. The result is written after every
step; the same command again goes on where the last run ended, for the same sources on the same GPU. This program itself imports no torch and opens no
driver, so that nothing can take it along.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
MINUTES = 9.0
LOG_LINES = 40
LAST_SECONDS = 3.0
"""How long before its limit a step says where it stands."""

OK, WRONG, HANG, CRASH, FAULT, MEMORY, FAILED, NO_TIME, NOT_HERE = (
    "ok", "wrong", "hang", "crash", "fault", "out of memory", "failed", "no time", "not here",
)  # fmt: skip
FINAL = (OK, WRONG, NOT_HERE)
"""What a later run does not try again."""
EXITS = {0: OK, 10: WRONG, 11: NOT_HERE, 12: MEMORY, 13: FAULT}
"""Exit statuses of a step's process; gpu_steps.py uses them too."""


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes
    ----------
    name : str
        "packaged int8"; the first word and the rest choose the function in gpu_steps.py.
    limit : float
        Seconds after which it is ended.
    least : float
        Seconds that must be left for it to be begun.
    beside : bool
        May run beside others: it times nothing.
    after : tuple of str
        Steps that must have ended, one way or another.
    """

    name: str
    limit: float
    least: float = 5.0
    beside: bool = False
    after: tuple[str, ...] = ()


def steps(machine: dict) -> list[Step]:
    """What is worth knowing of a machine, the most valuable first.

    Parameters
    ----------
    machine : dict
        What the step "machine" found: "arch", "packaged" (name, how many), "ptx", "speed", "candidates", "peers", "models".
    """
    found = [Step("build", 200, beside=True)] if machine["build"] else []
    built = tuple(step.name for step in found)
    found += [Step(f"packaged {name}", 60, beside=True) for name in machine["packaged"]]
    found += [Step("2^31", 60, beside=True)]
    found += [Step(f"ptx {arch}", 80, beside=True, after=built) for arch in machine["ptx"]]
    found += [Step(f"speed {call}", 45, 8) for call in machine["speed"]]
    found += [Step(f"candidate {label}", 45, beside=True, after=built) for label in machine["candidates"]]
    if machine["candidates"]:
        found += [Step("candidates", 75, 15, after=tuple(f"candidate {label}" for label in machine["candidates"]))]
    found += [Step("sanitizer probe", 10)]
    found += [Step(f"sanitizer {tool}", 75, 30, beside=True, after=("sanitizer probe",)) for tool in SANITIZERS]
    found += [Step(f"peer {name}", 45, 10) for name in machine["peers"]]
    found += [Step(f"model {name}", 120, least) for name, least in machine["models"].items()]
    return [*found, Step("ceilings", 40, 8)]


SANITIZERS = ("memcheck", "synccheck", "racecheck", "initcheck")


# ---- one process -----------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Running:
    """A step under way."""

    step: Step
    process: subprocess.Popen
    started: float
    limit: float
    files: tempfile.TemporaryDirectory

    @property
    def result(self) -> Path:
        return Path(self.files.name) / "result.json"

    @property
    def log(self) -> Path:
        return Path(self.files.name) / "log"


def start(step: Step, limit: float, command: Callable[[Step, Path, float], list[str]]) -> Running:
    """Starts the step in a process group of its own, its output in a file: a pipe that nobody reads would stop it."""
    files = tempfile.TemporaryDirectory(prefix="sparge-gpu-", ignore_cleanup_errors=True)
    folder = Path(files.name)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command(step, folder / "result.json", limit), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=os.name == "posix", env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    return Running(step, process, time.monotonic(), limit, files)


def end(process: subprocess.Popen) -> bool:
    """Ends a process and everything that it started; False where the system cannot, which a kernel that never returns may bring about."""
    try:
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except ProcessLookupError:
        pass
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        return False
    return True


def outcome(running: Running, timed_out: bool) -> dict:
    """The entry of a step that has ended, or was ended."""
    status, reason, result = None, None, None
    try:
        told = json.loads(running.result.read_text(encoding="utf-8"))
        reason, result = told["reason"], told["result"]
    except (OSError, ValueError, KeyError):
        pass  # it ended before it could say anything
    code = running.process.returncode
    if timed_out:
        status, reason = HANG, f"it was ended after its {running.limit:.0f} s"
        if code is None:
            reason += ", which the system has not managed yet"
    elif code in EXITS:
        status = EXITS[code]
    elif code < 0:
        status, reason = CRASH, f"it died of {signal.Signals(-code).name}"
    else:
        status, reason = FAILED, reason or f"exit status {code}"
    lines = running.log.read_bytes().decode(errors="replace").splitlines() if running.log.is_file() else []
    seconds = round(time.monotonic() - running.started, 1)
    return {"status": status, "seconds": seconds, "reason": reason, "log": [line[:300] for line in lines[-LOG_LINES:]], "result": result}


# ---- the run ---------------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run: its result, where that is written, and the time it has.

    Attributes
    ----------
    command : callable
        (step, file of its result, its limit) -> command line.
    deadline : float
        Of time.monotonic().
    jobs : int
        Steps that may run beside each other.
    """

    file: Path
    result: dict
    command: Callable[[Step, Path, float], list[str]]
    deadline: float
    jobs: int
    running: list[Running] = field(default_factory=list)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def keep(self, name: str, entry: dict) -> None:
        """Puts a step's entry into the result, last in order, and writes the file: whole or not at all."""
        self.result["steps"].pop(name, None)
        self.result["steps"][name] = entry
        self.result["seconds"] = round(sum(e["seconds"] for e in self.result["steps"].values()), 1)
        write(self.file, self.result)
        say(f"{entry['seconds']:6.1f} s  {name}: {entry['status']}" + (f", {entry['reason']}" if entry["reason"] else ""))

    def done(self, name: str) -> bool:
        return name in self.result["steps"]

    def all(self, wanted: list[Step]) -> bool:
        """Runs the steps that an earlier run has not settled; False when the GPU was lost on the way. Leaves no process, however it ends."""
        try:
            return self._all(wanted)
        finally:
            for running in self.running:
                end(running.process)
                running.files.cleanup()

    def _all(self, wanted: list[Step]) -> bool:
        for name in [s.name for s in wanted if self.done(s.name) and self.result["steps"][s.name]["status"] not in FINAL]:
            del self.result["steps"][name]
        pending = [step for step in wanted if not self.done(step.name)]
        names = {step.name for step in wanted}
        while pending or self.running:
            while pending and self._may_start(pending[0], names):
                step = pending.pop(0)
                if self.left() < step.least:
                    self.keep(step.name, _entry(NO_TIME, f"{max(0.0, self.left()):.0f} s were left, it takes {step.least:.0f}; run this again"))
                    continue
                self.running.append(start(step, min(step.limit, self.left()), self.command))
            if not self.running:
                continue
            time.sleep(0.05)
            hung = False
            for running in list(self.running):
                late = time.monotonic() - running.started > running.limit
                if not late and running.process.poll() is None:
                    continue
                if late:
                    end(running.process)
                self.running.remove(running)
                entry = outcome(running, late)
                hung |= entry["status"] in (HANG, CRASH)
                self.keep(running.step.name, entry)
                running.files.cleanup()
            if hung and not self._still_there():
                for step in (*(running.step for running in self.running), *pending):
                    self.keep(step.name, _entry(NO_TIME, "the GPU does not answer any more since the step before; run this again on a fresh one"))
                return False
        return True

    def _may_start(self, step: Step, names: set[str]) -> bool:
        waits = any(name in names and not self.done(name) for name in step.after)
        alone = not step.beside or any(not r.step.beside for r in self.running)
        return not waits and not (alone and self.running) and len(self.running) < self.jobs

    def _still_there(self) -> bool:
        """Whether a fresh process can use the GPU: one that hung may have left it useless for whatever comes."""
        probe = start(Step("alive", 30), 30, self.command)
        try:
            return probe.process.wait(30) == 0
        except subprocess.TimeoutExpired:
            end(probe.process)
            return False
        finally:
            probe.files.cleanup()


def _entry(status: str, reason: str) -> dict:
    return {"status": status, "seconds": 0.0, "reason": reason, "log": [], "result": None}


def say(text: str = "") -> None:
    print(text, flush=True)


def write(file: Path, result: dict) -> None:
    """Replaces the file at once, so that whoever is cut off leaves the one before."""
    if str(file) == os.devnull:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(part, file)


def sources() -> str:
    """Digest of everything that a result depends on here: the package and these programs."""
    whole = hashlib.sha256()
    for folder in ("kernels", "nodes", "tests/bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cuh", ".json", ".z") and "results" not in path.parts and path.is_file():
                whole.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()[:16]


def file_of(folder: Path, gpu: str) -> Path:
    return folder / (re.sub(r"[^a-z0-9]+", "-", f"{gpu} gpu".lower()).strip("-") + ".json")


def tables(file: Path) -> str:
    """What the reader makes of a result: in a process of its own, because it imports torch, and the result is worth something without it."""
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("read_gpu.py")), str(file)], capture_output=True, text=True, cwd=ROOT)
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


def impatient(rehearsal: str, wanted: list[Step]) -> list[Step]:
    """The steps of a rehearsal, with less patience for those that are made to hang."""
    return [replace(step, limit=8.0) if f",{step.name}=hang," in f",{rehearsal}," else step for step in wanted]


def supervise(options: argparse.Namespace) -> int:
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside; the result so far is kept, the same command goes on"))
    rehearsal = ["--rehearse", options.rehearse] if options.rehearse is not None else []

    def command(step: Step, into: Path, limit: float) -> list[str]:
        bad = json.dumps([name for name, entry in result["steps"].items() if entry["status"] != OK])
        given = {"--step": step.name, "--result": into, "--limit": limit, "--bad": bad}
        return [sys.executable, str(Path(__file__).resolve()), *(str(part) for pair in given.items() for part in pair), *rehearsal]

    result = {"program": "gpu", "date": datetime.date.today().isoformat(), "started": time.strftime("%H:%M:%S"), "sources": sources(),
              "seconds": 0.0, "steps": {}}  # fmt: skip
    jobs = min(4, os.cpu_count() or 1)
    first = Run(options.results / "unknown-gpu.json", result, command, began + 60 * options.minutes, jobs)
    probe = start(Step("machine", 60), 60, command)
    while probe.process.poll() is None and time.monotonic() - probe.started < probe.limit:
        time.sleep(0.05)
    late = probe.process.returncode is None
    if late:
        end(probe.process)
    entry = outcome(probe, late)
    probe.files.cleanup()
    if entry["status"] == NOT_HERE:
        say(f"Nothing was measured, because {entry['reason']}.")
        return 0
    if entry["status"] != OK:
        first.keep("machine", entry)
        say("\n".join(entry["log"]))
        return 1
    about = entry["result"]
    file = file_of(options.results, about["machine"]["gpu"])
    if file.is_file() and not options.again:
        before = json.loads(file.read_text(encoding="utf-8"))
        if before["sources"] == result["sources"]:
            result["steps"] = before["steps"]
            say(f"going on with {file}: {len(result['steps'])} steps are there")
    result |= {"machine": about["machine"], "commit": about["machine"]["commit"], "data": "normal random data"}
    say(f"{about['machine']['gpu']}, commit {result['commit']}; {options.minutes:g} minutes")
    run = Run(file, result, command, first.deadline, jobs)
    run.keep("machine", entry)
    wanted = steps(about)
    if options.rehearse is not None:
        wanted = impatient(options.rehearse, wanted)
    words = tuple(word for word in options.only.split(",") if word)
    run.all([step for step in wanted if not words or step.name.startswith(words)])
    say(f"written: {file}; {time.monotonic() - began:.0f} s in all")
    say()
    say(tables(file))
    return int(any(e["status"] in (WRONG, HANG, CRASH, FAULT, FAILED) for e in result["steps"].values()))


if __name__ == "__main__":
    sys.exit(main())
