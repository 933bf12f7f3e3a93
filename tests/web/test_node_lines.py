"""The line on Sparge Attention in a real browser, in both modes of the front end, and whose runs our nodes show: those of their own id and tab."""

from __future__ import annotations

import time

import comfy_server
import demo_model
import install
import pytest
from chromium import BrowserError
from monitor_page import ATTENTION_ID, MODEL, MONITOR, MONITOR_ID, PANEL, STEPS, MonitorPage, workflow

SHOTS = install.ROOT / "demo_output" / "screenshots"
ATTENTION = 3
LINE = "document.querySelector('.sparge-line')"
NODE = f"app.graph._nodes.find((found) => String(found.id) === '{ATTENTION}')"
EMPTY = "No run yet"
LONG = "; ".join(
    ["72 calls sparse, density 0.13, 8309 ms", *[f"dense: {n} x cross-attention to 16 tokens, of a reason that is long" for n in range(9)]]
)


class Lined(MonitorPage):
    """The page with Sparge Attention in view."""

    mode = ""

    def look(self, number: int = ATTENTION) -> None:
        super().look(number)

    def line(self, pattern: str, timeout: float = 30.0) -> str:
        """The text of the line, once it matches."""
        self.page.wait_for(f"{LINE}?.innerText.match(/{pattern}/) != null", timeout)
        return self.page.evaluate(f"{LINE}.innerText")

    def ids(self) -> list[str]:
        """The ids of our nodes in all graphs of the workflow."""
        return self.page.evaluate("""(() => {
          const root = app.rootGraph ?? app.graph;
          const nodes = [root, ...(root.subgraphs?.values() ?? [])].flatMap((graph) => graph.nodes);
          return nodes.flatMap((node) => node.widgets ?? []).filter(({ name }) => name === 'id').map(({ value }) => value);
        })()""")

    def say(self, text: str, node: str = f"{ATTENTION_ID}/{ATTENTION}") -> None:
        """As if the server had said it."""
        self.page.evaluate(f"""(() => {{
          const detail = {{ version: 3, number: 1e6, node: {node!r}, text: {text!r} }};
          app.api.dispatchEvent(new CustomEvent('sparge.line', {{ detail }}));
        }})()""")

    def size(self) -> list[float]:
        return self.page.evaluate(f"[...{NODE}.size]")

    def shot(self, name: str) -> None:
        self.page.screenshot(SHOTS / f"{self.mode}_line_{name}.png")


@pytest.fixture(scope="module", params=["canvas", "vue"])
def shown(request, browser):
    server = comfy_server.ComfyServer(pack_folder="ComfyUI-SpargeAttention")
    demo_model.write_demo_model(server.model_path(MODEL))
    with server:
        made = Lined(browser, server)
        made.mode = request.param
        made.set(VueNodes_Enabled=request.param == "vue", Locale="en", ColorPalette="dark")
        made.open()
        yield made
        made.page.close()


def test_the_line_stays_when_the_prompt_is_over_and_comes_back_with_the_page(shown):
    shown.drop(workflow(seed=1))
    shown.line(EMPTY)
    before = shown.size()
    shown.shot("before")
    shown.queue()
    shown.line("^backend torch")
    shown.shot("during")
    text = shown.line(f"^{STEPS * 6} calls sparse, density")
    shown.page.wait_for("!app.api.ourPrompt")
    time.sleep(3)  # newer front ends take their own progress text away when the prompt ends
    assert shown.line(".") == text and shown.size() == before
    assert shown.page.evaluate(f"{LINE}.title").split("; ") == text.split("\n")
    assert "cross-attention to 16 tokens" in text
    assert shown.page.evaluate(f"{NODE}.widgets.map(({{ name }}) => name).at(-1)") == "sparge-line", "a widget of the front end's stands behind it"
    shown.look()
    shown.shot("after")
    values = shown.page.evaluate(f"{NODE}.serialize().widgets_values")
    assert len(values) == 14 and values[-1] == ATTENTION_ID and not any("sparse" in str(value) for value in values)
    assert (
        shown.page.evaluate(f"app.graphToPrompt().then(({{ output }}) => Object.keys(output['{ATTENTION}'].inputs).includes('sparge-line'))") is False
    )
    shown.open()  # the front end opens by itself what was open
    assert shown.line("calls sparse") == text
    shown.wait_progress(f"done · step {STEPS} of {STEPS}")


def test_a_long_line_scrolls_in_the_room_that_it_has(shown):
    shown.drop(workflow(seed=1))
    before = shown.size()
    shown.say(LONG)
    shown.line("72 calls sparse")
    assert shown.page.evaluate(f"{LINE}.title") == LONG
    scrolls = f"(({{ scrollHeight, clientHeight }}) => scrollHeight > clientHeight + 20)({LINE}.firstChild)"
    assert shown.page.evaluate(scrolls) and shown.page.evaluate(f"{LINE}.firstChild.clientHeight") >= 80, "five lines of 16 pixels"
    shown.look()
    shown.shot("long")
    assert shown.size() == before
    inside = shown.page.evaluate(f"""(() => {{
      const [line, node] = [{LINE}.getBoundingClientRect(), {NODE}];
      const frame = document.querySelector('[data-node-id="{ATTENTION}"]')?.getBoundingClientRect();
      const [left, top] = app.canvas.ds.convertOffsetToCanvas(node.pos);
      const canvas = app.canvas.canvas.getBoundingClientRect();
      const box = frame ?? {{ left: left + canvas.left, right: left + canvas.left + node.size[0], bottom: top + canvas.top + node.size[1] }};
      return [line.left >= box.left, line.right <= box.right, line.bottom <= box.bottom];
    }})()""")
    assert inside == [True, True, True]


