"""Launches with one fault each, run by test_emulator.py in a process of its own: AddressSanitizer ends that process."""

from __future__ import annotations

import emulator
import pytest
import torch
from samples import launch


def test_right_kernels():
    """Nothing to find, and fibers that come and go leave no false finding behind."""
    x = torch.arange(1024, dtype=torch.int32)
    out = emulator.guarded((1024,), torch.int32)
    for seed in range(4):
        launch("reverse", a=x, out=out, grid=4, shared=1024, seed=seed)
        assert torch.equal(out.view(4, 256), x.view(4, 256).flip(1))
        with pytest.raises(RuntimeError, match="lanes of one warp in different places"):
            launch("strangers", out=out, shared=1024, seed=seed)
    emulator.check_guards(out)


def test_read_past_a_tensor():
    launch("trespass", a=torch.zeros(48, dtype=torch.uint8), out=torch.zeros(4, dtype=torch.uint8), n=48, which=14, shared=1024)


def test_write_past_a_guarded_tensor():
    launch("trespass", out=emulator.guarded((48,), torch.uint8), n=48, which=11, shared=1024)


def test_write_past_shared_memory():
    launch("trespass", n=1000, which=5, shared=1000)


def test_write_before_shared_memory():
    launch("trespass", which=7, shared=1024)


def test_shift_too_far():
    launch("trespass", out=torch.zeros(1, dtype=torch.int32), n=40, which=12, shared=1024)


def test_misaligned_read():
    launch("trespass", a=torch.zeros(16, dtype=torch.uint8), out=torch.zeros(1, dtype=torch.int32), which=13, shared=1024)
