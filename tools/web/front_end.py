"""ComfyUI's front end in a browser's page: settings, loading it, workflow files dropped on it."""

from __future__ import annotations

import json

import chromium
import comfy_server
import requests

SIGNS_OF_OURS = ("sparge_", "sparge.", "sparge-")


class FrontEnd:
    """A page with ComfyUI's front end on it, and the server behind. `scripts` run in every document of the page before its own."""

    def __init__(self, browser: chromium.Chromium, server: comfy_server.ComfyServer, *scripts: str):
        self.server, self.page = server, browser.page()
        self.dropped = 0
        for script in scripts:
            self.page.do("Page.addScriptToEvaluateOnNewDocument", source=script)

    def set(self, **settings) -> None:
        for name, value in settings.items():
            requests.post(f"{self.server.url}/api/settings/Comfy.{name.replace('_', '.')}", json=value, timeout=30).raise_for_status()

    def open(self) -> None:
        """Loads the page anew and waits until the extension is in."""
        self.page.goto(self.server.url)
        self.page.wait_for("window.app?.graph && app.extensionManager && document.querySelector('#sparge-monitor-style') !== null")
        self.page.wait_for("document.querySelector('canvas#graph-canvas')?.clientWidth > 0 && !document.querySelector('#splash-loader')")
        self.unveil()

    def front(self) -> None:
        """Brings the tab to the front: a browser draws no other."""
        self.page.do("Page.bringToFront")

    def unveil(self) -> None:
        """Waits for the front end's loading veil to go. On a slow machine PrimeVue's BlockUI, blocked again while its first veil fades, takes away
        the second and leaves the first over the page for good (it then complains of removeChild): such a veil is removed."""
        try:
            self.page.wait_for("!document.querySelector('.p-blockui-mask')", 5)
        except chromium.BrowserError:
            self.page.evaluate("document.querySelectorAll('.p-blockui-mask').forEach((veil) => veil.remove())")

    def drop_file(self, workflow: dict) -> None:
        """Drops a workflow file on the canvas, as a user does. Each has a name of its own: newer front ends open a file in the tab that has its name,
        and leave there the pictures of the file before, under nodes that have the ids of its nodes, which grow by them."""
        self.dropped += 1
        self.page.evaluate(f"""(() => {{
          const data = new DataTransfer();
          data.items.add(new File([{json.dumps(json.dumps(workflow))}], 'dropped{self.dropped}.json', {{ type: 'application/json' }}));
          const target = document.querySelector('canvas#graph-canvas');
          for (const type of ['dragenter', 'dragover', 'drop'])
            target.dispatchEvent(new DragEvent(type, {{ dataTransfer: data, bubbles: true, cancelable: true, clientX: 700, clientY: 500 }}));
        }})()""")

    def ours(self) -> list[str]:
        """What the page complained about that this pack has to do with; the front end has complaints of its own."""
        return [text for text in self.page.problems if any(sign in text for sign in (*SIGNS_OF_OURS, f"/{self.server.pack_folder}/"))]
