"""Every file in workflows/: what it holds, that it opens in the real front end, that the server takes it, and that a small twin samples sparse."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import build_workflows
import canvas
import chromium
import comfy_server
import graph
import install
import pytest
import requests
import thumbnails
import twins
from PIL import Image
from required import missing

NAMES = sorted(path.stem for path in build_workflows.FOLDER.glob("*.json"))
OURS = {"SpargeAttention", "SpargeMonitor", "SpargeReport"}
DIRECTORIES = {"diffusion_models", "checkpoints", "text_encoders", "vae", "clip_vision"}
# The files as they were before the inputs stood in the order of their importance, and the order that their values have.
OLD = Path(__file__).resolve().parent / "old_order"
OLD_WIDGETS = [
    "topk", "pvthreshd", "start_percent", "end_percent", "dense_blocks", "min_tokens", "simthreshd1", "cdfthreshd", "token_order", "compensate",
    "protect_references", "backend", "preset",
]  # fmt: skip
HUB_FILE = re.compile(r"https://huggingface\.co/[\w.-]+/[\w.-]+/resolve/main/[\w./-]+")


def load(name: str) -> dict:
    return json.loads((build_workflows.FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def of_kind(workflow: dict, kind: str) -> list[dict]:
    return [node for node in workflow["nodes"] if node["type"] == kind]


def widgets(node: dict) -> dict:
    """A node's values by name; the control behind a seed has none."""
    names = []
    for entry in graph.NODES[node["type"]][0].split():
        if "=" in entry:
            names += [entry.partition("=")[0]] + ["control"] * entry.endswith("*")
    return dict(zip(names, node["widgets_values"], strict=True))


def test_every_model_has_its_workflow():
    assert sorted(build_workflows.WORKFLOWS) == NAMES == sorted(twins.MODELS)
    assert len(NAMES) == 12
    assert {path.suffix for path in build_workflows.FOLDER.iterdir()} == {".json", ".jpg"}, "ComfyUI lists every file here as a template"


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_what_the_builder_writes(name):
    text = (build_workflows.FOLDER / f"{name}.json").read_text(encoding="utf-8")
    assert text == graph.text_of(build_workflows.build(name)), "run tools/workflows/build_workflows.py"


