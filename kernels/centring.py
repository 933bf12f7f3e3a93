"""The centre of K: the vector that every backend subtracts from the keys before they are rounded to 8 bits. The device code takes the same one."""

from __future__ import annotations

import torch
from torch import Tensor

from .block_mask import num_blocks

CENTRE_GROUP = 16
"""One key of so many makes the centre of K."""


def place_in_group(group):
    """Which of the 16 keys of group 0, 1, 2, ... is taken for the centre: an int for an int, int64 for an int64 tensor.

    Four bits of a multiple of the group's square. Squares are in step with no width, so that every column of a video is sampled about as often as
    every other; a fixed place takes the same columns wherever the width shares a factor with 16, and multiples of the group's number itself are in
    step with some width. The factor is the best one found. Group 0 has place 0. The device code says the same (layout.cuh, sampled_token).
    """
    return (group * group * 1126333 >> 20) & (CENTRE_GROUP - 1)


def sampled_keys(length: int, device: torch.device) -> Tensor:
    """The keys that make the centre: int64 (n,), one of each 16 from the start of a head on; the last 16 may be cut short and have none."""
    groups = num_blocks(length, CENTRE_GROUP)
    last = groups - 1
    if last * CENTRE_GROUP + place_in_group(last) >= length:
        groups = last
    group = torch.arange(groups, device=device)
    return group * CENTRE_GROUP + place_in_group(group)


def key_centre(k: Tensor, key_valid: Tensor | None = None) -> Tensor:
    """The vector that every backend subtracts from K: the mean of the unmasked ones of `sampled_keys`.

    Softmax does not see a constant vector added to all keys, so a sampled mean is as exact as a full one. INT8 sees how far it is from the full one:
    with columns that differ, of any width from 16 to 128, at most 0.07 of a key's distance from the mean at 4,096 keys and 0.05 at 8,192.

    Parameters
    ----------
    k : (B, H_kv, S_k, D), any float dtype
    key_valid : bool (B, S_k) or None
        True = attend. Masked keys count nowhere.

    Returns
    -------
    Tensor
        fp32 (B, H_kv, 1, D); zero where every sampled token is masked.
    """
    chosen = sampled_keys(k.shape[2], k.device)
    sample = k[:, :, chosen].float()
    if key_valid is None:
        return sample.mean(-2, keepdim=True)
    weight = key_valid[:, chosen][:, None, :, None].float()
    return torch.where(weight > 0, sample, 0).sum(-2, keepdim=True) / weight.sum(-2, keepdim=True).clamp_min(1)
