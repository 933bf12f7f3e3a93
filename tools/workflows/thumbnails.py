"""Writes workflows/*.jpg: every graph as ComfyUI's front end draws it, in Chromium. `.venv/bin/python tools/workflows/thumbnails.py [NAME ...]`."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "web"), str(HERE.parent / "comfyui")]  # what pyproject.toml gives to pytest

import build_workflows  # noqa: E402
import canvas  # noqa: E402
import chromium  # noqa: E402
import comfy_server  # noqa: E402
from PIL import Image  # noqa: E402

WIDTH, MOST_BYTES = 960, 60_000


def jpeg(picture: Image.Image) -> bytes:
    """The picture at the thumbnails' width, as exact as their size allows."""
    small = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
    for quality in range(90, 20, -5):
        file = io.BytesIO()
        small.save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= MOST_BYTES:
            return file.getvalue()
    raise ValueError(f"the picture takes more than {MOST_BYTES} bytes at any quality; make WIDTH smaller than {WIDTH}")


def main(names: list[str]) -> None:
    with comfy_server.ComfyServer() as server, chromium.Chromium(chromium.find()) as browser:
        canvas.stock(server)
        front_end = canvas.Canvas(browser, server)
        front_end.set(VueNodes_Enabled=False, Locale="en", ColorPalette="dark", Minimap_Visible=False, Graph_CanvasMenu=False, Graph_CanvasInfo=False)
        front_end.open()
        for name in names or build_workflows.WORKFLOWS:
            path = build_workflows.FOLDER / f"{name}.json"
            boxes = front_end.drop(json.loads(path.read_text(encoding="utf-8")))
            path.with_suffix(".jpg").write_bytes(jpeg(front_end.picture(boxes)))


if __name__ == "__main__":
    main(sys.argv[1:])
