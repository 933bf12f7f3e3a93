"""What a user has before the pack comes: this repository as something to clone, interpreters, environments and a home folder of their own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import install
import pytest
from computer import ROOT, Environment, Home, commit
from required import missing


@pytest.fixture(scope="session")
def tree():
    """The ComfyUI tree in use, where .venv has its packages."""
    if not (install.comfyui_tree() / "main.py").is_file() or not install.venv_python().is_file():
        missing("a ComfyUI tree or .venv")
    return install.comfyui_tree()


@pytest.fixture(scope="session")
def new_home(tmp_path_factory):
    return lambda: Home(tmp_path_factory.mktemp("user"))


@pytest.fixture(scope="session")
def new_environment(tmp_path_factory):
    return lambda user, interpreter=Path(sys.executable): Environment(user, tmp_path_factory.mktemp("venv") / "v", interpreter)


@pytest.fixture(scope="session")
def pypi(tmp_path_factory):
    """Python packages can be downloaded."""
    folder = tmp_path_factory.mktemp("pypi")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), "setuptools"]
    if subprocess.run(command, capture_output=True).returncode != 0:
        missing("PyPI")


@pytest.fixture(scope="session")
def repository(tmp_path_factory):
    """A git repository with one commit of the files that git knows here and those that it would add, as they are now."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        missing("git, or this folder as a git repository")
    folder = tmp_path_factory.mktemp("repository") / "ComfyUI-SpargeAttention"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    commit(folder, "init", "--quiet")
    return folder


@pytest.fixture(scope="session")
def packaged(repository):
    """The files that the registry's package has: what git tracks but what .comfyignore names, both by git's own rules."""

    def listed(*options: str) -> set[str]:
        done = subprocess.run(["git", "ls-files", "-z", "--cached", *options], cwd=repository, capture_output=True, text=True, check=True)
        return set(filter(None, done.stdout.split("\0")))

    return listed() - listed("--ignored", "--exclude-from=.comfyignore")


@pytest.fixture(scope="session")
def package(repository, packaged, tmp_path_factory):
    """The same as a zip file."""
    target = tmp_path_factory.mktemp("package") / "node.zip"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(packaged):
            archive.write(repository / name, name)
    return target
