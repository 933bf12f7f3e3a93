"""Runs steps, each a process with a time limit of its own, and writes what became of them after every one: what bench_gpu.py is made of.

Knows nothing of GPUs, imports neither torch nor anything of this project, so that nothing that a step does can take it along.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOG_LINES = 40

OK, WRONG, HANG, CRASH, FAULT, MEMORY, FAILED, NO_TIME, NOT_HERE = (
    "ok", "wrong", "hang", "crash", "fault", "out of memory", "failed", "no time", "not here",
)  # fmt: skip
BROKEN = (WRONG, FAULT, CRASH, HANG, FAILED, MEMORY)
"""What may become of a step that ran, the worst first."""
FINAL = (OK, WRONG, NOT_HERE)
"""What a later run does not try again."""
EXITS = {0: OK, 10: WRONG, 11: NOT_HERE, 12: MEMORY, 13: FAULT}
"""Exit status of a step's process -> what became of it."""


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes
    ----------
    name : str
        "packaged int8".
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


# ---- one process -----------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Running:
    """A step under way; `limit` is the step's, or what is left of the run."""

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


def end(process: subprocess.Popen) -> None:
    """Ends a process, if it has not ended yet, and everything in its group; the system may not manage to, where a kernel never returns."""
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
        pass


def outcome(running: Running, ended: tuple[str, str] | None = None) -> dict:
    """The entry of a step that has ended; `ended`: what became of one that had to be ended, and why."""
    reason, result = None, None
    try:
        told = json.loads(running.result.read_text(encoding="utf-8"))
        reason, result = told["reason"], told["result"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # it ended before it could say anything
    code = running.process.returncode
    if ended is not None:
        status, reason = ended
    elif code in EXITS and not (EXITS[code] == OK and result is None):
        status = EXITS[code]
    elif code < 0:
        status, reason = CRASH, f"it died of {_signal(-code)}"
    else:
        status, reason = FAILED, reason or (f"exit status {code}" if code else "it ended without a result")
    lines = running.log.read_bytes().decode(errors="replace").splitlines() if running.log.is_file() else []
    seconds = round(time.monotonic() - running.started, 1)
    return {"status": status, "seconds": seconds, "reason": reason, "log": [line[:300] for line in lines[-LOG_LINES:]], "result": result}


def hang(running: Running) -> tuple[str, str]:
    """Ends a step that is past its limit, and what to say of it."""
    end(running.process)
    told = f"it was ended after its {running.limit:.0f} s"
    return HANG, told if running.process.returncode is not None else f"{told}, which the system has not managed yet"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of those without a name
        return f"signal {number}"


def alone(step: Step, command: Callable[[Step, Path, float], list[str]]) -> dict:
    """The entry of a step that runs now, with nothing beside it."""
    running, ended = start(step, step.limit, command), None
    try:
        running.process.wait(step.limit)
    except subprocess.TimeoutExpired:
        ended = hang(running)
    finally:
        end(running.process)
    entry = outcome(running, ended)
    running.files.cleanup()
    return entry


# ---- the run ---------------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run: its result, where that is written, and the time it has.

    Attributes
    ----------
    file : Path
    result : dict
        With "steps": name -> entry, which may hold those of an earlier run, and "seconds".
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
        """Puts a step's entry into the result, last in order, and writes the file. What did not run keeps what an earlier run says of it."""
        steps = self.result["steps"]
        if entry["status"] != NO_TIME or steps.get(name, entry)["status"] == NO_TIME:
            steps.pop(name, None)
            steps[name] = entry
        self.result["seconds"] = round(sum(e["seconds"] for e in steps.values()), 1)
        say(f"{entry['seconds']:6.1f} s  {name}: {entry['status']}" + (f", {entry['reason']}" if entry["reason"] else ""))
        try:
            write(self.file, self.result)
        except OSError as error:  # what was measured is still printed at the end
            say(f"The result could not be written ({error}); the run goes on")

    def all(self, wanted: list[Step]) -> bool:
        """Runs the steps that an earlier run has not settled; False when the GPU was lost on the way. Leaves no process, however it ends."""
        try:
            return self._all(wanted)
        finally:
            for running in self.running:
                end(running.process)
                running.files.cleanup()

    def _all(self, wanted: list[Step]) -> bool:
        settled = {name for name, entry in self.result["steps"].items() if entry["status"] in FINAL}
        pending = [step for step in wanted if step.name not in settled]
        while pending or self.running:
            while (step := self._next(pending)) is not None:
                pending.remove(step)
                if self.left() < step.least:
                    self.keep(step.name, not_run(f"{max(0.0, self.left()):.0f} s were left, it takes {step.least:.0f}; run this again"))
                else:
                    self.running.append(start(step, min(step.limit, self.left()), self.command))
            time.sleep(0.05)
            hung = [entry for entry in self._collect() if entry["status"] in (HANG, CRASH)]
            if hung and (pending or self.running) and alone(Step("alive", 30), self.command)["status"] != OK:
                lost = "the GPU does not answer any more since the step before; run this again on a fresh one"
                while self.running:
                    running = self.running.pop()
                    end(running.process)
                    self.keep(running.step.name, outcome(running, (NO_TIME, lost)))
                    running.files.cleanup()
                for step in pending:
                    self.keep(step.name, not_run(lost))
                return False
        return True

    def _next(self, pending: list[Step]) -> Step | None:
        """The first step that waits for no other, if it may start now: what times runs alone, and nothing that comes later overtakes it."""
        unfinished = {step.name for step in pending} | {running.step.name for running in self.running}
        ready = next((step for step in pending if unfinished.isdisjoint(step.after)), None)
        if ready is None or len(self.running) >= self.jobs:
            return None
        together = ready.beside and all(running.step.beside for running in self.running)
        return ready if together or not self.running else None

    def _collect(self) -> list[dict]:
        """The entries of the steps that have ended, or that had to be."""
        entries = []
        for running in list(self.running):
            ended = None
            if running.process.poll() is None:
                if time.monotonic() - running.started <= running.limit:
                    continue
                ended = hang(running)
                if running.limit < running.step.limit:
                    ended = NO_TIME, f"the run's time was over after {running.limit:.0f} s of it; run this again"
            end(running.process)  # and what it left behind
            self.running.remove(running)
            entries.append(outcome(running, ended))
            self.keep(running.step.name, entries[-1])
            running.files.cleanup()
        return entries


def sources() -> str:
    """Digest of everything that a result depends on here: the package and these programs."""
    whole = hashlib.sha256()
    for folder in ("kernels", "nodes", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cuh", ".json", ".z") and "results" not in path.parts and path.is_file():
                whole.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()[:16]


def not_run(reason: str) -> dict:
    """The entry of a step that was not begun."""
    return {"status": NO_TIME, "seconds": 0.0, "reason": reason, "log": [], "result": None}


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
