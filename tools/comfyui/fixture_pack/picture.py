"""From a 16-channel video latent to frames, by fixed numbers only, so that two runs can be compared. Needs torch alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F

COLOUR_CHANNELS = 12  # three colours x 2 x 2 pixels; channel = colour * 4 + row * 2 + column
CONTRAST = 1.0
# What a step along each latent colour adds to red, green and blue: mild hues that mix well.
COLOURS = ((0.60, 0.25, -0.25), (0.15, 0.55, 0.30), (-0.35, 0.35, 0.60))


def decode(latent: torch.Tensor, scale: int = 4, between: int = 4) -> torch.Tensor:
    """Frames of a video latent as the model sees it (after ComfyUI's `process_in`).

    Parameters
    ----------
    latent : torch.Tensor
        [B, 16, T, H, W], any float dtype.
    scale : int
        Enlargement: a frame is 2 * H * scale high. 4 gives the size that a Wan VAE would.
    between : int
        Frames per latent frame: (T - 1) * between + 1 in all, linearly interpolated.

    Returns
    -------
    torch.Tensor
        [B * frames, height, width, 3] in 0..1, float32.

    Raises
    ------
    ValueError
        When the latent is not a 16-channel video latent.
    """
    if latent.ndim != 5 or latent.shape[1] < COLOUR_CHANNELS:
        raise ValueError(f"latent must be [B, 16, T, H, W], got {list(latent.shape)}; connect the samples of a Wan model")
    batch, _, frames, height, width = latent.shape
    cells = latent[:, :COLOUR_CHANNELS].float().view(batch, 3, 2, 2, frames, height, width)
    pixels = cells.permute(0, 1, 4, 5, 2, 6, 3).reshape(batch, 3, frames, 2 * height, 2 * width)
    if between > 1 and frames > 1:  # ends stay ends in time; in space the picture's edge is half a pixel further out
        pixels = F.interpolate(pixels, ((frames - 1) * between + 1, 2 * height, 2 * width), mode="trilinear", align_corners=True)
    rgb = torch.einsum("oc,bcthw->btohw", torch.tensor(COLOURS), pixels).flatten(0, 1)
    if scale > 1:
        rgb = F.interpolate(rgb, scale_factor=scale, mode="bilinear", align_corners=False)
    return (0.5 + 0.5 * torch.tanh(CONTRAST * rgb)).movedim(1, -1).contiguous()
