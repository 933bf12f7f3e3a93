"""A headless Chromium for tests, driven through its DevTools protocol: evaluated expressions, keys and clicks, screenshots, and what it logged."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome")
SWITCHES = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--disable-extensions", "--hide-scrollbars", "--mute-audio")  # fmt: skip
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13, "Escape": 27, "End": 35}

# The question whether a page with unsaved changes may be left stops everything until it is answered.
NO_QUESTIONS = "window.addEventListener('beforeunload', (event) => event.stopImmediatePropagation(), true)"


class BrowserError(RuntimeError):
    """The browser did not start or answer, or an expression failed in the page."""


def find() -> str | None:
    """Path of the browser's program, or None."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Chromium:
    """A context manager that starts the browser and leaves no process and no profile behind."""

    def __init__(self, program: str):
        self.profile = Path(tempfile.mkdtemp(prefix="sparge_chromium_"))
        self.loop = asyncio.new_event_loop()
        command = [program, *SWITCHES, "--remote-debugging-port=0", f"--user-data-dir={self.profile}", "about:blank"]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.session: aiohttp.ClientSession | None = None

    def __enter__(self) -> Chromium:
        try:
            self.port = self._port()
            self.session = self.run(self._open_session())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        if self.session is not None:
            self.run(self.session.close())
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.loop.close()
        shutil.rmtree(self.profile, ignore_errors=True)

    def run(self, task, timeout: float = 60.0):
        return self.loop.run_until_complete(asyncio.wait_for(task, timeout))

    @staticmethod
    async def _open_session() -> aiohttp.ClientSession:
        return aiohttp.ClientSession()

    def _port(self) -> int:
        file = self.profile / "DevToolsActivePort"
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise BrowserError(f"the browser ended with exit status {self.process.returncode}")
            if file.is_file() and file.read_text().strip():
                return int(file.read_text().split()[0])
            time.sleep(0.05)
        raise BrowserError("the browser opened no DevTools port within 30 s")

    def page(self, width: int = 1600, height: int = 1000) -> Page:
        """A new tab of this size."""
        return self.run(self._page(width, height))

    async def _page(self, width: int, height: int) -> Page:
        async with self.session.put(f"http://127.0.0.1:{self.port}/json/new?about:blank") as answer:
            target = await answer.json()
        socket = await self.session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0)
        page = Page(self, socket)
        for domain in ("Runtime", "Page", "Network", "Log"):
            await page.call(f"{domain}.enable")
        await page.call("Page.addScriptToEvaluateOnNewDocument", source=NO_QUESTIONS)
        await page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        return page


class Page:
    """One tab. `problems` are its console errors and warnings and its uncaught exceptions, `requests` (address, what asked for it)."""

    def __init__(self, browser: Chromium, socket: aiohttp.ClientWebSocketResponse):
        self.browser, self.socket = browser, socket
        self.problems: list[str] = []
        self.requests: list[tuple[str, str]] = []
        self._number = 0
        self._waiting: dict[int, asyncio.Future] = {}
        self._reader = browser.loop.create_task(self._read())

    async def _read(self) -> None:
        async for message in self.socket:
            event = json.loads(message.data)
            if "id" in event:
                waiting = self._waiting.pop(event["id"], None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(event)
            else:
                self._note(event["method"], event["params"])

    def _note(self, method: str, params: dict) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append((params["request"]["url"], json.dumps(params["initiator"])))
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(f"exception: {details.get('exception', {}).get('description') or details['text']}")
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            words = [str(part.get("value", part.get("description", ""))) for part in params["args"]]
            places = [frame["url"] for frame in params.get("stackTrace", {}).get("callFrames", [])]
            self.problems.append(f"{params['type']}: {' '.join(words)} at {' '.join(places)}")
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            entry = params["entry"]
            self.problems.append(f"{entry['level']}: {entry['text']} {entry.get('url', '')}")

    async def call(self, method: str, **params) -> dict:
        self._number += 1
        number = self._number
        answer = self._waiting[number] = self.browser.loop.create_future()
        await self.socket.send_json({"id": number, "method": method, "params": params})
        event = await answer
        if "error" in event:
            raise BrowserError(f"{method}: {event['error']['message']}")
        return event["result"]

    def do(self, method: str, **params) -> dict:
        """One command of the DevTools protocol."""
        return self.browser.run(self.call(method, **params))

    def evaluate(self, expression: str):
        """The value of a JavaScript expression in the page; a promise is waited for."""
        result = self.do("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True)
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise BrowserError(f"{details.get('exception', {}).get('description') or details['text']}\nin: {expression}")
        return result["result"].get("value")

    def wait_for(self, expression: str, timeout: float = 30.0):
        """Waits until the expression is true in the page, and returns its value."""
        deadline = time.monotonic() + timeout
        while True:
            error = None
            try:
                value = self.evaluate(expression)
            except BrowserError as failed:  # the page may be on its way to another document
                value, error = None, failed
            if value:
                return value
            if time.monotonic() > deadline:
                raise BrowserError(f"not true within {timeout:.0f} s: {expression}; problems: {self.problems[-5:]}") from error
            self.browser.run(asyncio.sleep(0.05))

    def goto(self, url: str) -> None:
        self.do("Page.navigate", url=url)

    def screenshot(self, path: Path, box: dict | None = None) -> Path:
        """A PNG of the page, or of a box {x, y, width, height} of it."""
        clip = {} if box is None else {"clip": {**box, "scale": 1}}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.do("Page.captureScreenshot", format="png", **clip)["data"]))
        return path

    def click(self, x: float, y: float) -> None:
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            pressed = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.do("Input.dispatchMouseEvent", type=kind, x=x, y=y, **pressed)

    def wheel(self, x: float, y: float, by: float) -> None:
        self.do("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=by)

    def key(self, name: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.do("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=KEYS[name])

    def close(self) -> None:
        """Ends the tab and its connections; one that goes to another page may keep them for a way back."""
        self.do("Page.close")
        self._reader.cancel()
        self.browser.run(self.socket.close())
