"""The order in which the kernels keep the bytes of a row, as layout.cuh says."""

from __future__ import annotations

import torch


def swizzled(x: torch.Tensor) -> torch.Tensor:
    """Rows of q8, k8 or v8 (..., rows, values) with their 16-byte chunks where the kernels have them; the same again undoes it."""
    chunks = x.unflatten(-1, (-1, 16 // x.element_size()))
    row = torch.arange(x.shape[-2])[:, None]
    order = torch.arange(chunks.shape[-2]) ^ (row & 7 if chunks.shape[-2] >= 8 else row >> 1 & 3)
    return chunks.gather(-2, order[:, :, None].expand_as(chunks)).flatten(-2)
