"""Texts of the nodes: locales and help pages name what the schemas have, no more and no less."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = sorted(folder.name for folder in (ROOT / "locales").iterdir())


@pytest.fixture(scope="module")
def schemas(pack):
    extension = asyncio.run(pack.comfy_entrypoint())
    return {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in asyncio.run(extension.get_node_list())}


def texts(schema) -> dict:
    """A schema's texts in the form of nodeDefs.json."""
    inputs = {i.id: {"name": i.display_name or i.id, "tooltip": i.tooltip} for i in schema.inputs}
    outputs = {str(n): {"name": o.display_name or o.id, "tooltip": o.tooltip} for n, o in enumerate(schema.outputs)}
    told = {"display_name": schema.display_name, "description": schema.description, "inputs": inputs, "outputs": outputs}
    return without_none(told)


def without_none(tree):
    return {name: without_none(value) for name, value in tree.items() if value is not None} if isinstance(tree, dict) else tree


def keys(tree, path: str = "") -> set[str]:
    return set().union(*(keys(value, f"{path}/{name}") for name, value in tree.items())) if isinstance(tree, dict) else {path}


def leaves(tree) -> list[str]:
    return [leaf for value in tree.values() for leaf in leaves(value)] if isinstance(tree, dict) else [tree]


def locale(language: str) -> dict:
    files = [path.name for path in (ROOT / "locales" / language).iterdir()]
    assert files == ["nodeDefs.json"]
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def page(node: str, language: str) -> str:
    """The help page that the browser opens: English ones are also what every other language falls back to."""
    path = ROOT / "web" / "docs" / (f"{node}.md" if language == "en" else f"{node}/{language}.md")
    return path.read_text(encoding="utf-8")


def test_comfyui_serves_them(comfy, tmp_path, monkeypatch):
    import folder_paths
    from app.custom_node_manager import CustomNodeManager

    (tmp_path / "any-name").symlink_to(ROOT)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "custom_nodes", ([str(tmp_path)], set()))
    served = CustomNodeManager().build_translations()
    assert served == {language: {"nodeDefs": locale(language)} for language in LANGUAGES}


def test_languages():
    assert LANGUAGES == ["en", "zh"]


def test_every_input_has_a_tooltip(schemas):
    for name, schema in schemas.items():
        for entry in schema.inputs:
            assert entry.tooltip and entry.tooltip.endswith("."), f"{name}.{entry.id}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_keys_are_the_schemas(schemas, language):
    assert keys(locale(language)) == keys({name: texts(schema) for name, schema in schemas.items()})


def test_english_is_what_the_schemas_say(schemas):
    assert locale("en") == {name: texts(schema) for name, schema in schemas.items()}


def test_other_languages_are_translated():
    for language in LANGUAGES:
        told = leaves(locale(language))
        assert all(isinstance(text, str) and text.strip() == text != "" for text in told)
        assert not [text for text in told if set("{}@|") & set(text)]  # the browser would take these as its own signs
        if language == "zh":
            assert all(re.search(r"[\u4e00-\u9fff]", text) for text in told), [text for text in told if not re.search(r"[\u4e00-\u9fff]", text)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_has_a_page_about_all_its_inputs(schemas, language):
    for name, schema in schemas.items():
        text = page(name, language)
        assert text.startswith(f"# {locale(language)[name]['display_name']}\n")
        rows = re.findall(r"^\| ([a-z0-9_, ]+) \|", text, re.M)
        told = {each for row in rows for each in row.split(", ")} - {"input", "output"}
        outputs = {entry.display_name for entry in schema.outputs} if schema.is_output_node else set()  # others pass the model on
        wanted = {entry.id for entry in schema.inputs} | outputs
        assert wanted - {"model"} <= told <= wanted, (name, told ^ wanted)


def test_no_page_without_a_node(schemas):
    docs = ROOT / "web" / "docs"
    assert {path.stem for path in docs.glob("*.md")} == set(schemas)
    assert {str(path.relative_to(docs)) for path in docs.glob("*/*")} == {
        f"{name}/{language}.md" for name in schemas for language in LANGUAGES if language != "en"
    }


@pytest.mark.parametrize("language", LANGUAGES)
def test_pictures_of_the_pages_exist(schemas, language):
    for name in schemas:
        for target in re.findall(r"\]\((?!http)([^)]+)\)", page(name, language)):
            assert (ROOT / "web" / "docs" / target).is_file(), target
