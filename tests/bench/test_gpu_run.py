"""The supervisor of the first ten minutes on a GPU (gpu_run.py): processes that hang, crash and flood, deadlines, what an earlier run has settled."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import gpu_run
import pytest

posix = pytest.mark.skipif(os.name != "posix", reason="signals and process groups as POSIX has them")

TOYS = {
    "good": "tell({'n': 1}); sys.exit(0)",
    "bad": "tell(None, 'two of three'); sys.exit(10)",
    "elsewhere": "tell(None, 'no such tool'); sys.exit(11)",
    "full": "tell(None, 'out of memory'); sys.exit(12)",
    "broken": "tell(None, 'illegal address'); sys.exit(13)",
    "raises": "raise ValueError('as it were')",
    "dies": "os.kill(os.getpid(), 11)",
    "hangs": "tell({'half': 1}); signal.signal(15, signal.SIG_IGN); time.sleep(600)",
    "hangs with a child": "one = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); tell({'child': one.pid}); one.wait()",
    "leaves a child": "one = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); tell({'child': one.pid})",
    "floods": "[print('x' * 100) for _ in range(50000)]; tell({'n': 2})",
    "slow": "time.sleep(.6); tell({'n': 3})",
    "alive": "tell({'there': True})",
    "says nothing": "sys.exit(0)",
    "writes a list": "open(sys.argv[1], 'w').write('[1]')",
    "nameless signal": "os.kill(os.getpid(), 40)",
    "tells": "tell({'bad': json.loads(sys.argv[2])})",
}
HEAD = """
import json, os, signal, subprocess, sys, time
def tell(result, reason=None):
    open(sys.argv[1], 'w').write(json.dumps({'reason': reason, 'result': result}))
