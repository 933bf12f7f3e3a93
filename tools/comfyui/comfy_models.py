"""Tiny random instances of ComfyUI's own diffusion models, sampled on the CPU through ComfyUI's own samplers.

Import this module after `comfy_launch.enter`; `comfy` itself is imported inside the functions. Every family has two heads or
four of 64 channels, fp32 weights from a fixed seed, and a main sequence of 1155 to 1398 tokens that is not a multiple of 64 (Z-Image's is
one of 32). Token orders were read in ComfyUI 0.3.75, `comfy/ldm/<family>/`; where a newer tree differs, the difference is read from the
model class and not from a version number. ACE-Step is left out: its self-attention is linear attention outside ComfyUI's hook.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

# What an attention call says about its place; the other entries of transformer_options are patches, wrappers and callbacks.
OPTIONS = (
    "block",
    "block_type",
    "block_index",
    "total_blocks",
    "transformer_index",
    "activations_shape",
    "original_shape",
    "img_slice",
    "grid_sizes",
    "cond_or_uncond",
    "uuids",
    "sigmas",
    "sample_sigmas",
)


@dataclass(frozen=True)
class TinyModel:
    """One tiny model, its inputs, and what is known of its main attention sequence.

    Attributes
    ----------
    name : key in `FAMILIES`.
    patcher : `comfy.model_patcher.ModelPatcher`.
    latent : zeros, the latent to sample from.
    positive, negative : CONDITIONING lists.
    cfg : guidance scale that suits the family; 1.0 runs the positive alone.
    tokens : length of the joint sequence, or of the image's where text is in cross-attention. UNets: of the highest level with attention.
    segments : that sequence in order, of `("text", n)`, `("grid", (T, H, W))`, `("reference", (T, H, W))`, `("pad", n)`.
    layers : attention calls over that sequence in one model call. UNets: at the highest level with attention.
    intercepted : False where ComfyUI 0.3.75 passes no transformer_options to attention, so that no override is ever called.
    """

    name: str
    patcher: Any
    latent: Tensor
    positive: list
    negative: list
    cfg: float
    tokens: int
    segments: tuple
    layers: int
    intercepted: bool = True


@dataclass(frozen=True)
class _Family:
    model: str  # class name in comfy.supported_models
    config: dict  # its unet_config
    latent: tuple[int, ...]
    channels: int  # of the prompt's embedding
    prompt: int = 7  # tokens of the prompt that are in the main sequence, or in the cross-attention
    layout: tuple[str, ...] = ("text", "grid")
    patch: tuple[int, int, int] = (1, 2, 2)
    layers: tuple[str, ...] | int = ("depth",)  # TinyModel.layers, or the config entries whose sum that is
    gain: float = 1.0
    cfg: float = 1.0
    more: Callable[[Callable, int], dict] = lambda draw, prompt: {}  # what the CONDITIONING holds beside the embedding
    beside: int = 0  # text tokens in the main sequence that are not the prompt's
    embedded: int | None = None  # length of the embedding where it is longer than the prompt
    references: tuple[tuple[int, ...], ...] = ()  # shapes of the reference latents
    multiple: int = 1  # text and image are padded to this, each
    levels: int = 0  # halvings before the level described (UNets)
    optional: tuple[str, dict] | None = None  # "module:class" and entries that only newer classes take
    intercepted: bool = True


def _pooled(channels: int, **others: Any) -> Callable[[Callable, int], dict]:
    return lambda draw, prompt: {"pooled_output": draw(1, channels), **{k: v(draw) for k, v in others.items()}}


def _masked(length: int) -> Callable[[Callable, int], dict]:
    """A prompt of `length` tokens, as many as are in the main sequence valid."""
    return lambda draw, prompt: {"attention_mask": (torch.arange(length) < prompt)[None]}


# Latents: (B, C, H, W) with odd sizes where the class pads, (B, C, T, H, W) with three frames and odd grids.
_IMAGE, _VIDEO, _UNPADDED = (1, 16, 67, 73), (1, 16, 3, 42, 38), (1, 4, 66, 70)
_AXES = [16, 24, 24]

# fmt: off
_FLUX = dict(image_model="flux", in_channels=16, out_channels=16, vec_in_dim=64, context_in_dim=64, hidden_size=128, mlp_ratio=2.0,
             num_heads=2, depth=2, depth_single_blocks=3, axes_dim=_AXES, theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True)
_CHROMA = dict(image_model="chroma", in_channels=64, out_channels=64, in_dim=64, out_dim=128, hidden_dim=64, n_layers=1, context_in_dim=64,
               hidden_size=128, mlp_ratio=2.0, num_heads=2, depth=2, depth_single_blocks=2, axes_dim=_AXES, theta=10000, patch_size=2,
               qkv_bias=True)
_MOCHI = dict(image_model="mochi_preview", depth=2, patch_size=2, num_heads=2, hidden_size_x=128, hidden_size_y=64, mlp_ratio_y=2.0,
              mlp_ratio_x=96.0,  # the class insists on hidden_size_x * mlp_ratio_x == 12288
              learn_sigma=False, in_channels=12, qk_norm=True, qkv_bias=False, out_bias=True, attn_drop=0.0, patch_embed_bias=True,
              posenc_preserve_area=True, timestep_mlp_bias=True, attend_to_padding=False, timestep_scale=1000.0, use_t5=True,
              t5_feat_dim=64, t5_token_length=256, rope_theta=10000.0)
_HUNYUAN = dict(image_model="hunyuan_video", in_channels=16, patch_size=[1, 2, 2], out_channels=16, vec_in_dim=64, axes_dim=_AXES,
                meanflow=False, context_in_dim=64, hidden_size=128, mlp_ratio=2.0, num_heads=2, depth=2, depth_single_blocks=3, theta=256,
                qkv_bias=True, byt5=False, guidance_embed=True)
_HUNYUAN_NEWER = ("comfy.ldm.hunyuan_video.model:HunyuanVideoParams",
                  dict(use_cond_type_embedding=False, vision_in_dim=None, meanflow_sum=False))
_WAN = dict(image_model="wan2.1", dim=128, in_dim=16, out_dim=16, num_heads=2, ffn_dim=128, num_layers=2, patch_size=(1, 2, 2), freq_dim=64,
            text_dim=64, window_size=(-1, -1), qk_norm=True, cross_attn_norm=True, eps=1e-6, model_type="t2v")
_LUMINA = dict(image_model="lumina2", patch_size=2, in_channels=16, dim=256, cap_feat_dim=64, n_layers=2, n_refiner_layers=2, qk_norm=True,
               n_heads=4, n_kv_heads=2, axes_dims=_AXES, axes_lens=[300, 512, 512], ffn_dim_multiplier=1.0)
_UNET = dict(use_checkpoint=False, image_size=32, use_spatial_transformer=True, legacy=False, in_channels=4, out_channels=4,
             transformer_depth_middle=1, context_dim=64, use_temporal_resblock=False, use_temporal_attention=False)
_COSMOS = dict(max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16, patch_spatial=2, patch_temporal=1,
               model_channels=128, concat_padding_mask=True, crossattn_emb_channels=64, pos_emb_cls="rope3d", pos_emb_interpolation="crop",
               use_adaln_lora=True, adaln_lora_dim=16, num_blocks=2, num_heads=2)
_QWEN = dict(image_model="qwen_image", in_channels=64, num_layers=2, attention_head_dim=64, num_attention_heads=2, joint_attention_dim=64,
             axes_dims_rope=tuple(_AXES))


_TABLE: dict[str, _Family] = {
    # Newer Flux classes take three more entries; 0.3.75 refuses them.
    "flux": _Family("Flux", _FLUX, _IMAGE, 64, layers=("depth", "depth_single_blocks"), more=_pooled(64),
                    optional=("comfy.ldm.flux.model:FluxParams", dict(txt_ids_dims=[], yak_mlp=False, txt_norm=False))),
    "chroma": _Family("Chroma", _CHROMA, _IMAGE, 64, cfg=3.0, layers=("depth", "depth_single_blocks"), more=_pooled(64),
                      optional=("comfy.ldm.chroma.model:ChromaParams", dict(txt_ids_dims=[], vec_in_dim=None))),
    # The prompt is cropped to its valid tokens, and text stands behind the video.
    "mochi": _Family("GenmoMochi", _MOCHI, (1, 12, 3, 42, 38), 64, prompt=9, layout=("grid", "text"), cfg=4.5, embedded=256,
                     more=_masked(256)),
    # Text stands behind the video where the blocks say flipped_img_txt (0.3.75), in front of it in newer trees: `_segments` looks.
    "hunyuan_video": _Family("HunyuanVideo", _HUNYUAN, _VIDEO, 64, layers=("depth", "depth_single_blocks"), more=_pooled(64),
                             optional=_HUNYUAN_NEWER),
    # Text is byT5 (6), then the language model's; vision tokens would stand in front of both.
    "hunyuan_video_1_5": _Family(
        "HunyuanVideo15", _HUNYUAN | dict(in_channels=65, out_channels=32, patch_size=[1, 1, 1], vec_in_dim=None, byt5=True,
                                          guidance_embed=False, use_cond_type_embedding=True, vision_in_dim=64),
        (1, 32, 3, 21, 19), 64, beside=6, patch=(1, 1, 1), cfg=6.0, layers=("depth", "depth_single_blocks"),
        more=_pooled(64, conditioning_byt5small=lambda draw: draw(1, 6, 1472)), optional=_HUNYUAN_NEWER),
    "wan_t2v": _Family("WAN21_T2V", _WAN, (1, 16, 3, 41, 37), 64, layout=("grid",), layers=("num_layers",), cfg=5.0),
    "wan_2_2_5b": _Family("WAN22_T2V", _WAN | dict(in_dim=48, out_dim=48), (1, 48, 3, 41, 37), 64, layout=("grid",), layers=("num_layers",),
                          cfg=5.0),
    "wan_i2v": _Family("WAN21_I2V", _WAN | dict(in_dim=36, model_type="i2v"), (1, 16, 3, 41, 37), 64, layout=("grid",),
                       layers=("num_layers",), cfg=5.0,
                       more=lambda draw, prompt: {"clip_vision_output": SimpleNamespace(penultimate_hidden_states=draw(1, 257, 1280))}),
    # The side blocks run over the same sequence: two layers and one of theirs. Frames and mask have the latent's size, and are not padded: so even.
    "wan_vace": _Family("WAN21_Vace", _WAN | dict(model_type="vace", vace_in_dim=96, vace_layers=1), _VIDEO, 64, layout=("grid",),
                        layers=("num_layers", "vace_layers"), cfg=5.0,
                        more=lambda draw, prompt: {"vace_frames": [draw(1, 32, 3, 42, 38)], "vace_mask": [torch.ones(1, 64, 3, 42, 38)],
                                                   "vace_strength": [1.0]}),
    "ltxv": _Family("LTXV", dict(image_model="ltxv", num_layers=2, attention_head_dim=64, num_attention_heads=2, cross_attention_dim=128,
                                 caption_channels=64, in_channels=128),
                    (1, 128, 3, 21, 19), 64, prompt=11, embedded=16, layout=("grid",), patch=(1, 1, 1), layers=("num_layers",), cfg=3.0,
                    more=lambda draw, prompt: {"attention_mask": (torch.arange(16) < prompt)[None].long()}),
    # 3.5 medium: the first block also attends within the image alone. Width is 64 * depth, one head for each 64.
    "sd3": _Family("SD3", dict(in_channels=16, patch_size=2, out_channels=16, depth=2, input_size=None, adm_in_channels=64,
                               context_embedder_config=dict(target="torch.nn.Linear", params=dict(in_features=64, out_features=128)),
                               num_patches=1600, pos_embed_max_size=40, pos_embed_scaling_factor=None, qk_norm="rms",
                               x_block_self_attn_layers=[0]),
                   _IMAGE, 64, cfg=4.0, more=_pooled(64)),
    # Attention from the second level on, as in the real model; two more levels of 17 x 18 below.
    "sdxl": _Family("SDXL", _UNET | dict(num_classes="sequential", adm_in_channels=2816, model_channels=64, num_res_blocks=[1, 1, 1],
                                         channel_mult=[1, 2, 2], transformer_depth=[0, 1, 1], transformer_depth_output=[0, 0, 1, 1, 1, 1],
                                         use_linear_in_transformer=True, num_heads=-1, num_head_channels=64),
                    _UNPADDED, 64, prompt=77, layout=("grid",), patch=(1, 1, 1), levels=1, layers=3, cfg=5.0,
                    more=_pooled(1280)),
    # Attention at both levels: one block going down and two going up at the first.
    "sd15": _Family("SD15", _UNET | dict(adm_in_channels=None, model_channels=128, num_res_blocks=[1, 1], channel_mult=[1, 2],
                                         transformer_depth=[1, 1], transformer_depth_output=[1, 1, 1, 1], use_linear_in_transformer=False,
                                         num_heads=2, num_head_channels=-1),
                    (1, 4, 33, 35), 64, prompt=77, layout=("grid",), patch=(1, 1, 1), layers=3, cfg=5.0),
    "qwen_image": _Family("QwenImage", _QWEN, (1, 16, 1, 67, 73), 64, layers=("num_layers",), cfg=4.0),
    # The mask, all of it true, tells 0.3.60 how many tokens the prompt has.
    "lumina2": _Family("Lumina2", _LUMINA, _IMAGE, 64, layers=("n_layers",), cfg=4.0, more=_masked(7),
                       optional=("comfy.ldm.lumina.model:NextDiT", dict(rope_theta=10000.0))),
    # Text and image are each padded to a multiple of 32.
    "z_image": _Family("ZImage", _LUMINA | dict(n_kv_heads=4, rope_theta=256.0, z_image_modulation=True, time_scale=1000.0,
                                                pad_tokens_multiple=32),
                       _IMAGE, 64, layers=("n_layers",), multiple=32),
    "cosmos_predict2": _Family("CosmosT2IPredict2", _COSMOS | dict(
        image_model="cosmos_predict2", pos_emb_learnable=True, min_fps=1, max_fps=30, extra_per_block_abs_pos_emb=False,
        rope_h_extrapolation_ratio=4.0, rope_w_extrapolation_ratio=4.0, rope_t_extrapolation_ratio=1.0, extra_h_extrapolation_ratio=1.0,
        extra_w_extrapolation_ratio=1.0, extra_t_extrapolation_ratio=1.0, rope_enable_fps_modulation=False),
        _VIDEO, 64, layout=("grid",), layers=("num_blocks",), cfg=3.5),
    "cosmos1": _Family("CosmosT2V", _COSMOS | dict(
        image_model="cosmos", block_config="FA-CA-MLP", pos_emb_learnable=False, block_x_format="THWBD", affline_emb_norm=True,
        rope_h_extrapolation_ratio=1.0, rope_w_extrapolation_ratio=1.0, rope_t_extrapolation_ratio=2.0, extra_per_block_abs_pos_emb=True,
        extra_per_block_abs_pos_emb_type="learnable"),
        _VIDEO, 64, layout=("grid",), layers=("num_blocks",), cfg=3.5),
    # Behind the image: T5 (7), the last LLaMA layer (9), this block's LLaMA layer (9).
    "hidream_i1": _Family("HiDream", dict(image_model="hidream", attention_head_dim=64, axes_dims_rope=[32, 16, 16], caption_channels=[64, 64],
                                          max_resolution=[128, 128], in_channels=16, llama_layers=[0, 1, 1], num_attention_heads=2,
                                          num_routed_experts=2, num_activated_experts=1, num_layers=1, num_single_layers=2, out_channels=16,
                                          patch_size=2, text_emb_dim=64),
                          _IMAGE, 64, layout=("grid", "text"), beside=18, layers=("num_layers", "num_single_layers"),
                          more=_pooled(64, conditioning_llama3=lambda draw: draw(1, 2, 9, 64))),
    # Eight register tokens stand in front of the prompt.
    "auraflow": _Family("AuraFlow", dict(max_seq=1600, cond_seq_dim=64, n_double_layers=1, n_layers=3, dim=128, n_heads=2, global_conddim=64),
                        (1, 4, 67, 73), 64, beside=8, layers=("n_layers",), cfg=3.5, gain=1.25),
    # Newer trees only; two or more classes share the prefix.
    "cogvideox": _Family("CogVideoX", dict(image_model="cogvideox", num_attention_heads=2, attention_head_dim=64, in_channels=16,
                                           out_channels=16, time_embed_dim=64, text_embed_dim=64, num_layers=2,
                                           use_rotary_positional_embeddings=True, max_text_seq_length=16),
                         _VIDEO, 64, prompt=16, layers=("num_layers",), cfg=3.0, gain=1.25),
    "kandinsky5": _Family("Kandinsky5", dict(image_model="kandinsky5", in_visual_dim=16, out_visual_dim=16, in_text_dim=64, in_text_dim2=64,
                                             time_dim=32, model_dim=128, ff_dim=128, visual_embed_dim=132, num_text_blocks=1,
                                             num_visual_blocks=2, axes_dims=tuple(_AXES)),
                          _VIDEO, 64, layout=("grid",), layers=("num_visual_blocks",), cfg=3.0, more=_pooled(64)),
    # The reference stands between text and image, unlike Flux and Qwen-Image.
    "omnigen2": _Family("Omnigen2", dict(image_model="omnigen2", axes_dim_rope=tuple(_AXES), axes_lens=[1024, 1664, 1664],
                                         ffn_dim_multiplier=None, hidden_size=256, in_channels=16, multiple_of=16, norm_eps=1e-5,
                                         num_attention_heads=4, num_kv_heads=2, num_layers=2, num_refiner_layers=1, out_channels=None,
                                         patch_size=2, text_feat_dim=64, timestep_scale=1000.0),
                        (1, 16, 61, 65), 64, layout=("text", "references", "grid"), layers=("num_layers",),
                        references=((1, 16, 33, 29),), more=lambda draw, prompt: {"attention_mask": torch.ones(1, prompt).long()}),
    "pixart": _Family("PixArtSigma", dict(image_model="pixart_sigma", num_heads=2, patch_size=2, hidden_size=128, in_channels=4, depth=2,
                                          model_max_length=300, input_size=128, pe_interpolation=2, micro_condition=False,
                                          caption_channels=64),
                      _UNPADDED, 64, prompt=300, layout=("grid",), cfg=4.0, intercepted=False),
    "hunyuan_dit": _Family("HunyuanDiT", dict(image_model="hydit", depth=2, hidden_size=128, num_heads=2, mlp_ratio=2.0, text_states_dim=64,
                                              text_states_dim_t5=64),
                           _UNPADDED, 64, prompt=77, layout=("grid",), cfg=5.0, intercepted=False,
                           more=lambda draw, prompt: {"attention_mask": torch.ones(1, prompt), "conditioning_mt5xl": draw(1, 256, 64),
                                                      "attention_mask_mt5xl": torch.ones(1, 256)}),
}
# References stand behind the image, in the order given.
_TABLE["flux_kontext"] = replace(_TABLE["flux"], latent=(1, 16, 61, 57), layout=("text", "grid", "references"),
                                 references=((1, 16, 35, 28), (1, 16, 24, 39)))
_TABLE["qwen_image_edit"] = replace(_TABLE["qwen_image"], latent=(1, 16, 1, 61, 57), layout=("text", "grid", "references"),
                                    references=((1, 16, 1, 35, 28), (1, 16, 1, 24, 39)))
# fmt: on

FAMILIES: tuple[str, ...] = tuple(sorted(_TABLE))


def _supported_model(family: _Family):
    import comfy.supported_models as supported

    exact = getattr(supported, family.model, None)
    return exact or next((getattr(supported, name) for name in sorted(dir(supported)) if name.startswith(family.model)), None)


def available(name: str) -> str | None:
    """None where this ComfyUI tree has the family, or a sentence saying that it lacks it."""
    if _supported_model(_TABLE[name]) is None:
        return f"this ComfyUI tree has no {_TABLE[name].model}, which {name} needs"
    return None


def build(name: str, *, latent: tuple[int, ...] | None = None, prompt: int | None = None, **changes: Any) -> TinyModel:
    """One tiny model of a family.

    Parameters
    ----------
    name : one of `FAMILIES`.
    latent : shape of the latent, (B, C, H, W) or (B, C, T, H, W); the default has odd sizes where the class pads.
    prompt : number of prompt tokens in the main sequence or the cross-attention.
    changes : entries of the family's unet_config that replace the default ones.
    """
    import comfy.model_management
    import comfy.model_patcher

    family = _TABLE[name]
    if missing := available(name):
        raise ValueError(missing)
    family = replace(family, latent=latent or family.latent, prompt=prompt or family.prompt, config=_entries(family) | changes)
    config = _supported_model(family)(dict(family.config))
    config.unet_config.update(family.config)  # a class's own extra entries (SD 1.5: eight heads) must not replace these
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    _fill(model.diffusion_model, family.gain)
    devices = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    segments = _segments(family, model.diffusion_model)
    return TinyModel(
        name=name,
        patcher=comfy.model_patcher.ModelPatcher(model, load_device=devices[0], offload_device=devices[1]),
        latent=torch.zeros(family.latent),
        positive=_conditioning(family, 11),
        negative=_conditioning(family, 12),
        cfg=family.cfg,
        tokens=sum(length(segment) for segment in segments),
        segments=segments,
        layers=family.layers if isinstance(family.layers, int) else sum(family.config[key] for key in family.layers),
        intercepted=family.intercepted,
    )


def length(segment: tuple) -> int:
    """Tokens of one entry of `TinyModel.segments`."""
    kind, size = segment
    return size if kind in ("text", "pad") else size[0] * size[1] * size[2]


def _entries(family: _Family) -> dict:
    """The family's unet_config, with those optional entries that this tree's parameter class takes."""
    if family.optional is None:
        return dict(family.config)
    path, optional = family.optional
    module, _, name = path.partition(":")
    taken = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    return {key: value for key, value in optional.items() if key in taken} | family.config


def _segments(family: _Family, diffusion_model) -> tuple:
    def grid(shape: tuple[int, ...]) -> tuple[int, int, int]:
        size = (1, *shape[2:]) if len(shape) == 4 else shape[2:]
        step = family.patch[0], family.patch[1] << family.levels, family.patch[2] << family.levels
        return tuple(-(-n // by) for n, by in zip(size, step, strict=True))

    layout = family.layout
    blocks = getattr(diffusion_model, "double_blocks", None)
    if blocks is not None and getattr(blocks[0], "flipped_img_txt", False):
        layout = ("grid", "text")  # HunyuanVideo up to ComfyUI 0.13
    parts = {
        "text": [("text", family.prompt + family.beside)],
        "grid": [("grid", grid(family.latent))],
        "references": [("reference", grid(shape)) for shape in family.references],
    }
    segments = []
    for segment in [segment for kind in layout for segment in parts[kind]]:
        segments.append(segment)
        if extra := -length(segment) % family.multiple:
            segments.append(("pad", extra))
    return tuple(segments)


def _fill(model: torch.nn.Module, gain: float) -> None:
    """Matrices N(0, gain / sqrt(fan_in)), tables N(0, 0.3), norm weights 1, biases and stored buffers N(0, 0.02); computed buffers stay.

    With gain 0.5 the gates before each residual add are so small that attention moves most outputs by 0.1 to 0.4 %; with 1.0 by 5 to 90 %.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(tensor: Tensor, deviation: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * deviation)

    stored = model.state_dict().keys()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                draw(parameter, gain / parameter[0].numel() ** 0.5 if name.endswith("weight") else 0.3)
            elif name.endswith(("weight", "scale")):
                parameter.fill_(1.0)
            else:
                draw(parameter, 0.02)
        for name, buffer in model.named_buffers():
            if name in stored and buffer.is_floating_point():
                draw(buffer, 0.02)


