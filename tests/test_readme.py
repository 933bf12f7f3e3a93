"""What the documents say is true: commands, paths, links and variables exist, tables are the code's own, the example runs."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path

import build_workflows
import demo_pictures
import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted((ROOT / "web" / "docs").rglob("*.md"))
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "python_examples/README.md", "bench/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *PAGES,
]
FILE = re.compile(r"[\w.-]+\.(?:py|md|json|toml|yml|svg|cuh|txt)")
MADE = {"fox.mp4", "wan.gif", "x.mp4", "demo_output/", ".venv/", ".comfyui", ".emulator"}  # what the commands make
OUTSIDE = {"CI", "PATH", "PYTHONPATH", "CUDA_LAUNCH_BLOCKING"}  # not of this project


def module(name: str):
    """A module of nodes/ that needs no ComfyUI."""
    spec = importlib.util.spec_from_file_location(f"readme_{name}", ROOT / "nodes" / f"{name}.py")
    made = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    """Every file of the repository, and those that it would take in."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is not a git repository")
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}


# Commands, paths, links and variables.


def code_of(text: str) -> list[str]:
    """The lines of code blocks, and code within lines."""
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.S | re.M)
    rest = re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M)
    return [line.strip() for kind, block in blocks if kind != "python" for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", rest)


def anchors(text: str) -> set[str]:
    return {re.sub(r"[^\w -]", "", line.lower()).strip().replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.M)}


def wrong_links(text: str, folder: Path) -> list[str]:
    """Relative links and pictures that lead nowhere, from a document in `folder`."""
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        path, _, anchor = target.partition("#")
        if re.match(r"https://[\w.-]+/", target):
            continue
        if path and not (folder / path).is_file():
            wrong.append(f"no file {target}")
        elif anchor and anchor not in anchors((folder / path).read_text(encoding="utf-8") if path else text):
            wrong.append(f"no heading {target}")
    return wrong


def wrong_commands(text: str, folder: Path, tracked: set[str]) -> list[str]:
    """What code in a document in `folder` names and the project does not have: targets, modules, options, paths."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    wrong = []
    for line in code_of(text):
        words = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line).replace('"', " ").split()
        if words[:1] == ["make"]:
            wrong += [f"make {word}" for word in words[1:] if not re.match(r"[A-Z_]+=", word) and word not in targets]
        if len(words) > 1 and words[0].endswith("python"):
            wrong += wrong_python(words[1:], folder)
        wrong += [f"no path {word}" for word in words if not known_path(word.lstrip("(").rstrip(".,;:)"), folder, tracked)]
    return wrong


def wrong_python(words: list[str], folder: Path) -> list[str]:
    """What `python WORDS` needs and does not find."""
    if words[0] == "-m":
        found = importlib.util.find_spec(words[1]) is not None or (ROOT / words[1] / "__main__.py").is_file()
        return [] if found else [f"no module {words[1]}"]
    places = [at for place in (ROOT, folder) for at in (place / words[0], place / words[0] / "__main__.py")]
    script = next((at for at in places if at.is_file()), None)
    if script is None:
        return [f"no script {words[0]}"]
    beside = script.parent.glob("*.py") if script.parent != ROOT else [script, *(ROOT / "tools").glob("cubins.py")]
    told = "".join(path.read_text(encoding="utf-8") for path in beside)
    return [f"{words[0]} has no {option}" for option in words[1:] if option.startswith("--") and option not in told]


def known_path(word: str, folder: Path, tracked: set[str]) -> bool:
    """Whether a word is no path of the project, or one that exists there; a file's name alone may stand for it."""
    if word in MADE or word.startswith(("/", ".venv/bin/", "results/")) or re.search(r"[<>*=|$]", word):
        return True
    folders = {parent.as_posix() for name in tracked for parent in Path(name).parents}
    if "/" not in word:
        return not FILE.fullmatch(word) or word in {Path(name).name for name in tracked}
    if word.split("/")[0] not in folders and not FILE.fullmatch(word.split("/")[-1]):
        return True
    return any(path in tracked | folders for path in (word.rstrip("/"), (folder / word).relative_to(ROOT).as_posix()))


