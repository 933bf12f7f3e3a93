"""Hopper's instructions on PTX written by hand: wgmma with its descriptors, the proxies, bulk copies, mbarriers, registers that are handed over."""

from __future__ import annotations

import re

import numpy as np
import pytest
import translate
from executor import COPIES, Schedule
from forms import FORMS, WGMMA_E4M3, WGMMA_S8
from handwritten import HOPPER, Program, row_of_thread, store_words
from scalar_references import E4M3

program = Program("hopper")
SCHEDULES = [Schedule(seed, copies, preempt) for seed, copies in enumerate(COPIES) for preempt in (0, 4)]


def schedule_id(schedule: Schedule) -> str:
    return f"{schedule.copies}, {schedule.preempt}"


# ---- wgmma ---------------------------------------------------------------------------------------------------------------------------------------

IMAGE = 49152
"""Bytes of the input that become the shared memory; the descriptors, whether to accumulate, and A of the registers follow."""
AT_A, AT_B = 1024, 1024 + 16384
BEFORE = 7
SHARED_BASE = 1024

FILL_SHARED = (
    row_of_thread(16, "%rd4", "%given", "%rd3") + "add.s64 %rd8, %smem, %rd3; mov.u32 %r5, 0;\n"
    "FILLING: ld.global.v4.u32 {%r6, %r7, %r8, %r9}, [%rd4]; st.shared.v4.u32 [%rd8], {%r6, %r7, %r8, %r9}; add.s64 %rd4, %rd4, 2048;"
    "add.s64 %rd8, %rd8, 2048; add.s32 %r5, %r5, 1; setp.lt.s32 %p1, %r5, 24; @%p1 bra FILLING;\n"
)  # fmt: skip
FENCE = "fence.proxy.async.shared::cta;"
READY = (
    f"bar.sync 0; ld.global.u64 %rd10, [%given+{IMAGE}]; ld.global.u64 %rd11, [%given+{IMAGE + 8}]; ld.global.u32 %r4, [%given+{IMAGE + 16}];"
    f"setp.ne.b32 %p2, %r4, 0; add.s64 %rd12, %given, {IMAGE + 32}; mul.wide.u32 %rd13, %r0, 16; add.s64 %rd12, %rd12, %rd13;"
    "ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd12]; ld.global.u32 %r14, [%given]; wgmma.fence.sync.aligned;\n"
)  # fmt: skip
END = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;\n"


