"""A clone and the registry's package in ComfyUI: the server loads them, a prompt runs, and removing the folder leaves nothing behind."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile

import comfy_server
import install
import pytest
from computer import NODES, Machine, used

NEEDED = {"__init__.py", "nodes/patch.py", "kernels/attention.py", "kernels/cuda/manifest.json", "kernels/cuda/src/attention_mma.cuh",
          "web/js/sparge_monitor.js", "web/docs/SpargeAttention.md", "locales/zh/nodeDefs.json", "requirements.txt", "pyproject.toml", "setup.py",
          "LICENSE", "README.md"}  # fmt: skip


@pytest.fixture(scope="module")
def machine(tree, new_home, new_environment, repository, pypi):
    user = new_home()
    environment = new_environment(user).add_project_packages()
    environment.pip("install", "--quiet", "-r", repository / "requirements.txt")
    made = Machine(user, environment)
    made.run(unused)
    return made, made.files()


def unused(server: comfy_server.ComfyServer, entry: dict) -> None:
    assert not NODES & set(server.object_info())


@pytest.mark.parametrize("way", ["git clone", "registry package"])
def test_it_loads_runs_and_leaves_nothing_behind(machine, way, repository, package):
    computer, before = machine
    folder = "ComfyUI-SpargeAttention" if way == "git clone" else "sparge-attention"
    target = computer.base / "custom_nodes" / folder
    if way == "git clone":
        subprocess.run(["git", "clone", "--quiet", repository.as_uri(), str(target)], check=True)
    else:
        with zipfile.ZipFile(package) as archive:
            archive.extractall(target)
    computer.run(lambda server, entry: used(folder, server, entry))
    shutil.rmtree(target)
    assert computer.files() == before


def test_package_has_what_runs_and_nothing_else(packaged, package, repository):
    tracked = {p.relative_to(repository).as_posix() for p in repository.rglob("*") if p.is_file() and ".git" not in p.relative_to(repository).parts}
    assert packaged >= NEEDED
    for folder in ("nodes", "kernels", "web", "locales", "workflows"):
        assert {name for name in tracked if name.startswith(folder + "/")} <= packaged, folder
    assert not [name for name in packaged if name.startswith((".", "bench/", "tests/", "tools/")) or name == "Makefile"]
    assert package.stat().st_size < 6_000_000


# What happens while ComfyUI loads a pack, watched by Python itself. ComfyUI is in before, with all that it imports.
ENTRY = """
import asyncio, importlib.util, os, sys, time
tree, root = sys.argv[1:]
sys.path.insert(0, os.path.join(root, "tools", "comfyui"))
import comfy_launch
from pathlib import Path
comfy_launch.enter(Path(tree))
import utils.install_util, nodes, server, comfy_api.latest, comfy.sample  # in main.py's order
import torch
from torch.utils._python_dispatch import TorchDispatchMode

WATCHED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.mkdir", "os.remove", "os.rename", "os.rmdir",
           "socket.connect", "socket.bind", "ctypes.dlopen", "urllib.Request")
did, watching = [], False

def audit(event, arguments):
    if watching and (event in WATCHED or event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        did.append(f"{event} {arguments[:1]}")

class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        did.append(f"torch: {function}")
        return function(*arguments, **(keywords or {}))

def refused(name):
    return lambda *arguments, **keywords: did.append(f"torch.cuda.{name}") or 0

for name in ("is_available", "device_count", "current_device", "get_device_properties", "get_device_capability", "get_device_name", "init",
             "_lazy_init", "mem_get_info", "synchronize"):
    setattr(torch.cuda, name, refused(name))
sys.addaudithook(audit)
before, watching, started = set(sys.modules), True, time.process_time()
with Watch():
    spec = importlib.util.spec_from_file_location("pack", os.path.join(root, "__init__.py"), submodule_search_locations=[root])
    pack = importlib.util.module_from_spec(spec)
    sys.modules["pack"] = pack
    spec.loader.exec_module(pack)
    found = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
    for node in found:
        node.GET_SCHEMA()
seconds, watching = time.process_time() - started, False
print("SECONDS", round(seconds, 3))
print("NODES", len(found))
print("DID", did)
print("INITIALISED", torch.cuda.is_initialized())
print("NEW", *sorted(set(sys.modules) - before))
"""


def test_loading_the_pack_does_no_work(tree, tmp_path, new_home, capsys):
    """No tensor, no GPU, no library, no process, no file, no word; and of others' modules nothing that ComfyUI had not loaded."""
    command = [sys.executable, "-c", ENTRY, str(tree), str(install.ROOT)]
    done = subprocess.run(
        command, cwd=tmp_path, env=new_home().variables() | {"PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    told = dict(line.partition(" ")[::2] for line in done.stdout.split("SECONDS", 1)[1].splitlines()[1:])
    assert int(told["NODES"]) >= len(NODES) and told["DID"] == "[]" and told["INITIALISED"] == "False", told
    new = told["NEW"].split()
    others = {name for name in new if name.split(".")[0] not in (*sys.stdlib_module_names, "pack")}
    assert not others, others
    assert done.stdout.split("SECONDS")[0].count("parge") == 0
    with capsys.disabled():  # told, not asserted: it depends on the machine
        print(f"[loading the pack took {done.stdout.split('SECONDS', 1)[1].split()[0]} s of one core]", end="")