"""


@pytest.fixture
def run(tmp_path):
    """run(seconds, jobs): a run over TOYS."""

    def make(seconds: float = 60.0, jobs: int = 1, steps: dict | None = None) -> gpu_run.Run:
        result = {"steps": steps or {}, "seconds": 0.0}

        def command(step, file, limit):
            bad = [name for name, entry in result["steps"].items() if entry["status"] != "ok"]
            return [sys.executable, "-c", HEAD + TOYS[step.name], str(file), json.dumps(bad)]

        return gpu_run.Run(tmp_path / "sub" / "toy.json", result, command, time.monotonic() + seconds, jobs)

    return make


def gone(pid: int) -> bool:
    """Whether a process has ended, within seconds; one that nobody has waited for yet has."""
    status = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        try:
            if not Path("/proc").is_dir() or status.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


def toy(name: str, limit: float = 30.0, **more) -> gpu_run.Step:
    return gpu_run.Step(name, limit, 1.0, **more)


@posix
def test_every_end_has_its_name(run):
    one = run(jobs=4)
    names = [name for name in TOYS if "hangs" not in name and name not in ("alive", "leaves a child")]
    assert one.all([toy(name, beside=True) for name in names])
    told = {name: (entry["status"], entry["reason"]) for name, entry in one.result["steps"].items()}
    assert told == {
        "good": ("ok", None), "bad": ("wrong", "two of three"), "elsewhere": ("not here", "no such tool"), "full": ("out of memory", "out of memory"),
        "broken": ("fault", "illegal address"), "raises": ("failed", "exit status 1"), "dies": ("crash", "it died of SIGSEGV"),
        "floods": ("ok", None), "slow": ("ok", None), "tells": ("ok", None), "says nothing": ("failed", "it ended without a result"),
        "writes a list": ("failed", "it ended without a result"), "nameless signal": ("crash", "it died of signal 40"),
    }  # fmt: skip
    steps = one.result["steps"]
    assert steps["good"]["result"] == {"n": 1} and steps["raises"]["log"][-1] == "ValueError: as it were"
    assert len(steps["floods"]["log"]) == gpu_run.LOG_LINES and steps["floods"]["result"] == {"n": 2}
    assert json.loads(one.file.read_text()) == one.result


@posix
@pytest.mark.parametrize("name", ["hangs", "hangs with a child"])
def test_what_hangs_is_ended_with_its_children_and_keeps_what_it_found(run, name):
    one, began = run(), time.monotonic()
    assert one.all([toy(name, 4), toy("good")])
    entry = one.result["steps"][name]
    assert time.monotonic() - began < 60 and entry["status"] == "hang" and entry["reason"] == "it was ended after its 4 s"
    assert set(entry["result"]) == {"half" if name == "hangs" else "child"} and one.result["steps"]["good"]["status"] == "ok"
    if "child" in entry["result"]:
        assert gone(entry["result"]["child"])


@posix
def test_a_step_leaves_no_child(run):
    one = run()
    assert one.all([toy("leaves a child")]) and one.result["steps"]["leaves a child"]["status"] == "ok"
    assert gone(one.result["steps"]["leaves a child"]["result"]["child"])


@posix
def test_nothing_more_is_tried_on_a_gpu_that_is_lost(run, monkeypatch):
    monkeypatch.setitem(TOYS, "alive", "sys.exit(1)")
    one = run(jobs=2)
    assert not one.all([toy("good"), toy("hangs", 600, beside=True), toy("dies", beside=True), toy("slow")])
    steps = one.result["steps"]
    assert {name: steps[name]["status"] for name in steps} == {"good": "ok", "dies": "crash", "hangs": "no time", "slow": "no time"}
    assert all("does not answer any more" in steps[name]["reason"] for name in ("hangs", "slow")) and json.loads(one.file.read_text()) == one.result
    assert not one.running


@posix
def test_the_gpu_is_not_asked_after_when_nothing_is_left_to_do(run, monkeypatch):
    monkeypatch.setitem(TOYS, "alive", "sys.exit(1)")
    assert run().all([toy("good"), toy("dies")])


@posix
def test_an_interrupted_run_leaves_no_process(run, monkeypatch):
    one, started = run(jobs=2), []
    begin, sleep = gpu_run.start, time.sleep

    def interrupted(seconds):
        monkeypatch.setattr(gpu_run.time, "sleep", sleep)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_run, "start", lambda *given: started.append(begin(*given)) or started[-1])
    monkeypatch.setattr(gpu_run.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        one.all([toy("hangs", beside=True), toy("hangs with a child", beside=True)])
    assert len(started) == 2 and all(running.process.returncode == -9 for running in started)


def test_the_deadline_holds_and_a_later_run_goes_on(run):
    one = run(seconds=30.0)
    assert one.all([toy("good"), gpu_run.Step("slow", 30, 60)])
    assert one.result["steps"]["slow"]["status"] == "no time" and "run this again" in one.result["steps"]["slow"]["reason"]
    again = run(steps={**one.result["steps"], "bad": {"status": "wrong", "seconds": 1.0, "reason": "", "log": [], "result": None}})
    before = dict(again.result["steps"]["good"])
    assert again.all([toy("good"), toy("slow"), toy("bad")])
    assert again.result["steps"]["good"] == before and again.result["steps"]["slow"]["status"] == "ok"
    assert again.result["steps"]["bad"]["seconds"] == 1.0  # settled: only other sources can change it


@posix
def test_a_step_that_the_deadline_cuts_did_not_hang(run):
    one, began = run(seconds=5.0), time.monotonic()
    assert one.all([toy("slow", 600), toy("hangs", 600)])
    entry = one.result["steps"]["hangs"]
    assert (entry["status"], entry["result"]) == ("no time", {"half": 1}) and "run this again" in entry["reason"] and time.monotonic() - began < 60


def test_what_an_earlier_run_saw_stays_until_the_step_runs_again(run):
    hang = {"status": "hang", "seconds": 9.0, "reason": "it was ended after its 9 s", "log": ["where"], "result": {"half": 1}}
    one = run(steps={"slow": hang, "good": hang})
    assert one.all([gpu_run.Step("slow", 30, 600), toy("good")])
    assert one.result["steps"]["slow"] == hang and one.result["steps"]["good"]["status"] == "ok"


def test_what_times_is_not_overtaken_by_what_comes_later(run):
    one = run(jobs=3)
    assert one.all([toy("slow", beside=True), toy("tells"), toy("good", beside=True)])
    assert list(one.result["steps"]) == ["slow", "tells", "good"]


def test_a_step_that_waits_holds_nothing_else_up(run):
    one = run(jobs=2)
    assert one.all([toy("slow", beside=True), toy("tells", beside=True, after=("slow",)), toy("good", beside=True)])
    assert list(one.result["steps"]) == ["good", "slow", "tells"]


def test_a_result_that_cannot_be_written_ends_nothing(run, tmp_path, capsys):
    (tmp_path / "sub").write_text("a file where the folder should be")
    one = run()
    assert one.all([toy("good"), toy("slow")]) and [e["status"] for e in one.result["steps"].values()] == ["ok", "ok"]
    assert "could not be written" in capsys.readouterr().out


def test_what_times_runs_alone_and_waits_for_what_it_needs(run):
    spans = {}
    one = run(jobs=3)
    keep = one.keep
    one.keep = lambda name, entry: (spans.__setitem__(name, len(one.running)), keep(name, entry))
    assert one.all([toy("slow", beside=True), toy("raises", beside=True), toy("tells", after=("raises", "slow")), toy("good")])
    assert spans["tells"] == spans["good"] == 0 and list(one.result["steps"]) == ["raises", "slow", "tells", "good"]
    assert one.result["steps"]["tells"]["result"] == {"bad": ["raises"]}
