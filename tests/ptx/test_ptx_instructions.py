"""Every instruction that the translator knows, against plain integers and numpy, on PTX written by hand; Hopper's are in test_ptx_hopper.py."""

from __future__ import annotations

import itertools

import numpy as np
import parse
import pytest
import translate
from executor import COPIES, Schedule
from forms import FORMS, VECTORS
from handwritten import FILL, HOPPER, PARAM_BYTES, Program, load_words, row_of_thread, store_words
from scalar_references import SCALARS

program = Program("instructions")


# ---- instructions of one thread ------------------------------------------------------------------------------------------------------------------

THREADS = 512
FLOATS = [0, 1 << 31, 0x3F800000, 0xBF800000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC12345, 1, 0x80000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF]
FLOATS += [0x3F000000, 0x3FC00000, 0x40200000, 0xC0200000, 0x43E00000, 0x43E80000, 0x43F00000, 0x4F000000, 0xCF000000, 0xCF000001, 0x4EFFFFFF]
FLOATS += [0x3F808000, 0x3F818000, 0x3F801000, 0x3F803000, 0x3F880000, 0x3F980000]  # in the middle of two bf16, fp16, e4m3
CORNERS = {
    "pred": [0, 1],
    "b16": [0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x3C00, 0x3C01, 0x7C00, 0xFC00, 0x7E00, 0x03FF, 0x0001, 0x7BFF],
    "b32": [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 127, 128, 129, 0xFFFFFF80, 0xFFFFFF7F, 0x5410, 0x7632, 0xFEDC, 0x89AB, 16777217, 16777219],
    "b64": [0, 1, 2, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 0xFFFFFFFF, 0x123456789ABCDEF0],
    "count": [0, 1, 7, 16, 31, 32, 33, 63, 64, 65, 255, 256, 257, 1 << 31, 0xFFFFFFFF],
    "f32": FLOATS,
}
CORNERS |= {f"nonzero{bits}": CORNERS[f"b{bits}"][1:] for bits in (32, 64)}
WIDTHS = {"pred": 1, "b16": 16, "b32": 32, "count": 32, "nonzero32": 32, "f32": 32, "b64": 64, "nonzero64": 64}
TAKEN = {  # from a register of 64 bits
    1: "setp.ne.s64 {}, {}, 0;",
    16: "cvt.u32.u64 %r20, {1}; cvt.u16.u32 {0}, %r20;",
    32: "cvt.u32.u64 {}, {};",
    64: "mov.u64 {}, {};",
}
GIVEN = {1: "selp.b64 {}, 1, 0, {};", 16: "cvt.u32.u16 %r20, {1}; cvt.u64.u32 {0}, %r20;", 32: "cvt.u64.u32 {}, {};", 64: "mov.u64 {}, {};"}
PREFIX = {"pred": "%p", "b16": "%rs", "f32": "%f"}


def register(kind: str, i: int) -> str:
    return f"{PREFIX.get(kind, '%r' if WIDTHS[kind] == 32 else '%rd')}{30 + i}"


def scalar_name(opcode: str) -> str:
    return "scalar_" + opcode.replace(".", "_")


def scalar_body(opcode: str) -> str:
    """Four words of 64 bits a thread, as many of them as there are operands to the instruction, its result to one such word."""
    form = SCALARS[opcode]
    lines = [row_of_thread(32, "%rd4", "%given", "%rd3")]
    kinds = form.operands.split()
    for i, kind in enumerate(kinds):
        lines.append(f"ld.global.u64 %rd{10 + i}, [%rd4+{8 * i}];")
        taken = f"%r{22 + i}" if kind == "f32" else register(kind, i)
        lines.append(TAKEN[WIDTHS[kind]].format(taken, f"%rd{10 + i}") + (f" mov.b32 {register(kind, i)}, {taken};" if kind == "f32" else ""))
    result = register(form.result, 9)
    lines.append(f"{opcode} {', '.join([result, *(register(kind, i) for i, kind in enumerate(kinds))])};")
    if form.result == "f32":
        lines.append(f"mov.b32 %r21, {result};")
        result = "%r21"
    lines += [GIVEN[WIDTHS[form.result]].format("%rd20", result), row_of_thread(8, "%rd6", "%out", "%rd5"), "st.global.u64 [%rd6], %rd20;"]
    return "\n".join(lines)