@pytest.mark.parametrize("name", NAMES)
def test_links_join_what_they_say(name):
    workflow = load(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    assert len(nodes) == len(workflow["nodes"]) and max(nodes) == workflow["last_node_id"]
    assert len(links) == len(workflow["links"]) and max(links) == workflow["last_link_id"]
    assert "definitions" not in workflow, "subgraphs do not load everywhere"
    for number, source, source_slot, target, target_slot, kind in links.values():
        output, given = nodes[source]["outputs"][source_slot], nodes[target]["inputs"][target_slot]
        assert number in output["links"] and given["link"] == number
        assert output["type"] == kind and kind in given["type"].split(",")
        assert nodes[source]["order"] < nodes[target]["order"]
    assert sorted(links) == sorted(number for node in nodes.values() for output in node["outputs"] for number in output["links"])
    assert sorted(links) == sorted(given["link"] for node in nodes.values() for given in node["inputs"] if given["link"] is not None)


@pytest.mark.parametrize("name", NAMES)
def test_every_model_is_patched_watched_and_reported(name):
    workflow = load(name)
    links = {link[0]: link for link in workflow["links"]}
    nodes = {node["id"]: node for node in workflow["nodes"]}

    def behind(node: dict, given: str = "model") -> dict:
        return nodes[links[next(entry["link"] for entry in node["inputs"] if entry["name"] == given)][1]]

    kinds = {"KSampler", "KSamplerAdvanced", "SamplerCustom", "BasicGuider", "CFGGuider"}
    sampled = [node for node in workflow["nodes"] if node["type"] in kinds]
    reports = of_kind(workflow, "SpargeReport")
    experts = 2 if "wan2_2" in name else 1
    assert len(sampled) == len(reports) == len(of_kind(workflow, "SpargeAttention")) == len(of_kind(workflow, "SpargeMonitor")) == experts
    monitors = [behind(node) for node in sampled]
    assert [node["type"] for node in monitors] == ["SpargeMonitor"] * experts
    assert len({node["id"] for node in monitors}) == experts
    assert [behind(node)["type"] for node in monitors] == ["SpargeAttention"] * experts
    assert [behind(node)["id"] for node in reports] == [node["id"] for node in monitors]
    loaders = {behind(behind(node))["type"] for node in monitors}
    assert loaders <= {"UNETLoader", "CheckpointLoaderSimple", "ModelSamplingSD3", "ModelSamplingAuraFlow"}


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_the_preset_table(name):
    row = build_workflows.PRESETS[build_workflows.WORKFLOWS[name][0]]
    workflow = load(name)
    for node in of_kind(workflow, "SpargeAttention"):
        values = widgets(node)
        assert (values["topk"], values["start_percent"], values["end_percent"], values["dense_blocks"], values["preset"]) == (
            row.topk, row.start_percent, row.end_percent, row.dense_blocks, "auto")  # fmt: skip
    note = of_kind(workflow, "MarkdownNote")[0]["widgets_values"][0]
    assert row.source in note and f"topk {row.topk:g}" in note and f"start_percent {row.start_percent:g}" in note
    assert "not yet measured on a GPU" in note and "## Try next" in note


@pytest.mark.parametrize("name", NAMES)
def test_nodes_say_where_they_come_from(name):
    workflow = load(name)
    note = of_kind(workflow, "MarkdownNote")[0]["widgets_values"][0]
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        properties = node["properties"]
        assert properties["Node name for S&R"] == node["type"]
        assert (properties["cnr_id"], properties["ver"]) == (graph.OURS if node["type"] in OURS else graph.CORE)
        files = [value for value in node["widgets_values"] if isinstance(value, str) and value.endswith(".safetensors")]
        models = properties.get("models", [])
        assert [model["name"] for model in models] == files, "a file without an entry is not offered for download"
        for model in models:
            assert set(model) == {"name", "url", "directory"} and model["directory"] in DIRECTORIES
            assert HUB_FILE.fullmatch(model["url"]) and model["url"].endswith(f"/{model['name']}")
            assert model["url"] in note
    assert not re.search(r"(?<![\w.:/])/\w+/|[A-Z]:\\\\", json.dumps(workflow)), "a path of one machine"


@pytest.mark.parametrize("name", NAMES)
def test_thumbnail_is_small_and_shows_something(name):
    path = build_workflows.FOLDER / f"{name}.jpg"
    assert path.stat().st_size <= thumbnails.MOST_BYTES
    with Image.open(path) as picture:
        assert picture.format == "JPEG" and picture.width == thumbnails.WIDTH and picture.height >= 200
        assert len(picture.convert("P").getcolors()) > 20, "one colour: nothing was drawn"


@pytest.fixture(scope="module")
def front_end():
    """The front end in canvas mode and the server behind it, which has no model files at first."""
    program = chromium.find()
    if program is None:
        missing("Chromium")
    if not (install.comfyui_tree() / "main.py").is_file():
        missing("a ComfyUI tree")
    with comfy_server.ComfyServer() as server, chromium.Chromium(program) as browser:
        made = canvas.Canvas(browser, server)
        made.set(VueNodes_Enabled=False, Locale="en", ColorPalette="dark")
        made.open()
        yield made
        made.page.close()


def test_the_template_browser_lists_them(front_end):
    assert sorted(front_end.server.get("/workflow_templates")[front_end.server.pack_folder]) == NAMES


def test_the_template_browser_opens_them(front_end):
    """ComfyUI serves the first folder of the names example_workflows, example, examples, workflow, workflows: none of the first four may be here."""
    picture = requests.get(f"{front_end.server.url}/api/workflow_templates/{front_end.server.pack_folder}/{NAMES[0]}.jpg", timeout=30)
    assert picture.content == (build_workflows.FOLDER / f"{NAMES[0]}.jpg").read_bytes()


# File -> how often it is offered: the least part of the page around a button "Download" that names any file at all.
OFFERED = """[...document.querySelectorAll('button')].filter((one) => /^\\s*Download(?! all)/.test(one.innerText)).reduce((found, button) => {
  let row = button;
  while (row && !/safetensors/.test(row.textContent)) row = row.parentElement;
  for (const [name] of row?.textContent.matchAll(/[\\w.-]+?\\.safetensors/g) ?? []) found[name] = (found[name] ?? 0) + 1;
  return found;
}, {})"""


def test_missing_files_are_offered_for_download(front_end):
    """First of those that need the front end: later ones have stand-ins for all files."""
    workflow = load("sparge_flux_dev")
    front_end.drop(workflow)
    names = [model["name"] for node in workflow["nodes"] for model in node["properties"].get("models", [])]
    assert len(names) == 4
    texts = "[...document.querySelectorAll('[role=dialog]')].map((dialog) => dialog.textContent).join()"
    named = f"{json.dumps(names)}.every((name) => {texts}.includes(name)) && {texts}.split('Download').length > {len(names)}"
    # Newer front ends say in a corner of the page that there are problems, and list them at its side once its button is pressed.
    notice = "document.querySelector('[data-testid=error-overlay]')"
    front_end.page.wait_for(f"({named}) || {notice}?.innerText.match(/{len(names)} (errors|issues) found/)")
    if front_end.page.evaluate(f"!({named})"):
        front_end.page.evaluate(f"[...{notice}.querySelectorAll('button')].find((one) => /^(see|view) /i.test(one.innerText.trim())).click()")
        front_end.page.wait_for(f"{json.dumps(names)}.every((name) => ({OFFERED})[name] === 1)")


@pytest.fixture(scope="module")
def stocked(front_end):
    """The front end once every model file and the example picture are there, as empty stand-ins."""
    canvas.stock(front_end.server)
    front_end.open()
    return front_end


@pytest.fixture(scope="module")
def prompts(stocked):
    """Name -> the API prompt that the front end makes of the file; made when first asked for."""
    made = {}

    def prompt(name: str) -> dict:
        if name not in made:
            boxes = stocked.drop(load(name))
            made[name] = boxes, stocked.prompt()
        return made[name]

    return prompt


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_in_the_front_end(stocked, prompts, name):
    workflow = load(name)
    boxes, prompt = prompts(name)
    assert sorted(box["type"] for box in boxes) == sorted(node["type"] for node in workflow["nodes"])
    assert [box for box in boxes if not box["known"] or box["broken"]] == []
    assert [f"{a['title']} and {b['title']}" for i, a in enumerate(boxes) for b in boxes[i + 1 :] if overlap(a, b)] == []
    kinds = [node["type"] for node in workflow["nodes"] if node["type"] != "MarkdownNote"]
    assert sorted(node["class_type"] for node in prompt.values()) == sorted(kinds)
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        given = prompt[str(node["id"])]["inputs"]
        expected = {key: value for key, value in widgets(node).items() if key not in ("control", "upload")}
        assert {key: given.get(key) for key in expected} == expected, node["type"]
        linked = {entry["name"] for entry in node["inputs"] if entry["link"] is not None}
        assert linked == {key for key, value in given.items() if isinstance(value, list)}
    assert [text for text in stocked.ours() if "api.comfy.org" not in text] == []  # the front end asks the registry about every pack


def overlap(a: dict, b: dict) -> bool:
    return a["x"] < b["x"] + b["width"] and b["x"] < a["x"] + a["width"] and a["y"] < b["y"] + b["height"] and b["y"] < a["y"] + a["height"]


def send(server: comfy_server.ComfyServer, prompt: dict) -> requests.Response:
    """Validates and queues a prompt, and empties the queue: empty stand-ins cannot be loaded."""
    answer = requests.post(server.url + "/prompt", json={"prompt": prompt}, timeout=60)
    requests.post(server.url + "/queue", json={"clear": True}, timeout=60)
    requests.post(server.url + "/interrupt", timeout=60)
    return answer


@pytest.mark.parametrize("name", NAMES)
def test_the_server_takes_it(stocked, prompts, name):
    answer = send(stocked.server, prompts(name)[1])
    assert answer.status_code == 200, answer.text
    assert answer.json()["node_errors"] == {}


def test_the_server_refuses_a_prompt_without_its_file(stocked, prompts):
    """The test above can fail: stand-ins alone make it pass."""
    stocked.server.model_path("ae.safetensors", "vae").unlink()
    answer = send(stocked.server, prompts("sparge_flux_dev")[1])
    stocked.server.model_path("ae.safetensors", "vae").touch()
    assert answer.status_code == 400 and "ae.safetensors" in answer.text


@pytest.mark.parametrize("name", NAMES)
def test_a_small_twin_samples_sparse(stocked, prompts, name):
    prompt = twins.twin(name, prompts(name)[1])
    entry = stocked.server.queue(prompt, timeout=120)
    row = build_workflows.PRESETS[build_workflows.WORKFLOWS[name][0]]
    reports = [number for number, node in prompt.items() if node["class_type"] == "SpargeReport"]
    for number in reports:
        files = {Path(file["filename"]).suffix: file for file in entry["outputs"][number]["sparge_files"]}
        assert list(files) == [".png", ".html", ".webp"][: 3 if name == "sparge_monitor_tour" else 2]
        with Image.open(stocked.server.output / files[".png"]["subfolder"] / files[".png"]["filename"]) as picture:
            runs = json.loads(picture.text["sparge"])["runs"]
        assert len(runs) == 1, "one run for each model"
        assert runs[0]["totals"]["sparse_calls"] > 0, runs[0]
        settings = runs[0]["settings"]
        assert (settings["topk"], settings["start_percent"], settings["dense_blocks"]) == (row.topk, row.start_percent, row.dense_blocks)
        assert settings["preset"] == row.label, "the note speaks of another model than the node recognises"
    saved = [number for number, node in prompt.items() if node["class_type"] in ("SaveVideo", "SaveImage")]
    assert len(saved) == 1
    picture = entry["outputs"][saved[0]]["images"][0]
    assert (stocked.server.output / picture["subfolder"] / picture["filename"]).stat().st_size > 1000


# Files from before the inputs had their order.


@pytest.mark.parametrize("name", NAMES)
def test_an_old_file_opens_with_its_values(stocked, name):
    """In the real front end: every value under its own name, every link where it was, and the socket that is gone is gone."""
    workflow = json.loads((OLD / f"{name}.json").read_text(encoding="utf-8"))
    stocked.drop(workflow)
    prompt = stocked.prompt()
    of = {str(node["id"]): node for node in of_kind(workflow, "SpargeAttention")}
    assert of and all(len(node["widgets_values"]) == len(OLD_WIDGETS) for node in of.values())
    for identity, node in of.items():
        given = {name: value for name, value in prompt[identity]["inputs"].items() if name != "id"}
        (link,) = (link for link in workflow["links"] if link[3] == node["id"])
        assert given == dict(zip(OLD_WIDGETS, node["widgets_values"], strict=True)) | {"model": [str(link[1]), link[2]]}
    assert sockets(stocked) == {identity: [["model", False]] for identity in of}
    today = opened(stocked, load(name))
    for node in today.values():
        if node["class_type"] == "SpargeReport":
            node["inputs"]["formats"] = "png, html"  # the default, for files of then have no such input
    assert without_ids(prompt) == without_ids(today)
    assert send(stocked.server, prompt).json().get("node_errors") == {}


def without_ids(prompt: dict) -> dict[str, dict]:
    """The inputs of every node but for the ids, which the page has drawn: each of our nodes has one, and no two the same."""
    ids = [node["inputs"]["id"] for node in prompt.values() if node["class_type"] in OURS - {"SpargeReport"}]
    assert len(ids) == len(set(ids)) and all(re.fullmatch("[0-9a-f]{16}", one) for one in ids), ids
    return {number: {name: value for name, value in node["inputs"].items() if name != "id"} for number, node in prompt.items()}


def opened(front_end, workflow: dict) -> dict:
    front_end.page.evaluate(f"app.loadGraphData({json.dumps(workflow)}, true, true, 'opened').then(() => 1)")
    return front_end.prompt()


def sockets(front_end) -> dict[str, list]:
    """Of every SpargeAttention in any graph: the names of its joined sockets, and whether their link says another place than they have."""
    return front_end.page.evaluate("""(() => {
      const root = app.rootGraph ?? app.graph;
      const found = {};
      for (const graph of [root, ...root.subgraphs.values()])
        for (const node of graph._nodes.filter((node) => node.type === "SpargeAttention")) {
          if (node.inputs.some((input) => input.name === "block_mask")) throw new Error("block_mask is there");
          found[node.id] = node.inputs.flatMap((input, at) => input.link == null ? [] : [[input.name, graph.getLink(input.link).target_slot !== at]]);
        }
      return found;
    })()""")


def in_old_order(node: dict, links: list, with_preset: bool) -> None:
    """Rewrites a SpargeAttention as front ends saved it then."""
    names = [entry["name"] for entry in node["inputs"] if "widget" in entry]
    values = dict(zip([*names, "id"], node["widgets_values"], strict=True))
    inputs = {entry["name"]: entry for entry in node["inputs"]} | {"block_mask": {"name": "block_mask", "type": "SPARGE_BLOCK_MASK", "link": None}}
    names = ["model", *OLD_WIDGETS[:-1], "policy", "block_mask", "preset"][: None if with_preset else -1]
    node["inputs"] = [inputs[name] for name in names]
    node["widgets_values"] = [values[name] for name in OLD_WIDGETS if with_preset or name != "preset"]
    for link in links:
        is_list = isinstance(link, list)
        if (link[3] if is_list else link["target_id"]) == node["id"]:
            number = link[0] if is_list else link["id"]
            link[4 if is_list else "target_slot"] = next(at for at, entry in enumerate(node["inputs"]) if entry["link"] == number)


VALUES = dict(preset="off", topk=0.3, start_percent=0.1, end_percent=0.9, dense_blocks="1-2", pvthreshd=20.0, min_tokens=512, simthreshd1=0.2,
              cdfthreshd=0.4, token_order="hilbert", compensate=True, protect_references=True, backend="torch")  # fmt: skip


@pytest.mark.parametrize("with_preset", [True, False], ids=["", "before presets"])
@pytest.mark.parametrize("place", ["graph", "subgraph"])
def test_an_old_file_with_everything(stocked, place, with_preset):
    """Every value differs from its default, topk and policy come over links, and the node may stand in a subgraph."""
    stocked.drop(load("sparge_flux_dev"))
    stocked.page.evaluate(f"""(() => {{
      const node = app.graph._nodes.find((found) => found.type === "SpargeAttention");
      for (const [name, value] of Object.entries({json.dumps(VALUES)})) node.widgets.find((widget) => widget.name === name).value = value;
      const source = LiteGraph.createNode("PrimitiveFloat");
      app.graph.add(source);
      source.connect(0, node, node.findInputSlot("topk"));
      source.outputs[0].type = "*";
      source.connect(0, node, node.findInputSlot("policy"));
      if ({json.dumps(place)} === "subgraph") app.graph.convertToSubgraph(new Set([node, source]));
    }})()""")
    today = stocked.page.evaluate("(app.rootGraph ?? app.graph).serialize()")
    expected = stocked.prompt()
    (identity,) = (name for name, node in expected.items() if node["class_type"] == "SpargeAttention")
    given = expected[identity]["inputs"]
    assert {name for name, value in given.items() if isinstance(value, list)} == {"model", "topk", "policy"}
    own = given["id"]
    assert all(given[name] == value for name, value in VALUES.items() if name != "topk")
    old = copy.deepcopy(today)
    for graph_of_it in [old, *old.get("definitions", {}).get("subgraphs", [])]:
        for node in of_kind(graph_of_it, "SpargeAttention"):
            in_old_order(node, graph_of_it["links"], with_preset)
    assert json.dumps(old) != json.dumps(today) and ("subgraph" in place) == ("definitions" in old and bool(old["definitions"]["subgraphs"]))
    if not with_preset:
        given["preset"] = "auto"  # as front ends filled in what a file lacked
    loaded = opened(stocked, old)
    assert without_ids(loaded) == without_ids(expected)
    assert [sorted(joined) for joined in sockets(stocked).values()] == [[["model", False], ["policy", False], ["topk", False]]]
    again = opened(stocked, today)[identity]["inputs"]
    assert again == given | ({} if with_preset else {"preset": "off"}) and again["id"] == own, "a file of today is left as it is"


def test_a_node_that_is_copied_keeps_its_values(stocked):
    """The clipboard holds values by position, too."""
    stocked.drop(load("sparge_flux_dev"))
    copied = stocked.page.evaluate("""(() => {
      const node = app.graph._nodes.find((found) => found.type === "SpargeAttention");
      const other = node.clone();
      app.graph.add(other);
      return [node, other].map((found) => found.widgets.map((widget) => [widget.name, widget.value]));
    })()""")
    node, other = map(dict, copied)
    assert node.pop("id") != other.pop("id") and node == other, "but for the id, for the copy is another node"
