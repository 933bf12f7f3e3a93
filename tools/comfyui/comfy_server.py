"""The real ComfyUI server on the CPU, as a subprocess on a free loopback port, with this pack and the fixture pack in it.

    with ComfyServer() as server:
        entry = server.queue({"1": {"class_type": "EmptyImage", "inputs": {...}}, ...})

Everything it writes lies in one base directory (a temporary one unless given): models, input, output, user, and custom_nodes, where the packs
are links. The ComfyUI tree itself is not written to.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import aiohttp
import install
import requests

HERE = Path(__file__).resolve().parent
PACK_FOLDER = "sparge_attention"  # names in custom_nodes; the pack must work under any
FIXTURE_FOLDER = "sparge_fixture"
MODEL_FOLDERS = ("checkpoints", "clip_vision", "configs", "diffusion_models", "embeddings", "loras", "text_encoders", "unet", "vae", "vae_approx")
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "demo_output", "node_modules", "build", "dist", "*.egg-info")
LOG_LINES = 60

Progress = Callable[[str, int, int], None]


class ServerError(RuntimeError):
    """The server did not start, died, or did not answer in time; the message ends with its last log lines."""


class PromptError(RuntimeError):
    """ComfyUI refused a prompt or a node of it failed.

    Attributes
    ----------
    nodes : dict[str, str]
        Node id -> its messages, joined.
    """

    def __init__(self, message: str, nodes: dict[str, str]):
        super().__init__(message)
        self.nodes = nodes


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port(preferred: int = 0) -> int:
    """`preferred` or the next free one of the 50 after it; any free loopback port for 0."""
    for port in range(preferred, preferred + 50) if preferred else (0,):
        with socket.socket() as probe:
            if os.name != "nt":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return probe.getsockname()[1]
    raise ServerError(f"no free port between {preferred} and {preferred + 49}; give another one")


def place(source: Path, target: Path) -> None:
    """Puts the folder `source` at `target` as a link, or as a copy where the system allows no links."""
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.is_dir():
        shutil.rmtree(target)
    try:
        target.symlink_to(source, target_is_directory=True)
    except OSError:
        shutil.copytree(source, target, ignore=NOT_COPIED)


class ComfyServer:
    """A context manager that starts the server on entry and leaves no process behind.

    Parameters
    ----------
    base : Path, optional
        Base directory to use and keep. By default a temporary one, removed at the end.
    pack : Path
        The folder to load as the pack; by default this repository.
    pack_folder : str
        Its name in custom_nodes.
    port : int
        Port to prefer (the next free one is taken); 0 for any.
    start_timeout : float
        Seconds until /system_stats must answer.
    arguments : sequence of str
        More command line arguments for ComfyUI.

    Raises
    ------
    ServerError
        When the server dies, does not answer in time, or has no ComfyUI tree to run.
    """

    def __init__(
        self,
        base: Path | None = None,
        *,
        pack: Path = install.ROOT,
        pack_folder: str = PACK_FOLDER,
        port: int = 0,
        start_timeout: float = 120.0,
        arguments: tuple[str, ...] = (),
    ):
        self.temporary = base is None
        self.base = Path(tempfile.mkdtemp(prefix="sparge_comfy_")) if base is None else Path(base).resolve()
        self.pack, self.pack_folder = Path(pack).resolve(), pack_folder
        self.preferred_port, self.port = port, 0
        self.start_timeout, self.arguments = start_timeout, tuple(arguments)
        self.process: subprocess.Popen | None = None
        self.log_file = self.base / "server.log"
        self.kept_log = ""
        for folder in ("custom_nodes", "input", "output", "temp", "user/default", *(f"models/{name}" for name in MODEL_FOLDERS)):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        pace = self.base / "user" / "sparge_attention" / "pace.json"
        if not pace.exists():  # else what one prompt measures on a busy machine could leave the next one's calls dense
            pace.parent.mkdir(exist_ok=True)
            pace.write_text(json.dumps({"version": 1, "off": True}), encoding="utf-8")

    @property
    def url(self) -> str:
        """Address of the server, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self) -> Path:
        """The folder that ComfyUI's save nodes write into."""
        return self.base / "output"

    def model_path(self, name: str, folder: str = "diffusion_models") -> Path:
        """Where to put the model file `name` so that the loader node lists it."""
        return self.base / "models" / folder / name

    def __enter__(self) -> ComfyServer:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the process and returns once it answers."""
        main = install.comfyui_tree() / "main.py"
        if not main.is_file():
            raise ServerError(f"there is no ComfyUI tree at {main.parent}; run `make` once, or set COMFYUI_PATH to a ComfyUI folder")
        place(self.pack, self.base / "custom_nodes" / self.pack_folder)
        place(HERE / "fixture_pack", self.base / "custom_nodes" / FIXTURE_FOLDER)
        settings = self.base / "user" / "default" / "comfy.settings.json"
        if not settings.exists():  # else the front end opens with its template browser over the canvas
            settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}), encoding="utf-8")
        self.port = free_port(self.preferred_port)
        command = [sys.executable, str(HERE / "comfy_launch.py"), str(main), "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:", "--disable-api-nodes", "--disable-auto-launch"]
        command += ["--use-pytorch-cross-attention", *self.arguments]
        environment = dict(os.environ, OMP_NUM_THREADS=str(cores()), PYTHONUNBUFFERED="1", PYTHONIOENCODING="utf-8")
        # Waiting threads sleep: beside one other busy process a sparse call takes 0.23 s, with spinning ones 0.42 s (2 cores, 8,320 tokens).
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if os.environ.get("COMFYUI_PATH"):
            environment["PYTHONDONTWRITEBYTECODE"] = "1"  # somebody else's folder
        with open(self.log_file, "wb") as log:
            # A session of its own: Ctrl-C in the terminal reaches this process alone, which then stops the server in order.
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=os.name != "nt"
            )
        deadline = time.monotonic() + self.start_timeout
        while True:
            self.check_alive()
            with contextlib.suppress(requests.RequestException):
                if requests.get(self.url + "/system_stats", timeout=5).ok:
                    return
            if time.monotonic() > deadline:
                raise ServerError(f"ComfyUI did not answer within {self.start_timeout:.0f} s\n{self.log_tail()}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Ends the process (terminate, after 10 s kill) and removes a temporary base directory. May be called again."""
        process, self.process = self.process, None
        try:
            if process is not None and process.poll() is None:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    pass
        finally:  # also when the wait above is interrupted
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
            self.kept_log = self.log()
            if self.temporary:
                shutil.rmtree(self.base, ignore_errors=True)

    def log(self) -> str:
        """What the server printed so far; still there after the end."""
        return self.log_file.read_text(encoding="utf-8", errors="replace") if self.log_file.is_file() else self.kept_log

    def log_tail(self) -> str:
        """The last lines of the log, with a heading."""
        lines = self.log().splitlines()[-LOG_LINES:]
        return "\n".join([f"--- last {len(lines)} lines of ComfyUI's log", *lines])

    def check_alive(self) -> None:
        if self.process is None:
            raise ServerError("the server is not running; use it inside `with ComfyServer() as server:`")
        if self.process.poll() is not None:
            raise ServerError(f"ComfyUI ended with exit status {self.process.returncode}\n{self.log_tail()}")

    def get(self, path: str) -> dict:
        """The JSON that a GET of `path` answers."""
        self.check_alive()
        try:
            answer = requests.get(self.url + path, timeout=60)
            answer.raise_for_status()
        except requests.RequestException as error:
            raise ServerError(f"ComfyUI did not answer {path}: {error}\n{self.log_tail()}") from error
        return answer.json()

    def object_info(self) -> dict:
        """Every node the server knows: class name -> its inputs and outputs."""
        return self.get("/object_info")

    def queue(self, prompt: dict, progress: Progress | None = None, timeout: float = 900.0) -> dict:
        """Runs an API-format prompt and returns its history entry.

        Parameters
        ----------
        prompt : dict
            Node id -> {"class_type", "inputs"}.
        progress : callable, optional
            Called with (node id, value, max) as nodes report it; a sampler does once a step.
        timeout : float
            Seconds the whole prompt may take.

        Raises
        ------
        PromptError
            When ComfyUI refuses the prompt or a node fails; the server goes on.
        ServerError
            When the server dies or the time is over.
        """
        self.check_alive()
        return asyncio.run(self._queue(prompt, progress or (lambda node, value, maximum: None), time.monotonic() + timeout))

    async def _queue(self, prompt: dict, progress: Progress, deadline: float) -> dict:
        client = uuid.uuid4().hex
        try:
            async with aiohttp.ClientSession(self.url) as session, session.ws_connect(f"/ws?clientId={client}", max_msg_size=0) as socket_:
                async with session.post("/prompt", json={"prompt": prompt, "client_id": client}) as answer:
                    body = await answer.json()
                    if answer.status != 200:
                        raise refused(body, prompt)
                identity = body["prompt_id"]
                while True:
                    ended = await self._follow(socket_, identity, progress)
                    # The history decides: it may lag behind the last message, and a lost message must not hang us.
                    async with session.get(f"/history/{identity}") as answer:
                        entry = (await answer.json()).get(identity)
                    if entry is not None:
                        return finished(entry)
                    if time.monotonic() > deadline:
                        raise ServerError(f"the prompt did not end in time\n{self.log_tail()}")
                    if ended:
                        await asyncio.sleep(0.05)
        except aiohttp.ClientError as error:
            time.sleep(0.5)  # a dying process needs a moment to be seen as dead
            self.check_alive()
            raise ServerError(f"the connection to ComfyUI broke: {error}\n{self.log_tail()}") from error

    @staticmethod
    async def _follow(socket_: aiohttp.ClientWebSocketResponse, identity: str, progress: Progress) -> bool:
        """Reads messages until the prompt ends (True) or for two seconds without one (False)."""
        if socket_.closed:
            return True
        while True:
            try:
                message = await socket_.receive(timeout=2.0)
            except asyncio.TimeoutError:
                return False
            if message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR):
                return True
            if message.type != aiohttp.WSMsgType.TEXT:  # previews are binary
                continue
            event = json.loads(message.data)
            data = event.get("data") or {}
            if data.get("prompt_id") != identity:
                continue
            if event["type"] == "progress":
                progress(str(data.get("node")), int(data["value"]), int(data["max"]))
            elif event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                return True


