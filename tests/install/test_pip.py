"""`pip install .` and the wheel on every Python that is found, and `pip install -r requirements.txt` beside ComfyUI: nothing else changes."""

from __future__ import annotations

import ast
import glob
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import read_configuration

ROOT = Path(__file__).resolve().parents[2]
SUPPORTED = ((3, 10), (3, 11), (3, 12), (3, 13))
ASK = "import sys, venv; print(*sys.version_info[:2])"
BROUGHT = {"numpy"}
IMPORTED_AS = {"pillow": "PIL"}
COMFYUIS_OWN = {"comfy", "comfy_api", "comfyui_version", "folder_paths"}

# Where torch is not to be had: the files are all there, this Python compiles them, and the device code is found without torch.
WITHOUT_TORCH = """
import compileall, importlib.metadata, pathlib, sys
site = pathlib.Path(sys.argv[1])
found = importlib.metadata.distribution("sparge-attention")
assert [line.split(">")[0] for line in found.requires if "extra ==" not in line] == ["numpy"], found.requires
assert found.metadata["License-Expression"] == "Apache-2.0" and [f for f in found.files if f.name == "LICENSE"], found.metadata
files = [str(site / f) for f in found.files if f.parts[0] == "sparge_kernels" and f.suffix == ".py"]
assert files and all(compileall.compile_file(f, quiet=1) for f in files)
import types
package = types.ModuleType("sparge_kernels")
package.__path__ = [str(site / "sparge_kernels")]
sys.modules["sparge_kernels"] = package
from sparge_kernels import config
from sparge_kernels.cuda import loader
variant = next(iter(config.variants("sm_89")))
assert loader.default().find("sm_89", variant).origin == "packaged for sm_89"
print(found.version)
"""


def interpreter(minor: tuple[int, int]) -> Path | None:
    """This Python, one on PATH, or one that pyenv or uv installed."""
    name = ".".join(map(str, minor))
    homes = [Path.home() / ".pyenv" / "versions" / f"{name}.*", Path.home() / ".local" / "share" / "uv" / "python" / f"cpython-{name}*"]
    candidates = [sys.executable, shutil.which(f"python{name}")]
    candidates += [found for home in homes for found in sorted(glob.glob(str(home / "bin" / "python")))]
    for candidate in filter(None, candidates):
        said = subprocess.run([candidate, "-c", ASK], capture_output=True, text=True)
        if said.stdout.split() == [str(part) for part in minor]:
            return Path(candidate)
    return None


def version() -> str:
    return re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]


@pytest.fixture(scope="session")
def wheel(pypi, repository, new_home):
    """Built once, as `pip wheel .` builds it, with the build requirements of pyproject.toml."""
    user = new_home()
    user.run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", user.folder / "wheel", repository)
    (built,) = (user.folder / "wheel").iterdir()
    return built


def check(environment, *what) -> None:
    """`pip install *what` and `pip uninstall`: the package, and with dependencies numpy; nothing is left behind."""
    assert environment.freeze() == set()
    environment.pip("install", "--quiet", *what)
    lines, ours = environment.freeze(), f"sparge-attention=={version()}"
    assert ours in lines and {line.split("==")[0] for line in lines - {ours}} == (set() if "--no-deps" in what else BROUGHT)
    assert environment.run("-c", WITHOUT_TORCH, environment.site).split() == [version()]

    environment.pip("uninstall", "--quiet", "--yes", "sparge-attention")
    assert installed(environment) == set() and environment.freeze() == lines - {ours}


@pytest.fixture(params=SUPPORTED, ids=lambda m: "Python " + ".".join(map(str, m)))
def every_python(request, new_home, new_environment):
    found = interpreter(request.param)
    if found is None:  # no package manager of the tests can bring one, so that this is not a failure in CI
        pytest.skip(f"there is no Python {'.'.join(map(str, request.param))} here")
    return new_environment(new_home(), found)


def test_the_wheel_on_every_python(every_python, wheel):
    assert wheel.name == f"sparge_attention-{version()}-py3-none-any.whl"
    check(every_python, "--no-deps", "--no-index", wheel)


@pytest.mark.tools
def test_pip_install_on_every_python(every_python, pypi, repository):
    """Built by each Python itself, with what the package needs."""
    check(every_python, repository)


def installed(environment) -> set[str]:
    """Our files: by their name, for a leftover is in no list of pip's."""
    return {str(p.relative_to(environment.site)) for p in environment.site.glob("*sparge*/**/*") if p.is_file() and "__pycache__" not in p.parts}


def test_beside_torch_the_self_test_passes_and_nothing_else_changes(wheel, repository, new_home, new_environment):
    """In an environment like ComfyUI's: its packages stay as they are, by the package and by requirements.txt; only imageio is new."""
    environment = new_environment(new_home()).add_project_packages()
    before = environment.freeze()
    assert any(line.startswith("torch==") for line in before) and not any(line.startswith("imageio==") for line in before)

    environment.pip("install", "--quiet", "-r", repository / "requirements.txt")
    (new,) = environment.freeze() - before
    assert new.startswith("imageio==") and before <= environment.freeze()

    environment.pip("install", "--quiet", wheel)
    assert environment.freeze() - before - {new} == {f"sparge-attention=={version()}"} and before <= environment.freeze()
    files = environment.user.listing()
    said = environment.run("-m", "sparge_kernels", CUDA_VISIBLE_DEVICES="")
    assert environment.user.listing() == files
    assert said.startswith(f"sparge_kernels {version()}, ") and "backend torch: available" in said and "WRONG" not in said and said.count(" ok") == 4

    environment.pip("uninstall", "--quiet", "--yes", "sparge-attention")
    assert installed(environment) == set() and environment.freeze() == before | {new}


def asked_by_the_package() -> set[str]:
    return set(read_configuration(ROOT / "pyproject.toml")["project"]["dependencies"])


def asked_by_the_pack() -> set[str]:
    return set((ROOT / "requirements.txt").read_text(encoding="utf-8").split())


def modules_of(lines: set[str]) -> set[str]:
    """The modules that requirements bring, by the name they are imported by."""
    names = {re.match(r"[\w.-]+", line)[0].lower() for line in lines if re.match(r"[A-Za-z]", line)}
    return {IMPORTED_AS.get(name, name) for name in names}


def imported(folder: str) -> set[str]:
    """The modules, of others than Python and this project, that the sources in `folder` import anywhere."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            found |= {name.split(".")[0] for name in names}
    return found - sys.stdlib_module_names - {"sparge_kernels"}


@pytest.mark.parametrize("lines", [asked_by_the_package, asked_by_the_pack], ids=["package", "pack"])
def test_requirements_are_plain_lines_without_torch(lines):
    """ComfyUI-Manager takes neither options nor paths, and a manager must have no reason to replace a CUDA build of torch."""
    for line in lines():
        assert re.fullmatch(r"[A-Za-z][\w.-]*>=[\d.]+", line) and not line.lower().startswith(("torch", "nvidia", "triton")), line


def test_the_package_asks_for_what_kernels_imports():
    assert imported("kernels") == {"torch"} | modules_of(asked_by_the_package())


def test_the_pack_asks_for_what_nodes_imports_and_comfyui_does_not_bring(tree):
    brought = modules_of(set((tree / "requirements.txt").read_text(encoding="utf-8").splitlines()))
    assert imported("nodes") - brought - COMFYUIS_OWN == modules_of(asked_by_the_pack())


def test_versions_agree():
    assert f'__version__ = "{version()}"' in (ROOT / "kernels" / "__init__.py").read_text(encoding="utf-8")
