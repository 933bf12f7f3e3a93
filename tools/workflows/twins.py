"""Small twins of the workflows' API prompts: the loaders give tiny models of the same families, sizes and steps are cut down, all else stays."""

from __future__ import annotations

import copy
import json

# Workflow -> what its loaders give: a family of comfy_models, changes of its configuration, pixels of a latent cell.
# Kontext scales its picture to a megapixel: cells of 16 pixels keep that small. Wan 2.2 i2v takes the picture as more input channels alone.
MODELS = {
    "sparge_flux_dev": ("flux", {}, 0),
    "sparge_flux_kontext": ("flux", {}, 16),
    "sparge_mochi": ("mochi", {}, 0),
    "sparge_hunyuan_video_t2v": ("hunyuan_video", {}, 0),
    "sparge_hunyuan_video_1_5": ("hunyuan_video_1_5", {}, 0),
    "sparge_wan2_1_t2v": ("wan_t2v", {}, 0),
    "sparge_wan2_1_i2v": ("wan_i2v", {}, 0),
    "sparge_wan2_2_t2v": ("wan_t2v", {}, 0),
    "sparge_wan2_2_i2v": ("wan_t2v", {"in_dim": 36}, 0),
    "sparge_ltxv": ("ltxv", {}, 0),
    "sparge_qwen_image": ("qwen_image", {}, 0),
    "sparge_monitor_tour": ("wan_t2v", {}, 0),
}

LOADERS = {
    "UNETLoader": "SpargeTinyModel",
    "CheckpointLoaderSimple": "SpargeTinyCheckpoint",
    "CLIPLoader": "SpargeTinyClip",
    "DualCLIPLoader": "SpargeTinyClip",
    "VAELoader": "SpargeTinyVae",
    "CLIPVisionLoader": "SpargeTinyVision",
}
MIN_TOKENS = 1000  # every twin has 1,024 to 2,048 tokens
SMALL = {
    "EmptySD3LatentImage": {"width": 576, "height": 528},
    "EmptyMochiLatentVideo": {"width": 336, "height": 304, "length": 13},
    "EmptyHunyuanLatentVideo": {"width": 336, "height": 304, "length": 9},
    "EmptyHunyuanVideo15Latent": {"width": 336, "height": 304, "length": 9},
    "EmptyLTXVLatentVideo": {"width": 672, "height": 608, "length": 17},
    "WanImageToVideo": {"width": 336, "height": 304, "length": 9},
    "KSampler": {"steps": 4},
    "BasicScheduler": {"steps": 4},
    "LTXVScheduler": {"steps": 4},
    "SpargeAttention": {"min_tokens": MIN_TOKENS},
}


def twin(name: str, prompt: dict) -> dict:
    """The API prompt `prompt` of workflow `name`, small enough for a CPU."""
    family, changes, spatial = MODELS[name]
    small = copy.deepcopy(prompt)
    for node in small.values():
        kind, inputs = node["class_type"], node["inputs"]
        if kind in LOADERS:
            file = next(value for value in inputs.values() if isinstance(value, str))
            node["class_type"] = LOADERS[kind]
            node["inputs"] = {"family": family, "name": file, "changes": json.dumps(changes), "spatial": spatial}
        inputs.update(SMALL.get(kind, {}))
        if kind == "KSamplerAdvanced":  # two stages of three steps each
            inputs["steps"] = 6
            inputs |= {"start_at_step": 3} if inputs["start_at_step"] else {"end_at_step": 3}
    return small