def variables() -> set[str]:
    """Every environment variable that the code or the Makefile reads."""
    sources = [ROOT / "Makefile", ROOT / "kernels" / "environment.py", ROOT / "tools" / "comfyui" / "install.py", ROOT / "tests" / "conftest.py"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    return set(re.findall(r'environ\.get\("(\w+)"', text)) | set(re.findall(r"\$\((?:if \$\()?([A-Z_]+)", text)) | OUTSIDE


def wrong_variables(text: str) -> list[str]:
    named = {name for line in code_of(text) for name in re.findall(r"(?<![\w$-])([A-Z][A-Z_]{2,})(?==)", line)}
    named |= {line for line in code_of(text) if re.fullmatch(r"[A-Z]+(?:_[A-Z]+)+", line)} | set(re.findall(r"\b(?:SPARGE|COMFYUI)_[A-Z_]+", text))
    return sorted(f"no variable {name}" for name in named - variables() if not _constant(name))


def _constant(name: str) -> bool:
    """A table that a document names (CONTRIBUTING tells where families stand), or a public name."""
    return f'"{name}"' in (ROOT / "kernels" / "__init__.py").read_text(encoding="utf-8") or any(
        re.search(rf"^{name}\b", path.read_text(encoding="utf-8"), re.M) for path in (ROOT / "nodes").glob("*.py")
    )


MACHINE = re.compile(r"(?<![\w.:/])/(?:home|root|work|tmp|mnt|Users|opt|var)/|[A-Z]:\\|file://|localhost:\d|127\.0\.0\.1")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_document(path, tracked):
    text = path.read_text(encoding="utf-8")
    # The browser takes what help pages link from the folder of the English ones.
    folder = ROOT / "web" / "docs" if path in PAGES else path.parent
    wrong = wrong_links(text, folder) + wrong_commands(text, path.parent, tracked) + wrong_variables(text) + MACHINE.findall(text)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "text",
    [
        "[page](docs/gone.md)",
        "[part](docs/gpu.md#gone)",
        '<img src="web/docs/gone.png">',
        "`make gone`",
        "```\nmake SHORT=1 gone\n```",
        "`python -m gone_module`",
        "`python tests/gone.py`",
        "run `nodes/gone.py`",
        "the file `gone.py`",
        "in `tests/gone`",
        "`python setup.py cubins --gone`",
        "`python plain_pytorch.py --gone`",
        "`SPARGE_GONE=1 make demo`",
        "set `GONE_TOO`",
        "`/home/somebody/ComfyUI`",
    ],
)
def test_what_is_wrong_is_found(text, tracked):
    folder = ROOT / "python_examples" if "plain_pytorch" in text else ROOT
    assert wrong_links(text, folder) + wrong_commands(text, folder, tracked) + wrong_variables(text) + MACHINE.findall(text)


def test_every_target_of_the_makefile_is_told():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)) - {"help", "clean"}
    told = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    assert {target for target in targets if not re.search(rf"make {target}\b(?!-)", told)} == set()