for opcode in SCALARS:
    program.entry(scalar_name(opcode), scalar_body(opcode), THREADS)


def operands_for(kinds: list[str]) -> list[tuple[int, ...]]:
    """One row a thread: corners against corners, as many as there is room for, and random bits."""
    rng = np.random.default_rng(sum(map(ord, " ".join(kinds))))
    corners = list(itertools.product(*(CORNERS[kind] for kind in kinds)))
    rows = [corners[i] for i in rng.permutation(len(corners))[: THREADS * 2 // 3]]
    while len(rows) < THREADS:
        row = []
        for kind in kinds:
            drawn = int(rng.integers(0, 1 << WIDTHS[kind], dtype=np.uint64)) if WIDTHS[kind] < 64 else int(rng.integers(0, 1 << 63)) * 2 + 1
            if kind == "f32":  # of sizes at which conversions round
                drawn = int(np.float32(rng.standard_normal() * 10.0 ** rng.integers(-8, 9)).view(np.uint32))
            row.append(drawn % 80 if kind == "count" else drawn or 1)
        rows.append(tuple(row))
    return rows


@pytest.mark.parametrize("opcode", SCALARS)
def test_an_instruction_of_one_thread_gives_what_the_reference_gives(opcode):
    form = SCALARS[opcode]
    rows = operands_for(form.operands.split())
    given = np.zeros((THREADS, 4), np.uint64)
    given[:, : len(rows[0])] = np.array(rows, np.uint64)
    out = program.run(scalar_name(opcode), given, np.uint64, THREADS, threads=THREADS)
    mask = (1 << WIDTHS[form.result]) - 1
    for row, got in zip(rows, out.tolist(), strict=True):
        expected = int(form.compute(*row)) & mask
        near = form.ulps and abs(got - expected) <= form.ulps
        assert got == expected or near, f"{opcode} of {[hex(x) for x in row]} gave {got:#x} instead of {expected:#x}"


program.entry(
    "parts",
    load_words(2) + "mov.b64 %rd10, {%r10, %r11}; mov.b64 {%r30, %r31}, %rd10; mov.b32 {%rs1, %rs2}, %r10; mov.b32 %r32, {%rs2, %rs1};"
    "mov.b64 %rd11, %rd10; mov.b64 {%r33, %r34}, %rd11; shr.u64 %rd12, %rd10, 32; cvt.u32.u64 %r35, %rd12;"
    + store_words([f"%r{i}" for i in range(30, 36)]),
)  # fmt: skip


def test_the_lower_part_of_a_register_comes_first():
    words = np.random.default_rng(1).integers(0, 1 << 32, (32, 2), dtype=np.uint32)
    out = program.run("parts", words, np.uint32, 32 * 6).reshape(32, 6)
    low, high = words.T
    assert (out == np.stack([low, high, low >> 16 | low << 16, low, high, high], 1)).all()


program.entry(
    "immediates",
    "mov.u32 %r10, -1; mov.u32 %r11, 0x1F; mov.f32 %f1, 0f3FC00000; mov.b32 %r12, %f1; mov.u64 %rd7, -9223371899415822336;"
    "shr.u64 %rd8, %rd7, 32; cvt.u32.u64 %r13, %rd8; mov.pred %p1, -1; selp.u32 %r14, 3, 4, !%p1; mov.u16 %rs1, -2; cvt.u32.u16 %r15, %rs1;"
    "setp.ge.s32 %p2, %r0, 16; mov.u32 %r16, 5; @%p2 mov.u32 %r16, 6; @!%p2 add.s32 %r16, %r16, 10;"
    "mov.u32 %r17, %ntid.x; mov.u32 %r18, %ctaid.x; mov.u32 %r19, %nctaid.x;"
    + store_words([f"%r{i}" for i in range(10, 20)]),
)  # fmt: skip


def test_constants_guards_and_special_registers_are_what_they_say():
    out = program.run("immediates", np.zeros(1, np.uint32), np.uint32, 320).reshape(32, 10)
    assert (out[:, :6] == [0xFFFFFFFF, 31, 0x3FC00000, 0x80000020, 4, 0xFFFE]).all()
    assert (out[:16, 6] == 15).all() and (out[16:, 6] == 6).all() and (out[:, 7:] == [32, 0, 1]).all()


program.entry(
    "unwritten", "mov.b32 %r30, %f100; mov.b64 {%r31, %r32}, %rd50; cvt.u32.u16 %r33, %rs30;" + store_words(["%r30", "%r31", "%r32", "%r33"])
)


def test_registers_that_nobody_wrote_are_poison():
    out = program.run("unwritten", np.zeros(1, np.uint32), np.uint32, 128).reshape(32, 4)
    assert np.isnan(out[:, 0].view(np.float32)).all() and (out[:, 1:] == [0xDEADBEEF, 0xDEADBEEF, 0xBEEF]).all()


# ---- memory --------------------------------------------------------------------------------------------------------------------------------------

KINDS = {"u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "s32": np.int32, "f32": np.uint32, "u64": np.uint64}
SHAPES = [("", kind) for kind in KINDS] + sorted(VECTORS)
PLACES = [("global", "%rd4"), ("shared", "%rd8"), ("", "%rd9"), ("", "%rd4"), ("param", None)]
"""State space, and where the 16 bytes lie: of the input, of shared memory, the same with a generic address, or among the parameters."""
LOADS = [(space, base, vector, kind) for space, base in PLACES for vector, kind in SHAPES]
STORES = [case for case in LOADS if case[0] != "param" and case[3] != "s32"]
OWN = row_of_thread(16, "%rd4", "%given", "%rd3") + row_of_thread(64, "%rd6", "%out", "%rd5") + row_of_thread(16, "%rd8", "%smem", "%rd7")
OWN += "cvta.shared.u64 %rd9, %rd8; mov.u32 %r5, 0;"


def memory_name(operation: str, space: str, base: str | None, vector: str, kind: str) -> str:
    return "_".join((operation, space or "generic", (base or "constants").strip("%"), vector or "one", kind))


def opcode_of(operation: str, space: str, vector: str, kind: str) -> str:
    return ".".join(part for part in (operation, space, vector, kind) if part)


def elements(vector: str) -> int:
    return int(vector[1:] or 1)


def names_of(vector: str, kind: str) -> list[str]:
    prefix = {"u8": "%rs", "u16": "%rs", "f32": "%f", "u64": "%rd", "s32": "%rd"}.get(kind, "%r")
    return [f"{prefix}{30 + i}" for i in range(elements(vector))]


def braced(names: list[str]) -> str:
    return "{" + ", ".join(names) + "}" if len(names) > 1 else names[0]


def load_body(name: str, space: str, base: str | None, vector: str, kind: str) -> str:
    """Every element that a thread loads as 64 bits, one after the other."""
    names = names_of(vector, kind)
    body = OWN + "ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd4]; st.shared.v4.u32 [%rd8], {%r10, %r11, %r12, %r13};"
    body += f"{opcode_of('ld', space, vector, kind)} {braced(names)}, [{base or name + '_param_2+16'}];"
    for i, held in enumerate(names):
        if kind == "f32":
            body += f"mov.b32 %r21, {held};"
        width = {"u8": 16, "u16": 16, "u64": 64, "s32": 64}.get(kind, 32)
        body += GIVEN[width].format("%rd20", "%r21" if kind == "f32" else held) + f"st.global.u64 [%rd6+{8 * i}], %rd20;\n"
    return body


def store_body(space: str, base: str, vector: str, kind: str) -> str:
    """The first bytes of the thread's 16 through the instruction; of shared memory, whose other bytes are 0, all 16 go out."""
    names, out = names_of(vector, kind), space == "global" or base == "%rd4"
    body = OWN + "" if out else OWN + "st.shared.v4.u32 [%rd8], {%r5, %r5, %r5, %r5};"
    body += f"{opcode_of('ld.global', '', vector, kind)} {braced(names)}, [%rd4];"
    body += f"{opcode_of('st', space, vector, kind)} [{'%rd6' if out else base}], {braced(names)};\n"
    return body if out else body + "ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%rd8]; st.global.v4.u32 [%rd6], {%r10, %r11, %r12, %r13};"


for case in LOADS:
    program.entry(memory_name("load", *case), load_body(memory_name("load", *case), *case))
for case in STORES:
    program.entry(memory_name("store", *case), store_body(*case))


@pytest.mark.parametrize("case", LOADS, ids=lambda case: memory_name("load", *case))
def test_a_load_gives_the_bytes_of_its_place(case):
    space, _, vector, kind = case
    given = np.random.default_rng(3).integers(0, 256, (32, 16), dtype=np.uint8)
    out = program.run(memory_name("load", *case), given, np.uint64, 32 * 8).reshape(32, 8)[:, : elements(vector)]
    if space == "param":
        given = np.tile(np.frombuffer(PARAM_BYTES[16:], np.uint8), (32, 1))
    expected = given.view(KINDS[kind])[:, : elements(vector)].astype(np.int64 if kind == "s32" else np.uint64).view(np.uint64)
    assert (out == expected).all()


@pytest.mark.parametrize("case", STORES, ids=lambda case: memory_name("store", *case))
def test_a_store_writes_its_bytes_and_no_others(case):
    space, base, vector, kind = case
    given = np.random.default_rng(4).integers(0, 256, (32, 16), dtype=np.uint8)
    out = program.run(memory_name("store", *case), given, np.uint8, 32 * 64).reshape(32, 64)
    size = elements(vector) * np.dtype(KINDS[kind]).itemsize
    assert (out[:, :size] == given[:, :size]).all()
    assert (out[:, size:16] == (FILL if space == "global" or base == "%rd4" else 0)).all() and (out[:, 16:] == FILL).all()


program.entry(
    "wide_registers",
    load_words(1) + "ld.global.u16 %r11, [%rd4]; ld.global.u16 %rd10, [%rd4]; cvt.u32.u64 %r12, %rd10; cvt.s64.s32 %rd11, %rd10;"
    "st.global.u16 [%rd4], %rd10; st.global.u16 [%rd4+2], %r10; ld.global.u32 %r13, [%rd4];" + store_words(["%r11", "%r12", "%r13"]),
)  # fmt: skip


def test_narrow_loads_and_stores_take_wide_registers():
    words = np.arange(0xFFFF0000, 0xFFFF0020, dtype=np.uint32)
    out = program.run("wide_registers", words, np.uint32, 96).reshape(32, 3)
    low = words & 0xFFFF
    assert (out == np.stack([low, low, low << 16 | low], 1)).all()


program.entry("count_up", "atom.global.add.u32 %r10, [%out], 3; @%p1 bra END; atom.global.add.u32 %r11, [%out+4], %r10; END:")


def test_an_atomic_addition_gives_what_was_there():
    start = FILL * 0x01010101
    out = program.run("count_up", np.zeros(1, np.uint32), np.uint32, 2, grid=4)
    assert out[0] == start + 3 * 128
    assert out[1] == (start + sum(start + 3 * i for i in range(128))) % 2**32


# ---- warps ---------------------------------------------------------------------------------------------------------------------------------------

SHUFFLES = {
    "bfly": lambda lane, by, clamp, segment: lane ^ by,
    "up": lambda lane, by, clamp, segment: lane - by,
    "down": lambda lane, by, clamp, segment: lane + by,
    "idx": lambda lane, by, clamp, segment: (lane & segment) | (by & ~segment),
}
for mode in SHUFFLES:
    plain = f"shfl.sync.{mode}.b32 %r32, %r10, %r11, %r12, -1;"
    program.entry(f"shuffle_{mode}", load_words(3) + f"mov.u32 %r13, -1; shfl.sync.{mode}.b32 %r30|%p1, %r10, %r11, %r12, %r13; {plain}"
                  "selp.u32 %r31, 1, 0, %p1;" + store_words(["%r30", "%r31", "%r32"]))  # fmt: skip


@pytest.mark.parametrize("mode", SHUFFLES)
@pytest.mark.parametrize("width", [32, 16, 8, 4, 2])
@pytest.mark.parametrize("by", [0, 1, 3, 5, 16, 31, None], ids=lambda by: "each its own" if by is None else f"by {by}")
def test_a_shuffle_stays_in_its_segment(mode, width, by):
    rng = np.random.default_rng(width)
    words = np.zeros((32, 3), np.uint32)
    words[:, 0] = rng.integers(0, 1 << 32, 32)
    words[:, 1] = rng.integers(0, 32, 32) if by is None else by
    segment = 32 - width
    words[:, 2] = segment << 8 | (0 if mode == "up" else 31)
    out = program.run(f"shuffle_{mode}", words, np.uint32, 96).reshape(32, 3)
    for lane in range(32):
        first, last = lane & segment, lane & segment | ~segment & 31
        source = SHUFFLES[mode](lane, int(words[lane, 1]), int(words[lane, 2]), segment)
        inside = source >= first if mode == "up" else source <= last
        expected = words[source if inside else lane, 0]
        assert out[lane].tolist() == [expected, inside, expected]


program.entry(
    "votes",
    load_words(1) + "setp.ne.s32 %p1, %r10, 0; vote.sync.ballot.b32 %r30, %p1, -1; vote.sync.any.pred %p2, %p1, -1; vote.sync.all.pred %p3, %p1, -1;"
    "vote.sync.any.pred %p4, !%p1, -1; selp.u32 %r31, 1, 0, %p2; selp.u32 %r32, 1, 0, %p3; selp.u32 %r33, 1, 0, %p4;"
    + store_words(["%r30", "%r31", "%r32", "%r33"]),
)  # fmt: skip


@pytest.mark.parametrize("mask", [0, 1, 0x80000000, 0x12345678, 0xFFFFFFFF], ids=hex)
def test_votes_are_those_of_all_lanes(mask):
    out = program.run("votes", np.array([mask >> i & 1 for i in range(32)], np.uint32), np.uint32, 128).reshape(32, 4)
    assert (out == [mask, mask != 0, mask == 0xFFFFFFFF, mask != 0xFFFFFFFF]).all()


program.entry(
    "matrices",
    load_words(4) + "shl.b32 %r2, %r0, 4; cvt.u32.u64 %r3, %smem; add.s32 %r2, %r2, %r3; cvt.u64.u32 %rd8, %r2;"
    "st.shared.v4.u32 [%rd8], {%r10, %r11, %r12, %r13}; bar.warp.sync -1;"
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r30, %r31, %r32, %r33}, [%r2];"
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r34, %r35, %r36, %r37}, [%r2];"
    + store_words([f"%r{i}" for i in range(30, 38)]),
)  # fmt: skip


def test_matrices_are_loaded_by_rows_and_by_columns():
    rows = np.random.default_rng(5).integers(0, 65536, (4, 8, 8)).astype(np.uint16)
    out = program.run("matrices", rows, np.uint16, 32 * 16).reshape(32, 2, 4, 2)
    for lane in range(32):
        r, c = lane // 4, 2 * (lane % 4)
        assert (out[lane, 0] == rows[:, r, c : c + 2]).all() and (out[lane, 1] == rows[:, c : c + 2, r]).all()


# ---- mma: fragments laid out by the formulas of the instruction set -------------------------------------------------------------------------------

MMA = {
    "s8": "m16n8k32.row.col.s32.s8.s8.s32",
    "u8": "m16n8k32.row.col.s32.u8.s8.s32",
    "f16": "m16n8k16.row.col.f32.f16.f16.f32",
}
for kind, modifiers in MMA.items():
    sums, before = ([f"%{'r' if kind in ('s8', 'u8') else 'f'}{first + i}" for i in range(4)] for first in (30, 16))
    moved = "".join(f"mov.b32 %f{i}, %r{i};" for i in range(16, 20))
    program.entry(f"mma_{kind}", load_words(10) + moved + f"mma.sync.aligned.{modifiers} {braced(sums)}, {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}},"
                  f"{braced(before)};" + store_words(sums))  # fmt: skip


def fragment_places(lane: int, each: int) -> tuple[list, list, list]:
    """Row and column in A, in B and in C of the elements that a lane holds, `each` of them a word."""
    group, quad, half = lane // 4, lane % 4, 4 * each
    steps = range(each)
    a = [(group + 8 * (word & 1), each * quad + i + half * (word >> 1)) for word in range(4) for i in steps]
    b = [(each * quad + i + half * word, group) for word in range(2) for i in steps]
    return a, b, [(group + 8 * (i >> 1), 2 * quad + (i & 1)) for i in range(4)]


def codes_and_values(kind: str, rng, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    if kind == "f16":
        values = rng.standard_normal(shape).astype(np.float16)
        return values.view(np.uint16), values.astype(np.float64)
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    return codes, (codes if kind == "u8" else codes.view(np.int8)).astype(np.int64)


@pytest.mark.parametrize("kind", MMA)
@pytest.mark.parametrize("seed", range(3))
def test_a_product_of_a_warp_is_the_product_of_the_matrices(kind, seed):
    rng = np.random.default_rng(seed)
    integers, each = kind in ("s8", "u8"), 2 if kind == "f16" else 4
    (a, x), (b, y) = codes_and_values(kind, rng, (16, 8 * each)), codes_and_values("s8" if kind == "u8" else kind, rng, (8 * each, 8))
    c = rng.integers(-(2**31), 2**31, (16, 8)).astype(np.int32) if integers else rng.standard_normal((16, 8)).astype(np.float32)
    words = np.zeros((32, 10), np.uint32)
    for lane in range(32):
        for first, count, matrix, places in zip((0, 4, 6), (4, 2, 4), (a, b, c), fragment_places(lane, each), strict=True):
            words[lane, first : first + count] = np.array([matrix[place] for place in places], matrix.dtype).view(np.uint32)
    out = program.run(f"mma_{kind}", words, np.int32 if integers else np.float32, 128).reshape(32, 4)
    expected = (x @ y + c).astype(np.int32) if integers else (x @ y + c).astype(np.float32)
    for lane in range(32):
        for got, place in zip(out[lane], fragment_places(lane, each)[2], strict=True):
            assert got == expected[place] or abs(got - expected[place]) <= 1e-6 * abs(expected[place])


# ---- blocks --------------------------------------------------------------------------------------------------------------------------------------

program.entry(
    "exchange",  # every thread reads what the thread at the other end of the block wrote
    row_of_thread(4, "%rd8", "%smem", "%rd7") + row_of_thread(4, "%rd6", "%out", "%rd5")
    + "st.shared.u32 [%rd8], %r0; bar.sync 0; mov.u32 %r2, %ntid.x; sub.s32 %r3, %r2, %r0; add.s32 %r3, %r3, -1; mul.wide.u32 %rd9, %r3, 4;"
    "add.s64 %rd9, %smem, %rd9; ld.shared.u32 %r4, [%rd9]; st.global.u32 [%rd6], %r4;",
    256,
)  # fmt: skip
program.entry(
    "named",  # the upper half of the block hands a word to the lower half, by a barrier at which it does not wait itself; then all ask for any
    row_of_thread(4, "%rd8", "%smem", "%rd7") + row_of_thread(8, "%rd6", "%out", "%rd5")
    + "setp.ge.s32 %p1, %r0, 128; mov.u32 %r5, 3; mov.u32 %r6, 256; @%p1 bra UPPER; barrier.cta.sync %r5, %r6; ld.shared.u32 %r4, [%rd8+512];"
    "bra.uni JOIN; UPPER: st.shared.u32 [%rd8], %r0; barrier.cta.arrive %r5, %r6; mov.u32 %r4, 0; JOIN: mov.u32 %r7, 5; bar.sync 1, 256;"
    "setp.eq.s32 %p2, %r0, 77; ld.global.u32 %r9, [%given]; setp.ne.s32 %p3, %r9, 0; and.pred %p2, %p2, %p3;"
    "barrier.cta.red.or.pred %p4, %r7, %r6, %p2; selp.u32 %r8, 1, 0, %p4; st.global.v2.u32 [%rd6], {%r4, %r8};",
    256,
)  # fmt: skip
SCHEDULES = [Schedule(seed, copies, preempt, 1 + seed % 3) for seed, copies in enumerate(COPIES) for preempt in (0, 3)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.copies}, {s.preempt}")
def test_barriers_of_the_block_hold_everyone_back(schedule):
    out = program.run("exchange", np.zeros(1, np.uint32), np.uint32, 256, threads=256, schedule=schedule)
    assert (out == np.arange(256)[::-1]).all()
    for asked in (0, 1):
        out = program.run("named", np.array([asked], np.uint32), np.uint32, 512, threads=256, schedule=schedule).reshape(256, 2)
        assert (out[:128, 0] == np.arange(128, 256)).all() and (out[128:, 0] == 0).all() and (out[:, 1] == asked).all()


program.entry(
    "copies",  # two groups of 16 bytes each; the first is waited for, read, then the second
    row_of_thread(32, "%rd4", "%given", "%rd3") + row_of_thread(32, "%rd8", "%smem", "%rd7") + row_of_thread(32, "%rd6", "%out", "%rd5")
    + "cvt.u32.u64 %r2, %rd8; add.s64 %rd9, %rd4, 16; cp.async.cg.shared.global [%r2], [%rd4], 16; cp.async.commit_group;"
    "cp.async.cg.shared.global [%r2+16], [%rd9], 16; cp.async.commit_group; cp.async.wait_group 1; ld.shared.v2.u32 {%r10, %r11}, [%rd8];"
    "ld.shared.u32 %r12, [%rd8+16]; cp.async.wait_group 0; ld.shared.v4.u32 {%r13, %r14, %r15, %r16}, [%rd8+16];"
    "st.global.v2.u32 [%rd6], {%r10, %r11}; st.global.u32 [%rd6+8], %r12; st.global.v4.u32 [%rd6+16], {%r13, %r14, %r15, %r16};",
)  # fmt: skip


@pytest.mark.parametrize("copies", COPIES)
def test_a_copy_is_there_once_it_is_waited_for(copies):
    given = np.random.default_rng(8).integers(0, 1 << 32, (32, 8), dtype=np.uint32)
    out = program.run("copies", given, np.uint32, 256, schedule=Schedule(copies=copies)).reshape(32, 8)
    assert (out[:, :2] == given[:, :2]).all() and (out[:, 4:] == given[:, 4:]).all()
    early = out[:, 2] == given[:, 4]  # read before its wait
    late = out[:, 2] == 0xFFFFFFFF
    assert {"at once": early.all(), "late": late.all(), "random": early.any() and late.any() and (early | late).all()}[copies]


# ---- the table -----------------------------------------------------------------------------------------------------------------------------------


def test_every_form_that_is_translated_is_tried_here():
    tried = translate.opcodes(program.text) | {"trap"}  # in test_ptx_errors.py
    assert {opcode for opcode in FORMS if not opcode.startswith(HOPPER)} == {opcode for opcode in tried if not opcode.startswith(HOPPER)}


UNKNOWN = [
    "add.sat.s32 %r1, %r2, %r3", "add.ftz.f32 %f1, %f2, %f3", "ld.volatile.shared.u32 %r1, [%rd1]", "mov.u32 %r1, %clock", "add.s32 %r1, %rd2, %r3",
    "mov.u32 %r1, 0x1FFFFFFFF", "st.global.u32 [%rd1], %rs1", "ld.global.f32 %rd1, [%rd2]", "bra NOWHERE", "add.s32 %r1, %r2", "add.s32 5, %r2, %r3",
    "mov.u32 %r1, other_memory", "shfl.sync.bfly.b32 %r1, %r2, 1, 31", "cp.async.wait_group %r1", "mbarrier.arrive.shared::cta.b64 %rd1, [%r1]",
    f"wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 {braced([f'%f{i}' for i in range(16)])}, {{%r1, %r2, %r3, %r4}}, %rd1, %p1, 1, -1",
    "mma.sync.aligned.m8n8k4 %r1, %r2",
]  # fmt: skip


@pytest.mark.parametrize("statement", UNKNOWN)
def test_what_is_not_known_is_not_translated(statement):
    program = Program("unknown")
    program.entry("unknown", f"{statement};")
    with pytest.raises((translate.UnknownInstruction, parse.ParseError), match="unknown, line [0-9]+, `"):
        translate.translate(program.text)
