"""kernels/ and nodes/ hold what their annotations say, every backend is a `Backend`, and the checker that tells so sees what is wrong.

The pack is checked as ComfyUI loads it, as a package with both folders in it: what a room of nodes/ takes from kernels/ has its type there. Whether
something that may be None is None hangs on the call, which no checker follows: that alone is not asked (`strict_optional` in pyproject.toml).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

BACKENDS = {
    "a function that it lacks": ("def self_test_devices(", "def self_tests("),
    "another argument": ("def blocks_form(call: Call, rule: Rule)", "def blocks_form(call: Call, rule: int)"),
    "another result": ("def status() -> Availability:", "def status() -> str:"),
}
"""What could be wrong with a backend's module: text of backends/torch.py, and what stands there instead."""


@pytest.fixture
def check(tmp_path):
    """Runs the checker over `pack.nodes` and `pack.kernels`, where `pack` is this folder or a copy, and returns what it says.

    `follow="skip"`: what torch and numpy hand over has any type, so that they need not be read.
    """

    def run(pack: Path, *packages: str, follow: str = "normal") -> str:
        (tmp_path / "pack").symlink_to(pack, target_is_directory=True)
        words = [word for name in packages for word in ("-p", f"pack.{name}")]
        options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache" / follow), "--no-error-summary"]
        command = [sys.executable, "-m", "mypy", *options, "--follow-imports", follow, *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode in (0, 1) and not done.stderr, done.stderr  # no checker, or one that fell, says nothing on the other channel
        return done.stdout

    return run


def test_what_the_annotations_say_is_true(check):
    assert check(ROOT, "kernels", "nodes") == ""


@pytest.mark.parametrize("wrong", BACKENDS)
def test_a_backend_that_breaks_the_protocol_is_noticed(check, tmp_path, wrong):
    right, instead = BACKENDS[wrong]
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "kernels", copy / "kernels", ignore=shutil.ignore_patterns("cubins", "__pycache__"))
    (copy / "__init__.py").touch()
    backend = copy / "kernels" / "backends" / "torch.py"
    source = backend.read_text(encoding="utf-8")
    assert right in source
    backend.write_text(source.replace(right, instead), encoding="utf-8")
    said = check(copy, "kernels", follow="skip")
    assert [line for line in said.splitlines() if line.startswith("pack/kernels/backends/__init__.py") and '"Backend"' in line], said
