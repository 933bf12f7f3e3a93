"""The browser code's pure functions, by Node's own test runner."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from node_js import node

HERE = Path(__file__).resolve().parent


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
