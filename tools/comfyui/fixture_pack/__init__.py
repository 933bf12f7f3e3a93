"""Test-only ComfyUI nodes: what a graph needs so that it can run without a text encoder and a VAE. Not part of the pack."""

from __future__ import annotations

from pathlib import Path

import torch

from . import soak
from .picture import decode
from .tiny import LOADERS

CATEGORY = "sparge test fixtures"


class SpargeDemoConditioning:
    """CONDITIONING without a text encoder: seeded noise in the place of a prompt."""

    CATEGORY, RETURN_TYPES, FUNCTION = CATEGORY, ("CONDITIONING",), "make"
    DESCRIPTION = "Test fixture: random text tokens in the place of a prompt."

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "tokens": ("INT", {"default": 16, "min": 1, "max": 4096, "tooltip": "How many text tokens."}),
                "dim": ("INT", {"default": 4096, "min": 1, "max": 65536, "tooltip": "Channels of a token: what the model's text input takes."}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**32 - 1, "tooltip": "Another seed is another prompt."}),
            },
            "optional": {
                "pooled": ("INT", {"default": 0, "min": 0, "max": 65536, "tooltip": "Channels of the pooled output; 0 for none."}),
            },
        }

    def make(self, tokens: int, dim: int, seed: int, pooled: int = 0):
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(1, tokens, dim, generator=generator)
        return ([[text, {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}]],)


class SpargeDemoDecode:
    """Pictures from a Wan latent without a VAE: a fixed pixel shuffle."""

    CATEGORY, RETURN_TYPES, FUNCTION = CATEGORY, ("IMAGE",), "decode"
    DESCRIPTION = "Test fixture: shows a Wan 2.1 latent as frames by a fixed linear map, in the place of a VAE."

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "samples": ("LATENT", {"tooltip": "A 16-channel video latent."}),
                "scale": ("INT", {"default": 4, "min": 1, "max": 8, "tooltip": "Enlargement; 4 gives the size a Wan VAE would."}),
                "between": ("INT", {"default": 4, "min": 1, "max": 8, "tooltip": "Frames per latent frame; 4 as a Wan VAE."}),
            }
        }

    def decode(self, samples: dict, scale: int, between: int):
        from comfy.latent_formats import Wan21

        return (decode(Wan21().process_in(samples["samples"].float().cpu()), scale, between),)


class SpargeDemoRecord:
    """Writes what a comparison needs, without loss: NAME.safetensors in the output folder."""

    CATEGORY, RETURN_TYPES, FUNCTION, OUTPUT_NODE = CATEGORY, (), "record", True
    DESCRIPTION = "Test fixture: writes the latent (as the model sees it, float32) and the frames (8 bit) to a file."

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "samples": ("LATENT", {"tooltip": "A Wan 2.1 latent."}),
                "images": ("IMAGE", {"tooltip": "The frames of it."}),
                "name": ("STRING", {"default": "record", "tooltip": "Name of the file, without its ending."}),
            }
        }

    def record(self, samples: dict, images: torch.Tensor, name: str):
        import folder_paths
        import safetensors.torch
        from comfy.latent_formats import Wan21

        if not name or Path(name).name != name:
            raise ValueError(f"name must be a plain file name, got {name!r}; leave out folders")
        latent = Wan21().process_in(samples["samples"].float().cpu()).contiguous()
        frames = (images.clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
        file = name + ".safetensors"
        safetensors.torch.save_file({"latent": latent, "frames": frames}, str(Path(folder_paths.get_output_directory()) / file))
        return {"ui": {"record": [file]}}


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (SpargeDemoConditioning, SpargeDemoDecode, SpargeDemoRecord, *LOADERS, *soak.NODES)}
NODE_DISPLAY_NAME_MAPPINGS = {
    "SpargeDemoConditioning": "Demo Conditioning (test fixture)",
    "SpargeDemoDecode": "Demo Decode (test fixture)",
    "SpargeDemoRecord": "Demo Record (test fixture)",
}

soak.register()
