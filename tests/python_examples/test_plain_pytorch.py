"""The example in plain PyTorch, from the command line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "python_examples"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(EXAMPLES / "plain_pytorch.py"), *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("topk", [1.0, 0.05])
def test_every_way_is_exact_at_topk_1_and_differs_below(topk):
    done = run("--tiny", "--topk", str(topk))
    assert done.returncode == 0, done.stderr
    ways = {re.split(r"[ ,:]", line)[0]: float(line.split("against dense ")[1]) for line in done.stdout.splitlines() if "against dense" in line}
    assert set(ways) == {"sparse_attention", "select_blocks", "two", "spas_sage2_attn_meansim_topk_cuda"}
    for way, error in ways.items():
        assert error < 1e-5 if topk == 1 else 1e-5 < error < 2, way
    assert f"density {1 if topk == 1 else 2 / 32:.3f}" in done.stdout  # of 32 key blocks 0.05 keeps 2
    assert re.search(r"dense took [\d.]+ times as long, in this run on this machine", done.stdout)


def test_a_wrong_argument_gets_a_sentence():
    done = run("--topk", "2")
    assert done.returncode == 2 and "argument --topk: must be a number above 0 to 1, got '2'" in done.stderr


def test_the_readme_names_scripts_that_exist():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(\w+\.py)`", text)) == {p.name for p in EXAMPLES.glob("*.py")} - {"command_line.py", "tiny_parts.py"}
