"""Whose run and whose line it is: the names of nodes, the browser tab that queued the prompt, and the last line of each node."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import comfy_models
import pytest
from node_js import node as node_js

IDS = Path(__file__).resolve().parents[2] / "web" / "js" / "lib" / "ids.js"
HTML = "<img src=x onerror=alert(1)>"


def runs(nodes, monitor: str, client: str | None = None) -> list[int]:
    query = {"monitor": monitor} | ({} if client is None else {"client": client})
    return [run["run"] for run in nodes.transport.answer_runs(query)[1]["runs"]]


def line(nodes, node: str, client: str | None = None) -> str | None:
    status, answer = nodes.transport.answer_line({"node": node} | ({} if client is None else {"client": client}))
    assert status == 200 and answer["version"] == nodes.transport.VERSION
    return answer["line"] and answer["line"]["text"]


@pytest.fixture
def sampled(nodes, tiny, patched, browser):
    """`sampled(client, monitor="a/1")`: a run of one step that this tab has queued; returns its number."""

    def sample(client, monitor="a/1", during=lambda: None):
        browser.client_id = client
        model = tiny("wan_t2v")
        patcher = nodes.monitor.watched(patched(model), monitor, False)
        (patch,) = nodes.patch.patches_of(patcher)
        patch.node = "b/2"
        before = patch.apply_model

        def apply_model(*args, **kwargs):
            during()
            return before(*args, **kwargs)

        patch.apply_model = apply_model
        patcher.wrappers["apply_model"]["sparge_attention"] = [apply_model]
        comfy_models.sample(model, patcher, steps=1)
        return nodes.telemetry.runs.latest

    return sample


# Names.


def test_both_sides_make_the_same_names(nodes):
    pairs = [["0f3c", "12"], ["0f3c", "5:12"], ["", "12"], ["", "5:8:3"], [HTML, '"'], ["é/", "7"]]
    script = f"import {{ nameOf }} from {json.dumps(IDS.as_uri())}; console.log(JSON.stringify({json.dumps(pairs)}.map(([a, b]) => nameOf(a, b))))"
    done = subprocess.run([node_js(), "--input-type=module", "-e", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [nodes._comfy.name_of(SimpleNamespace(unique_id=number), own) for own, number in pairs]


def test_names_in_scripts_and_bad_ids(nodes):
    assert nodes._comfy.name_of(None, "a") is None
    assert nodes._comfy.name_of(SimpleNamespace(unique_id=31)) == "31"
    for bad in ("x" * 65, 5, None):
        with pytest.raises(ValueError, match="id must be text of up to 64 characters, got .*; leave it empty"):
            nodes._comfy.name_of(None, bad)


@pytest.mark.parametrize("make", ["SpargeAttention", "SpargeMonitor"])
def test_a_new_id_is_a_new_output(nodes, make):
    """ComfyUI's cache compares inputs: `id` is one, and the server knows that the page makes no widget for it."""
    node = getattr(nodes.patch, make, None) or getattr(nodes.monitor, make)
    kind, options = node.INPUT_TYPES()["optional"]["id"]
    assert (kind, options["default"], options["hidden"]) == ("STRING", "", True)


# Tabs.


def test_messages_go_to_the_tab_that_queued_the_run(nodes, sampled, browser):
    browser.sockets = {"A": object(), "B": object()}
    sampled("A")
    assert {tab for _, tab in browser.told} == {"A"} and {event for event, _ in browser.told} == {"sparge.run", "sparge.line"}
    del browser.told[:]
    for nobody in (None, "", 5, ["A"]):  # the server checks nothing of it
        sampled(nobody)
    assert {tab for _, tab in browser.told} == {None}


def test_each_of_two_tabs_is_told_its_own_run(nodes, sampled, browser):
    """The same workflow file in both: the same names."""
    browser.sockets = {"A": object(), "B": object()}
    first, second, anybodys = sampled("A"), sampled("B"), sampled(None)
    assert runs(nodes, "a/1", "A") == [first, anybodys] and runs(nodes, "a/1", "B") == [second, anybodys]
    assert runs(nodes, "a/1", "C") == runs(nodes, "a/1", "") == [anybodys]
    assert runs(nodes, "a/1") == [first, second, anybodys], "a program that names no tab is told all"
    asked = {"run": str(first), "step": "0", "layer": "0"}
    assert nodes.transport.answer_map({**asked, "client": "A"})[0] == nodes.transport.answer_map(asked)[0] == 200
    assert nodes.transport.answer_map({**asked, "client": "B"}) == (404, {"error": f"run {first} belongs to another browser tab, which is open"})
    del browser.sockets["A"]
    assert runs(nodes, "a/1", "B") == [first, second, anybodys] and nodes.transport.answer_map({**asked, "client": "B"})[0] == 200


