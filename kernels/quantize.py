"""8-bit forms of q, k and v in PyTorch: the arithmetic that the device code does, written to be read and tested.

Q gets one scale per row, K one per block of 64 rows after centring, V one per channel. All scales are absmax over unmasked rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .block_mask import BLOCK_K, num_blocks

CENTRE_GROUP = 16
"""One key of so many makes the centre of K."""
E4M3_MAX = 448.0


@dataclass(frozen=True, eq=False)
class Quantized:
    """`values` times `scale` (broadcast) gives the tensor back; `per` names the granularity."""

    values: Tensor
    scale: Tensor
    per: str

    def dequantize(self) -> Tensor:
        """The fp32 tensor that the 8-bit values stand for."""
        if self.per == "per_block":
            scale = self.scale.repeat_interleave(BLOCK_K, -2)[..., : self.values.shape[-2], :]
            return self.values.float() * scale
        return self.values.float() * self.scale


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


@lru_cache(maxsize=8)
def _hadamard_matrix(size: int, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float32)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return (matrix * size**-0.5).to(device)


def hadamard(x: Tensor) -> Tensor:
    """Rotates the last dimension by the orthonormal Hadamard matrix; its size must be a power of two.

    Applied to Q and K alike it leaves every score as it is and spreads outlier channels over all channels before quantising.
    """
    size = x.shape[-1]
    if size & (size - 1):
        raise ValueError(f"the last dimension must be a power of two for a Hadamard rotation, got {size}; zero-pad it first")
    return x.float() @ _hadamard_matrix(size, x.device)


def quantize_q(q: Tensor) -> Quantized:
    """INT8 per row: q (..., S_q, D) any float dtype; scale fp32 (..., S_q, 1). A zero row has scale 0 and values 0."""
    return _int8(q.float(), q.float().abs().amax(-1, keepdim=True), "per_row")


def quantize_k(k: Tensor, centre: Tensor | None = None, key_valid: Tensor | None = None) -> Quantized:
    """INT8 per 64 rows: k (B, H_kv, S_k, D); scale fp32 (B, H_kv, N_k, 1).

    Parameters
    ----------
    k : (B, H_kv, S_k, D), any float dtype
    centre : fp32 (B, H_kv, 1, D) or None
        Subtracted first (`key_centre`).
    key_valid : bool (B, S_k) or None
        Masked keys are stored as zero and do not widen the scale.
    """
    x = k.float() if centre is None else k.float() - centre
    if key_valid is not None:
        x = torch.where(key_valid[:, None, :, None], x, 0)
    n_k = num_blocks(x.shape[-2], BLOCK_K)
    padded = torch.nn.functional.pad(x, (0, 0, 0, n_k * BLOCK_K - x.shape[-2]))
    absmax = padded.abs().unflatten(-2, (n_k, BLOCK_K)).amax((-2, -1))[..., None]
    rows = absmax.repeat_interleave(BLOCK_K, -2)[..., : x.shape[-2], :]
    return Quantized(_int8(x, rows, "per_row").values, absmax / 127, "per_block")


def quantize_v(v: Tensor, dtype: str = "int8", key_valid: Tensor | None = None) -> Quantized:
    """Per channel, as "int8" or "fp8" (e4m3): v (B, H_kv, S_k, D); scale fp32 (B, H_kv, 1, D).

    Masked rows are stored as zero: whatever they held (NaN too) cannot leak. An all-zero channel has scale 0, never NaN.
    """
    x = v.float()
    if key_valid is not None:
        x = torch.where(key_valid[:, None, :, None], x, 0)
    absmax = x.abs().amax(-2, keepdim=True)
    if dtype == "int8":
        return _int8(x, absmax, "per_channel")
    if dtype == "fp8":
        scale = absmax / E4M3_MAX
        return Quantized((x / torch.where(scale > 0, scale, 1)).to(torch.float8_e4m3fn), scale, "per_channel")
    raise ValueError(f"dtype must be 'int8' or 'fp8', got {dtype!r}")


def _int8(x: Tensor, absmax: Tensor, per: str) -> Quantized:
    scale = absmax / 127
    return Quantized((x / torch.where(scale > 0, scale, 1)).round().clamp(-127, 127).to(torch.int8), scale, per)
