"""What a user has before the pack comes: this repository as something to clone, interpreters, environments and a home folder of their own."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import install
import pytest

ROOT = install.ROOT
HIDDEN = (
    "sparge",
    "__editable__",
    "imageio",
    "pip",
    "setuptools",
    "pkg_resources",
    "_distutils_hack",
    "distutils-precedence",
    "wheel",
    "__pycache__",
)
FROM_OUTSIDE = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "COMFYUI_PATH", "SPARGE_CACHE_DIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")


def missing(what: str) -> None:
    """Skips for want of a tool; under CI=true that is a failure, so that nothing is skipped unseen."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing, and with CI=true a missing tool is a failure")
    pytest.skip(f"{what} is missing")


class Home:
    """A user's home folder; `run` starts programs that know no other, with nothing of this process's environments."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("home", "tmp"):
            (folder / name).mkdir(parents=True)

    def variables(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in FROM_OUTSIDE}
        home, tmp = str(self.folder / "home"), str(self.folder / "tmp")
        return kept | {"HOME": home, "USERPROFILE": home, "TMPDIR": tmp, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}

    def run(self, *command, cwd: Path | None = None, **variables: str) -> str:
        """What the program printed (both streams); a failure shows the end of it."""
        done = subprocess.run(
            [str(part) for part in command], cwd=cwd or self.folder, env=self.variables() | variables,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stdout[-6000:]}"
        return done.stdout

    def listing(self) -> set[str]:
        return files_below(self.folder)


class Environment:
    """A new virtual environment. pip is the project's own, told to work on this one: bootstrapping another takes longer than the test."""

    def __init__(self, user: Home, folder: Path, interpreter: Path):
        self.user, self.folder = user, folder
        user.run(interpreter, "-m", "venv", "--without-pip", folder)
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.site = Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())

    def run(self, *arguments, cwd: Path | None = None, **variables: str) -> str:
        return self.user.run(self.python, *arguments, cwd=cwd, **variables)

    def pip(self, *arguments) -> str:
        return self.user.run(sys.executable, "-m", "pip", "--python", self.python, *arguments)

    def freeze(self) -> set[str]:
        """What is installed and in which version: the lines of `pip freeze` that name a version, without starting pip."""
        found = importlib.metadata.distributions(path=[str(self.site)])
        return {f"{d.metadata['Name'].lower()}=={d.version}" for d in found}

    def add_project_packages(self) -> Environment:
        """ComfyUI's packages, torch among them, without this pack and without what it asks for: links, so that nothing is downloaded."""
        source = Path(subprocess.run([install.venv_python(), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                                     capture_output=True, text=True, check=True).stdout.strip())  # fmt: skip
        for entry in source.iterdir():
            if not entry.name.lower().startswith(HIDDEN) and not (self.site / entry.name).exists():
                (self.site / entry.name).symlink_to(entry)
        return self


def files_below(folder: Path) -> set[str]:
    """Every file and link below `folder`, but for Python's own caches."""
    found = set()
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        links = [name for name in folders if os.path.islink(os.path.join(path, name))]
        found |= {Path(path, name).relative_to(folder).as_posix() for name in (*files, *links)}
    return found


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


def commit(folder: Path, *first: str) -> None:
    """Everything in `folder` as a commit; `first` is a git command to run before."""
    identity = ("-c", "user.name=somebody", "-c", "user.email=somebody@localhost")
    for command in (first, ("add", "--all"), (*identity, "commit", "--quiet", "--message", "as it is")):
        if command:
            subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True)


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