def _conditioning(family: _Family, seed: int) -> list:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    options = family.more(draw, family.prompt)
    if family.references:
        options["reference_latents"] = [draw(*shape) for shape in family.references]
    return [[draw(1, family.embedded or family.prompt, family.channels), options]]


def conditioning(name: str, seed: int) -> list:
    """A CONDITIONING list of the family, as another prompt would give it."""
    return _conditioning(_TABLE[name], seed)


def latent_kind(name: str) -> tuple[int, bool]:
    """Channels of the family's latent, and whether it is a video's."""
    shape = _TABLE[name].latent
    return shape[1], len(shape) == 5 and shape[2] > 1


def sample(
    model: TinyModel,
    patcher=None,
    steps: int = 2,
    seed: int = 1,
    sampler: str = "euler",
    scheduler: str = "simple",
    cfg: float | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Samples `model`, or `patcher` (a patched clone of its patcher) with the model's inputs, through `comfy.sample.sample`.

    `noise` defaults to ComfyUI's own for `seed`, `cfg` to the model's.
    """
    import comfy.sample

    noise = comfy.sample.prepare_noise(model.latent, seed) if noise is None else noise
    cfg = model.cfg if cfg is None else cfg
    inputs = model.positive, model.negative, model.latent
    return comfy.sample.sample(patcher or model.patcher, noise, steps, cfg, sampler, scheduler, *inputs, disable_pbar=True, seed=seed)


@dataclass(frozen=True)
class AttentionCall:
    """One call that reached the override, as ComfyUI made it.

    `q`, `k`, `v` are shapes; `heads_by` and `mask_by` are "position", "name" or None (not passed); `mask` is None or
    (shape, dtype, strides); `contiguous` speaks of q; `extra` are the remaining keywords, without transformer_options; `options` are
    the entries of `OPTIONS` found in transformer_options, with tensors as lists; `tensors` are clones of q, k and v, or None.
    """

    func: str
    q: tuple
    k: tuple
    v: tuple
    heads: int
    heads_by: str | None
    mask: tuple | None
    mask_by: str | None
    skip_reshape: bool
    skip_output_reshape: bool
    contiguous: bool
    extra: dict
    options: dict
    model_call: int
    tensors: tuple | None

    @property
    def lengths(self) -> tuple[int, int]:
        """(S_q, S_k)."""
        return (self.q[2], self.k[2]) if self.skip_reshape else (self.q[1], self.k[1])

    @property
    def head_dim(self) -> int:
        return self.q[3] if self.skip_reshape else self.q[2] // self.heads


@dataclass
class Recorder:
    """An `optimized_attention_override` that notes every attention call and calls `func` on.

    `install` also notes what reaches an APPLY_MODEL wrapper in `model_calls`: shapes in place of tensors.
    """

    keep: bool = False
    calls: list[AttentionCall] = field(default_factory=list)
    model_calls: list[dict] = field(default_factory=list)

    def __call__(self, func, *args, **kwargs):
        bound = inspect.signature(_attention).bind(*args, **kwargs)
        bound.apply_defaults()

        def passed_by(name: str, index: int) -> str | None:
            return "position" if len(args) > index else "name" if name in kwargs else None

        given, extra = bound.arguments, dict(bound.arguments["extra"])
        q, k, v, mask = given["q"], given["k"], given["v"], given["mask"]
        options = extra.pop("transformer_options", None) or {}
        self.calls.append(
            AttentionCall(
                func=func.__name__,
                q=tuple(q.shape),
                k=tuple(k.shape),
                v=tuple(v.shape),
                heads=given["heads"],
                heads_by=passed_by("heads", 3),
                mask=None if mask is None else (tuple(mask.shape), mask.dtype, mask.stride()),
                mask_by=passed_by("mask", 4),
                skip_reshape=given["skip_reshape"],
                skip_output_reshape=given["skip_output_reshape"],
                contiguous=q.is_contiguous(),
                extra=extra,
                model_call=len(self.model_calls) - 1,
                options={key: _plain(options[key]) for key in OPTIONS if key in options},
                tensors=tuple(x.detach().clone() for x in (q, k, v)) if self.keep else None,
            )
        )
        return func(*args, **kwargs)

    def install(self, patcher):
        """A clone of `patcher` that records here."""
        from comfy.patcher_extension import WrappersMP

        clone = patcher.clone()
        clone.model_options["transformer_options"]["optimized_attention_override"] = self
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "recorder", self._note_model_call)
        return clone

    def _note_model_call(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **others):
        given = dict(x=x, t=t, c_concat=c_concat, c_crossattn=c_crossattn, **others)
        self.model_calls.append({key: _shape(value) for key, value in given.items()})
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **others)

    def main(self, model: TinyModel) -> list[AttentionCall]:
        """The calls over the main sequence: S_q == S_k == `model.tokens`."""
        return [call for call in self.calls if call.lengths == (model.tokens, model.tokens)]


def _attention(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **extra):
    """The signature of ComfyUI's attention functions, to bind a call's arguments to their names."""


def _plain(value):
    return value.tolist() if isinstance(value, Tensor) else value


def _shape(value):
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return [_shape(item) for item in value] if isinstance(value, list) else value
