"""Stand-ins for loader nodes: a tiny model of a family, and a text encoder, a VAE and a vision encoder that fit it."""

from __future__ import annotations

import json
import zlib
from types import SimpleNamespace

import torch
import torch.nn.functional as F

# Shapes of a VAE: pixels and frames that one latent cell stands for. Families that are not named: 8 and 4.
SPATIAL = {"hunyuan_video_1_5": 16, "ltxv": 32}
FRAMES = {"mochi": 6, "ltxv": 8}


class TinyClip:
    """Seeded noise for a text, in the form that the family's model takes."""

    def __init__(self, family: str):
        self.family = family

    def tokenize(self, text: str, **others):
        return text

    def encode_from_tokens_scheduled(self, tokens: str, **others):
        import comfy_models

        return comfy_models.conditioning(self.family, zlib.crc32(tokens.encode()))


class TinyVae:
    """Shapes as the family's VAE has them, pictures by interpolation. A latent that is not finite is refused: it must not pass as a black picture."""

    def __init__(self, family: str, spatial: int = 0):
        import comfy_models

        self.channels, self.video = comfy_models.latent_kind(family)
        self.spatial, self.frames = spatial or SPATIAL.get(family, 8), FRAMES.get(family, 4)

    def decode(self, samples, **others):
        if not torch.isfinite(samples).all():
            raise ValueError("the sampled latent holds values that are not finite")
        cells = samples.float() if samples.ndim == 5 else samples.float()[:, :, None]
        frames, height, width = cells.shape[2:]
        size = (frames - 1) * self.frames + 1, height * self.spatial, width * self.spatial
        return torch.sigmoid(F.interpolate(cells[:, :3], size)).movedim(1, -1)

    def decode_tiled(self, samples, **others):
        return self.decode(samples)

    def encode(self, pixels):
        planes = pixels.movedim(-1, 1)  # one row a frame
        cells = F.avg_pool2d(planes, self.spatial)
        if self.video:
            cells = cells[:: self.frames].movedim(0, 1)[None]
        return cells.repeat_interleave(-(-self.channels // 3), 1)[:, : self.channels] * 2 - 1

    def temporal_compression_decode(self):
        return self.frames if self.video else None

    def spacial_compression_decode(self):
        return self.spatial


class TinyVision:
    def encode_image(self, image, **others):
        generator = torch.Generator().manual_seed(5)
        return SimpleNamespace(penultimate_hidden_states=torch.randn(1, 257, 1280, generator=generator))


class _Loader:
    CATEGORY, FUNCTION = "sparge test fixtures", "load"
    DESCRIPTION = "Test fixture: stands in for a loader node."

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"family": ("STRING", {"tooltip": "A family of comfy_models."})},
            "optional": {
                "name": ("STRING", {"tooltip": "The file that it stands for."}),
                "changes": ("STRING", {"tooltip": "JSON: entries of the model's configuration."}),
                "spatial": ("INT", {"default": 0, "min": 0, "max": 64, "tooltip": "Pixels of a latent cell; 0 for the family's."}),
            },
        }

    def model(self, family: str, changes: str):
        import comfy_models

        return comfy_models.build(family, **json.loads(changes)).patcher


class SpargeTinyModel(_Loader):
    RETURN_TYPES = ("MODEL",)

    def load(self, family: str, name: str = "", changes: str = "{}", spatial: int = 0):
        return (self.model(family, changes),)


class SpargeTinyCheckpoint(_Loader):
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")

    def load(self, family: str, name: str = "", changes: str = "{}", spatial: int = 0):
        return self.model(family, changes), TinyClip(family), TinyVae(family, spatial)


class SpargeTinyClip(_Loader):
    RETURN_TYPES = ("CLIP",)

    def load(self, family: str, name: str = "", changes: str = "{}", spatial: int = 0):
        return (TinyClip(family),)


class SpargeTinyVae(_Loader):
    RETURN_TYPES = ("VAE",)

    def load(self, family: str, name: str = "", changes: str = "{}", spatial: int = 0):
        return (TinyVae(family, spatial),)


class SpargeTinyVision(_Loader):
    RETURN_TYPES = ("CLIP_VISION",)

    def load(self, family: str, name: str = "", changes: str = "{}", spatial: int = 0):
        return (TinyVision(),)


LOADERS = (SpargeTinyModel, SpargeTinyCheckpoint, SpargeTinyClip, SpargeTinyVae, SpargeTinyVision)
