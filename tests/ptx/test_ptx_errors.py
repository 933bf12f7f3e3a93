"""The executor tells what is wrong with a kernel, on PTX written by hand, and goes on with the next launch."""

from __future__ import annotations

import ctypes
import re

import executor
import numpy as np
import pytest
import torch
from executor import Schedule
from handwritten import PARAM_BYTES, Params, Program, row_of_thread, store_words

program = Program("errors")
OWN = row_of_thread(4, "%rd4", "%given", "%rd3") + row_of_thread(4, "%rd6", "%out", "%rd5") + row_of_thread(4, "%rd8", "%smem", "%rd7")
HALF = "setp.lt.s32 %p1, %r0, 16;"
LOOP = "AGAIN: add.s32 %r5, %r5, 1; {} setp.ne.s32 %p1, %r0, 99; @%p1 bra AGAIN;"

FAULTS = {
    "global past the end": ("ld.global.u32 %r1, [%rd4+4];", "thread 31: global access of 4 bytes at 0x[0-9a-f]+ is outside of every tensor"),
    "global before the start": ("ld.global.u32 %r1, [%rd4+-4];", "thread 0: global access of 4 bytes .* outside of every tensor"),
    "global half outside": ("ld.global.u64 %rd1, [%given+124];", "outside of every tensor"),
    "global misaligned": ("ld.global.u32 %r1, [%given+2];", "global access of 4 bytes at 0x[0-9a-f]+ is misaligned"),
    "global vector misaligned": ("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%given+8];", "global access of 16 bytes .* misaligned"),
    "global store outside": ("st.global.u32 [%rd6+4], %r0;", "outside of every tensor"),
    "atomic outside": ("atom.global.add.u32 %r1, [%out+128], 1;", "outside of every tensor"),
    "null": ("mov.u64 %rd1, 0; ld.global.u8 %rs1, [%rd1];", "outside of every tensor"),
    "shared past the end": ("st.shared.u32 [%rd8+1024], %r0;", "shared access of 4 bytes at offset [0-9]+ is outside of the 1024 bytes"),
    "shared before the start": ("ld.shared.u32 %r1, [%rd8+-4];", "shared access of 4 bytes at offset -4 is outside"),
    "shared misaligned": ("ld.shared.u32 %r1, [%smem+2];", "shared access .* misaligned"),
    "generic outside": ("cvta.shared.u64 %rd1, %smem; ld.u32 %r1, [%rd1+1024];", "outside of every tensor"),
    "generic misaligned": ("cvta.shared.u64 %rd1, %smem; st.u32 [%rd1+1], %r1;", "misaligned"),
    "parameter outside": ("ld.param.u32 %r1, [parameter_outside_param_2+32];", "parameter access of 4 bytes at offset 48 of 48"),
    "parameter misaligned": ("ld.param.u32 %r1, [parameter_misaligned_param_2+2];", "parameter access of 4 bytes at offset 18"),
    "copy outside": ("cvt.u32.u64 %r1, %smem; cp.async.cg.shared.global [%r1], [%given+128], 16;", "outside of every tensor"),
    "copy misaligned": ("cvt.u32.u64 %r1, %smem; cp.async.cg.shared.global [%r1+8], [%given], 16;", "misaligned"),
    "copy left open": ("cvt.u32.u64 %r1, %smem; cp.async.cg.shared.global [%r1], [%given], 16;", "cp.async without cp.async.commit_group"),
    "matrix outside": ("cvt.u32.u64 %r1, %smem; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r2, %r3, %r4, %r5}, [%r1+1024];", "outside of shared"),
    "matrix misaligned": ("cvt.u32.u64 %r1, %smem; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r2, %r3, %r4, %r5}, [%r1+8];", "misaligned"),
    "division": ("div.u32 %r1, %r0, %r0;", "thread 0: division by zero"),
    "remainder": ("cvt.u64.u32 %rd1, %r0; rem.s64 %rd2, %rd1, %rd1;", "division by zero"),
    "trap": (HALF + "@!%p1 trap;", "thread (1[6-9]|2[0-9]|3[01]): trap"),
    "not all lanes": ("shfl.sync.bfly.b32 %r1, %r0, 1, 31, 65535;", "lanes 0xffff are named"),
    "not all vote": ("vote.sync.any.pred %p1, %p2, 1;", "lanes 0x1 are named"),
    "no such barrier": ("bar.sync 16;", "there is no barrier 16"),
    "too many for a barrier": ("bar.sync 1, 64;", "barrier 1 for 64 threads of 32"),
    "odd count": ("bar.sync 1, 33;", "barrier 1 for 33 threads"),
}
for fault, (body, _) in FAULTS.items():
    program.entry(re.sub(r"\W", "_", fault), OWN + body)


