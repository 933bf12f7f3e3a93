"""A stand-in for the GPU of the CUDA backend that notes its launches, and calls for it."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from sparge_kernels import config
from sparge_kernels.backends import cuda as backend
from sparge_kernels.call import Call, Rule
from sparge_kernels.cuda import prepare, workspace

KERNELS = ["sparge_statistics", "sparge_prepass", "sparge_select", "sparge_attention_mma"]
ON_HOPPER = [*KERNELS[:3], "sparge_attention_sm90"]
IN_SEQUENCE = [*KERNELS[:3], "sparge_sequence", "sparge_attention_sm90"]


class RecordingMachine:
    """A GPU that notes its launches: (kernel, variant, grid, shared memory, a copy of the struct, threads)."""

    def __init__(self, pv="int8", processors=84, arch="sm_89"):
        self.arch, self.pv, self.processors, self.launched = arch, pv, processors, []

    def missing(self, variants):
        return None

    def kernel(self, variant, symbol):
        return SimpleNamespace(variant=variant.name, name=symbol)

    def launch(self, kernel, grid, threads, shared, params, stream):
        assert stream == 7
        self.launched.append((kernel.name, kernel.variant, grid, shared, type(params).from_buffer_copy(params), threads))

    def here(self):
        return contextlib.nullcontext()

    def stream(self):
        return 7


@pytest.fixture
def machine(monkeypatch):
    """The `RecordingMachine` that every device is taken for."""
    made = RecordingMachine()
    monkeypatch.setattr(backend, "machine_of", lambda device: (made, None))
    return made


def call_of(q, k, **options):
    return Call.of(q, k, "cuda", **{"scale": 0.25, "want_info": True, **options})


def tensors(rand, b=2, h=4, h_kv=2, s_q=333, s_k=400, d=40, dtype=torch.float16):
    return rand(1, b, h, s_q, d, dtype=dtype), rand(2, b, h_kv, s_k, d, dtype=dtype), rand(3, b, h_kv, s_k, d, dtype=dtype)


VIEWS = {"slice", "view", "detach", "select", "unsqueeze", "split", "unbind", "transpose", "expand"}
WAITING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero", "repeat_interleave", "lift_fresh"}
"""Operators that wait for a device: they read something back (repeat_interleave: with repeats in a tensor) or copy a fresh host value to it."""


def carved(*, q_shape=(2, 4, 333, 40), k_shape=(2, 2, 1000, 40), rule=None, pv="int8", processors=84, masked=False, **options):
    """The workspace of a call without memory."""
    q, k = torch.empty(q_shape, dtype=torch.float16, device="meta"), torch.empty(k_shape, dtype=torch.float16, device="meta")
    mask = torch.empty(k_shape[0], k_shape[2], dtype=torch.bool, device="meta") if masked else None
    found = {variant.name: variant for variant in config.variants("sm_90")}
    dim = config.padded_dim(q_shape[3])
    kernel = config.attention_kernel("sm_90", pv)
    binaries = workspace.Binaries(pv, found[f"prepass_d{dim}_float16"], found[f"select_d{dim}"], kernel.variant(dim, pv, masked), kernel)
    return workspace.carve(call_of(q, k, key_mask=mask, **options), rule or Rule(0.3), prepare.Inputs(q, k, k), binaries, processors)
