"""The harness itself: the real server, core nodes and the fixture nodes."""

from __future__ import annotations

import json
import os
import sys

import comfy_server
import demo_model
import install
import pytest
import safetensors.torch
import torch
from required import missing

MODEL = demo_model.FILE


@pytest.fixture(scope="module")
def tree():
    if not (install.comfyui_tree() / "main.py").is_file():
        missing("a ComfyUI tree")


@pytest.fixture(scope="module")
def server(tree):
    made = comfy_server.ComfyServer()
    demo_model.write_demo_model(made.model_path(MODEL))
    with made:
        yield made


def graph(**changes) -> dict:
    """Two steps of the demo model on 3 x 4 x 6 tokens, decoded and recorded; `changes` are KSampler inputs."""
    sampler = {"seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    sampler |= {"model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0]} | changes
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": MODEL, "weight_dtype": "default"}},
        "2": {"class_type": "SpargeDemoConditioning", "inputs": {"tokens": 8, "dim": 4096, "seed": 3}},
        "3": {"class_type": "EmptyHunyuanLatentVideo", "inputs": {"width": 96, "height": 64, "length": 9, "batch_size": 1}},
        "4": {"class_type": "KSampler", "inputs": sampler},
        "5": {"class_type": "SpargeDemoDecode", "inputs": {"samples": ["4", 0], "scale": 1, "between": 2}},
        "6": {"class_type": "SpargeDemoRecord", "inputs": {"samples": ["4", 0], "images": ["5", 0], "name": "small"}},
    }


def test_fixture_nodes_are_listed(server):
    info = server.object_info()
    assert {"SpargeDemoConditioning", "SpargeDemoDecode", "SpargeDemoRecord", "KSampler", "UNETLoader"} <= set(info)
    assert info["SpargeDemoDecode"]["python_module"] == f"custom_nodes.{comfy_server.FIXTURE_FOLDER}"
    assert MODEL in info["UNETLoader"]["input"]["required"]["unet_name"][0]


def test_sampling_reports_progress_and_decodes(server):
    seen = []
    entry = server.queue(graph(), lambda *event: seen.append(event))
    assert [event for event in seen if event[0] == "4"] == [("4", 1, 2), ("4", 2, 2)]
    record = safetensors.torch.load_file(server.output / entry["outputs"]["6"]["record"][0])
    assert record["latent"].shape == (1, 16, 3, 8, 12)
    assert torch.isfinite(record["latent"]).all()
    assert record["frames"].shape == (5, 16, 24, 3)
    assert record["frames"].float().std() > 1


@pytest.mark.parametrize(
    "changes, node, words",
    [({"steps": 0}, "4", "steps"), ({"sampler_name": "no_such"}, "4", "no_such"), ({"positive": ["1", 0]}, "4", "MODEL")],
    ids=["range", "choice", "type"],
)
def test_refused_prompt_names_the_node(server, changes, node, words):
    with pytest.raises(comfy_server.PromptError, match=words) as caught:
        server.queue(graph(**changes))
    assert words in caught.value.nodes[node]
    assert "KSampler" in str(caught.value)


def test_failing_node_raises_and_the_server_lives_on(server):
    bad = graph()
    bad["6"]["inputs"]["name"] = "folder/file"
    with pytest.raises(comfy_server.PromptError, match="name must be a plain file name, got 'folder/file'") as caught:
        server.queue(bad)
    assert "ValueError" in caught.value.nodes["6"]
    assert server.queue(graph(seed=2))["status"]["status_str"] == "success"


def test_demo_workflow_matches_the_nodes(server):
    """The links join what they say, and every value that the nodes want is there in their order."""
    info = server.object_info()
    workflow = json.loads((comfy_server.HERE / "fixture_pack" / "workflows" / "sparge_demo.json").read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in workflow["nodes"] if node["type"] != "Note"}
    for identity, source, source_slot, target, target_slot, kind in workflow["links"]:
        assert nodes[source]["outputs"][source_slot]["type"] == kind
        assert identity in nodes[source]["outputs"][source_slot]["links"]
        assert nodes[target]["inputs"][target_slot]["link"] == identity
    for node in nodes.values():
        assert mismatch(node, info[node["type"]]) is None
        widgets = [given["name"] for given in node["inputs"] if "widget" in given]
        assert len(node["widgets_values"]) == len(widgets) + ("seed" in widgets), node["type"]  # a seed is followed by its control