def refused(name: str, why: str, **how) -> str:
    """What the executor says of a launch on 32 words, of which there must be `why`."""
    name = re.sub(r"\W", "_", name)
    with pytest.raises(RuntimeError, match=why) as told:
        program.run(name, np.zeros(32, np.uint32), np.uint32, 32, **{"shared": 1024, **how})
    assert str(told.value).startswith(name)
    return str(told.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_with_its_place(fault):
    body, why = FAULTS[fault]
    text = refused(fault, why)
    quoted = [part.strip() for part in re.findall(r"line [0-9]+, block 0, thread [0-9]+: [^|\n]* \| (.*)", text)]
    assert quoted or fault == "copy left open"
    assert all(line in program.text for line in quoted)


TOGETHER = {
    "lanes apart": (HALF + "@%p1 bra ELSE; vote.sync.any.pred %p2, %p1, -1; bra JOIN; ELSE: bar.warp.sync -1; JOIN:", "of warp 0 meets lane 0"),
    "aligned apart": (HALF + "@%p1 bra ELSE;\nbar.sync 0; bra JOIN; ELSE:\nbar.sync 0; JOIN:", "of the warp waits at another barrier, line"),
    "counts differ": (
        "setp.lt.s32 %p1, %r0, 32; mov.u32 %r1, 1; mov.u32 %r2, 64; mov.u32 %r3, 96; @%p1 bra ELSE; barrier.cta.sync %r1, %r2; bra JOIN;"
        "ELSE: barrier.cta.sync %r1, %r3; JOIN:",
        "barrier 1 is for (64|96) threads and for (64|96) at the same time",
    ),
    "half of every warp": (
        "and.b32 %r3, %r0, 16; setp.ne.s32 %p1, %r3, 0; mov.u32 %r1, 1; mov.u32 %r2, 64; @%p1 bra OUT; barrier.cta.sync %r1, %r2; OUT:",
        "barrier 1 lets go when only lanes 0xffff of warp 0 have come",
    ),
    "twice": (
        "setp.ge.s32 %p1, %r0, 32; mov.u32 %r1, 1; mov.u32 %r2, 128; @%p1 bra OUT;"
        "barrier.cta.arrive %r1, %r2;\nbarrier.cta.arrive %r1, %r2; OUT:",
        "thread ([0-9]|[12][0-9]|3[01]): the thread has come to barrier 1 already",
    ),
    "in vain": (
        "setp.ge.s32 %p1, %r0, 32; mov.u32 %r1, 1; mov.u32 %r2, 128; @%p1 bra OUT; barrier.cta.arrive %r1, %r2; OUT:",
        "32 threads have come to barrier 1 in vain",
    ),
}  # fmt: skip
for fault, (body, _) in TOGETHER.items():
    program.entry(re.sub(r"\W", "_", fault), OWN + body, 128)


@pytest.mark.parametrize("fault", TOGETHER)
@pytest.mark.parametrize("seed", range(3))
def test_threads_that_meet_wrongly_are_told(fault, seed):
    threads = 32 if fault.endswith("apart") else 128
    refused(fault, TOGETHER[fault][1], threads=threads, schedule=Schedule(seed, preempt=2))


program.entry("some_leave", OWN + "setp.lt.s32 %p1, %r0, 40; @%p1 bra OUT; bar.sync 0; OUT:", 96)
program.entry("half_a_warp", OWN + HALF + "@%p1 bra OUT; shfl.sync.idx.b32 %r1, %r0, 0, 31, -1; OUT:")


@pytest.mark.parametrize("schedule", [Schedule(), Schedule(2, "random", 3, 3)], ids=["plain", "preempted"])
def test_a_deadlock_is_told_with_where_every_warp_stands(schedule):
    text = refused("some_leave", "deadlock in block [0-2]", threads=96, grid=3, schedule=schedule)
    assert "\n  warp 0: lanes 0-31 have ended\n" in text
    assert re.search(
        r"\n  warp 1: lanes 0-7 have ended; lanes 8-31 wait at barrier 0, line [0-9]+\n  warp 2: lanes 0-31 wait at barrier 0, line", text
    )
    text = refused("half_a_warp", "deadlock in block 0", schedule=schedule)
    assert re.search(r"warp 0: lanes 0-15 have ended; lanes 16-31 wait for the warp at line [0-9]+$", text)


program.entry("spin", OWN + LOOP.format(""))
program.entry("spin_in_memory", OWN + LOOP.format("ld.global.u32 %r6, [%given];"))


@pytest.mark.parametrize("name", ["spin", "spin_in_memory"])
@pytest.mark.parametrize("preempt", [0, 5])
def test_a_loop_without_an_end_is_told(name, preempt):
    refused(name, "no end after 0.3 s", limit=0.3, schedule=Schedule(preempt=preempt))


program.entry("copy_words", OWN + "ld.global.u32 %r1, [%rd4]; st.global.u32 [%rd6], %r1;")


def test_an_error_leaves_nothing_behind():
    """Neither in the next launch nor in memory: 300 launches that fail midway take no more than one."""

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    refused("some_leave", "deadlock", threads=96, grid=20, schedule=Schedule(resident=8))
    before = resident()
    for i in range(300):
        refused("some_leave" if i % 2 else "global past the end", ".", threads=96 if i % 2 else 32, schedule=Schedule(resident=1 + i % 8), grid=8)
    assert resident() - before < 8 << 20
    words = np.arange(32, dtype=np.uint32)
    assert (program.run("copy_words", words, np.uint32, 32) == words).all()


def test_without_a_list_memory_is_that_of_live_tensors_which_the_parameters_name():
    library = executor.Library(program.text, "errors")
    constants = (ctypes.c_uint8 * len(PARAM_BYTES))(*PARAM_BYTES)
    whole, out = torch.arange(64, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)

    def launch(address: int) -> None:
        library.launch("copy_words", executor.Launch(1, 32), Params(address, out.data_ptr(), constants), Schedule())

    launch(whole.data_ptr() + 128)
    assert (out == whole[32:]).all()
    with pytest.raises(RuntimeError, match="outside of every tensor"):
        launch(whole.data_ptr() + 132)
    words = np.arange(64, dtype=np.int32)
    one, other = torch.from_numpy(words[:32]), torch.from_numpy(words[32:])
    with pytest.raises(RuntimeError, match="thread 31: global access .* outside of every tensor"):
        launch(one.data_ptr() + 4)  # goes on into the other one, which nothing points to
    assert other[0] == 32
    address = whole.data_ptr()
    del whole
    with pytest.raises(RuntimeError, match="outside of every tensor"):
        launch(address)


program.entry("powers", OWN + "ld.global.u32 %r1, [%rd4]; mov.b32 %f1, %r1; ex2.approx.ftz.f32 %f2, %f1;" + store_words(["%f2"]))


def test_approximations_are_off_by_what_the_schedule_allows():
    x = np.linspace(-3, 3, 32).astype(np.float32)
    exact = np.exp2(x.astype(np.float64)).astype(np.float32).view(np.int32)
    for ulps in (0, 1, 4):
        seen = [program.run("powers", x, np.int32, 32, schedule=Schedule(seed, ulps=ulps)) - exact for seed in range(1, 20)]
        assert np.abs(seen).max() == ulps


def test_the_same_seed_gives_the_same_run():
    runs = [program.run("powers", np.linspace(-3, 3, 32).astype(np.float32), np.int32, 32, schedule=Schedule(seed, ulps=4)) for seed in (5, 5, 6)]
    assert (runs[0] == runs[1]).all() and (runs[0] != runs[2]).any()


program.entry(
    "gap",  # the thread's word is the most that others add to a counter between two times that it does
    row_of_thread(4, "%rd6", "%out", "%rd5") + "mov.u32 %r5, 0; mov.u32 %r6, 0; atom.global.add.u32 %r7, [%out+256], 1;"
    "AGAIN: atom.global.add.u32 %r8, [%out+256], 1; sub.s32 %r9, %r8, %r7; max.s32 %r6, %r6, %r9; mov.u32 %r7, %r8;"
    "add.s32 %r5, %r5, 1; setp.ne.s32 %p1, %r5, 100; @%p1 bra AGAIN; st.global.u32 [%rd6], %r6;",
    64,
)  # fmt: skip


def test_who_stands_still_is_overtaken_and_goes_on_in_the_end():
    def gap(seed: int, stall: int) -> int:
        schedule = Schedule(seed, preempt=1, stall=stall)
        return program.run("gap", np.zeros(1, np.uint32), np.uint32, 65, threads=64, schedule=schedule)[:64].max()

    assert max(gap(seed, 0) for seed in range(8)) < 500 < min(gap(seed, 50) for seed in range(8))
    assert gap(1, 1 << 20) > 0  # nobody else could go on at last


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"copies": "soon"}, "copies must be one of"),
        ({"resident": 0}, "resident must be"),
        ({"preempt": -1}, "preempt"),
        ({"ulps": -1}, "ulps"),
        ({"stall": -1}, "stall"),
    ],
    ids=str,
)
def test_a_schedule_that_makes_no_sense_is_refused(given, why):
    with pytest.raises(ValueError, match=why):
        Schedule(**given)


@pytest.mark.parametrize("how", [{"threads": 64}, {"threads": 31}, {"shared": 232449}], ids=str)
def test_a_launch_that_the_kernel_does_not_take_is_refused(how):
    refused("copy_words", "takes up to 32 threads, 48 bytes of parameters and up to 232448 of shared memory, got", **how)
