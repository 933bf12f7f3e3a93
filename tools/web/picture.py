"""Takes the README's pictures of Sparge Monitor: `.venv/bin/python tools/web/picture.py`, two minutes."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("tools/comfyui", "tools/web")]  # what pyproject.toml gives to pytest

import chromium  # noqa: E402
import comfy_server  # noqa: E402
import demo_model  # noqa: E402
from monitor_page import LAYERS, MODEL, MONITOR, PANEL, MonitorPage, workflow  # noqa: E402

FOLDER = ROOT / "web" / "docs"
MARGIN = 12


def main() -> int:
    server = comfy_server.ComfyServer(pack_folder="ComfyUI-SpargeAttention")
    demo_model.write_demo_model(server.model_path(MODEL))
    with chromium.Chromium(chromium.find()) as browser, server:
        shown = MonitorPage(browser, server)
        shown.set(VueNodes_Enabled=True, Locale="en", ColorPalette="dark")
        shown.open()
        shown.drop(workflow(seed=1, whole_size=True))
        shown.queue()
        steps = int(shown.wait_progress("done · step (\\d+) of", 600).split()[3])
        node = f"document.querySelector('[data-node-id=\"{MONITOR}\"]').getBoundingClientRect()"
        take(shown, node, "monitor.png")
        paper = shown.box(".sparge-paper")
        shown.page.click(paper["x"] + paper["width"] * (steps - 0.5) / steps, paper["y"] + paper["height"] * 2.5 / LAYERS)
        shown.page.wait_for(f"!{PANEL}.querySelector('.sparge-map').hidden && {PANEL}.querySelector('.sparge-map [role=status]').hidden")
        take(shown, node, "monitor_map.png")
    return 0


def take(shown: MonitorPage, node: str, name: str) -> None:
    box = shown.page.evaluate(f"(({{x, y, width, height}}) => ({{x, y, width, height}}))({node})")
    box = {"x": box["x"] - MARGIN, "y": box["y"] - MARGIN, "width": box["width"] + 2 * MARGIN, "height": box["height"] + 2 * MARGIN}
    print(shown.page.screenshot(FOLDER / name, box))


if __name__ == "__main__":
    sys.exit(main())
