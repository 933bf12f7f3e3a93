"""The monitor in a real browser on ComfyUI's front end, in both of its modes, with the pack under the folder names of a clone and of the registry."""

from __future__ import annotations

import json
import re
import time
from urllib.parse import urlencode

import chromium
import comfy_server
import demo_model
import install
import pytest
import requests
from monitor_page import LAYERS, MODEL, MONITOR, MONITOR_ID, PANEL, STEPS, MonitorPage, workflow

SHOTS = install.ROOT / "demo_output" / "screenshots"
WORST_DRAW_MS = 5.0
NAME = f"{MONITOR_ID}/{MONITOR}"  # of the monitor on the server

# Counts what the pack's scripts hold on to: listeners that were not removed, and observers that were not disconnected.
COUNTER = """(() => {
  window.held = { listeners: 0, observers: 0 };
  const isOurs = () => /extensions\\/[^/]+\\/js\\//.test(new Error().stack);
  const { addEventListener: add, removeEventListener: remove } = EventTarget.prototype;
  const known = new WeakMap();
  EventTarget.prototype.addEventListener = function (type, listener, options) {
    if (listener && isOurs()) {
      held.listeners++;
      if (options?.signal) add.call(options.signal, 'abort', () => { held.listeners--; }, { once: true });
      else known.set(listener, true);
    }
    return add.call(this, type, listener, options);
  };
  EventTarget.prototype.removeEventListener = function (type, listener, options) {
    if (listener && known.delete(listener)) held.listeners--;
    return remove.call(this, type, listener, options);
  };
  window.ResizeObserver = class extends window.ResizeObserver {
    constructor(f) { super(f); this.isOurs = isOurs(); if (this.isOurs) held.observers++; }
    disconnect() { if (this.isOurs) held.observers--; this.isOurs = false; super.disconnect(); }
  };
})()"""

# Messages of a made-up run for the monitor: 50 steps of 60 layers.
MADE_UP = """(() => {
  const column = (name, unit, label) => ({ name, unit, label });
  const columns = [column("step", "index"), column("layer", "index"), column("density", "share", "density"),
    column("pv_skipped", "share", "PV skipped"), column("ms", "ms", "time"), column("sparse_calls", "calls", "sparse calls"),
    column("dense_calls", "calls", "dense calls")];
  const cells = (step) => Array.from({ length: 60 }, (_, layer) => step < 4 || layer < 2 ? [step - 1, layer, null, null, 90 + layer, 0, 1]
    : [step - 1, layer, 0.1 + 0.5 * Math.abs(Math.sin(layer / 7 + step / 9)), 0.05 + layer / 900, 30 + layer / 3, 1, 0]);
  const stepTotal = (step) => step < 4 ? [step - 1, null, null, null, 7170, 0, 60] : [step - 1, null, 0.42, 0.08, 2500, 58, 2];
  const reasons = (step) => [["cross-attention to 512 tokens", 60 * step], ["outside the step window (start_percent, end_percent)", 180]];
  const totals = { density: 0.13, pv_skipped: 0.05, ms: 13000, sparse_calls: 100, dense_calls: 60, speedup: 3.12, speedup_low: 2.9,
    speedup_high: 3.3, compared_calls: 5, saved_ms: 41000, measuring_ms: 12 };
  window.madeUp = (step, changes = {}) => ({ version: 3, run: 1000, monitors: ["NAME"], state: "running", step, steps: 50, layers: 60, heads: 24,
    tokens: 32760, columns, cells: step ? cells(step) : [], step_totals: step ? [stepTotal(step)] : [], reasons: reasons(step), warning: null,
    note: null, compared_with: "dense", totals, ...changes });
  window.send = (message) => app.api.dispatchEvent(new CustomEvent("sparge.run", { detail: message }));
})()""".replace("NAME", NAME)


class Watched(MonitorPage):
    """The monitor's page in one of the front end's modes."""

    def __init__(self, browser: chromium.Chromium, server: comfy_server.ComfyServer, mode: str):
        super().__init__(browser, server, COUNTER, MADE_UP)
        self.mode = mode

    def shot(self, name: str) -> None:
        self.page.screenshot(SHOTS / f"{self.mode}_{name}.png")


@pytest.fixture(scope="module", params=[("canvas", "ComfyUI-SpargeAttention"), ("vue", "sparge-attention")], ids=["canvas", "vue"])
def monitor(request, browser):
    mode, folder = request.param
    server = comfy_server.ComfyServer(pack_folder=folder)
    demo_model.write_demo_model(server.model_path(MODEL))
    with server:
        made = Watched(browser, server, mode)
        made.set(VueNodes_Enabled=mode == "vue", Locale="en", ColorPalette="dark")
        made.open()
        yield made
        made.page.close()


