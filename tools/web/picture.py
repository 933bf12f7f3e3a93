"""Takes the README's pictures of Sparge Monitor: `.venv/bin/python tools/web/picture.py`, two minutes."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("tools/comfyui", "tests/web")]  # what pyproject.toml gives to pytest

import chromium  # noqa: E402
import comfy_server  # noqa: E402
import demo_model  # noqa: E402
import test_browser  # noqa: E402

FOLDER = ROOT / "web" / "docs"
MARGIN = 12


def main() -> int:
    server = comfy_server.ComfyServer(pack_folder="ComfyUI-SpargeAttention")
    demo_model.write_demo_model(server.model_path(test_browser.MODEL))
    with chromium.Chromium(chromium.find()) as browser, server:
        desk = test_browser.Desk(browser, server, "vue")
        desk.set(VueNodes_Enabled=True, Locale="en", ColorPalette="dark")
        desk.open()
        desk.drop(test_browser.workflow(seed=1, whole_size=True))
        test_browser.queue(desk)
        steps = int(desk.wait_progress("done · step (\\d+) of", 600).split()[3])
        node = f"document.querySelector('[data-node-id=\"{test_browser.MONITOR}\"]').getBoundingClientRect()"
        take(desk, node, "monitor.png")
        paper = desk.box(".sparge-paper")
        desk.page.click(paper["x"] + paper["width"] * (steps - 0.5) / steps, paper["y"] + paper["height"] * 2.5 / test_browser.LAYERS)
        panel = test_browser.PANEL
        desk.page.wait_for(f"!{panel}.querySelector('.sparge-map').hidden && {panel}.querySelector('.sparge-map [role=status]').hidden")
        take(desk, node, "monitor_map.png")
    return 0


def take(desk: test_browser.Desk, node: str, name: str) -> None:
    box = desk.page.evaluate(f"(({{x, y, width, height}}) => ({{x, y, width, height}}))({node})")
    box = {"x": box["x"] - MARGIN, "y": box["y"] - MARGIN, "width": box["width"] + 2 * MARGIN, "height": box["height"] + 2 * MARGIN}
    print(desk.page.screenshot(FOLDER / name, box))


if __name__ == "__main__":
    sys.exit(main())