def sums_of(kind: str, columns: int) -> list[str]:
    return [f"%{'r' if kind == 's8' else 'f'}{40 + i}" for i in range(columns // 2)]


def clear(kind: str, columns: int) -> str:
    value = f"mov.u32 {{}}, {BEFORE};" if kind == "s8" else "mov.f32 {}, 0f40E00000;"
    return "".join(value.format(name) for name in sums_of(kind, columns))


def product(kind: str, columns: int, a: str = "%rd10", b: str = "%rd11") -> str:
    sums = "{" + ", ".join(sums_of(kind, columns)) + "}"
    if kind == "s8":
        return f"wgmma.mma_async.sync.aligned.m64n{columns}k32.s32.s8.s8 {sums}, {a}, {b}, %p2;\n"
    return f"wgmma.mma_async.sync.aligned.m64n{columns}k32.f32.e4m3.e4m3 {sums}, {{%r10, %r11, %r12, %r13}}, {b}, %p2, 1, 1;\n"


WGMMA = [("s8", columns) for columns in WGMMA_S8] + [("e4m3", columns) for columns in WGMMA_E4M3]
for kind, columns in WGMMA:
    program.entry(f"wgmma_{kind}_{columns}", FILL_SHARED + FENCE + READY + clear(kind, columns) + product(kind, columns) + END
                  + store_words(sums_of(kind, columns)), 128)  # fmt: skip


def descriptor(at: int, row_bytes: int, rows_stride: int, **changed: int) -> int:
    """Of a K-major matrix at an offset of the shared memory; fields by name."""
    swizzle = {128: 1, 64: 2, 32: 3}[row_bytes]
    fields = {"start": at + SHARED_BASE >> 4, "leading": 1, "stride": rows_stride >> 4, "base": 0, "swizzle": swizzle, **changed}
    places = {"start": 0, "leading": 16, "stride": 32, "base": 49, "swizzle": 62}
    return sum(fields[name] << place for name, place in places.items()) | fields.get("reserved", 0)


def place(image: np.ndarray, matrix: np.ndarray, start: int, row_bytes: int, stride: int, k: int) -> None:
    """Rows of 32 bytes from byte `k` of rows of 128, 64 or 32, whose chunks of 16 bytes change places: with every row, every second, every fourth."""
    each = 128 // row_bytes
    for row in range(matrix.shape[0]):
        for i in range(32):
            chunk = (k + i) // 16 ^ row // each % (row_bytes // 16)
            image[start + row // 8 * stride + row % 8 * row_bytes + 16 * chunk + i % 16] = matrix[row, i]


def wgmma_input(a: np.ndarray, b: np.ndarray, row_bytes: int = 128, k: int = 0, accumulate: int = 1, **changed: int) -> np.ndarray:
    """Everything a kernel of this file reads; `changed` are fields of B's descriptor."""
    image, stride_a, stride_b = np.zeros(IMAGE, np.uint8), 16 * row_bytes, 8 * row_bytes
    place(image, a, AT_A, row_bytes, stride_a, k)
    place(image, b, AT_B, row_bytes, stride_b, k)
    descriptors = [descriptor(AT_A + k, row_bytes, stride_a), descriptor(AT_B + k, row_bytes, stride_b, **changed)]
    registers = np.zeros((128, 4, 4), np.uint8)
    for thread in range(128):
        group, quad = 16 * (thread // 32) + thread % 32 // 4, thread % 4
        for word in range(4):
            first = 4 * quad + 16 * (word >> 1)
            registers[thread, word] = a[group + 8 * (word & 1), first : first + 4]
    return np.concatenate([image, np.array([*descriptors, accumulate, 0], np.uint64).view(np.uint8), registers.reshape(-1)])


def matrix_of(out: np.ndarray, columns: int) -> np.ndarray:
    """64 x columns, from the accumulators of 128 threads."""
    held = out.reshape(128, columns // 8, 2, 2)
    found = np.zeros((64, columns), out.dtype)
    for thread in range(128):
        row = 16 * (thread // 32) + thread % 32 // 4
        for j in range(columns // 8):
            for half in range(2):
                found[row + 8 * half, 8 * j + 2 * (thread % 4) :][:2] = held[thread, j, half]
    return found


def operands(kind: str, columns: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 256, (64, 32)).astype(np.uint8), rng.integers(0, 256, (columns, 32)).astype(np.uint8)
    if kind == "e4m3":  # no NaN
        a[a % 128 == 127], b[b % 128 == 127] = 3, 5
    return a, b


@pytest.mark.parametrize(("row_bytes", "k"), [(128, 0), (128, 32), (128, 96), (64, 0), (64, 32), (32, 0)])
@pytest.mark.parametrize(("kind", "columns"), WGMMA)
def test_a_product_of_a_warpgroup_is_the_product_of_the_matrices(kind, columns, row_bytes, k):
    a, b = operands(kind, columns, k + columns)
    for accumulate in (0, 1):
        given = wgmma_input(a, b, row_bytes, k, accumulate)
        out = program.run(f"wgmma_{kind}_{columns}", given, np.int32 if kind == "s8" else np.float32, 64 * columns, threads=128)
        if kind == "s8":
            exact = a.view(np.int8).astype(np.int64) @ b.view(np.int8).astype(np.int64).T
        else:
            exact = np.array(E4M3)[a] @ np.array(E4M3)[b].T
        expected = (exact + BEFORE * accumulate).astype(out.dtype)
        assert np.allclose(matrix_of(out, columns), expected, rtol=1e-6, atol=0 if kind == "s8" else 1e-5)


def refused(name: str, given: np.ndarray, why: str, **how) -> None:
    with pytest.raises(RuntimeError, match=why) as told:
        program.run(name, given, np.uint8, 65536, **{"threads": 128, **how})
    assert f"{name}, " in str(told.value)


ANY = wgmma_input(*operands("e4m3", 72, 0))
DESCRIPTORS = {
    "reserved bit 14": ({"reserved": 1 << 14}, "reserved bits"),
    "reserved bit 31": ({"reserved": 1 << 31}, "reserved bits"),
    "reserved bit 46": ({"reserved": 1 << 46}, "reserved bits"),
    "reserved bit 61": ({"reserved": 1 << 61}, "reserved bits"),
    "no swizzle": ({"swizzle": 0}, "no swizzle"),
    "base offset": ({"base": 1}, "base offset"),
    "leading dimension": ({"leading": 64}, "leading dimension"),
    "start in the second row": ({"start": AT_B + SHARED_BASE + 128 >> 4}, "first row of the pattern"),
    "start at the end of a row": ({"start": AT_B + SHARED_BASE + 112 >> 4}, "beyond its rows"),
    "stride inside the pattern": ({"stride": 512 >> 4}, "stride breaks"),
    "outside": ({"start": 65536 >> 4}, "outside of shared memory"),
}


@pytest.mark.parametrize("fault", DESCRIPTORS)
def test_a_wrong_descriptor_is_told(fault):
    changed, why = DESCRIPTORS[fault]
    refused("wgmma_e4m3_72", wgmma_input(*operands("e4m3", 72, 0), **changed), why)


ONLY_FIRST = "setp.eq.s32 %p5, %r0, 0;"
PRODUCT = clear("e4m3", 72) + product("e4m3", 72)
OVERWRITE = ONLY_FIRST + f"@%p5 st.shared.u32 [%smem+{AT_B}], %r14;"
FAULTS = {
    "no fence": (FILL_SHARED + READY + PRODUCT + END, "without a proxy fence"),
    "fence before the writes": (FENCE + FILL_SHARED + READY + PRODUCT + END, "without a proxy fence"),
    "fence of one thread": (FILL_SHARED + ONLY_FIRST + f"@%p5 {FENCE}" + READY + PRODUCT + END, "wgmma reads offset .* wrote without a proxy fence"),
    "no wgmma.fence": (FILL_SHARED + FENCE + READY.replace("wgmma.fence.sync.aligned;", "") + PRODUCT + END, "without wgmma.fence"),
    "no wgmma.fence again": (FILL_SHARED + FENCE + READY + PRODUCT + END + product("e4m3", 72) + END, "without wgmma.fence"),
    "no commit": (FILL_SHARED + FENCE + READY + PRODUCT, "without wgmma.commit_group"),
    "no wait": (FILL_SHARED + FENCE + READY + PRODUCT + "wgmma.commit_group.sync.aligned;", "not waited for"),
    "operand overwritten": (FILL_SHARED + FENCE + READY + PRODUCT + OVERWRITE + END, "changed in shared memory"),
    "descriptors of lanes": (FILL_SHARED + FENCE + READY + ONLY_FIRST + "@%p5 add.s64 %rd11, %rd11, 64;" + PRODUCT + END, "differ among the lanes"),
    "one warp does more": (
        FILL_SHARED + FENCE + READY + clear("e4m3", 72) + "setp.lt.s32 %p5, %r0, 32; @!%p5 bra SKIP;" + product("e4m3", 72)
        + "SKIP: " + product("e4m3", 72) + END,
        "different wgmma",
    ),
    "a warp apart": (
        FILL_SHARED + FENCE + READY + ONLY_FIRST + "@%p5 bra ELSE;" + PRODUCT + "bra JOIN; ELSE:" + PRODUCT + "JOIN:" + END,
        "lane . of warp 0 meets lane 0",
    ),
}  # fmt: skip
for fault, (body, _) in FAULTS.items():
    program.entry("fault_" + re.sub(r"\W", "_", fault), body, 128)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_rule_of_wgmma_is_told(fault):
    given = ANY.copy()
    given[:4] = 77
    refused("fault_" + re.sub(r"\W", "_", fault), given, FAULTS[fault][1])


TWO_GROUPS = FILL_SHARED + FENCE + READY + "add.s64 %rd14, %rd11, 1024;" + PRODUCT + "wgmma.commit_group.sync.aligned;"  # 16 KB further on
TWO_GROUPS += product("e4m3", 72, b="%rd14") + "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1; bar.sync 0;" + ONLY_FIRST
for name, offset in (("first", AT_B), ("second", AT_B + 16384)):
    wait = "wgmma.wait_group.sync.aligned 0;"
    program.entry(f"wait_for_one_{name}", TWO_GROUPS + f"@%p5 st.shared.u32 [%smem+{offset}], %r14; bar.sync 0; {wait}" + store_words(["%r0"]), 128)


def test_a_wait_for_all_groups_but_one_lets_the_first_ones_operands_go():
    given = ANY.copy()
    given[:4] = 77
    out = program.run("wait_for_one_first", given, np.uint32, 128, threads=128)
    assert (out == np.arange(128)).all()
    refused("wait_for_one_second", given, "changed in shared memory")


# ---- bulk copies and mbarriers -------------------------------------------------------------------------------------------------------------------

BAR = 4096
"""Where the mbarrier lies; the copies go to 0 and 512."""
PREPARE = f"cvt.u32.u64 %r2, %smem; add.s32 %r3, %r2, {BAR}; mov.u32 %r20, 1; mov.u32 %r21, 1024; mov.u32 %r22, 512; setp.eq.s32 %p1, %r0, 0;"
PREPARE += row_of_thread(8, "%rd6", "%out", "%rd5") + row_of_thread(8, "%rd8", "%smem", "%rd7") + "add.s64 %rd9, %given, 512; add.s32 %r23, %r2, 512;"
INIT = "@%p1 mbarrier.init.shared::cta.b64 [%r3], %r20;"
INIT_FENCE = "@%p1 fence.mbarrier_init.release.cluster; bar.sync 0;"
EXPECT = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], %r21;"
BULK = "@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{}], [{}], %r22, [%r3];"
COPY = BULK.format("%r2", "%given") + BULK.format("%r23", "%rd9")
AGAIN = "add.s64 %rd10, %given, 1024; add.s64 %rd11, %given, 1536;" + BULK.format("%r2", "%rd10") + BULK.format("%r23", "%rd11")
READ = "ld.shared.v2.u32 {%r10, %r11}, [%rd8]; st.global.v2.u32 [%rd6], {%r10, %r11};"


def wait_for(parity: int, label: str) -> str:
    return f"mov.u32 %r24, {parity}; {label}: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r3], %r24; @!%p3 bra {label};"


ONCE = PREPARE + INIT + INIT_FENCE + EXPECT + COPY + wait_for(0, "FIRST") + READ
TWICE = ONCE + FENCE + "bar.sync 0;" + EXPECT + AGAIN + wait_for(1, "SECOND") + "add.s64 %rd6, %rd6, 1024;" + READ
ARRIVALS = (
    PREPARE + "mov.u32 %r20, 128;" + INIT + INIT_FENCE + row_of_thread(4, "%rd12", "%smem", "%rd7") + "st.shared.u32 [%rd12], %r0;"
    "mbarrier.arrive.shared::cta.b64 _, [%r3];" + wait_for(0, "FIRST")
    + "sub.s32 %r25, 127, %r0; mul.wide.s32 %rd13, %r25, 4; add.s64 %rd13, %smem, %rd13;"
    "ld.shared.u32 %r10, [%rd13];" + store_words(["%r10"])
)  # fmt: skip
program.entry("bulk_twice", TWICE, 128)
program.entry("arrivals", ARRIVALS, 128)
DATA = np.arange(1024, dtype=np.uint16).view(np.uint8)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=schedule_id)
def test_a_bulk_copy_is_there_when_its_mbarrier_says_so(schedule):
    out = program.run("bulk_twice", DATA, np.uint16, 1024, threads=128, shared=8192, schedule=schedule)
    assert (out == np.arange(1024)).all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=schedule_id)
def test_a_phase_ends_with_the_last_arrival(schedule):
    out = program.run("arrivals", DATA, np.uint32, 128, threads=128, shared=8192, schedule=schedule)
    assert (out == np.arange(128)[::-1]).all()


COPY_FAULTS = {
    "read before": (TWICE.replace(FENCE, ""), "which thread [0-9]+ read without a proxy fence"),
    "written before": (
        PREPARE + INIT + INIT_FENCE + "st.shared.u32 [%rd8], %r0; bar.sync 0;" + EXPECT + COPY + wait_for(0, "W"),
        "wrote without a proxy",
    ),
    "no wait": (PREPARE + INIT + INIT_FENCE + EXPECT + COPY + READ + wait_for(0, "W"), "while the bulk copy of line [0-9]+ writes there"),
    "wrong parity": (ONCE.replace("mov.u32 %r24, 0", "mov.u32 %r24, 1"), "while the bulk copy of line"),
    "parity 2": (ONCE.replace("mov.u32 %r24, 0", "mov.u32 %r24, 2"), "thread [0-9]+: parity 2"),
    "too few bytes": (ONCE.replace("%r21, 1024", "%r21, 512"), "expects -512 bytes more|while the bulk copy of line"),
    "too many bytes": (ONCE.replace("%r21, 1024", "%r21, 2048"), "deadlock in block 0\n +warp 0: lanes 0-31 wait at mbarrier 4096 for parity 0"),
    "not 16 bytes": (ONCE.replace("%r22, 512", "%r22, 520"), "520 bytes .* misaligned"),
    "odd place": (ONCE.replace("[%r23]", "[%r23+8]"), "misaligned"),
    "past shared": (ONCE.replace("[%r23]", "[%r23+7680]"), "outside of shared memory"),
    "past the tensor": (ONCE.replace("%rd9, %given, 512", "%rd9, %given, 1552"), "outside of every tensor"),
    "same place": (ONCE.replace("[%r23]", "[%r2+496]"), "still writing there"),
    "over the mbarrier": (ONCE.replace("[%r23]", f"[%r23+{BAR - 512}]"), "writes over the mbarrier"),
    "store over the mbarrier": (ONCE + f"st.shared.u32 [%smem+{BAR + 4}], %r0;", "access to the bytes of the mbarrier"),
    "no init": (PREPARE + "bar.sync 0;" + EXPECT + COPY, "there is no mbarrier at offset 4096"),
    "init without a fence": (ONCE.replace("@%p1 fence.mbarrier_init.release.cluster;", ""), "initialised without a fence"),
    "init twice": (PREPARE + INIT + INIT, "initialised twice"),
    "init of nothing": (PREPARE + "mov.u32 %r20, 0;" + INIT, "cannot count 0 arrivals"),
    "init misaligned": (PREPARE + "add.s32 %r3, %r3, 4;" + INIT, "misaligned"),
    "an arrival too many": (ONCE.replace(EXPECT, EXPECT.removeprefix("@%p1 ")), "more arrivals"),
    "left under way": (PREPARE + INIT + INIT_FENCE + EXPECT + COPY, "under way at the end"),
}
for fault, (body, _) in COPY_FAULTS.items():
    program.entry("copy_" + re.sub(r"\W", "_", fault), body, 128)


@pytest.mark.parametrize("fault", COPY_FAULTS)
def test_a_broken_rule_of_bulk_copies_is_told(fault):
    refused("copy_" + re.sub(r"\W", "_", fault), DATA, COPY_FAULTS[fault][1], shared=8192)


# ---- registers -----------------------------------------------------------------------------------------------------------------------------------


def registers_body(down: int, up: int) -> str:
    """The first warpgroup gives registers back, the second one takes some."""
    change = f"@%p1 bra TAKE; setmaxnreg.dec.sync.aligned.u32 {down}; bra DONE; TAKE: setmaxnreg.inc.sync.aligned.u32 {up}; DONE:"
    return "setp.ge.s32 %p1, %r0, 128;" + change + store_words(["%r0"])


REGISTERS = {
    (24, 240): "deadlock in block 0\n(.|\n)*warp [4-7]: lanes 0-31 wait for registers at line [0-9]+",
    (136, 232): "setmaxnreg.dec from 128 to 136",
    (24, 120): "setmaxnreg.inc from 128 to 120",
    (20, 232): "setmaxnreg 20 is not",
    (28, 232): "setmaxnreg 28 is not",
}
for down, up in [(24, 232), *REGISTERS]:
    program.entry(f"registers_{down}_{up}", registers_body(down, up), 256)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=schedule_id)
def test_registers_wait_until_they_are_given_back(schedule):
    out = program.run("registers_24_232", DATA, np.uint32, 256, threads=256, registers=128, schedule=schedule)
    assert (out == np.arange(256)).all()


@pytest.mark.parametrize("counts", REGISTERS, ids=str)
def test_registers_that_are_not_there_are_told(counts):
    refused("registers_{}_{}".format(*counts), DATA, REGISTERS[counts], threads=256, registers=128)


def test_every_form_that_is_translated_is_tried_here():
    tried = {opcode for opcode in translate.opcodes(program.text) if opcode.startswith(HOPPER)}
    assert {opcode for opcode in FORMS if opcode.startswith(HOPPER)} == tried