def test_a_run_fills_the_monitor_and_a_click_opens_the_block_map(monitor):
    monitor.drop(workflow(seed=1))
    monitor.wait_progress("Waiting")
    monitor.queue()
    monitor.wait_progress(f"done · step {STEPS} of {STEPS} · {LAYERS} layers · 2 heads")
    assert re.search(r"than dense|from dense|compare with dense", monitor.text(".sparge-headline"))
    assert re.search(r"\d x cross-attention to 16 tokens", monitor.text(".sparge-reasons"))
    # Every cell of the map is painted: half way between two cells there may be a gap, so the middles are looked at.
    painted = monitor.page.evaluate(f"""(() => {{
      const canvas = {PANEL}.querySelector('.sparge-heat canvas');
      const paper = {PANEL}.querySelector('.sparge-paper');
      const at = (start, size, i, n) => Math.floor(start + size * (i + 0.5) / n);
      const alpha = (step, layer) => canvas.getContext('2d').getImageData(at(paper.offsetLeft, paper.offsetWidth, step, {STEPS}),
        at(paper.offsetTop, paper.offsetHeight, layer, {LAYERS}), 1, 1).data[3];
      let count = 0;
      for (let step = 0; step < {STEPS}; step++) for (let layer = 0; layer < {LAYERS}; layer++) count += alpha(step, layer) === 255;
      return count;
    }})()""")
    assert painted == STEPS * LAYERS
    buttons = f"[...{PANEL}.querySelectorAll('.sparge-choice')[0].children].map((button) => button.textContent)"
    assert monitor.page.evaluate(buttons) == ["density", "PV skipped", "time"]
    (run,) = monitor.server.get(f"/sparge_attention/runs?{urlencode({'monitor': NAME})}")["runs"]
    last = dict(zip([column["name"] for column in run["columns"]], run["step_totals"][-1], strict=True))
    table = monitor.page.evaluate(f"[...{PANEL}.querySelectorAll('tr')].map((row) => [...row.children].map((field) => field.textContent))")
    assert table[0] == ["", "density", "PV skipped", "time", "sparse calls", "dense calls"]
    assert [row[0] for row in table[1:]] == [f"step {STEPS}", "whole run"]
    for row, numbers in zip(table[1:], (last, run["totals"]), strict=True):
        assert row[4:] == [f"{numbers[name]:,}" for name in ("sparse_calls", "dense_calls")]
        assert float(row[1]) == pytest.approx(numbers["density"], abs=0.0051)
    monitor.shot("done")
    paper = monitor.box(".sparge-paper")
    monitor.page.click(paper["x"] + paper["width"] * (STEPS - 0.5) / STEPS, paper["y"] + paper["height"] * 2.5 / LAYERS)
    monitor.page.wait_for(f"!{PANEL}.querySelector('.sparge-map').hidden && {PANEL}.querySelector('.sparge-map [role=status]').hidden")
    assert monitor.text(".sparge-map strong") == f"Block map of step {STEPS}, layer 2"
    assert monitor.page.evaluate(f"{PANEL}.querySelector('.sparge-picture canvas').width") > 1
    assert monitor.page.evaluate(f"{PANEL}.querySelectorAll('.sparge-tiles canvas').length") == 3
    assert monitor.page.evaluate(f"{PANEL}.querySelector('.sparge-map select').options.length") == 3
    monitor.shot("block_map")
    monitor.page.evaluate(f"""(() => {{ const head = {PANEL}.querySelector('.sparge-map select'); head.value = '1';
      head.dispatchEvent(new Event('change')); }})()""")
    monitor.page.wait_for(f"{PANEL}.querySelector('.sparge-map [role=status]').hidden")
    assert any("layer=2&head=1" in url for url, _ in monitor.page.requests)
    monitor.page.key("Escape")
    assert monitor.page.evaluate(f"{PANEL}.querySelector('.sparge-map').hidden")


