"""Whole calls with the PTX of the packaged kernels executed on the CPU: every step of the CUDA backend, down to the compiler's instructions.

The blocks are the torch backend's, and the numbers keep the bounds of tools/emulator/whole_call.py. As there, everything that the backend
allocates lies between sentinels and is full of NaN. `make test-ptx` runs every packaged kernel; what always runs are those that differ most.
"""

from __future__ import annotations

import calls
import pytest
import torch
from calls import HOPPER, MASKED, PLAIN, SHORT, TYPES, long_lists, run
from executor import Schedule
from sparge_kernels import config


@pytest.mark.parametrize("dim", config.DIMS, ids="d{}".format)
@pytest.mark.parametrize("name", [*PLAIN, *MASKED])
def test_hopper(machine, name, dim):
    run(machine, HOPPER, {**PLAIN, **MASKED}[name](dim))


@pytest.mark.parametrize("arch, dim", [("sm_80", 64), ("sm_80", 128), ("sm_120", 64), ("sm_120", 128)])
@pytest.mark.parametrize("name", [name for name in SHORT if name in PLAIN])
def test_int8(machine, name, arch, dim):
    run(machine, (arch, "int8"), SHORT[name](dim))


@pytest.mark.parametrize("dtype, dim", [(torch.float32, 48), (torch.bfloat16, 100)], ids=str)
def test_other_types(machine, dtype, dim):
    run(machine, HOPPER, calls.of_type(dtype, dim))


@pytest.mark.ptx_all
@pytest.mark.parametrize("arch, pv", [HOPPER, ("sm_80", "int8")], ids=str)
@pytest.mark.parametrize("dtype, dim", [(dtype, dim) for dtype, dims in TYPES.items() for dim in dims], ids=str)
def test_every_type(machine, dtype, dim, arch, pv):
    run(machine, (arch, pv), calls.of_type(dtype, dim))


@pytest.mark.ptx_all
@pytest.mark.parametrize(
    "arch, dim, pv, masked",
    [
        pytest.param(arch, dim, pv, masked, id=f"{arch} {config.attention_kernel(arch, pv).variant(dim, pv, masked).name}")
        for arch in config.SHIPPED
        for dim in config.DIMS
        for pv in config.forms(arch)
        for masked in (False, True)
    ],
)
def test_every_attention_kernel(machine, arch, dim, pv, masked):
    if same := calls.earlier_with(config.attention_kernel(arch, pv).variant(dim, pv, masked), arch):
        pytest.skip(f"{same} has the same instructions")
    for name, make in SHORT.items():
        if (name in MASKED) == masked:
            run(machine, (arch, pv), make(dim))


# ---- whatever the schedule -----------------------------------------------------------------------------------------------------------------------

SCHEDULES = (
    Schedule(seed=2, copies="at once", resident=1), Schedule(seed=3, copies="random", resident=1), Schedule(seed=4, preempt=7, resident=3),
    Schedule(seed=5, copies="random", preempt=3, resident=3, stall=4000), Schedule(seed=6, copies="at once", preempt=15, resident=3, stall=1000),
)  # fmt: skip


@pytest.mark.parametrize("arch, pv", [HOPPER, ("sm_80", "int8")], ids=str)
@pytest.mark.parametrize("name", ["lists of 0 to 9 blocks", "tiles drop out", "compensate"])
def test_any_schedule_gives_the_same_bits(machine, name, arch, pv):
    call = PLAIN[name](64)
    machine(arch, pv)
    first = calls.attend(call)
    for schedule in SCHEDULES:
        machine(arch, pv, schedule)
        assert all(map(torch.equal, calls.attend(call).bits, first.bits)), schedule


@pytest.mark.parametrize("dim", config.DIMS, ids="d{}".format)
def test_a_ring_that_is_gone_round_often(machine, dim):
    call = long_lists(dim)
    machine(*HOPPER, processors=1)
    first = calls.attend(call)
    calls.check(call, *HOPPER, first)
    machine(*HOPPER, Schedule(seed=7, copies="random", preempt=9), processors=1)
    assert all(map(torch.equal, calls.attend(call).bits, first.bits))


@pytest.mark.parametrize("arch, pv", [HOPPER, ("sm_80", "int8")], ids=str)
@pytest.mark.parametrize("name", ["topk", "cdf and the judge", "tiles drop out"])
def test_approximations_may_be_off_by_four_units_in_the_last_place(machine, name, arch, pv):
    call = PLAIN[name](64)
    machine(arch, pv)
    exact = calls.attend(call)
    machine(arch, pv, Schedule(ulps=4))
    off = calls.attend(call)
    calls.check(call, arch, pv, off)
    assert not torch.equal(off.lse, exact.lse), "nothing was off"
