"""Attention calls as ComfyUI makes them, for the tests of the override."""

from __future__ import annotations

import torch

KEY = "optimized_attention_override"
B, H, S, D = 2, 2, 200, 64  # four blocks of keys, the last one short; two of queries


def qkv(s_q=S, s_k=None, heads=H, heads_kv=None, batch=B, dim=D, dtype=torch.float32, skip_reshape=True):
    """q, k, v as ComfyUI passes them: (B, H, S, D), or (B, S, H * D)."""
    generator = torch.Generator().manual_seed(s_q + heads)
    shapes = [(batch, heads, s_q, dim)] + 2 * [(batch, heads_kv or heads, s_k or s_q, dim)]
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return made if skip_reshape else [x.transpose(1, 2).flatten(2) for x in made]


def answer(func, *args, **kwargs):
    """An earlier override that answers calls which ComfyUI's own function could not."""
    return "answered"


def quantised(nodes, monkeypatch):
    """The torch backend works on 8-bit values, it says."""
    choice = nodes._kernels.BackendChoice("torch", None, True, True)
    monkeypatch.setattr(nodes._kernels, "backend_for", lambda *kind: choice)


def plain():
    from comfy.ldm.modules.attention import attention_pytorch

    return attention_pytorch.__wrapped__


def counts(run: dict) -> dict:
    """{(step, layer): (sparse calls, reasons)}"""
    return {(c["step"], c["layer"]): (c["sparse_calls"], c["reasons"]) for c in run["cells"]}