def refused(body: dict, prompt: dict) -> PromptError:
    """The error for a prompt that did not pass ComfyUI's validation."""
    nodes = {}
    for identity, found in (body.get("node_errors") or {}).items():
        texts = [": ".join(part for part in (error.get("message"), error.get("details")) if part) for error in found.get("errors", [])]
        nodes[str(identity)] = "; ".join(texts)
    kinds = {identity: prompt.get(identity, {}).get("class_type", "?") for identity in nodes}
    lines = [f"node {identity} ({kinds[identity]}): {text}" for identity, text in nodes.items()]
    error = body.get("error") or {}
    summary = error if isinstance(error, str) else ": ".join(part for part in (error.get("message"), error.get("details")) if part)
    return PromptError("ComfyUI refused the prompt. " + ("\n".join(lines) or summary), nodes)


def finished(entry: dict) -> dict:
    """`entry`, unless it records a failure."""
    status = entry.get("status") or {}
    if status.get("status_str", "success") == "success":
        return entry
    for kind, data in status.get("messages", []):
        if kind == "execution_error":
            node, text = str(data.get("node_id")), f"{data.get('exception_type')}: {str(data.get('exception_message')).strip()}"
            raise PromptError(f"node {node} ({data.get('node_type')}) failed. {text}", {node: text})
    raise PromptError("the prompt was interrupted", {})
