"""The nodes in ComfyUI's server, a process of its own: what which browser is sent, and prompts as they were saved before there were presets."""

from __future__ import annotations

import asyncio
import contextlib
import json
from urllib.parse import urlencode

import aiohttp
import comfy_server
import demo_model
import pytest

MODEL = demo_model.FILE


@pytest.fixture(scope="module")
def server(comfy):
    made = comfy_server.ComfyServer()
    demo_model.write_demo_model(made.model_path(MODEL))
    with made:
        yield made


def prompt(steps: int, size: dict, sparge: dict, **more: tuple[str, dict]) -> dict:
    """So many steps of the demo model with these inputs of SpargeAttention, which may leave `preset` out; `more`: further nodes by their ids."""
    sampler = {"seed": 1, "steps": steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0, "latent_image": ["latent", 0]}
    sampler |= {"model": ["5:12" if "5:12" in more else "sparge", 0], "positive": ["text", 0], "negative": ["text", 0]}
    old = dict(topk=0.3, pvthreshd=15.0, start_percent=0.0, end_percent=1.0, dense_blocks="", min_tokens=0, simthreshd1=-0.1, cdfthreshd=0.0,
               token_order="auto", compensate=False, protect_references=False, backend="auto")  # fmt: skip
    nodes = {
        "loader": ("UNETLoader", {"unet_name": MODEL, "weight_dtype": "default"}),
        "sparge": ("SpargeAttention", {"model": ["loader", 0], **old, **sparge}),
        "text": ("SpargeDemoConditioning", {"tokens": 8, "dim": 4096, "seed": 3}),
        "latent": ("EmptyHunyuanLatentVideo", {**size, "batch_size": 1}),
        "sampler": ("KSampler", sampler),
        **more,
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def test_real_server(server):
    """Of a prompt that no browser queued, messages arrive over every websocket; the routes answer under both prefixes; in a subgraph, too."""
    monitor = ("SpargeMonitor", {"model": ["sparge", 0], "measure_dense": True})
    save = ("SaveLatent", {"samples": ["sampler", 0], "filename_prefix": "monitor"})
    size = {"width": 96, "height": 64, "length": 9}
    (messages,) = listen(server, prompt(3, size, {"token_order": "tiles"}, **{"5:12": monitor, "save": save}), [""], ["watcher"])
    (run,) = server.get("/api/sparge_attention/runs?" + urlencode({"monitor": "5:12"}))["runs"]
    answer = server.get(f"/sparge_attention/map?run={run['run']}&step=2&layer=0&head=0")
    assert [(m["state"], m["step"]) for m in messages] == [("running", 0), ("running", 1), ("running", 2), ("done", 3)]
    assert all(m["monitors"] == ["5:12"] for m in messages) and messages[-1]["totals"]["measuring_ms"] > 0
    assert run["cells"] == [cell for m in messages for cell in m["cells"]] and len(run["cells"]) == 3 * run["layers"] > 0
    assert answer["frames"]["t"] == 3 and answer["frames"]["h"] == 4 and answer["frames"]["w"] == 6


def listen(server, prompt, queued_by: list[str], tabs: list[str], event: str = "sparge.run") -> list[list[dict]]:
    """Runs the prompt for each client of `queued_by`, "" for none, while these tabs are connected; the data of `event` that each of them was sent."""

    async def run():
        async with aiohttp.ClientSession(server.url) as session, contextlib.AsyncExitStack() as opened:
            sockets = [await opened.enter_async_context(session.ws_connect(f"/ws?clientId={name}", max_msg_size=0)) for name in tabs]
            for client in queued_by:
                await queued(session, prompt, client)
            # A tab hears of the end of its own prompt; what was sent before has come before.
            lasts = [await queued(session, {"1": {"class_type": "PreviewAny", "inputs": {"source": name}}}, name) for name in tabs]
            return [await told(socket, last, event) for socket, last in zip(sockets, lasts, strict=True)]

    return asyncio.run(run())


async def queued(session, prompt: dict, client: str) -> str:
    """The id of the prompt, once it is done."""
    async with session.post("/prompt", json={"prompt": prompt} | ({"client_id": client} if client else {})) as answer:
        assert answer.status == 200, await answer.text()
        identity = (await answer.json())["prompt_id"]
    for _ in range(1200):
        async with session.get(f"/history/{identity}") as answer:
            if identity in (entry := await answer.json()):
                assert entry[identity]["status"]["status_str"] == "success"
                return identity
        await asyncio.sleep(0.1)
    raise TimeoutError(f"prompt {identity} has not ended within two minutes")


async def told(socket, last: str, event: str) -> list[dict]:
    """The data of every `event` up to the end of the prompt `last`."""
    found = []
    while True:
        message = await socket.receive(timeout=60)
        assert message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY), message
        said = json.loads(message.data) if message.type == aiohttp.WSMsgType.TEXT else {}
        if said.get("type") == event:
            found.append(said["data"])
        elif said.get("type") == "execution_success" and said["data"]["prompt_id"] == last:
            return found