def test_keys_move_and_open_a_cell(monitor):
    monitor.page.evaluate(f"{PANEL}.querySelector('.sparge-heat canvas').focus()")
    for name in ("Escape", "ArrowLeft", "ArrowLeft", "ArrowDown"):
        monitor.page.key(name)
    assert monitor.text(".sparge-cell").startswith(f"step {STEPS - 1}, layer 1: ")
    nodes = monitor.page.evaluate("app.graph._nodes.length")
    monitor.page.key("Enter")
    monitor.page.wait_for(f"!{PANEL}.querySelector('.sparge-map').hidden")
    monitor.page.key("Escape")
    assert monitor.page.evaluate(f"document.activeElement === {PANEL}.querySelector('.sparge-heat canvas')")
    monitor.page.key("Escape")
    assert monitor.text(".sparge-cell").startswith("Click a cell")
    assert monitor.page.evaluate("app.graph._nodes.length") == nodes


def test_the_wheel_over_the_panel_zooms_the_graph(monitor):
    box = monitor.box(".sparge-headline")
    monitor.page.wheel(box["x"] + 20, box["y"] + 5, -120)
    monitor.page.wait_for("Math.abs(app.canvas.ds.scale - 1.1) < 0.02")
    monitor.look()


def test_a_node_that_takes_the_place_of_another_has_its_panel(monitor):
    """As an undo does: "Nodes 2.0" then keeps the place in the page, and puts nothing into it."""
    assert monitor.page.evaluate(f"""(() => {{
      const [before, whole] = [{PANEL}, app.graph.serialize()];
      app.graph.clear();
      app.graph.configure(whole);
      return new Promise((done) => setTimeout(() => done({PANEL} !== before && !before.isConnected), 500));
    }})()""")
    monitor.wait_progress(f"done · step {STEPS} of {STEPS}")
    monitor.look()
    monitor.shot("replaced")


def test_a_monitor_in_a_subgraph_follows_its_runs(monitor):
    enter = "app.canvas.openSubgraph(around.subgraph, around)"
    monitor.drop(workflow(seed=4, steps=3, cdfthreshd=0.98))  # another model than the runs before had
    monitor.page.evaluate(f"""(() => {{
      const node = app.graph._nodes.find((found) => String(found.id) === '{MONITOR}');
      window.around = app.graph.convertToSubgraph(new Set([node])).node;
      {enter};
    }})()""")
    monitor.wait_progress("Waiting")
    monitor.queue()
    monitor.wait_progress("done · step 3 of 3", 15)
    monitor.page.evaluate(f"""app.loadGraphData((app.rootGraph ?? app.graph).serialize(), true, true, 'inside').then(() => {{
      window.around = app.graph._nodes.find((found) => found.subgraph);
      {enter};
    }})""")
    monitor.wait_progress("done · step 3 of 3", 15)
    name = monitor.page.evaluate("""(() => {
      const node = around.subgraph._nodes.find((found) => found.type === 'SpargeMonitor');
      return `${node.widgets.find(({ name }) => name === 'id').value}/${around.id}:${node.id}`;
    })()""")
    assert any(f"/sparge_attention/runs?{urlencode({'monitor': name})}&client=" in url for url, _ in monitor.page.requests)


def test_a_page_that_is_reloaded_in_the_middle_of_a_run_goes_on(monitor):
    graph = workflow(seed=2, steps=40, length=25)
    monitor.drop(graph)
    monitor.queue()
    monitor.wait_progress("running · step [1-9]")
    monitor.open()
    monitor.drop(graph)
    running = monitor.wait_progress(r"running · step \d+ of 40")
    done = int(re.search(r"step (\d+)", running)[1])
    monitor.page.evaluate(f"{PANEL}.querySelector('.sparge-heat canvas').focus()")
    for _ in range(2):
        monitor.page.key("ArrowLeft")
    assert "not run" not in monitor.text(".sparge-cell"), "a step of before the reload is missing"
    monitor.wait_progress(f"running · step {done + 1}|running · step {done + 2}|running · step {done + 3}")
    monitor.shot("reloaded")
    requests.post(f"{monitor.server.url}/interrupt", timeout=30).raise_for_status()
    monitor.wait_progress("ended early")


def test_a_server_that_was_restarted_leaves_no_run_on_the_panel(monitor):
    """It knows none: no numbers and no heat map of a run that is gone, until there is one again."""
    hidden = f"[getComputedStyle({PANEL}.querySelector('.sparge-heat canvas')).visibility === 'hidden', {PANEL}.querySelector('table').hidden]"
    monitor.drop(workflow(seed=3))
    monitor.wait_progress("done|ended early")
    assert monitor.page.evaluate(hidden) == [False, False]
    monitor.page.evaluate("""(() => {
      const real = app.api.fetchApi;
      app.api.fetchApi = (address, ...more) => address.startsWith('/sparge_attention/runs')
        ? Promise.resolve(new Response('{"version": 3, "runs": []}')) : real.call(app.api, address, ...more);
      window.restart = () => app.api.dispatchEvent(new CustomEvent('reconnected'));
      window.restoreFetch = () => { app.api.fetchApi = real; };
      restart();
    })()""")
    monitor.wait_progress("Waiting")
    assert monitor.page.evaluate(hidden) == [True, True]
    monitor.page.evaluate("restoreFetch(), restart()")
    monitor.wait_progress("done|ended early")
    assert monitor.page.evaluate(hidden) == [False, False]


