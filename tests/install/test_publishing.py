"""The pack through the tools that publish and install it: comfy-cli makes the registry's package, ComfyUI-Manager installs it.

Each tool comes from PyPI into an environment of its own, which takes a minute: `make test-install`. Neither the registry nor a git host is asked:
git reads the address from a folder, and an HTTP server on the loopback interface answers in the registry's place.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import shutil
import threading
import zipfile
from pathlib import Path

import comfy_server
import pytest
from computer import Machine, commit, used

pytestmark = pytest.mark.tools
ADDRESS = "https://git.invalid/somebody/ComfyUI-SpargeAttention"
OWNERS_LINES = {
    "[tool.comfy]\n": '[tool.comfy]\nPublisherId = "somebody"\n',
    "[tool.ruff]\n": f'[project.urls]\nRepository = "{ADDRESS}"\n\n[tool.ruff]\n',
}

# ComfyUI-Manager with another address for the registry, which is a constant of its own. It downloads with torchvision.
MANAGER = """import sys, comfy_launch
comfy_launch.declare_torchvision_ops()
import cm_cli.__main__ as m
m.cnr_utils.base_url = sys.argv.pop(1)
m.app()"""


@pytest.fixture(scope="module")
def comfy_cli(pypi, new_home, new_environment):
    environment = new_environment(new_home())
    environment.pip("install", "--quiet", "comfy-cli")
    return lambda folder, *arguments: environment.run("-m", "comfy_cli", "--no-json", "--skip-prompt", *arguments, cwd=folder)


@pytest.fixture(scope="module")
def published(repository, tmp_path_factory):
    """The repository as the owner publishes it: with the two lines that CONTRIBUTING's "Release" names."""
    folder = tmp_path_factory.mktemp("published") / repository.name
    shutil.copytree(repository, folder)
    text = (folder / "pyproject.toml").read_text(encoding="utf-8")
    for line, replaced in OWNERS_LINES.items():
        assert text.count(line) == 1
        text = text.replace(line, replaced)
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    commit(folder)
    return folder


def test_validation_has_nothing_to_say(comfy_cli, published):
    said = comfy_cli(published, "node", "validate")  # its exit status is 0 with warnings, too
    assert "All validation checks passed" in said and "arning" not in said and "rror" not in said, said


def test_validation_sees_what_it_should(comfy_cli, published, tmp_path):
    """The test above can fail."""
    shutil.copytree(published, tmp_path / "pack")
    (tmp_path / "pack" / "nodes" / "patch.py").write_text("exec('1')\n", encoding="utf-8")
    assert "arning" in comfy_cli(tmp_path / "pack", "node", "validate")


@pytest.fixture(scope="module")
def zip_file(comfy_cli, published):
    comfy_cli(published, "node", "pack")
    return published / "node.zip"


def test_package_of_comfy_cli_is_the_one_that_the_other_tests_load(zip_file, packaged):
    with zipfile.ZipFile(zip_file) as archive:
        assert {name for name in archive.namelist() if not name.endswith("/")} == packaged


class Registry(http.server.BaseHTTPRequestHandler):
    """Answers what ComfyUI-Manager asks before it downloads one version, and the download."""

    package: bytes

    def do_GET(self):
        if self.path.startswith("/nodes/sparge-attention/install"):
            url = f"http://127.0.0.1:{self.server.server_address[1]}/node.zip"
            body = json.dumps({"id": "1", "version": "0.1.0", "downloadUrl": url, "status": "NodeVersionStatusActive"}).encode()
        elif self.path.startswith("/nodes?"):
            body = json.dumps({"nodes": [], "totalPages": 1}).encode()
        elif self.path == "/node.zip":
            body = self.package
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def registry(package: Path):
    handler = type("Handler", (Registry,), {"package": package.read_bytes()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class Managed:
    """A ComfyUI with ComfyUI-Manager."""

    def __init__(self, tree: Path, user, environment, repository: Path):
        self.user, self.environment = user, environment
        environment.pip("install", "--quiet", "comfyui-manager")
        self.computer = Machine(user, environment)
        self.tree = user.folder / "tree"  # the Manager looks for custom_nodes beside ComfyUI's own files
        self.tree.mkdir()
        for entry in tree.iterdir():
            if entry.is_file():
                shutil.copy2(entry, self.tree / entry.name)
            elif entry.name not in ("custom_nodes", "user", "input", "output", "temp"):
                (self.tree / entry.name).symlink_to(entry)
        (self.tree / "custom_nodes").symlink_to(self.computer.base / "custom_nodes")
        # The address stays what a user would paste; git takes the folder in its place.
        (user.folder / "home" / ".gitconfig").write_text(f'[url "{repository.as_uri()}"]\n\tinsteadOf = {ADDRESS}\n', encoding="utf-8")

    def manager(self, registry: str, *arguments: str) -> str:
        return self.environment.run("-c", MANAGER, registry, *arguments, COMFYUI_PATH=str(self.tree), PYTHONPATH=str(comfy_server.HERE))


@pytest.fixture(scope="module")
def managed(tree, pypi, new_home, new_environment, repository):
    user = new_home()
    return Managed(tree, user, new_environment(user).add_project_packages(), repository)


@pytest.mark.parametrize("way", ["git address", "registry"])
def test_the_manager_installs_what_loads_and_removes_it(managed, way, zip_file):
    what, folder = (ADDRESS, "ComfyUI-SpargeAttention") if way == "git address" else ("sparge-attention@0.1.0", "sparge-attention")
    target = managed.computer.base / "custom_nodes" / folder
    with registry(zip_file) as address:
        said = managed.manager(address, "install", what, "--exit-on-fail", "--mode", "local")
        assert "[INSTALLED]" in said and "imageio>=" in said, said[-3000:]  # it runs the lines of requirements.txt one by one
        assert (target / "kernels" / "cuda" / "manifest.json").is_file()
        assert any(line.startswith("imageio==") for line in managed.environment.freeze())
        managed.computer.run(lambda server, entry: used(folder, server, entry))
        said = managed.manager(address, "uninstall", folder, "--mode", "local")
    assert "UNINSTALLED" in said and not target.exists(), said[-3000:]
