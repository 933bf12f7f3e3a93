"""Writes workflows/*.json: one function a model, the values of Sparge Attention from nodes/presets.py. Run it with `.venv/bin/python`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable

import graph
from graph import Graph, Slot

FOLDER = graph.ROOT / "workflows"
SEED = 42
EXAMPLE_PICTURE = "example.png"  # comes with ComfyUI

HUB = "https://huggingface.co"
FLUX_TEXT = "comfyanonymous/flux_text_encoders/resolve/main"
HUNYUAN = "Comfy-Org/HunyuanVideo_repackaged/resolve/main/split_files"
HUNYUAN_15 = "Comfy-Org/HunyuanVideo_1.5_repackaged/resolve/main/split_files"
WAN_21 = "Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
WAN_22 = "Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
QWEN = "Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files"
MOCHI = "Comfy-Org/mochi_preview_repackaged/resolve/main/split_files"

# Model file -> where the official templates download it, and the folder below ComfyUI's models.
FILES = {
    "flux1-dev.safetensors": ("Comfy-Org/flux1-dev/resolve/main", "diffusion_models"),
    "flux1-dev-kontext_fp8_scaled.safetensors": (
        "Comfy-Org/flux1-kontext-dev_ComfyUI/resolve/main/split_files/diffusion_models",
        "diffusion_models",
    ),
    "clip_l.safetensors": (FLUX_TEXT, "text_encoders"),
    "t5xxl_fp16.safetensors": (FLUX_TEXT, "text_encoders"),
    "t5xxl_fp8_e4m3fn_scaled.safetensors": (FLUX_TEXT, "text_encoders"),
    "ae.safetensors": ("Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae", "vae"),
    "mochi_preview_bf16.safetensors": (f"{MOCHI}/diffusion_models", "diffusion_models"),
    "mochi_vae.safetensors": (f"{MOCHI}/vae", "vae"),
    "hunyuan_video_t2v_720p_bf16.safetensors": (f"{HUNYUAN}/diffusion_models", "diffusion_models"),
    "llava_llama3_fp8_scaled.safetensors": (f"{HUNYUAN}/text_encoders", "text_encoders"),
    "hunyuan_video_vae_bf16.safetensors": (f"{HUNYUAN}/vae", "vae"),
    "hunyuanvideo1.5_720p_t2v_fp16.safetensors": (f"{HUNYUAN_15}/diffusion_models", "diffusion_models"),
    "byt5_small_glyphxl_fp16.safetensors": (f"{HUNYUAN_15}/text_encoders", "text_encoders"),
    "hunyuanvideo15_vae_fp16.safetensors": (f"{HUNYUAN_15}/vae", "vae"),
    "qwen_2.5_vl_7b_fp8_scaled.safetensors": (f"{QWEN}/text_encoders", "text_encoders"),
    "qwen_image_fp8_e4m3fn.safetensors": (f"{QWEN}/diffusion_models", "diffusion_models"),
    "qwen_image_vae.safetensors": (f"{QWEN}/vae", "vae"),
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors": (f"{WAN_21}/text_encoders", "text_encoders"),
    "wan_2.1_vae.safetensors": (f"{WAN_21}/vae", "vae"),
    "clip_vision_h.safetensors": (f"{WAN_21}/clip_vision", "clip_vision"),
    "wan2.1_t2v_1.3B_fp16.safetensors": (f"{WAN_21}/diffusion_models", "diffusion_models"),
    "wan2.1_t2v_14B_fp8_scaled.safetensors": (f"{WAN_21}/diffusion_models", "diffusion_models"),
    "wan2.1_i2v_480p_14B_fp16.safetensors": (f"{WAN_21}/diffusion_models", "diffusion_models"),
    "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors": (f"{WAN_22}/diffusion_models", "diffusion_models"),
    "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors": (f"{WAN_22}/diffusion_models", "diffusion_models"),
    "wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors": (f"{WAN_22}/diffusion_models", "diffusion_models"),
    "wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors": (f"{WAN_22}/diffusion_models", "diffusion_models"),
    "ltx-video-2b-v0.9.safetensors": ("Lightricks/LTX-Video/resolve/main", "checkpoints"),
}
LINKS = {name: (f"{HUB}/{place}/{name}", directory) for name, (place, directory) in FILES.items()}

FOX = "A red fox trots through fresh snow between birches, breath steaming, low winter sun behind it, the camera follows at its height."
HARBOUR = "A small harbour at dawn: a blue fishing boat leaves the quay, gulls circle, ripples spread over calm water, slow camera pan to the right."
KITCHEN = "A lighthouse keeper's kitchen, copper pots on the wall, rain on the window, oil painting."
PENCIL = "Turn this into a pencil drawing on rough paper; keep the composition."
MOVES = "The camera moves slowly closer while the light changes from afternoon to evening and a soft wind moves everything that can move."
BAD_VIDEO = "still image, flicker, blur, low quality, distorted limbs, extra fingers, subtitles, watermark"

NOT_MEASURED = (
    "**Speed-up: not yet measured on a GPU.** *Sparge Monitor* measures it on your machine while you sample, *Sparge Report* keeps the numbers. "
    "Calls of fewer than 4,096 tokens stay dense."
)
LOWER = "preset fast, or topk 0.25 with preset auto: faster and less exact. Compare with the same seed."
HIGHER = "If details suffer: preset careful, or preset auto with start_percent 0.1 higher."
FEW_STEPS = (
    "With a 4 or 8 step LoRA set start_percent to 0 and leave preset on auto: then at most one step stays dense. Put the LoRA between the loader "
    "and Sparge Attention."
)


def _presets() -> dict:
    """The table, without importing the pack (that takes ComfyUI)."""
    spec = importlib.util.spec_from_file_location("sparge_presets", graph.ROOT / "nodes" / "presets.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PRESETS


PRESETS = _presets()
WORKFLOWS: dict[str, tuple[str, Callable[[Graph], None]]] = {}
"""Name -> (family in the table of presets, what fills its graph)."""


def workflow(name: str, family: str):
    """Registers a function that fills a graph as the file sparge_NAME.json."""

    def register(fill: Callable[[Graph], None]):
        WORKFLOWS[f"sparge_{name}"] = family, fill
        return fill

    return register


def sparge_values(family: str) -> list:
    """The widgets of Sparge Attention, in their order."""
    row = PRESETS[family]
    return ["auto", row.topk, row.start_percent, row.end_percent, row.dense_blocks, 15.0, 4096, -0.1, 0.0, "auto", False, False, "auto"]


def about(g: Graph, title: str, what: str, expect: str, *following: str) -> None:
    """The note of a workflow. Files are listed by `build`, when they are known."""
    row = PRESETS[WORKFLOWS[g.name][0]]
    dense = f"layer {row.dense_blocks} (of the model's transformer blocks, counted from 0)" if row.dense_blocks else "no layer"
    g.note("\n".join([
        f"# {title}",
        what,
        "",
        "## Settings, and why",
        f"- topk {row.topk:g}: every block of 128 tokens attends to this share of the others, chosen anew in each call.",
        f"- start_percent {row.start_percent:g}: the first part of the schedule, which settles the composition, stays dense.",
        f"- dense_blocks: {dense} always dense.",
        "- everything else at its default; preset auto takes over any of these that you set back to its default.",
        "",
        f"Source for {row.label}: {row.source}.",
        "",
        "## What to expect",
        expect,
        "",
        NOT_MEASURED,
        "",
        "## Try next",
        *(f"- {entry}" for entry in (*following, LOWER, HIGHER)),
    ]))  # fmt: skip


def add_files(g: Graph) -> None:
    """Ends the note with every model file that the loaders name."""
    lines = ["", "## Files", "A file that is missing is offered for download when the workflow is opened."]
    seen = set()
    for node in g.nodes:
        for file in node["properties"].get("models", []):
            if file["name"] not in seen:
                seen.add(file["name"])
                lines.append(f"- `models/{file['directory']}/` [{file['name']}]({file['url']})")
    first = g.nodes[0]
    first["widgets_values"][0] += "\n" + "\n".join(lines)
    first["size"][1] = graph.note_height(first["widgets_values"][0], first["size"][0])


def patched(g: Graph, model: dict, which: str = "") -> dict:
    """Sparge Attention, and after it Sparge Monitor; `which` of two models."""
    of = f" ({which})" if which else ""
    sparge = g.add("sparse", "SpargeAttention", *sparge_values(WORKFLOWS[g.name][0]), title=f"Sparge Attention{of}", model=model)
    return g.add("watch", "SpargeMonitor", True, title=f"Sparge Monitor{of}", model=sparge)


def report(g: Graph, model: dict, images: dict, which: str = "", formats: str = "png, html") -> dict:
    title = f"Sparge Report ({which})" if which else "Sparge Report"
    return g.add("report", "SpargeReport", formats, "sparge/report", title=title, model=model, data=images)


def text_pair(g: Graph, clip: dict, positive: str, negative: str) -> tuple[dict, dict]:
    return (
        g.add("inputs", "CLIPTextEncode", positive, title="Prompt", clip=clip),
        g.add("inputs", "CLIPTextEncode", negative, title="Negative prompt", clip=clip),
    )


def decoded(g: Graph, samples: dict, vae: dict | Slot) -> dict:
    return g.add("result", "VAEDecode", samples=samples, vae=vae)


def save_video(g: Graph, images: dict, fps: float) -> None:
    video = g.add("result", "CreateVideo", fps, images=images)
    g.add("result", "SaveVideo", f"video/{g.name}", "auto", "auto", video=video)


def save_image(g: Graph, images: dict) -> None:
    g.add("result", "SaveImage", g.name, images=images)


def sampled(g: Graph, model: dict, conditions: tuple, latent: dict | Slot, *values) -> dict:
    """A KSampler with a fixed seed; `conditions`: the positive and the negative one, `values`: steps, cfg, sampler."""
    positive, negative = conditions
    return g.add("sampler", "KSampler", SEED, *values, "simple", 1.0, model=model, positive=positive, negative=negative, latent_image=latent)


def shifted_and_guided(g: Graph, model: dict, latent: dict, guider: str, *values, **conditions: dict) -> tuple[dict, dict]:
    """A model with its sampling shifted, patched and sampled under a guider; the patched model, and the samples."""
    shifted = g.add("sparse", "ModelSamplingSD3", 7.0, model=model)
    model = patched(g, shifted)
    noise = g.add("sampler", "RandomNoise", SEED)
    sampler = g.add("sampler", "KSamplerSelect", "euler")
    sigmas = g.add("sampler", "BasicScheduler", "simple", 20, 1.0, model=shifted)
    guided = g.add("sampler", guider, *values, model=model, **conditions)
    return model, g.add("sampler", "SamplerCustomAdvanced", noise=noise, guider=guided, sampler=sampler, sigmas=sigmas, latent_image=latent)


def finish(g: Graph, model: dict, images: dict, fps: float | None = None, formats: str = "png, html") -> dict:
    """Saves a video of so many frames a second, or a picture, and reports on the model that was sampled; the report."""
    if fps is None:
        save_image(g, images)
    else:
        save_video(g, images, fps)
    return report(g, model, images, formats=formats)


@workflow("flux_dev", "flux")
def flux_dev(g: Graph) -> None:
    about(
        g,
        "Flux.1 dev with Sparge Attention",
        "A picture of 1024 x 1024 from text. Sparge Attention lets the model attend only to the blocks of tokens that matter.",
        "Text and picture are one sequence here, of 4,096 picture tokens and the prompt; the text is always kept. That is short: most of what "
        "there is to gain lies in larger pictures.",
        "1536 x 1536 or 2048 x 1024: attention grows with the square of the pixels, and so does what is left out.",
    )
    model = g.add("models", "UNETLoader", "flux1-dev.safetensors", "default")
    clip = g.add("models", "DualCLIPLoader", "clip_l.safetensors", "t5xxl_fp16.safetensors", "flux", "default")
    vae = g.add("models", "VAELoader", "ae.safetensors")
    prompt = g.add("inputs", "CLIPTextEncode", KITCHEN, title="Prompt", clip=clip)
    positive = g.add("inputs", "FluxGuidance", 3.5, conditioning=prompt)
    negative = g.add("inputs", "ConditioningZeroOut", conditioning=prompt)
    latent = g.add("inputs", "EmptySD3LatentImage", 1024, 1024, 1)
    model = patched(g, model)
    samples = sampled(g, model, (positive, negative), latent, 20, 1.0, "euler")
    finish(g, model, decoded(g, samples, vae))


@workflow("flux_kontext", "flux")
def flux_kontext(g: Graph) -> None:
    about(
        g,
        "Flux.1 Kontext with Sparge Attention",
        "Edits a picture as the prompt says. Choose your own picture in *Load Image*.",
        "The picture that you give stands in the same sequence as the one that is made, so there are about 8,200 tokens and the prompt. Tokens of "
        "the reference are kept only where something attends to them.",
        "protect_references on: the reference is always kept. Compare how much of it survives the edit.",
    )
    model = g.add("models", "UNETLoader", "flux1-dev-kontext_fp8_scaled.safetensors", "default")
    clip = g.add("models", "DualCLIPLoader", "clip_l.safetensors", "t5xxl_fp8_e4m3fn_scaled.safetensors", "flux", "default")
    vae = g.add("models", "VAELoader", "ae.safetensors")
    picture = g.add("models", "LoadImage", EXAMPLE_PICTURE, "image")
    prompt = g.add("inputs", "CLIPTextEncode", PENCIL, title="What to change", clip=clip)
    scaled = g.add("inputs", "FluxKontextImageScale", image=picture)
    latent = g.add("inputs", "VAEEncode", pixels=scaled, vae=vae)
    referring = g.add("inputs", "ReferenceLatent", conditioning=prompt, latent=latent)
    positive = g.add("inputs", "FluxGuidance", 2.5, conditioning=referring)
    negative = g.add("inputs", "ConditioningZeroOut", conditioning=prompt)
    model = patched(g, model)
    samples = sampled(g, model, (positive, negative), latent, 20, 1.0, "euler")
    finish(g, model, decoded(g, samples, vae))


@workflow("mochi", "mochi")
def mochi(g: Graph) -> None:
    about(
        g,
        "Mochi 1 with Sparge Attention",
        "A video of 848 x 480 with 37 frames from text.",
        "11,130 video tokens and the prompt in one sequence; the text is always kept.",
        "85 or 163 frames, where memory allows: 23,850 and 44,520 tokens; attention grows with the square of that.",
    )
    model = g.add("models", "UNETLoader", "mochi_preview_bf16.safetensors", "default")
    clip = g.add("models", "CLIPLoader", "t5xxl_fp16.safetensors", "mochi", "default")
    vae = g.add("models", "VAELoader", "mochi_vae.safetensors")
    positive, negative = text_pair(g, clip, FOX, "")
    latent = g.add("inputs", "EmptyMochiLatentVideo", 848, 480, 37, 1)
    model = patched(g, model)
    samples = sampled(g, model, (positive, negative), latent, 30, 4.5, "euler")
    finish(g, model, decoded(g, samples, vae), 24.0)


@workflow("hunyuan_video_t2v", "hunyuan_video")
def hunyuan_video_t2v(g: Graph) -> None:
    about(
        g,
        "HunyuanVideo with Sparge Attention",
        "A video of 848 x 480 with 73 frames from text.",
        "30,210 video tokens and the prompt in one sequence; the text is always kept.",
        "129 frames or 1280 x 720: the share of attention in the time grows, and with it what can be saved.",
    )
    model = g.add("models", "UNETLoader", "hunyuan_video_t2v_720p_bf16.safetensors", "default")
    clip = g.add("models", "DualCLIPLoader", "clip_l.safetensors", "llava_llama3_fp8_scaled.safetensors", "hunyuan_video", "default")
    vae = g.add("models", "VAELoader", "hunyuan_video_vae_bf16.safetensors")
    prompt = g.add("inputs", "CLIPTextEncode", HARBOUR, title="Prompt", clip=clip)
    positive = g.add("inputs", "FluxGuidance", 6.0, conditioning=prompt)
    latent = g.add("inputs", "EmptyHunyuanLatentVideo", 848, 480, 73, 1)
    model, samples = shifted_and_guided(g, model, latent, "BasicGuider", conditioning=positive)
    images = g.add("result", "VAEDecodeTiled", 256, 64, 64, 8, samples=samples, vae=vae)
    finish(g, model, images, 24.0)


@workflow("hunyuan_video_1_5", "hunyuan_video_1_5")
def hunyuan_video_1_5(g: Graph) -> None:
    about(
        g,
        "HunyuanVideo 1.5 with Sparge Attention",
        "A video of 1280 x 720 with 121 frames from text.",
        "111,600 video tokens and the prompt in one sequence, the longest of these workflows; the text is always kept.",
        "640 x 368 first, to find the values: a step takes a small part of the time.",
    )
    model = g.add("models", "UNETLoader", "hunyuanvideo1.5_720p_t2v_fp16.safetensors", "default")
    clip = g.add("models", "DualCLIPLoader", "qwen_2.5_vl_7b_fp8_scaled.safetensors", "byt5_small_glyphxl_fp16.safetensors",
                 "hunyuan_video_15", "default")  # fmt: skip
    vae = g.add("models", "VAELoader", "hunyuanvideo15_vae_fp16.safetensors")
    positive, negative = text_pair(g, clip, HARBOUR, "")
    latent = g.add("inputs", "EmptyHunyuanVideo15Latent", 1280, 720, 121, 1)
    model, samples = shifted_and_guided(g, model, latent, "CFGGuider", 6.0, positive=positive, negative=negative)
    finish(g, model, decoded(g, samples, vae), 24.0)


def wan_files(g: Graph) -> tuple[dict, dict]:
    clip = g.add("models", "CLIPLoader", "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan", "default")
    return clip, g.add("models", "VAELoader", "wan_2.1_vae.safetensors")


@workflow("wan2_1_t2v", "wan_t2v")
def wan2_1_t2v(g: Graph) -> None:
    about(
        g,
        "Wan 2.1 text to video with Sparge Attention",
        "A video of 832 x 480 with 81 frames from text, with the 14B model.",
        "32,760 video tokens attend to one another; attention to the text is a call of its own and stays dense.",
        "1280 x 720: 75,600 tokens.",
        "The 1.3B model, in workflow *sparge_monitor_tour*.",
        FEW_STEPS,
    )
    model = g.add("models", "UNETLoader", "wan2.1_t2v_14B_fp8_scaled.safetensors", "default")
    clip, vae = wan_files(g)
    positive, negative = text_pair(g, clip, FOX, BAD_VIDEO)
    latent = g.add("inputs", "EmptyHunyuanLatentVideo", 832, 480, 81, 1)
    model = patched(g, g.add("sparse", "ModelSamplingSD3", 8.0, model=model))
    samples = sampled(g, model, (positive, negative), latent, 30, 6.0, "uni_pc")
    finish(g, model, decoded(g, samples, vae), 16.0)


@workflow("wan2_1_i2v", "wan_i2v")
def wan2_1_i2v(g: Graph) -> None:
    about(
        g,
        "Wan 2.1 image to video with Sparge Attention",
        "A video of 832 x 480 with 81 frames that begins with your picture. Choose the picture in *Load Image*.",
        "32,760 video tokens attend to one another; attention to the text and to the picture's description is a call of its own and stays dense.",
        "start_percent 0.2: what Sparse VideoGen used at this size; 0.35 is the careful value for all sizes.",
        FEW_STEPS,
    )
    model = g.add("models", "UNETLoader", "wan2.1_i2v_480p_14B_fp16.safetensors", "default")
    clip, vae = wan_files(g)
    vision = g.add("models", "CLIPVisionLoader", "clip_vision_h.safetensors")
    picture = g.add("models", "LoadImage", EXAMPLE_PICTURE, "image", title="First frame")
    positive, negative = text_pair(g, clip, MOVES, BAD_VIDEO)
    seen = g.add("inputs", "CLIPVisionEncode", "none", clip_vision=vision, image=picture)
    start = g.add("inputs", "WanImageToVideo", 832, 480, 81, 1,
                  positive=positive, negative=negative, vae=vae, clip_vision_output=seen, start_image=picture)  # fmt: skip
    model = patched(g, g.add("sparse", "ModelSamplingSD3", 8.0, model=model))
    samples = sampled(g, model, (Slot(start, 0), Slot(start, 1)), Slot(start, 2), 20, 6.0, "uni_pc")
    finish(g, model, decoded(g, samples, vae), 16.0)


TWO_EXPERTS = (
    "Wan 2.2 is two models: one for the noisy half of the schedule, one for the rest. **Both are patched**, each by a Sparge Attention and a Sparge "
    "Monitor of its own, with the same values: start_percent counts on the whole schedule, so it ends within the first model's steps."
)


def two_experts(g: Graph, kind: str) -> tuple[dict, dict, dict, dict]:
    """Loaders of both models, text encoder and VAE."""
    high = g.add("models", "UNETLoader", f"wan2.2_{kind}_high_noise_14B_fp8_scaled.safetensors", "default", title="Model for high noise")
    low = g.add("models", "UNETLoader", f"wan2.2_{kind}_low_noise_14B_fp8_scaled.safetensors", "default", title="Model for low noise")
    return high, low, *wan_files(g)


def two_stages(g: Graph, high: dict, low: dict, vae: dict, positive, negative, latent) -> None:
    """Steps 0 to 9 with one model, 10 to 19 with the other; a report for each."""
    high = patched(g, g.add("sparse", "ModelSamplingSD3", 8.0, model=high), "high noise")
    low = patched(g, g.add("sparse", "ModelSamplingSD3", 8.0, model=low), "low noise")
    first = g.add("sampler", "KSamplerAdvanced", "enable", SEED, 20, 3.5, "euler", "simple", 0, 10, "enable",
                  title="Steps 0 to 9, high noise", model=high, positive=positive, negative=negative, latent_image=latent)  # fmt: skip
    second = g.add("sampler", "KSamplerAdvanced", "disable", 0, 20, 3.5, "euler", "simple", 10, 10000, "disable",
                   title="Steps 10 to 19, low noise", model=low, positive=positive, negative=negative, latent_image=first)  # fmt: skip
    images = decoded(g, second, vae)
    save_video(g, images, 16.0)
    report(g, high, images, "high noise")
    report(g, low, images, "low noise")


@workflow("wan2_2_t2v", "wan_t2v")
def wan2_2_t2v(g: Graph) -> None:
    about(
        g,
        "Wan 2.2 text to video with Sparge Attention",
        "A video of 640 x 640 with 81 frames from text. " + TWO_EXPERTS,
        "33,600 video tokens attend to one another; attention to the text is a call of its own and stays dense.",
        "1280 x 720: 75,600 tokens.",
        FEW_STEPS + " Both models need it.",
    )
    high, low, clip, vae = two_experts(g, "t2v")
    positive, negative = text_pair(g, clip, FOX, BAD_VIDEO)
    two_stages(g, high, low, vae, positive, negative, g.add("inputs", "EmptyHunyuanLatentVideo", 640, 640, 81, 1))


@workflow("wan2_2_i2v", "wan_2_2_i2v")
def wan2_2_i2v(g: Graph) -> None:
    about(
        g,
        "Wan 2.2 image to video with Sparge Attention",
        "A video of 640 x 640 with 81 frames that begins with your picture. Choose the picture in *Load Image*. " + TWO_EXPERTS,
        "33,600 video tokens attend to one another; attention to the text is a call of its own and stays dense.",
        FEW_STEPS + " Both models need it.",
    )
    high, low, clip, vae = two_experts(g, "i2v")
    picture = g.add("models", "LoadImage", EXAMPLE_PICTURE, "image", title="First frame")
    positive, negative = text_pair(g, clip, MOVES, BAD_VIDEO)
    start = g.add("inputs", "WanImageToVideo", 640, 640, 81, 1, positive=positive, negative=negative, vae=vae, start_image=picture)
    two_stages(g, high, low, vae, Slot(start, 0), Slot(start, 1), Slot(start, 2))


@workflow("ltxv", "ltxv")
def ltxv(g: Graph) -> None:
    about(
        g,
        "LTX-Video with Sparge Attention",
        "A video of 768 x 512 with 97 frames from text.",
        "4,992 video tokens, because this model's VAE is coarse: hardly above min_tokens, so there is little to gain at this size.",
        "1216 x 704 with 121 frames: 13,376 tokens.",
    )
    model = g.add("models", "CheckpointLoaderSimple", "ltx-video-2b-v0.9.safetensors")
    clip = g.add("models", "CLIPLoader", "t5xxl_fp16.safetensors", "ltxv", "default")
    positive, negative = text_pair(g, clip, HARBOUR, BAD_VIDEO)
    timed = g.add("inputs", "LTXVConditioning", 25.0, positive=positive, negative=negative)
    latent = g.add("inputs", "EmptyLTXVLatentVideo", 768, 512, 97, 1)
    patched_model = patched(g, model)
    sampler = g.add("sampler", "KSamplerSelect", "euler")
    sigmas = g.add("sampler", "LTXVScheduler", 30, 2.05, 0.95, True, 0.1, latent=latent)
    samples = g.add("sampler", "SamplerCustom", True, SEED, 3.0, model=patched_model, positive=Slot(timed, 0), negative=Slot(timed, 1),
                    sampler=sampler, sigmas=sigmas, latent_image=latent)  # fmt: skip
    finish(g, patched_model, decoded(g, samples, model), 25.0)


@workflow("qwen_image", "qwen_image")
def qwen_image(g: Graph) -> None:
    about(
        g,
        "Qwen-Image with Sparge Attention",
        "A picture of 1328 x 1328 from text, good at writing in pictures.",
        "6,889 picture tokens and the prompt in one sequence; the text is always kept.",
        "Larger pictures: attention grows with the square of the pixels, and so does what is left out.",
        FEW_STEPS,
    )
    model = g.add("models", "UNETLoader", "qwen_image_fp8_e4m3fn.safetensors", "default")
    clip = g.add("models", "CLIPLoader", "qwen_2.5_vl_7b_fp8_scaled.safetensors", "qwen_image", "default")
    vae = g.add("models", "VAELoader", "qwen_image_vae.safetensors")
    prompt = 'A bookshop window at night, a hand-painted sign reads "OPEN LATE", warm light falls on wet cobblestones.'
    positive, negative = text_pair(g, clip, prompt, "")
    latent = g.add("inputs", "EmptySD3LatentImage", 1328, 1328, 1)
    model = patched(g, g.add("sparse", "ModelSamplingAuraFlow", 3.1, model=model))
    samples = sampled(g, model, (positive, negative), latent, 20, 2.5, "euler")
    finish(g, model, decoded(g, samples, vae))


TOUR_SPARSE = """## 1. Sparge Attention
Everything is decided here. After a run the node says in one line what ran sparse and why the rest stayed dense.
- **topk**: the share of key blocks that every block of queries keeps. The one slider to play with.
- **pvthreshd**: skips the second half of work on tiles that hardly count. Lower skips more, 50 is off. The CPU ignores it.
- **start_percent, end_percent**: sparse only in this part of the schedule.
- **dense_blocks**: layers that stay dense, such as `0, 3-5, -1`.
- **min_tokens**: shorter calls stay dense.
- **simthreshd1**: always keep blocks whose tokens differ more than this. Negative is off.
- **cdfthreshd**: also keep blocks until this share of the attention is covered, so hard heads keep more. 0 is off.
- **token_order**: how tokens are grouped. auto: 3-D tiles at a low topk, rows above.
- **compensate**: blocks that are not kept count with their average.
- **protect_references**: always keep reference pictures.
- **backend**: auto takes the fastest that runs here.
- **preset**: auto fills what you leave at its default with the values for this model."""

TOUR_MONITOR = """## 2. Sparge Monitor
Draws while the sampler runs; it changes no picture.
- The **heat map** has a column a step and a row a layer, from dark (little kept) to yellow (all); grey stayed dense. Buttons choose what is shown.
- **Click a cell**: which blocks that layer kept, and the same over the frames of the video. Escape closes it, arrow keys move.
- The **list of reasons** says what stayed dense, and why.
- **measure_dense**: runs a few calls of each size densely as well, so that the speed-up is measured. Off saves that time."""

TOUR_REPORT = """## 3. Sparge Report
Waits for the sampler and keeps what the monitor showed: the heat map, a page that opens offline and an animation step by step, all in the output \
folder.
- **formats**: what is saved. `png` is the heat map, `html` the page, `webp` the animation, as are `gif` and `mp4`; `json` and `csv` are the numbers.
- **filename_prefix**: subfolder and name of the files.
- **model**: the model that was sampled.
- **data**: the pictures (they lie under the block maps) or the latent; passed on unchanged.
- **maps**, shown below: which blocks some layers kept."""


@workflow("monitor_tour", "wan_t2v")
def monitor_tour(g: Graph) -> None:
    about(
        g,
        "A tour: Sparge Attention, Monitor and Report",
        "A short video (832 x 480, 33 frames) with the smallest Wan 2.1 model, to watch what is kept. The notes 1 to 3 explain each switch. Queue "
        "it, look at *Sparge Monitor* while it runs, then at *Sparge Report*.",
        "14,040 video tokens attend to one another; attention to the text is a call of its own and stays dense. The first steps and layer 0 are "
        "dense columns and a dense row in the heat map.",
        "topk 1: everything dense. With the same seed this is the picture to compare with.",
        "cdfthreshd 0.9 with topk 0.1: easy heads keep little, hard ones more.",
        "Bypass Sparge Attention (Ctrl+B): the monitor says that nothing runs sparse.",
    )
    model = g.add("models", "UNETLoader", "wan2.1_t2v_1.3B_fp16.safetensors", "default")
    clip, vae = wan_files(g)
    positive, negative = text_pair(g, clip, FOX, BAD_VIDEO)
    latent = g.add("inputs", "EmptyHunyuanLatentVideo", 832, 480, 33, 1)
    model = patched(g, g.add("sparse", "ModelSamplingSD3", 8.0, model=model))
    g.note(TOUR_SPARSE, "sparse", title="1. Sparge Attention")
    g.note(TOUR_MONITOR, "watch", title="2. Sparge Monitor")
    samples = sampled(g, model, (positive, negative), latent, 20, 6.0, "uni_pc")
    shown = finish(g, model, decoded(g, samples, vae), 16.0, "png, html, webp")
    g.add("report", "PreviewImage", title="Blocks kept, over the frames", images=Slot(shown, 4))
    g.note(TOUR_REPORT, "report", title="3. Sparge Report")


def build(name: str) -> dict:
    """The content of one workflow file."""
    g = Graph(name, LINKS)
    WORKFLOWS[name][1](g)
    add_files(g)
    return g.finished()


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in WORKFLOWS:
        (FOLDER / f"{name}.json").write_text(graph.text_of(build(name)), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
