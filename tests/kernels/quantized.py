"""8-bit forms of q, k and v in PyTorch: the arithmetic that the device code does, written to be read. Tests compare the kernels with it.

Q gets one scale per row, K one per block of 64 rows after centring, V one per channel. All scales are absmax over unmasked rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sparge_kernels.block_mask import BLOCK_K, num_blocks
from torch import Tensor

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
