"""A user's machine for the tests of installing: a home folder, environments, a ComfyUI with a small model."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import comfy_server
import demo
import demo_model
import install
import pytest

ROOT = install.ROOT
MODEL = "install.safetensors"
NODES = {"SpargeAttention", "SpargeMonitor", "SpargeReport"}
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
        self.shared = folder.with_name("shared")
        self.site = Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())

    def run(self, *arguments, cwd: Path | None = None, **variables: str) -> str:
        return self.user.run(self.python, *arguments, cwd=cwd, **variables)

    def pip(self, *arguments) -> str:
        return self.user.run(sys.executable, "-m", "pip", "--python", self.python, *arguments)

    def freeze(self) -> set[str]:
        """What is installed and in which version: the lines of `pip freeze` that name a version, without starting pip."""
        found = [*importlib.metadata.distributions(path=[str(self.shared)]), *importlib.metadata.distributions(path=[str(self.site)])]
        versions = {d.metadata["Name"].lower(): d.version for d in found}  # the environment's own is what Python imports
        return {f"{name}=={number}" for name, number in versions.items()}

    def add_project_packages(self) -> Environment:
        """ComfyUI's packages, torch among them, without this pack and without what it asks for. Nothing is downloaded, and as they lie outside the
        environment pip leaves them alone: what it would change, it installs anew beside them."""
        command = [str(install.venv_python()), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        source = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
        self.shared.mkdir()
        for entry in source.iterdir():
            if not entry.name.lower().startswith(HIDDEN):
                (self.shared / entry.name).symlink_to(entry)
        (self.site / "shared.pth").write_text(f"{self.shared}\n", encoding="utf-8")
        return self


def files_below(folder: Path) -> set[str]:
    """Every file and link below `folder`, but for Python's own caches."""
    found = set()
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        links = [name for name in folders if os.path.islink(os.path.join(path, name))]
        found |= {Path(path, name).relative_to(folder).as_posix() for name in (*files, *links)}
    return found


def commit(folder: Path, *first: str) -> None:
    """Everything in `folder` as a commit; `first` is a git command to run before."""
    identity = ("-c", "user.name=somebody", "-c", "user.email=somebody@localhost")
    for command in (first, ("add", "--all"), (*identity, "commit", "--quiet", "--message", "as it is")):
        if command:
            subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True)


def graph(info: dict) -> dict:
    """Two steps of a small model; with the pack's nodes where the server has them."""
    sampler = {"seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    prompt = {
        "loader": ("UNETLoader", {"unet_name": MODEL, "weight_dtype": "default"}),
        "text": ("SpargeDemoConditioning", {"tokens": 8, "dim": 4096, "seed": 3}),
        "latent": ("EmptyHunyuanLatentVideo", {"width": 96, "height": 64, "length": 9, "batch_size": 1}),
        "sampler": ("KSampler", {**sampler, "model": ["loader", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["latent", 0]}),
        "decode": ("SpargeDemoDecode", {"samples": ["sampler", 0], "scale": 1, "between": 2}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "video"}),
    }
    if "SpargeAttention" in info:
        settings = {"min_tokens": 0}
        demo.fill_defaults(settings, info["SpargeAttention"])
        prompt["sparge"] = ("SpargeAttention", {"model": ["loader", 0], **settings})
        prompt["monitor"] = ("SpargeMonitor", {"model": ["sparge", 0], "measure_dense": True})
        prompt["sampler"][1]["model"] = ["monitor", 0]
        prompt["report"] = ("SpargeReport", {"model": ["monitor", 0], "data": ["sampler", 0]})
        prompt["json"] = ("PreviewAny", {"source": ["report", 3]})
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in prompt.items()}


class Machine:
    """A user's home with a ComfyUI base folder in it, and ComfyUI's packages."""

    def __init__(self, user, environment):
        self.user, self.python, self.base = user, environment.python, user.folder / "comfyui"
        comfy_server.ComfyServer(self.base)  # makes the folders
        shutil.copytree(comfy_server.HERE / "fixture_pack", self.base / "custom_nodes" / comfy_server.FIXTURE_FOLDER)
        demo_model.write_demo_model(self.base / "models" / "diffusion_models" / MODEL)

    def run(self, look) -> None:
        """Starts the server, samples once, and lets `look` see it."""
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(sys, "executable", str(self.python))  # what the server runs on
            monkeypatch.setattr(comfy_server, "place", lambda source, target: None)  # what lies in custom_nodes was put there by the test
            for name, value in self.user.variables().items():
                monkeypatch.setenv(name, value)
            with comfy_server.ComfyServer(self.base) as server:
                look(server, server.queue(graph(server.object_info())))

    def files(self) -> set[str]:
        """All but the pictures that the user asked for and ComfyUI's own log; its temp folder is emptied at the next start."""
        return {name for name in self.user.listing() if not name.startswith(("comfyui/output/", "comfyui/temp/", "comfyui/user/comfyui"))}


def used(folder: str, server: comfy_server.ComfyServer, entry: dict) -> None:
    """The nodes come from `folder`, the browser's part and the texts are served, and attention ran sparse."""
    info = server.object_info()
    assert set(info) >= NODES and {info[name]["python_module"] for name in NODES} == {f"custom_nodes.{folder}"}
    assert f"/extensions/{folder}/js/sparge_monitor.js" in server.get("/extensions")
    assert "SpargeAttention" in server.get("/i18n")["zh"]["nodeDefs"]
    (run,) = json.loads(entry["outputs"]["json"]["text"][0])["runs"]
    assert {cell["sparse_calls"] for cell in run["cells"]} == {1}
    problems = [line for line in server.log().splitlines() if "IMPORT FAILED" in line or "Traceback" in line]
    assert not problems, server.log_tail()
