"""Launches with one fault each, run by test_emulator.py under AddressSanitizer, which ends the process that it finds something in."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable

import emulator
import pytest
import torch
from samples import launch


def alone(test: Callable[[], None]) -> Callable[[], None]:
    """The test in a child process, whose end follows on stderr what was found in it."""

    @functools.wraps(test)
    def parent() -> None:
        child = os.fork()
        if child == 0:
            try:
                test()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(f"{test.__name__} ended with {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", file=sys.stderr, flush=True)

    return parent


@alone
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


@alone
def test_read_past_a_tensor():
    launch("trespass", a=torch.zeros(48, dtype=torch.uint8), out=torch.zeros(4, dtype=torch.uint8), n=48, which=14, shared=1024)


@alone
def test_write_past_a_guarded_tensor():
    launch("trespass", out=emulator.guarded((48,), torch.uint8), n=48, which=11, shared=1024)


@alone
def test_write_past_shared_memory():
    launch("trespass", n=1000, which=5, shared=1000)


@alone
def test_write_before_shared_memory():
    launch("trespass", which=7, shared=1024)


@alone
def test_shift_too_far():
    launch("trespass", out=torch.zeros(1, dtype=torch.int32), n=40, which=12, shared=1024)


@alone
def test_misaligned_read():
    launch("trespass", a=torch.zeros(16, dtype=torch.uint8), out=torch.zeros(1, dtype=torch.int32), which=13, shared=1024)