def test_two_browsers_with_the_same_file_see_their_own_runs(server):
    """The same ids and numbers in both; while a tab is connected, the other is told nothing of its runs, neither sent nor asked for."""
    monitor = ("SpargeMonitor", {"model": ["sparge", 0], "measure_dense": False, "id": "0f3c"})
    save = ("SaveLatent", {"samples": ["sampler", 0], "filename_prefix": "two"})
    size = {"width": 96, "height": 64, "length": 9}
    graph = prompt(2, size, {"id": "77aa"}, **{"5:12": monitor, "save": save})
    both = []
    for event in ("sparge.run", "sparge.line"):
        graph["sampler"]["inputs"]["seed"] += 10
        again = json.loads(json.dumps(graph))
        ours = listen(server, graph, ["one"], ["one", "two"], event)
        again["sampler"]["inputs"]["seed"] += 1
        theirs = listen(server, again, ["two"], ["one", "two"], event)
        assert ours[1] == [] and theirs[0] == [] and ours[0] and theirs[1], event
        both.append((ours[0], theirs[1]))
    (runs_of_one, runs_of_two), (lines_of_one, lines_of_two) = both
    for messages in (runs_of_one, runs_of_two):
        assert [m["state"] for m in messages] == ["running", "running", "done"] and all(m["monitors"] == ["0f3c/5:12"] for m in messages)
    assert runs_of_one[0]["run"] != runs_of_two[0]["run"]
    for lines in (lines_of_one, lines_of_two):
        assert {said["node"] for said in lines} == {"77aa/sparge"} and lines[-1]["text"].startswith("12 calls sparse")

    def asked(client: str, connected: list[str]) -> list[int]:
        return asyncio.run(ask(server, client, connected))

    assert runs_of_two[0]["run"] not in asked("one", ["one", "two"]) and runs_of_one[0]["run"] in asked("one", ["one", "two"])
    assert {runs_of_one[0]["run"], runs_of_two[0]["run"]} <= set(asked("new", ["new"])), "both tabs are gone"


async def ask(server, client: str, connected: list[str]) -> list[int]:
    """The runs of the monitor that a tab is told, while these are connected."""
    async with aiohttp.ClientSession(server.url) as session, contextlib.AsyncExitStack() as open_ones:
        for name in connected:
            await open_ones.enter_async_context(session.ws_connect(f"/ws?clientId={name}"))
        async with session.get("/sparge_attention/runs", params={"monitor": "0f3c/5:12", "client": client}) as answer:
            return [run["run"] for run in (await answer.json())["runs"]]


def test_a_saved_prompt_runs_as_it_did(server):
    report, text = ("SpargeReport", {"model": ["sparge", 0], "data": ["sampler", 0]}), ("PreviewAny", {"source": ["report", 3]})

    def run(**values) -> dict:
        """With a socket of the time before presets, and `values` changed."""
        saved = prompt(9, {"width": 256, "height": 256, "length": 1}, {"block_mask": None, **values}, report=report, json=text)
        (written,) = server.queue(saved)["outputs"]["json"]["text"]
        return json.loads(written)["runs"][-1]

    def dense_steps(run: dict) -> list[int]:
        """Of the last layer, which no preset keeps dense here."""
        return [c["step"] for c in run["cells"] if c["layer"] == run["layers"] - 1 and not c["sparse_calls"]]

    old, new = run(), run(preset="auto")
    assert (dense_steps(old), old["settings"]["preset"], old["settings"]["start_percent"]) == ([], "none", 0.0)
    assert (dense_steps(new), new["settings"]["preset"], new["settings"]["start_percent"]) == ([0, 1, 2], "Wan 2.1 / 2.2 t2v", 0.24)
    assert "layer is listed in dense_blocks" in new["reasons"] and not any("dense_blocks" in reason for reason in old["reasons"])
    with pytest.raises(comfy_server.PromptError, match="preset"):
        run(preset="Wan")
