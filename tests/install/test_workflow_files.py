"""The files in .github/workflows can be read, and every command, path and target in them exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROGRAMS = {"apt-get", "git", "bash", "make", "python", "comfy", "mv"}
ON_WINDOWS = {"python"}
MODULES = {"pip", "pytest", "build", "sparge_kernels"}
EXTRAS = re.compile(r"^\.\[(\w+)\]$")


def jobs(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]


def commands(job: dict) -> list[list[str]]:
    lines = [line for step in job["steps"] for line in step.get("run", "").splitlines()]
    return [shlex.split(part) for line in lines for part in line.split("&&")]


def test_both_files_are_there():
    assert [p.name for p in FILES] == ["release.yml", "test.yml"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_file_can_be_read_and_asks_for_nothing_more_than_it_needs(path):
    read = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert read["name"] == path.stem and read[True] and read["permissions"] == {"contents": "read"}  # YAML 1.1 reads the key `on` as true
    for name, job in read["jobs"].items():
        assert job["timeout-minutes"] <= 60, name
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), step
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step.get("uses", "actions/checkout@v1")), step


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_command_and_path_exists(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1], re.M)
    for name, job in jobs(path).items():
        matrix = job.get("strategy", {}).get("matrix", {})
        windows = any("windows" in system for system in [job["runs-on"], *matrix.get("os", [])])
        for words in commands(job):
            assert words[0] in (ON_WINDOWS if windows else PROGRAMS), f"{name}: {words}"
            if words[0] == "make":
                assert set(words[1:]) <= targets, words
            if words[:2] == ["python", "-m"]:
                assert words[2] in MODULES, words
            if words[0] == "bash" or words[:3] == ["python", "-m", "pytest"]:
                for named in words[1 if words[0] == "bash" else 3 :]:
                    assert (ROOT / named).exists(), named
            for extra in filter(None, map(EXTRAS.match, words)):
                assert extra[1] in extras, words


def test_the_matrix_is_what_the_readme_and_pyproject_say():
    matrix = jobs(ROOT / ".github" / "workflows" / "test.yml")["kernels"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.10", "3.11", "3.12", "3.13"] and matrix["os"] == ["ubuntu-latest", "windows-latest"]
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_whole_test_command_is_the_readmes():
    assert "make test\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8") and "\nmake test\n" in (ROOT / "README.md").read_text(encoding="utf-8")
