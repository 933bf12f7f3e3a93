"""ComfyUI's front end with a workflow dropped on it, and pictures of the graph as it is drawn there."""

from __future__ import annotations

import base64
import io

import build_workflows
from comfy_server import ComfyServer
from front_end import FrontEnd
from PIL import Image

# Every node as the front end made it: the file's size is a wish, a node is never smaller than its slots and widgets.
BOXES = """app.graph._nodes.map((node) => ({ id: node.id, type: node.type, title: node.title, x: node.pos[0], y: node.pos[1] - 30,
  width: node.size[0], height: node.size[1] + 30, known: LiteGraph.registered_node_types[node.type] !== undefined, broken: !!node.has_errors }))"""
FURNITURE = 80, 140  # what the front end's own bars take at the sides, and at the top and bottom


def stock(server: ComfyServer) -> None:
    """Empty stand-ins for every model file of the workflows, and the example picture."""
    for file, (_, directory) in build_workflows.LINKS.items():
        server.model_path(file, directory).touch()
    Image.effect_noise((96, 80), 60).convert("RGB").save(server.base / "input" / build_workflows.EXAMPLE_PICTURE)


class Canvas(FrontEnd):
    """The front end with any workflow file."""

    def drop(self, workflow: dict) -> list[dict]:
        """Drops the file on an empty canvas; returns the boxes of its nodes."""
        self.page.evaluate("app.graph.clear()")
        self.drop_file(workflow)
        self.page.wait_for(f"app.graph._nodes.length === {len(workflow['nodes'])} && Object.keys(app.graph.links).length >= 0")
        self.unveil()
        # A node grows when it is drawn: measured before that, it would have the size of the file.
        self.page.evaluate("app.canvas.draw(true, true), app.canvas.draw(true, true)")
        return self.page.evaluate(BOXES)

    def prompt(self) -> dict:
        """What the front end would send to the server."""
        return self.page.evaluate("app.graphToPrompt().then((made) => made.output)")

    def picture(self, boxes: list[dict], width: int = 1900) -> Image.Image:
        """The whole graph with its letters, and nothing of the front end around it."""
        left, top = min(box["x"] for box in boxes) - 40, min(box["y"] for box in boxes) - 80
        right, bottom = (max(box[at] + box[size] for box in boxes) + 40 for at, size in (("x", "width"), ("y", "height")))
        scale = width / (right - left)
        height = round((bottom - top) * scale)
        across, down = FURNITURE
        size = {"width": width + 2 * across, "height": height + 2 * down}
        self.page.do("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=False)
        self.page.evaluate(f"""(async () => {{
          app.canvas.min_font_size_for_lod = 0;
          for (let i = 0; i < 4; i++) {{
            app.canvas.ds.scale = {scale};
            app.canvas.ds.offset = [{across / scale - left}, {down / scale - top}];
            app.canvas.setDirty(true, true);
            await new Promise((done) => setTimeout(done, 150));
          }}
        }})()""")
        clip = {"x": across, "y": down, "width": width, "height": height, "scale": 1}
        shot = self.page.do("Page.captureScreenshot", format="png", clip=clip)["data"]
        return Image.open(io.BytesIO(base64.b64decode(shot))).convert("RGB")
