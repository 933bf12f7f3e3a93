"""A page with Sparge Monitor on it, and the workflow that it watches: the demo's, cut down to a sampler."""

from __future__ import annotations

import json

import chromium
import comfy_server
import demo_model
from front_end import FrontEnd

MODEL = demo_model.FILE
MONITOR = 12
STEPS, LAYERS = 8, 6
ATTENTION_ID, MONITOR_ID = "a77e47104a77e471", "304170a304170a30"  # as a browser has drawn them, when it saved the file
PANEL = "document.querySelector('.sparge-monitor')"


class MonitorPage(FrontEnd):
    """The front end with one monitor, in view at full size."""

    def drop(self, workflow: dict) -> None:
        """Drops a workflow file and puts its monitor into view at full size."""
        loaded = f"app.graph._nodes.length === {len(workflow['nodes'])} && {PANEL} !== null"
        for _ in range(5):  # the front end may still be loading a workflow of its own
            self.drop_file(workflow)
            try:
                self.page.wait_for(loaded, 3)
                break
            except chromium.BrowserError:
                continue
        self.page.wait_for(loaded, 3)
        self.unveil()
        self.look()

    def look(self, number: int = MONITOR) -> None:
        """Puts a node into view at full size."""
        self.page.evaluate(f"""(async () => {{
          for (let i = 0; i < 3; i++) {{
            const node = app.graph._nodes.find((found) => String(found.id) === '{number}');
            app.canvas.ds.scale = 1;
            app.canvas.ds.offset[0] = 140 - node.pos[0];
            app.canvas.ds.offset[1] = 150 - node.pos[1];
            app.canvas.setDirty(true, true);
            await new Promise((done) => setTimeout(done, 100));
          }}
        }})()""")

    def queue(self) -> None:
        self.page.evaluate("app.queuePrompt(0, 1).then(() => 1)")

    def text(self, name: str) -> str:
        """The text of one part of the panel."""
        return self.page.evaluate(f"{PANEL}.querySelector('{name}').textContent")

    def wait_progress(self, pattern: str, timeout: float = 30.0) -> str:
        return self.page.wait_for(f"({PANEL}?.querySelector('.sparge-row')?.textContent.match(/{pattern}/) ?? [null])[0]", timeout)

    def box(self, name: str) -> dict:
        values = "({x, y, width, height}) => ({x, y, width, height})"
        return self.page.evaluate(f"({values})({PANEL}.querySelector('{name}').getBoundingClientRect())")


def workflow(seed: int, steps: int = STEPS, length: int = 9, cdfthreshd: float = 0.99, whole_size: bool = False) -> dict:
    """The demo's workflow cut down to a sampler, with a monitor before it; of few tokens unless `whole_size`. Our nodes have their ids in it."""
    file = comfy_server.HERE / "fixture_pack" / "workflows" / "sparge_demo.json"
    whole = json.loads(file.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in whole["nodes"] if node["id"] <= 6}
    links = [link for link in whole["links"] if link[1] in nodes and link[3] in nodes]
    values = {3: {6: 256, 8: cdfthreshd}, 5: {0: 320, 1: 256, 2: length}, 6: {0: seed, 2: steps}}
    for identity, changes in () if whole_size else values.items():
        for at, value in changes.items():
            nodes[identity]["widgets_values"][at] = value
    nodes[3]["widgets_values"].append(ATTENTION_ID)
    through = next(link for link in links if (link[1], link[3]) == (3, 6))
    links += [[900, 3, 0, MONITOR, 0, "MODEL"], [901, 6, 0, 13, 0, "LATENT"]]
    through[1] = MONITOR
    nodes[3]["outputs"][0]["links"] = [900]
    nodes[6]["outputs"][0]["links"] = [901]
    for node in nodes.values():
        for output in node["outputs"]:
            output["links"] = [link[0] for link in links if link[1] == node["id"]]
    monitor = {"type": "SpargeMonitor", "pos": [1600, 80], "size": [460, 700], "widgets_values": [True, MONITOR_ID]}
    monitor["inputs"] = [{"name": "model", "type": "MODEL", "link": 900}]
    monitor["outputs"] = [{"name": "model", "type": "MODEL", "links": [through[0]]}]
    save = {"type": "SaveLatent", "pos": [1200, 80], "size": [300, 60], "outputs": [], "widgets_values": ["monitor"]}
    save["inputs"] = [{"name": "samples", "type": "LATENT", "link": 901}]
    plain = {"flags": {}, "order": 0, "mode": 0, "properties": {}}
    added = [{"id": identity, **plain, **node} for identity, node in ((MONITOR, monitor), (13, save))]
    return {"last_node_id": 13, "last_link_id": 901, "nodes": [*nodes.values(), *added], "links": links, "groups": [], "config": {}, "extra": {},
            "version": 0.4}  # fmt: skip