def mismatch(node: dict, known: dict) -> str | None:
    """Why a saved node is not what the server declares, or None. A core node may have gained optional inputs behind the widgets that were saved."""
    required, optional = (known["input"].get(kind, {}) for kind in ("required", "optional"))
    declared, given = {**required, **optional}, [entry["name"] for entry in node["inputs"]]
    is_core = not known["python_module"].startswith("custom_nodes.")
    wanted = [name for name in declared if name in required or name in given or not is_core]
    if given != wanted:
        return f"{node['type']} has {given}, wanted {wanted}"
    saved = [entry["name"] for entry in node["inputs"] if "widget" in entry]
    widgets = [name for name, declaration in declared.items() if name in saved or (name not in given and is_widget(*declaration))]
    return None if widgets[: len(saved)] == saved else f"{node['type']} saves values of {saved}, and the front end reads them as those of {widgets}"


def is_widget(kind, options: dict | None = None) -> bool:
    return not (options or {}).get("forceInput") and (isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"))


SAVED = {"type": "Made", "inputs": [{"name": "images"}, {"name": "fps", "widget": {}}, {"name": "text", "widget": {}}, {"name": "audio"}]}
REQUIRED, OPTIONAL = {"images": ["IMAGE"], "fps": ["FLOAT", {}]}, {"text": ["STRING", {}], "audio": ["AUDIO"]}


@pytest.mark.parametrize(
    ("required", "optional", "words"),
    [
        (REQUIRED, OPTIONAL, None),
        (REQUIRED, {**OPTIONAL, "depth": [["8", "10"], {}], "more": ["MASK"]}, None),
        (REQUIRED, {"mask": ["MASK"], **OPTIONAL}, None),
        ({"images": ["IMAGE"], "rate": ["FLOAT", {}]}, OPTIONAL, "wanted ['images', 'rate'"),
        ({**REQUIRED, "size": ["INT", {}]}, OPTIONAL, "wanted ['images', 'fps', 'size'"),
        ({"fps": ["FLOAT", {}], "images": ["IMAGE"]}, OPTIONAL, "wanted ['fps', 'images'"),
        (REQUIRED, {"text": ["STRING", {}]}, "has ['images', 'fps', 'text', 'audio']"),
        (REQUIRED, {"depth": ["INT", {}], **OPTIONAL}, "reads them as those of ['fps', 'depth', 'text']"),
    ],
    ids=["same", "new", "new socket", "renamed", "new and required", "moved", "gone", "new between"],
)
def test_what_a_mismatch_is(required, optional, words):
    known = {"input": {"required": required, "optional": optional}}
    said = mismatch(SAVED, {**known, "python_module": "comfy_extras.nodes_video"})
    assert said is None if words is None else words in said
    assert (mismatch(SAVED, {**known, "python_module": "custom_nodes.ours"}) is None) == (optional == OPTIONAL and words is None)


def test_start_that_fails_shows_the_log_and_leaves_nothing(tree):
    broken = comfy_server.ComfyServer(arguments=("--no-such-option",))
    with pytest.raises(comfy_server.ServerError, match="exit status 2") as caught, broken:
        pass
    assert "--no-such-option" in str(caught.value)
    assert not broken.base.exists()


def test_stop_leaves_no_process(server):
    """Last of the module: it ends the shared server."""
    process, port = server.process, server.port
    assert "Starting server" in server.log()
    server.stop()
    assert process.poll() is not None
    if sys.platform != "win32":
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    assert comfy_server.free_port(port) == port
    assert "Starting server" in server.log()
    assert not server.base.exists()
    with pytest.raises(comfy_server.ServerError, match="not running"):
        server.object_info()