def test_a_tab_that_was_closed_and_opened_again_follows_the_run(nodes, sampled, browser):
    """It has a new name then; what asked before it had a connection, or while the first tab was there, does not."""
    browser.sockets = {"A": object(), "B": object()}
    seen = []

    def during():
        seen.append(runs(nodes, "a/1", "B"))
        del browser.sockets["A"]
        seen.append(runs(nodes, "a/1", "new"))
        browser.sockets["new"] = object()
        seen.append(runs(nodes, "a/1", "new"))
        seen.append(runs(nodes, "a/1", "B"))
        del browser.told[:]

    number = sampled("A", during=during)
    assert seen == [[], [number], [number], []]
    assert sorted(browser.told) == [("sparge.line", "A"), ("sparge.line", "new"), ("sparge.run", "A"), ("sparge.run", "new")]


def test_a_model_without_sparge_attention_tells_its_tab(nodes, tiny, browser):
    browser.sockets, browser.client_id = {"A": object(), "B": object()}, "A"
    model = tiny("wan_t2v")
    comfy_models.sample(model, nodes.monitor.watched(model.patcher, "a/1", False), steps=1)
    assert browser.told == [("sparge.run", "A")] and len(runs(nodes, "a/1", "A")) == 1 and runs(nodes, "a/1", "B") == []


# Lines.


def test_the_last_line_of_a_node_is_kept(nodes, browser):
    for text in ("first", "second"):
        nodes.transport.show("a/1", text, set())
    nodes.transport.show("a/2", "other", set())
    nodes.transport.show(None, "a script's", set())
    assert [message["text"] for message in browser.lines] == ["first", "second", "other"]
    assert [message["number"] for message in browser.lines] == sorted({message["number"] for message in browser.lines})
    assert (line(nodes, "a/1"), line(nodes, "a/2"), line(nodes, "a/3")) == ("second", "other", None)
    assert len(nodes.telemetry.lines.kept) == 2


def test_lines_are_bounded(nodes, browser):
    most = nodes.telemetry.MAX_LINES
    for number in range(most + 10):
        nodes.transport.show(f"a/{number}", "said", set())
    assert len(nodes.telemetry.lines.kept) == most
    assert line(nodes, "a/9") is None and line(nodes, "a/10") == line(nodes, f"a/{most + 9}") == "said"


def test_each_of_two_tabs_has_its_own_line(nodes, browser):
    browser.sockets = {"A": object(), "B": object()}
    nodes.transport.show("a/1", "of A", {"A"})
    nodes.transport.show("a/1", "of B", {"B"})
    assert (line(nodes, "a/1", "A"), line(nodes, "a/1", "B"), line(nodes, "a/1", "C")) == ("of A", "of B", None)
    assert browser.told == [("sparge.line", "A"), ("sparge.line", "B")]
    nodes.transport.show("a/1", "of A again", {"A"})
    assert (line(nodes, "a/1", "A"), line(nodes, "a/1", "B")) == ("of A again", "of B")
    browser.sockets.clear()
    assert line(nodes, "a/1", "C") == "of A again", "nobody is there who could be shown another's"


def test_html_in_names_is_data(nodes, browser):
    """Names come with the prompt; they are looked up and sent as JSON, nothing else."""
    name = nodes._comfy.name_of(SimpleNamespace(unique_id=HTML), HTML)
    nodes.transport.show(name, HTML, set())
    assert browser.lines[0]["node"] == f"{HTML}/{HTML}" and line(nodes, f"{HTML}/{HTML}") == HTML and line(nodes, HTML) is None


def test_a_line_that_cannot_be_sent_stops_nothing(nodes, browser, caplog):
    def fail(*args):
        raise OSError("the loop is closed")

    browser.send_sync = fail
    nodes.transport.show("a/1", "said", set())
    assert line(nodes, "a/1") == "said" and "OSError: the loop is closed" in caplog.text
