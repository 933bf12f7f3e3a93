"""`make serve`: ComfyUI with the pack and the demo model, left open for the browser, with the demo workflow on screen."""

from __future__ import annotations

import argparse
import signal
import sys
import time
import webbrowser
from pathlib import Path

import comfy_server
import demo_model

MODEL = demo_model.FILE


def serve(port: int, base: Path | None, browser: bool) -> None:
    server = comfy_server.ComfyServer(base, port=port)
    demo_model.write_demo_model(server.model_path(MODEL))
    with server:
        url = f"{server.url}/?template=sparge_demo&source={comfy_server.FIXTURE_FOLDER}"
        print(f"ComfyUI is at {url}\nOutput folder: {server.output}{' (removed at the end)' if base is None else ''}\nCtrl-C stops it.", flush=True)
        if browser and not webbrowser.open(url):
            print("No browser could be opened; open the address yourself.", flush=True)
        shown = len(server.log())
        while True:
            log = server.log()
            print(log[shown:], end="", flush=True)
            shown = len(log)
            server.check_alive()
            time.sleep(0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description="Starts ComfyUI on the CPU with this pack and the demo model and opens the demo workflow.")
    parser.add_argument("--port", type=int, default=8188, help="port, or the next free one (default: 8188)")
    parser.add_argument("--base", type=Path, default=None, help="base directory to use and keep (default: a temporary one)")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))  # stops the server on the way out
    try:
        serve(given.port, given.base, not given.no_browser)
    except comfy_server.ServerError as error:
        print(f"serve failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