def test_messages_of_a_long_run_are_drawn_quickly(monitor):
    monitor.drop(workflow(seed=3))
    took = monitor.page.evaluate("""(async () => {
      const real = window.requestAnimationFrame;
      const took = [];
      for (let step = 0; step <= 50; step++) {
        let spent = 0;
        let drawn = 0;
        const timed = (work) => { const from = performance.now(); work(); spent += performance.now() - from; };
        window.requestAnimationFrame = (callback) => { drawn++; return real((time) => timed(() => callback(time))); };
        timed(() => send(madeUp(step)));
        window.requestAnimationFrame = real;
        await new Promise((done) => real(() => setTimeout(done)));
        took.push(drawn ? spent : Infinity);
      }
      return took.map((ms) => ms === Infinity ? 1e9 : ms);
    })()""")
    settled = sorted(took[2:])
    median, worst = settled[len(settled) // 2], settled[-1]
    print(f"{monitor.mode}: a message of 60 cells on a map of 50 x 60 takes {median:.2f} ms in the median, {worst:.2f} ms at most")
    assert median < WORST_DRAW_MS
    monitor.shot("fifty_by_sixty")


def test_warning_language_and_themes(monitor):
    warning = "nothing ran sparse; most calls: <b>5 tokens</b>"
    monitor.page.evaluate(f"send(madeUp(51, {{ run: 1001, steps: 60, warning: {json.dumps(warning)} }}))")
    monitor.page.wait_for(f"!{PANEL}.querySelector('.sparge-warning').hidden")
    assert monitor.text(".sparge-warning") == warning
    assert monitor.page.evaluate(f"{PANEL}.querySelector('select').options.length") > 1
    monitor.shot("warning")
    monitor.page.evaluate("send(madeUp(52, { version: 4 }))")
    monitor.page.wait_for(f"{PANEL}.textContent.includes('another version of Sparge Attention than this page')")
    monitor.set(Locale="zh", ColorPalette="light")
    monitor.open()
    monitor.drop(workflow(seed=3))
    monitor.page.wait_for(f"{PANEL}.textContent.includes('已完成') || {PANEL}.textContent.includes('提前结束')")
    monitor.shot("light")
    monitor.set(Locale="en", ColorPalette="dark")


def test_a_removed_node_leaves_nothing_behind(monitor):
    monitor.page.evaluate("app.graph.clear()")
    monitor.page.wait_for(f"{PANEL} === null")
    before = monitor.page.evaluate("held")
    assert before["listeners"] == 4, "the extensions themselves listen for runs, for lines and for reconnections"
    assert before["observers"] == 0
    empty = {"last_node_id": 0, "last_link_id": 0, "nodes": [], "links": [], "groups": [], "config": {}, "extra": {}, "version": 0.4}
    added = "app.graph.add(window.made = LiteGraph.createNode('SpargeMonitor'))"
    assert monitor.page.evaluate(f"{added}; held.listeners") > 10
    monitor.page.wait_for(f"{PANEL} !== null")
    monitor.page.evaluate("app.graph.remove(made)")
    time.sleep(0.2)
    assert monitor.page.evaluate("held") == before
    monitor.page.evaluate("send(madeUp(3))")
    # Nor does one in a subgraph, when another workflow is loaded.
    assert monitor.page.evaluate(f"{added}; app.graph.convertToSubgraph(new Set([made])); held.listeners") > 10
    monitor.page.evaluate(f"app.loadGraphData({json.dumps(empty)}).then(() => 1)")
    assert monitor.page.evaluate("held") == before


def test_the_console_is_clean_and_nothing_is_asked_of_other_servers(monitor):
    assert monitor.ours() == []
    scripts = f"/extensions/{monitor.server.pack_folder}/js/"
    asked = [url for url, by in monitor.page.requests if scripts in by]
    assert any(f"/sparge_attention/runs?{urlencode({'monitor': NAME})}" in url for url in asked)
    assert [url for url in asked if not url.startswith(monitor.server.url)] == []
