"""The browser code's pure functions, by Node's own test runner."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
OLDEST = (18, 19)  # Debian 12 has it; web/package.json tells it that the .js files are modules


def node() -> str:
    """Node's path; without one that is new enough the test is skipped, and fails with CI=true."""
    found = shutil.which("node")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout.strip() if found else "none"
    if not found or tuple(int(part) for part in version.removeprefix("v").split(".")[:2]) < OLDEST:
        why = f"Node {OLDEST[0]}.{OLDEST[1]} or newer is missing (found: {version})"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{why}, and with CI=true a missing tool is a failure")
        pytest.skip(why)
    return found


@pytest.mark.parametrize("file", sorted(HERE.glob("*.test.mjs")), ids=lambda path: path.stem)
def test_pure_functions(file):
    done = subprocess.run([node(), "--test", "--test-reporter=spec", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pass 0" not in done.stdout, done.stdout


def test_every_script_is_read_without_errors():
    """The ones that need a page are only parsed."""
    scripts = sorted((HERE.parents[1] / "web").rglob("*.js"))
    assert len(scripts) > 5
    for script in scripts:
        done = subprocess.run([node(), "--check", str(script)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
