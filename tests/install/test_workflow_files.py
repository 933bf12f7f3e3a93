"""The files in .github/workflows can be read, ask for no more than they need, and every command, path and target in them exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROGRAMS = {"apt-get", "git", "bash", "make", "python", ".venv/bin/python", "comfy", "mv", "gh"}
ON_WINDOWS = {"python"}
MODULES = {"pip", "pytest", "build", "zipfile", "sparge_kernels"}
PINNED = re.compile(r"uses: actions/([a-z-]+)@[0-9a-f]{40} # v\d+\.\d+\.\d+")
ASKED = {
    ("release", "build"): {"contents": "read", "id-token": "write", "attestations": "write"},  # the last two sign the provenance
    ("release", "page"): {"contents": "write"},  # the release page, and for that reason nothing of the repository runs there
}
"""What a job may do beyond reading."""
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
        assert job.get("permissions") == ASKED.get((path.stem, name)), name
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), step
            if "checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False, step  # what runs afterwards finds no token in .git
                assert "repository" not in step["with"] or re.fullmatch(r"[0-9a-f]{40}", step["with"]["ref"]), step


def test_a_job_that_may_write_runs_nothing_of_the_repository():
    for path in FILES:
        for name, job in jobs(path).items():
            if (job.get("permissions") or {}).get("contents") == "write":
                assert not [step for step in job["steps"] if "checkout" in step.get("uses", "")], name
                assert {words[0] for words in commands(job)} <= {"gh"}, name


def test_actions_are_pinned_by_digest_and_say_their_version():
    """A tag can be moved by whoever owns the action; one version of each, so that an update is seen in every place."""
    used = [line.strip().removeprefix("- ") for path in FILES for line in path.read_text(encoding="utf-8").splitlines() if "uses:" in line]
    assert all(PINNED.fullmatch(line) for line in used), used
    assert len(set(used)) == len({PINNED.fullmatch(line)[1] for line in used}), sorted(set(used))


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
            words[0] = words[0].removeprefix(".venv/bin/")
            if words[:2] == ["python", "-m"]:
                assert words[2] in MODULES, words
            if words[:2] == ["python", "setup.py"]:
                options = {word.removeprefix("--") for word in words[3:]}
                assert options <= {name.rstrip("=") for name in re.findall(r'^ +\("([a-z-]+=?)",', SETUP, re.M)}, words
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


def test_the_oldest_torch_and_comfyui_are_those_of_the_readme():
    text, readme = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"), (ROOT / "README.md").read_text(encoding="utf-8")
    torch, comfyui = re.search(r" torch==([\d.]+)\.0 ", text)[1], re.search(r"ref: [0-9a-f]{40} # ([\d.]+)", text)[1]
    assert f"torch {torch} or newer" in readme and f"ComfyUI {comfyui} or newer" in readme
