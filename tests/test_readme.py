"""What the README says is true: its example runs, its commands and files exist, its table of inputs is the node's."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})  # noqa: S102  (the README's own text)
    assert re.fullmatch(r"torch tensor\(0\.2\d*\)\n", printed.getvalue())


def test_commands_and_files_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"make ([a-z][a-z-]+)", README)) <= targets
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).is_file(), path


def test_table_of_inputs_is_the_nodes(pack):
    node = importlib.import_module(pack.__name__ + ".nodes.patch").SpargeAttention
    schema = {i.id: i.default for i in node.define_schema().inputs if getattr(i, "default", None) is not None}
    rows = re.findall(r"^\| ([a-z0-9_, ]+) \| ([^|]+) \| [^|]+ \|$", README, re.M)
    told = {}
    for names, values in rows:
        for name, value in zip(names.split(", "), values.strip().split(", "), strict=True):
            told[name] = value.split(" ")[0]
    assert set(told) == set(schema)
    for name, default in schema.items():
        shown = "off" if default is False else "empty" if default == "" else f"{default:g}" if isinstance(default, int | float) else default
        assert told[name] == shown, name