def test_a_line_is_text(shown):
    text = "<img src=x onerror=alert(1)>; <b>bold</b>"
    shown.say(text)
    shown.line("<b>bold")
    assert shown.page.evaluate(f"[{LINE}.querySelector('img, b'), {LINE}.title]") == [None, text]
    shown.say("of another node", "0f3c/3")
    shown.say("of a number alone", str(ATTENTION))
    assert shown.line(".").startswith("<img")


def test_another_workflow_with_the_same_numbers_shows_no_run_of_this_one(shown):
    shown.drop(workflow(seed=1))
    shown.line("calls sparse")
    other = workflow(seed=1)
    values = {node["type"]: node["widgets_values"] for node in other["nodes"]}
    values["SpargeAttention"][-1], values["SpargeMonitor"][-1] = "5ec04d5ec04d5ec0", "0d5ec00d5ec00d5e"
    shown.drop(other)
    shown.wait_progress("Waiting")
    shown.line(EMPTY)
    for node in other["nodes"]:
        if node["type"] in ("SpargeAttention", "SpargeMonitor"):
            node["widgets_values"].pop()  # as files are that were saved before there were ids
    drawn = []
    for _ in range(2):
        shown.drop(other)
        shown.wait_progress("Waiting")
        shown.line(EMPTY)
        drawn += shown.ids()
    assert len(set(drawn)) == 4 and all(len(one) == 16 for one in drawn)
    shown.drop(workflow(seed=1))
    shown.line("calls sparse")
    shown.wait_progress(f"done · step {STEPS} of {STEPS}")
    assert sorted(shown.ids()) == sorted([ATTENTION_ID, MONITOR_ID])


COPIES = {
    "paste": "app.canvas.copyToClipboard([node]); app.canvas.pasteFromClipboard();",
    "clone": "app.graph.add(node.clone());",
    "paste of a subgraph": "const { node: around } = app.graph.convertToSubgraph(new Set([node])); app.canvas.copyToClipboard([around]); "
    "app.canvas.pasteFromClipboard();",
}


@pytest.mark.parametrize("number", [ATTENTION, MONITOR])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_has_an_id_of_its_own(shown, way, number):
    shown.drop(workflow(seed=1))
    shown.page.evaluate(f"(() => {{ const node = app.graph._nodes.find((found) => String(found.id) === '{number}'); {COPIES[way]} }})()")
    assert len(shown.ids()) == len(set(shown.ids())) == 3
    whole = shown.page.evaluate("(app.rootGraph ?? app.graph).serialize()")
    before = shown.ids()
    shown.page.evaluate("((whole) => app.loadGraphData(whole, true, true, 'again').then(() => 1))((app.rootGraph ?? app.graph).serialize())")
    assert sorted(shown.ids()) == sorted(before), "a file that is loaded, as an undo does, keeps every id"
    assert str(whole).count(ATTENTION_ID) + str(whole).count(MONITOR_ID) >= 1


def test_the_input_id_is_not_shown(shown):
    shown.drop(workflow(seed=1))
    for number, own in ((ATTENTION, ATTENTION_ID), (MONITOR, MONITOR_ID)):
        shown.look(number)
        found = shown.page.evaluate(f"""(() => {{
          const node = app.graph._nodes.find((found) => String(found.id) === '{number}');
          const widget = node.widgets.find(({{ name }}) => name === 'id');
          const [at, size] = [node.widgets.indexOf(widget), node.computeSize()[1]];
          const [before, after] = [node.widgets[at - 1], node.widgets[at + 1]];
          const frame = document.querySelector(`[data-node-id="${{node.id}}"]`);
          node.widgets.splice(at, 1);
          const without = node.computeSize()[1];
          node.widgets.splice(at, 0, widget);
          return [widget.value, node.isWidgetVisible(widget), Math.round(after.y - before.y), size - without, node.findInputSlot('id'),
            frame ? [...frame.querySelectorAll('input, textarea')].map(({{ value }}) => value) : []];
        }})()""")
        value, is_visible, below, height, socket, shown_values = found
        assert (value, is_visible, below, height, socket) == (own, False, 24, 0, -1)
        assert own not in shown_values
        assert shown.page.evaluate(f"!document.body.innerText.includes({own!r})")


def test_a_tab_draws_no_run_of_another_one(shown, browser):
    """The same file in two tabs. When the first is closed, the other, loaded again, shows what it had."""
    own = workflow(seed=5)
    ids = {"SpargeAttention": "7ab7ab7ab7ab7ab0", "SpargeMonitor": "7ab7ab7ab7ab7ab1"}
    for node in own["nodes"]:
        if node["type"] in ids:
            node["widgets_values"][-1] = ids[node["type"]]
    first = Lined(browser, shown.server)
    first.open()
    for tab in (shown, first):
        tab.front()
        tab.drop(own)
        tab.wait_progress("Waiting")
        tab.line(EMPTY)
    first.queue()
    first.wait_progress(f"done · step {STEPS} of {STEPS}")
    text = first.line("calls sparse")
    shown.front()
    shown.drop(own)  # asks, too
    shown.wait_progress("Waiting")
    shown.line(EMPTY)
    first.page.close()
    for _ in range(30):  # it takes the browser a moment to close the connection
        shown.drop(own)
        try:
            shown.wait_progress(f"done · step {STEPS} of {STEPS}", 1)
            assert shown.line("calls sparse", 1) == text
            return
        except BrowserError:
            continue
    pytest.fail("the run of a tab that is gone is shown nowhere")


def test_the_console_is_clean(shown):
    assert shown.ours() == []
    assert shown.page.evaluate(f"{PANEL} !== null && {LINE} !== null")
