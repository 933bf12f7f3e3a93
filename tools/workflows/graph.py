"""Workflow files as ComfyUI's front end saves them: nodes in columns, each with a size that its slots and widgets fit in."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORE = ("comfy-core", "0.3.75")  # the oldest version that all of these node chains were run with

# Inputs in the order of the node's schema, then outputs: "name:TYPE" is a slot, "name=TYPE" a widget, "*" the control that follows a seed.
NODES = {
    "UNETLoader": ("unet_name=COMBO weight_dtype=COMBO", "MODEL:MODEL"),
    "CheckpointLoaderSimple": ("ckpt_name=COMBO", "MODEL:MODEL CLIP:CLIP VAE:VAE"),
    "VAELoader": ("vae_name=COMBO", "VAE:VAE"),
    "CLIPLoader": ("clip_name=COMBO type=COMBO device=COMBO", "CLIP:CLIP"),
    "DualCLIPLoader": ("clip_name1=COMBO clip_name2=COMBO type=COMBO device=COMBO", "CLIP:CLIP"),
    "CLIPVisionLoader": ("clip_name=COMBO", "CLIP_VISION:CLIP_VISION"),
    "LoadImage": ("image=COMBO upload=IMAGEUPLOAD", "IMAGE:IMAGE MASK:MASK"),
    "EmptySD3LatentImage": ("width=INT height=INT batch_size=INT", "LATENT:LATENT"),
    "EmptyMochiLatentVideo": ("width=INT height=INT length=INT batch_size=INT", "LATENT:LATENT"),
    "EmptyHunyuanLatentVideo": ("width=INT height=INT length=INT batch_size=INT", "LATENT:LATENT"),
    "EmptyHunyuanVideo15Latent": ("width=INT height=INT length=INT batch_size=INT", "LATENT:LATENT"),
    "EmptyLTXVLatentVideo": ("width=INT height=INT length=INT batch_size=INT", "LATENT:LATENT"),
    "CLIPTextEncode": ("clip:CLIP text=STRING", "CONDITIONING:CONDITIONING"),
    "ConditioningZeroOut": ("conditioning:CONDITIONING", "CONDITIONING:CONDITIONING"),
    "FluxGuidance": ("conditioning:CONDITIONING guidance=FLOAT", "CONDITIONING:CONDITIONING"),
    "FluxKontextImageScale": ("image:IMAGE", "IMAGE:IMAGE"),
    "VAEEncode": ("pixels:IMAGE vae:VAE", "LATENT:LATENT"),
    "ReferenceLatent": ("conditioning:CONDITIONING latent:LATENT", "CONDITIONING:CONDITIONING"),
    "CLIPVisionEncode": ("clip_vision:CLIP_VISION image:IMAGE crop=COMBO", "CLIP_VISION_OUTPUT:CLIP_VISION_OUTPUT"),
    "WanImageToVideo": (
        "positive:CONDITIONING negative:CONDITIONING vae:VAE clip_vision_output:CLIP_VISION_OUTPUT start_image:IMAGE "
        "width=INT height=INT length=INT batch_size=INT",
        "positive:CONDITIONING negative:CONDITIONING latent:LATENT",
    ),
    "LTXVConditioning": ("positive:CONDITIONING negative:CONDITIONING frame_rate=FLOAT", "positive:CONDITIONING negative:CONDITIONING"),
    "LTXVScheduler": ("latent:LATENT steps=INT max_shift=FLOAT base_shift=FLOAT stretch=BOOLEAN terminal=FLOAT", "SIGMAS:SIGMAS"),
    "ModelSamplingSD3": ("model:MODEL shift=FLOAT", "MODEL:MODEL"),
    "ModelSamplingAuraFlow": ("model:MODEL shift=FLOAT", "MODEL:MODEL"),
    "SpargeAttention": (
        "model:MODEL policy:SPARGE_POLICY preset=COMBO topk=FLOAT start_percent=FLOAT end_percent=FLOAT dense_blocks=STRING pvthreshd=FLOAT "
        "min_tokens=INT simthreshd1=FLOAT cdfthreshd=FLOAT token_order=COMBO compensate=BOOLEAN protect_references=BOOLEAN backend=COMBO",
        "model:MODEL",
    ),
    "SpargeMonitor": ("model:MODEL measure_dense=BOOLEAN", "model:MODEL"),
    "SpargeReport": (
        "model:MODEL data:LATENT,IMAGE formats=STRING filename_prefix=STRING",
        "data:* heat_map:IMAGE frames:IMAGE json:STRING maps:IMAGE",
    ),
    "KSampler": (
        "model:MODEL positive:CONDITIONING negative:CONDITIONING latent_image:LATENT "
        "seed=INT* steps=INT cfg=FLOAT sampler_name=COMBO scheduler=COMBO denoise=FLOAT",
        "LATENT:LATENT",
    ),
    "KSamplerAdvanced": (
        "model:MODEL positive:CONDITIONING negative:CONDITIONING latent_image:LATENT add_noise=COMBO noise_seed=INT* steps=INT cfg=FLOAT "
        "sampler_name=COMBO scheduler=COMBO start_at_step=INT end_at_step=INT return_with_leftover_noise=COMBO",
        "LATENT:LATENT",
    ),
    "KSamplerSelect": ("sampler_name=COMBO", "SAMPLER:SAMPLER"),
    "RandomNoise": ("noise_seed=INT*", "NOISE:NOISE"),
    "BasicScheduler": ("model:MODEL scheduler=COMBO steps=INT denoise=FLOAT", "SIGMAS:SIGMAS"),
    "BasicGuider": ("model:MODEL conditioning:CONDITIONING", "GUIDER:GUIDER"),
    "CFGGuider": ("model:MODEL positive:CONDITIONING negative:CONDITIONING cfg=FLOAT", "GUIDER:GUIDER"),
    "SamplerCustomAdvanced": (
        "noise:NOISE guider:GUIDER sampler:SAMPLER sigmas:SIGMAS latent_image:LATENT",
        "output:LATENT denoised_output:LATENT",
    ),
    "SamplerCustom": (
        "model:MODEL positive:CONDITIONING negative:CONDITIONING sampler:SAMPLER sigmas:SIGMAS latent_image:LATENT "
        "add_noise=BOOLEAN noise_seed=INT* cfg=FLOAT",
        "output:LATENT denoised_output:LATENT",
    ),
    "VAEDecode": ("samples:LATENT vae:VAE", "IMAGE:IMAGE"),
    "VAEDecodeTiled": ("samples:LATENT vae:VAE tile_size=INT overlap=INT temporal_size=INT temporal_overlap=INT", "IMAGE:IMAGE"),
    "CreateVideo": ("images:IMAGE audio:AUDIO fps=FLOAT", "VIDEO:VIDEO"),
    "SaveVideo": ("video:VIDEO filename_prefix=STRING format=COMBO codec=COMBO", ""),
    "SaveImage": ("images:IMAGE filename_prefix=STRING", ""),
    "PreviewImage": ("images:IMAGE", ""),
}

WIDTHS = (460, 420, 340, 480, 460, 520)
# Section -> its column and its heading. Sections of one column stand below one another, and so do the nodes of a section, as they are added.
SECTIONS = {
    "note": (0, ""),
    "models": (1, "Models"),
    "inputs": (1, "Prompt and size"),
    "sparse": (2, "Sparge Attention"),
    "watch": (3, "Watch it live"),
    "sampler": (4, "Sample"),
    "result": (4, "Result"),
    "report": (5, "What was kept"),
}
TITLE, GAP, MARGIN, HEADING, COLUMN_GAP = 30, 40, 20, 50, 90
HEIGHTS = {"SpargeMonitor": 720, "CLIPTextEncode": 190, "LoadImage": 340, "SaveImage": 460, "SaveVideo": 500, "SpargeReport": 560,
           "PreviewImage": 420}  # fmt: skip
NOTE_COLOURS = {"color": "#432", "bgcolor": "#653"}


@dataclass(frozen=True)
class Slot:
    """An output of a node."""

    node: dict
    index: int


@dataclass
class Graph:
    """A workflow in the making. `files` maps the name of a model file to (url, folder below models)."""

    name: str
    files: dict[str, tuple[str, str]]
    nodes: list[dict] = field(default_factory=list)
    links: list[list] = field(default_factory=list)
    sections: dict[str, list[dict]] = field(default_factory=dict)

    def add(self, section: str, kind: str, *values, title: str | None = None, **sources) -> dict:
        """A node: `values` are its widgets', `sources` the nodes (or `Slot`s) that its inputs come from.

        Raises
        ------
        ValueError
            When a value is missing or an input's source has no output of its type.
        """
        inputs, outputs = (part.split() for part in NODES[kind])
        widgets = [entry for entry in inputs if "=" in entry]
        if len(values) != len(widgets):
            raise ValueError(f"{kind} has {len(widgets)} widgets ({', '.join(widgets)}), got {len(values)} values")
        node = {"id": len(self.nodes) + 1, "type": kind, "pos": [0, 0], "size": [0, 0], "flags": {}, "order": len(self.nodes), "mode": 0}
        node["inputs"] = []
        for entry in inputs:
            name, type_ = re.split("[:=]", entry.rstrip("*"))
            given = {"name": name, "type": type_, "link": None}
            node["inputs"].append(given | {"widget": {"name": name}} if "=" in entry else given)
        node["outputs"] = [{"name": name, "type": type_, "links": []} for name, type_ in (entry.split(":") for entry in outputs)]
        node["properties"] = {"Node name for S&R": kind} | dict(zip(("cnr_id", "ver"), OURS if kind.startswith("Sparge") else CORE, strict=True))
        models = [{"name": value, "url": self.files[value][0], "directory": self.files[value][1]} for value in values if value in self.files]
        if models:
            node["properties"]["models"] = models
        node["widgets_values"] = []
        for entry, value in zip(widgets, values, strict=True):
            node["widgets_values"] += [value, "fixed"] if entry.endswith("*") else [value]
        if title:
            node["title"] = title
        rows = max(len(inputs) - len(widgets), len(outputs))
        height = 12 + 20 * rows + 26 * len(node["widgets_values"])
        node["size"] = [width_of(section), max(height, HEIGHTS.get(kind, 0))]
        self.nodes.append(node)
        self.sections.setdefault(section, []).append(node)
        for name, source in sources.items():
            self._join(source, node, name)
        return node

    def note(self, text: str, section: str = "note", title: str | None = None) -> None:
        """A note in Markdown."""
        width = width_of(section)
        size = [width, note_height(text, width)]
        node = {"id": len(self.nodes) + 1, "type": "MarkdownNote", "pos": [0, 0], "size": size, "flags": {}, "order": len(self.nodes), "mode": 0}
        node |= {"inputs": [], "outputs": [], "title": title or "About this workflow", "properties": {}, "widgets_values": [text], **NOTE_COLOURS}
        self.nodes.append(node)
        self.sections.setdefault(section, []).append(node)

    def _join(self, source: dict | Slot, target: dict, name: str) -> None:
        place, wanted = next((i, entry) for i, entry in enumerate(target["inputs"]) if entry["name"] == name)
        types = wanted["type"].split(",")
        if not isinstance(source, Slot):
            fitting = [i for i, output in enumerate(source["outputs"]) if output["type"] in types]
            if not fitting:
                raise ValueError(f"{target['type']}.{name} takes {wanted['type']}, got {source['type']}; name another node or a Slot")
            source = Slot(source, fitting[0])
        link = len(self.links) + 1
        output = source.node["outputs"][source.index]
        self.links.append([link, source.node["id"], source.index, target["id"], place, output["type"]])
        output["links"].append(link)
        wanted["link"] = link

    def finished(self) -> dict:
        """The file's content, with every node in its place."""
        below, groups = [0] * len(WIDTHS), []
        for section, (column, heading) in SECTIONS.items():
            nodes = self.sections.get(section)
            if not nodes:
                continue
            x, y = sum(WIDTHS[:column]) + column * COLUMN_GAP, below[column] + (HEADING if below[column] else 0)
            top = y - TITLE - HEADING
            for node in nodes:
                node["pos"] = [x, y]
                y += node["size"][1] + TITLE + GAP
            if heading:
                box = [x - MARGIN, top, WIDTHS[column] + 2 * MARGIN, y - TITLE - GAP + MARGIN - top]
                groups.append({"id": len(groups) + 1, "title": heading, "bounding": box, "color": "#3f789e", "font_size": 24, "flags": {}})
            below[column] = y + MARGIN
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"sparge-attention/{self.name}")),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": groups,
            "config": {},
            "extra": {"ds": {"scale": 0.5, "offset": [80, 200]}},
            "version": 0.4,
        }


def width_of(section: str) -> int:
    return WIDTHS[SECTIONS[section][0]]


def note_height(text: str, width: int) -> int:
    """Room for a Markdown note, from the length of its lines."""
    letters = (width - 60) / 6
    lines = sum(1 if line.startswith("- `models") else max(0.6, -(-len(line) // letters)) for line in text.splitlines())
    return round(70 + 14 * lines + 18 * text.count("# "))


def text_of(workflow: dict) -> str:
    """The file's text: a line for each node, link and group, so that a change shows as one."""

    def plain(value) -> str:
        return json.dumps(value, ensure_ascii=False)

    lines = []
    for key, value in workflow.items():
        rows = key in ("nodes", "links", "groups")
        lines.append(f"{plain(key)}: " + ("[\n" + ",\n".join(map(plain, value)) + "\n]" if rows else plain(value)))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _registered() -> tuple[str, str]:
    """Name and version under which the registry knows this pack."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return tuple(re.search(rf'^{key} = "(.+?)"', project, re.MULTILINE)[1] for key in ("name", "version"))


OURS = _registered()
