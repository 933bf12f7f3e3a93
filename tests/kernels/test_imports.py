"""Who imports whom is what docs/design/architecture.md says, nothing but torch and numpy is imported, and importing does no work.

A room that is added, split or renamed, or that imports another one than before, changes its row in that document: the failing test prints the row.
"""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS, NODES = ROOT / "kernels", ROOT / "nodes"
ARCHITECTURE = ROOT / "docs" / "design" / "architecture.md"

FREE = {"block_mask", "errors"}
"""Rooms of kernels/ that everybody may import and no row names: they hold no logic of their own that anything could depend on in a circle."""


def python_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.py") if "__pycache__" not in p.parts)


def imports(path: Path, package: Path):
    """(level, module, names, type_only) of every import statement; level 0 is absolute."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    type_only = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            type_only |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name, [], id(node) in type_only
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [a.name for a in node.names], id(node) in type_only


def stem(path: Path, package: Path) -> str:
    """'attention', 'backends', 'backends.torch', '__init__'."""
    parts = list(path.relative_to(package).with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts = parts[:-1]
    return ".".join(parts)


def targets(path: Path, package: Path, level: int, module: str, names: list[str]) -> set[str]:
    """The rooms of the package that a relative import reaches."""
    base = path.parent
    for _ in range(level - 1):
        base = base.parent
    base = base.joinpath(*module.split(".")) if module else base
    assert base.is_relative_to(package), f"{path} imports from outside the package"
    if not base.is_dir():
        return {stem(base.with_suffix(".py"), package)}
    reached = set()
    for name in names:
        inner = base / name
        is_room = inner.with_suffix(".py").is_file() or inner.is_dir()
        reached.add(stem(inner.with_suffix(".py") if is_room else base / "__init__.py", package))
    return reached


def rooms(package: Path) -> dict[str, set[str]]:
    """What every room of the package imports of it when it runs, but for FREE."""
    found = {}
    for path in python_files(package):
        own = stem(path, package)
        found[own] = set()
        for level, module, names, type_only in imports(path, package):
            outside = package == NODES and level > len(path.relative_to(NODES).parts)  # test_nodes_reach_kernels_through_one_crossing
            if level and not type_only and not outside:
                found[own] |= targets(path, package, level, module, names) - (FREE if package == KERNELS else set()) - {own}
    return found


def told(package: Path) -> dict[str, set[str]]:
    """The same, of the document's table under the heading that names the folder: room, what it does, what it imports."""
    part = re.search(rf"^### `{package.name}/`\n(.*?)(?=^#|\Z)", ARCHITECTURE.read_text(encoding="utf-8"), re.S | re.M)[1]
    cells = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("| `")]
    return {name: set(re.findall(r"`([\w.]+)`", row[2])) for row in cells for name in re.findall(r"`([\w.]+)`", row[0])}


@pytest.mark.parametrize("package", [KERNELS, NODES], ids=lambda p: p.name)
def test_who_imports_whom_is_what_the_document_says(package):
    """Every room has a row, every row is a room, and a row names what the room imports: no more, no less."""
    found, rows = rooms(package), told(package)
    wrong = [f"{name} has no row" for name in sorted(found.keys() - rows.keys())]
    wrong += [f"there is no room {name}" for name in sorted(rows.keys() - found.keys())]
    for name in sorted(found.keys() & rows.keys()):
        if found[name] != rows[name]:
            wrong.append(f"the row of {name} must end: | {', '.join(f'`{other}`' for other in sorted(found[name]))} |")
    assert not wrong, f"{ARCHITECTURE.relative_to(ROOT)}: " + "\n".join(wrong)


