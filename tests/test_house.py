"""What docs/design/style.md asks of every product file and a parser can check: short argument lists, short files."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1]
PYTHON = sorted(p for folder in ("kernels", "nodes", "python_examples") for p in (HERE / folder).rglob("*.py"))
SCRIPTS = sorted((HERE / "web" / "js").rglob("*.js"))
MOST_ARGUMENTS, MOST_LINES = 6, 500

PUBLIC = {"kernels/attention.py": {"sparse_attention", "block_sparse_attention", "select_blocks"}}
"""The public functions, whose options all have names."""

FOREIGN = {
    "kernels/compat.py": {"spas_sage2_attn_meansim_topk_cuda", "spas_sage2_attn_meansim_cuda", "block_sparse_sage2_attn_cuda"},
    "nodes/override.py": {"bind"},
    "nodes/run_state.py": {"apply_model"},
}
"""Functions that somebody else calls, with a list of arguments of his: SpargeAttn's names, ComfyUI's attention and its wrapper of model calls."""


def relative(path: Path) -> str:
    return path.relative_to(HERE).as_posix()


def long_lists(source: str) -> dict[str, int]:
    """The functions of a module with more than MOST_ARGUMENTS arguments, keyword-only ones counted."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            if count > MOST_ARGUMENTS:
                found[node.name] = count
    return found


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_a_function_takes_six_arguments_at_most(path):
    allowed = PUBLIC.get(relative(path), set()) | FOREIGN.get(relative(path), set())
    too_long = {name: n for name, n in long_lists(path.read_text(encoding="utf-8")).items() if name not in allowed}
    assert not too_long, f"more than {MOST_ARGUMENTS} arguments: {too_long}; give what belongs together a type"


def test_the_lists_of_exceptions_name_functions_that_need_it():
    for path, names in (*PUBLIC.items(), *FOREIGN.items()):
        assert names <= set(long_lists((HERE / path).read_text(encoding="utf-8"))), path


def test_an_argument_is_counted_wherever_it_stands():
    assert long_lists("def f(a, b, /, c, *, d, e, f, g): ...") == {"f": 7}
    assert long_lists("class A:\n def f(self, a, b, c, d, e, f): ...") == {}


@pytest.mark.parametrize("path", [*PYTHON, *SCRIPTS], ids=relative)
def test_a_file_can_be_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_no_argument_list_is_kept_from_the_formatter(path):
    """`fmt: skip` and `fmt: off` are for tables: literals of rows, never the arguments of a definition or a call."""
    source = path.read_text(encoding="utf-8")
    skipped = [i for i, line in enumerate(source.splitlines(), 1) if "# fmt: skip" in line]
    ends = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            ends[node.body[0].lineno - 1] = ends[node.lineno] = node.name
        if isinstance(node, ast.stmt) and isinstance(getattr(node, "value", None), ast.Call):
            ends[node.end_lineno] = ast.unparse(node.value.func)
    assert not {ends[i]: i for i in skipped if i in ends}