def test_every_environment_variable_of_the_package_is_told():
    known = set(re.findall(r'environ\.get\("(SPARGE_\w+)"', (ROOT / "kernels" / "environment.py").read_text(encoding="utf-8")))
    assert known == set(re.findall(r"^\| `(SPARGE_\w+)`", (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8"), re.M))


@pytest.mark.parametrize("path", sorted([*(ROOT / "web" / "docs").glob("*.png"), *(ROOT / "docs").glob("*.png")]), ids=lambda path: path.name)
def test_pictures_are_shown_and_small(path):
    with Image.open(path) as picture:
        picture.verify()
    assert path.stat().st_size < 300_000
    assert any(path.name in document.read_text(encoding="utf-8") for document in DOCUMENTS), f"no document shows {path.name}"


def test_frames_of_the_demo_are_compared():
    dense = np.full((61, 40, 52, 3), 100, dtype=np.uint8)
    sparse = dense.copy()
    sparse[50] -= 10
    sheet = np.asarray(demo_pictures.side_by_side(dense, sparse, 0.13))
    first, second = demo_pictures.TITLE + 5, demo_pictures.TITLE + demo_pictures.HEIGHT + demo_pictures.GAP + 5
    at = [5 + column * (demo_pictures.WIDTH + demo_pictures.GAP) for column in range(3)]
    assert [int(sheet[first, x, 0]) for x in at] == [100, 100, 255] and [int(sheet[second, x, 0]) for x in at] == [100, 90, 255 - 40]


# Tables.


def rows(text: str, heading: str) -> list[tuple[str, ...]]:
    """The rows of every table below a heading, without their own headings."""
    part = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.S | re.M)[1]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    heads = {n for n, line in enumerate(lines) if set(line) <= set("|-")}
    return [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for n, line in enumerate(lines) if n not in heads and n + 1 not in heads]


def test_settings_are_the_presets():
    presets = module("presets").PRESETS
    files: dict[str, list[str]] = {family: [] for family in presets}
    for name, (family, _) in build_workflows.WORKFLOWS.items():
        if not name.endswith("_tour"):
            files[family].append(f"[{name.removeprefix('sparge_')}](workflows/{name}.json)")
    wanted = [
        (row.label, f"{row.topk:g}", f"{row.start_percent:g}", row.dense_blocks or "empty", ", ".join(files[row.family]) or "none")
        for row in presets.values()
    ]
    assert rows(README, "Settings for your model") == wanted, "the table must be:\n" + "\n".join(f"| {' | '.join(row)} |" for row in wanted)
    assert {(row.topk, row.end_percent) for row in presets.values()} == {(0.5, 1.0)}, (
        "web/docs/SpargeAttention.md says that these are the same for all"
    )


def test_every_reason_has_a_row():
    reasons = module("reasons")
    wanted = {re.sub(r"\{[^}]*\}", "…", value) for name, value in vars(reasons).items() if name.isupper()}
    told = [row[0] for row in rows(README, "It does not get faster: why?")]
    assert len(told) == len(set(told)) and set(told) == wanted, f"missing: {wanted - set(told)}; no reason of nodes/reasons.py: {set(told) - wanted}"
    assert all(len(row) == 2 and row[1] for row in rows(README, "It does not get faster: why?"))


@pytest.mark.parametrize(("page", "off", "empty"), [("SpargeAttention.md", "off", "empty"), ("SpargeAttention/zh.md", "关", "空")])
def test_defaults_are_the_nodes(pack, page, off, empty):
    node = importlib.import_module(pack.__name__ + ".nodes.patch").SpargeAttention
    schema = {entry.id: entry.default for entry in node.define_schema().inputs if getattr(entry, "default", None) is not None}
    text = (ROOT / "web" / "docs" / page).read_text(encoding="utf-8")
    told = {}
    for names, values in re.findall(r"^\| ([a-z0-9_, ]+) \| (?:default|默认) ?([^:：]+)[:：]", text, re.M):
        told |= dict(zip(names.split(", "), values.split(", "), strict=True))
    shown = {
        name: off if default is False else empty if default == "" else f"{default:g}" if isinstance(default, int | float) else default
        for name, default in schema.items()
    }
    assert told == shown


def test_advanced_inputs_are_the_nodes(pack):
    inputs = importlib.import_module(pack.__name__ + ".nodes.settings").INPUTS
    for page in ("SpargeAttention.md", "SpargeAttention/zh.md"):
        (line,) = re.findall(r"^.*ComfyUI 0\.10.*$", (ROOT / "web" / "docs" / page).read_text(encoding="utf-8"), re.M)
        assert {name for name in inputs if name in line} == {name for name, row in inputs.items() if row.advanced}, page


def test_named_presets_are_the_codes():
    levels = module("presets").LEVELS
    for page, lines in (("SpargeAttention.md", "- **{}**, topk {:g}: {}"), ("SpargeAttention/zh.md", "- **{}**，topk {:g}")):
        text = (ROOT / "web" / "docs" / page).read_text(encoding="utf-8")
        wanted = [lines.format(name, level.topk, level.source.removesuffix("; not yet measured here")) for name, level in levels.items()]
        assert [line for line in text.splitlines() if line.startswith("- **")] == wanted, page
    assert "{}, {} and {} decide all of them: topk\n{:g}, {:g} or {:g}".format(*levels, *(level.topk for level in levels.values())) in README


# The rest.


def test_python_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.S)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})  # noqa: S102  (the document's own text)
    assert re.fullmatch(r"torch tensor\(0\.2\d*\)\n", printed.getvalue())


def test_debugging_examples_run():
    """One call with the reference, on the emulator under some seeds, and on the executor: the last two to the same bits."""
    first, emulated, executed = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "debugging.md").read_text(encoding="utf-8"), re.S)
    printed, names = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        exec(first, {})  # noqa: S102
        exec(emulated + executed, names)  # noqa: S102
        with names["using"](names["machine"]):
            out = names["sparse_attention"](*(names[name] for name in "qkv"), topk=0.5, backend="cuda")
    error, *seeds = printed.getvalue().splitlines()
    assert "e-0" in error and len({line.partition(" ")[2] for line in seeds}) == 1 and len(seeds) == 4
    assert torch.equal(out, names["out"])


def test_versions_are_the_projects():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "([^"]+)"', project, re.M)[1]
    assert re.search(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[1] == version
    oldest = re.search(r'^requires-comfyui = ">=([\d.]+)"', project, re.M)[1]
    assert f"ComfyUI {oldest} or newer" in README and f"the oldest that was run is {oldest}," in README
    assert f"ComfyUI must be {oldest} or newer" in (ROOT / "nodes" / "_comfy.py").read_text(encoding="utf-8")


def test_the_changelogs_headings_are_the_formats():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - (unreleased|\d{4}-\d\d-\d\d)", head) for head in re.findall(r"^## (.*)$", text, re.M))
    assert set(re.findall(r"^### (.*)$", text, re.M)) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