@pytest.mark.parametrize("package", [KERNELS, NODES], ids=lambda p: p.name)
def test_imports_run_one_way(package):
    tuple(graphlib.TopologicalSorter(rooms(package)).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", python_files(KERNELS), ids=lambda p: str(p.relative_to(KERNELS)))
def test_kernels_import_only_stdlib_numpy_torch(path):
    place = path.relative_to(KERNELS).as_posix()
    for level, module, _, _ in imports(path, KERNELS):
        if not level:
            assert module.split(".")[0] in (*sys.stdlib_module_names, "numpy", "torch"), f"{place} imports {module}"


def test_reference_shares_block_mask_with_the_backends_alone():
    source = (ROOT / "tools" / "reference.py").read_text(encoding="utf-8")
    modules = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    assert {module for module in modules if module.startswith("sparge_kernels")} == {"sparge_kernels.block_mask"}
    assert "import sparge_kernels" not in source


def test_block_mask_needs_order_for_the_type_only():
    for level, module, names, type_only in imports(KERNELS / "block_mask.py", KERNELS):
        assert not level or type_only, f"block_mask imports {module} {names} when it runs"


def test_no_path_edits_and_no_logging_setup():
    for path in [*python_files(KERNELS), *python_files(NODES)]:
        text = path.read_text(encoding="utf-8")
        for forbidden in ("sys.path", "logging.basicConfig", "addHandler", "torch.cuda.set_device"):
            own_program = forbidden == "sys.path" and path == KERNELS / "__main__.py"  # started as a folder, it must find itself
            assert own_program or forbidden not in text, f"{path.relative_to(ROOT)} holds {forbidden}"
        for node in ast.walk(ast.parse(text)):
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{path.relative_to(ROOT)}:{node.lineno}: a bare except"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and path.is_relative_to(KERNELS) and path.name != "__main__.py":
                assert node.func.id != "print", f"{path.relative_to(ROOT)}:{node.lineno} prints"


def test_public_functions_take_no_kwargs():
    for path in python_files(KERNELS):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                assert node.args.kwarg is None, f"{path.name}: {node.name} takes **{node.args.kwarg.arg}"


@pytest.mark.parametrize("path", python_files(NODES), ids=lambda p: str(p.relative_to(NODES)))
def test_nodes_reach_kernels_through_one_crossing(path):
    for level, module, names, _ in imports(path, NODES):
        if level == 0:
            assert module.split(".")[0] not in ("kernels", "sparge_kernels", "nodes"), f"{path.name} imports {module} by a top-level name"
            continue
        depth = len(path.relative_to(NODES).parts)
        if level == depth:  # inside nodes/
            continue
        reached = [module.split(".")[0]] if module else names
        assert level < depth or level == depth + 1, f"{path.name} imports from above the pack"
        if "kernels" in reached:
            assert path.name == "_kernels.py", f"{path.name} imports kernels itself; nodes/_kernels.py is the one crossing"


def test_the_root_holds_no_logic():
    for level, module, names, _ in imports(ROOT / "__init__.py", ROOT):
        assert (level == 1 and "kernels" not in (module.split(".")[0], *names)) or (
            level == 0 and module.split(".")[0] in (*sys.stdlib_module_names, "comfy_api", "typing_extensions")
        )


CODE = """
import builtins, os, socket, sys
import torch, numpy
import torch.cuda
before = set(sys.modules)
def refuse(name):
    def call(*args, **kwargs):
        raise SystemExit(f"importing called {name}{args}")
    return call
plain = builtins.open
def no_writing(file, mode="r", *args, **kwargs):
    if set(mode) & set("wax+"):
        raise SystemExit(f"importing writes {file}")
    return plain(file, mode, *args, **kwargs)
builtins.open = no_writing
os.mkdir = os.makedirs = refuse("mkdir")
socket.socket.connect = refuse("connect")
for name in ("is_available", "device_count", "current_device", "get_device_properties", "get_device_capability", "init", "_lazy_init"):
    setattr(torch.cuda, name, refuse("torch.cuda." + name))
import sparge_kernels
assert not torch.cuda.is_initialized()
heavy = {"triton", "transformers", "diffusers", "safetensors", "comfy", "torch._dynamo", "torch._inductor"} & (set(sys.modules) - before)
if heavy:
    raise SystemExit(f"importing loads {heavy}")
"""


def test_importing_is_silent_and_takes_nothing(tmp_path):
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == "" and list(tmp_path.iterdir()) == []


def test_public_names():
    import sparge_kernels

    expected = {"sparse_attention", "block_sparse_attention", "select_blocks", "BlockMask", "AttentionInfo", "UnsupportedCall", "backends",
                "merge_lse", "order", "compat", "can_run", "BackendChoice", "BACKEND_NAMES"}  # fmt: skip
    assert set(sparge_kernels.__all__) == expected and all(hasattr(sparge_kernels, name) for name in expected)
    for name in expected - {"order", "compat", "BACKEND_NAMES"}:
        assert getattr(sparge_kernels, name).__doc__, f"{name} has no docstring"


def test_signatures():
    import inspect

    import sparge_kernels

    api = {
        "sparse_attention": "q, k, v, *, topk=None, cdfthreshd=None, simthreshd1=-0.1, pvthreshd=15.0, causal=False, causal_offset=0, scale=None, "
        "key_mask=None, always_keep=None, order=None, score='subblock', compensate=False, smooth_k=True, layout='HND', backend='auto', "
        "return_lse=False, return_info=False",
        "block_sparse_attention": "q, k, v, block_mask, *, pvthreshd=15.0, causal=False, causal_offset=0, scale=None, key_mask=None, order=None, "
        "compensate=False, smooth_k=True, layout='HND', backend='auto', return_lse=False, return_info=False",
        "can_run": "device, *, backend='auto', head_dim=64, dtype=torch.float16, masked=False",
        "select_blocks": "q, k, *, topk=None, cdfthreshd=None, simthreshd1=-0.1, causal=False, causal_offset=0, scale=None, key_mask=None, "
        "always_keep=None, order=None, score='subblock', smooth_k=True, layout='HND', backend='auto'",
    }
    for name, expected in api.items():
        signature = inspect.signature(getattr(sparge_kernels, name))
        parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        assert str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)) == f"({expected})"


def test_folder_starts_in_an_embedded_python():
    """Which sees neither the current folder nor PYTHONPATH, like -I: `python kernels` is what the documents offer."""
    done = subprocess.run([sys.executable, "-I", str(KERNELS)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("sparge_kernels ") and "backend torch: available" in done.stdout and "WRONG" not in done.stdout
