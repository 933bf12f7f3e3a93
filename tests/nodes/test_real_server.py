"""The nodes in ComfyUI's server, a process of its own: what browsers are sent, and prompts as they were saved before there were presets."""

from __future__ import annotations

import asyncio
import json
import threading
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
    """Messages arrive over the websocket of every browser, the routes answer under both prefixes, for a node inside a subgraph too."""
    monitor = ("SpargeMonitor", {"model": ["sparge", 0], "measure_dense": True})
    save = ("SaveLatent", {"samples": ["sampler", 0], "filename_prefix": "monitor"})
    size = {"width": 96, "height": 64, "length": 9}
    messages = listen(server, prompt(3, size, {"token_order": "tiles"}, **{"5:12": monitor, "save": save}))
    (run,) = server.get("/api/sparge_attention/runs?" + urlencode({"monitor": "5:12"}))["runs"]
    answer = server.get(f"/sparge_attention/map?run={run['run']}&step=2&layer=0&head=0")
    assert [(m["state"], m["step"]) for m in messages] == [("running", 0), ("running", 1), ("running", 2), ("done", 3)]
    assert all(m["monitors"] == ["5:12"] for m in messages) and messages[-1]["totals"]["measuring_ms"] > 0
    assert run["cells"] == [cell for m in messages for cell in m["cells"]] and len(run["cells"]) == 3 * run["layers"] > 0
    assert answer["frames"]["t"] == 3 and answer["frames"]["h"] == 4 and answer["frames"]["w"] == 6


def listen(server, prompt) -> list[dict]:
    """Runs a prompt while another browser watches; what that one was sent of ours."""

    async def run():
        sent = []
        async with aiohttp.ClientSession(server.url) as session, session.ws_connect("/ws?clientId=watcher") as socket:
            thread = threading.Thread(target=server.queue, args=(prompt,))
            thread.start()
            while not sent or sent[-1]["state"] == "running":
                message = await socket.receive(timeout=60)
                assert message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY), message
                event = json.loads(message.data) if message.type == aiohttp.WSMsgType.TEXT else {}
                if event.get("type") == "sparge.run":
                    sent.append(event["data"])
            await asyncio.to_thread(thread.join, 60)
        return sent

    return asyncio.run(run())


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
