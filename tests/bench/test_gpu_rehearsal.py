"""The first ten minutes on a GPU without one: a whole rehearsal with accidents, on an emulated H200."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import bench_gpu
import gpu_rehearsal
import pytest

PROGRAMS = Path(bench_gpu.__file__).resolve().parent


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """(printed, result, exit status, seconds, file of the result) of the whole program on the emulated GPU, with accidents."""
    folder, began = tmp_path_factory.mktemp("results"), time.monotonic()
    spec = "speed Mochi 22k=hang,ptx sm_86=crash,speed Wan 14B 75k=fault,2^31=memory,ptx sm_80=wrong"
    command = [sys.executable, str(PROGRAMS / "bench_gpu.py"), "--rehearse", spec, "--results", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=560)
    (file,) = folder.iterdir()
    return done.stdout + done.stderr, json.loads(file.read_text()), done.returncode, time.monotonic() - began, file


def test_a_rehearsal_ends_in_time_with_a_complete_report(rehearsal):
    printed, result, status, seconds, _ = rehearsal
    told = {name: entry["status"] for name, entry in result["steps"].items()}
    accidents = {"speed Mochi 22k": "hang", "ptx sm_86": "crash", "speed Wan 14B 75k": "fault", "2^31": "out of memory", "ptx sm_80": "wrong"}
    about = result["steps"]["machine"]["result"]
    assert [*told] and set(told) == {"machine", *(step.name for step in bench_gpu.steps(about))}, printed
    assert {name: told[name] for name in accidents} == accidents
    fine = {name: state for name, state in told.items() if name not in accidents and not name.startswith("sanitizer")}
    assert set(fine.values()) == {"ok"}, {name: result["steps"][name] for name, state in fine.items() if state != "ok"}
    assert status == 1 and seconds < 540
    assert result["steps"]["packaged fp8"]["result"]["kernels"] == result["steps"]["packaged fp8"]["result"]["of"] == 20
    assert {row["what"] for row in result["steps"]["candidates"]["result"]["rows"]} == {*gpu_rehearsal.LABELS, "mma int8"}
    assert all(name in printed for name in told)


def test_a_second_run_does_only_what_is_left(rehearsal):
    *_, file = rehearsal
    before = json.loads(file.read_text())
    for entry in before["steps"].values():
        entry["marked"] = True  # a step that runs again has a new entry, which is not
    file.write_text(json.dumps(before))
    command = [sys.executable, str(PROGRAMS / "bench_gpu.py"), "--rehearse", "", "--results", str(file.parent), "--only", "2^31,speed Mochi"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    after = json.loads(file.read_text())["steps"]
    assert after["2^31"]["status"] == after["speed Mochi 22k"]["status"] == "ok", done.stdout + done.stderr
    again = {name for name, entry in after.items() if "marked" not in entry}
    assert again == {"machine", "2^31", "speed Mochi 22k"}
    assert {name: entry for name, entry in after.items() if name not in again} == {n: e for n, e in before["steps"].items() if n not in again}


def test_without_a_gpu():
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(PROGRAMS / "bench_gpu.py")], capture_output=True, text=True, timeout=120, env=hidden)
    assert (done.returncode, done.stdout) == (0, "Nothing was measured, because there is no GPU that PyTorch can use.\n"), done.stderr
