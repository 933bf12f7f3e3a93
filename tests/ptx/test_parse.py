"""PTX text to instructions."""

from __future__ import annotations

import parse
import pytest

HEAD = '.version 8.7\n.target sm_90a\n.address_size 64\n.file 1 "/src/one.cuh"\n.file 2 "two.cuh"\n.extern .shared .align 1024 .b8 memory[];\n'
PARAMS = ".param .u32 sample_param_0,\n.param .align 8 .b8 sample_param_1[20],\n.param .u16 sample_param_2"
ENTRY = f".visible .entry sample(\n{PARAMS}\n)\n.maxntid 96, 1, 1\n"


def entry_of(body: str) -> parse.Entry:
    return parse.module(f"{HEAD}{ENTRY}{{\n.reg .b32 %r<9>; .reg .f32 %f<99>; .reg .b64 %rd<9>; .reg .pred %p<9>;\n{body}\nret;\n}}\n").entries[
        "sample"
    ]


def test_an_entry_has_its_threads_and_parameters():
    entry = entry_of("")
    assert (entry.name, entry.threads, entry.params_size) == ("sample", 96, 30)
    assert entry.params == (("sample_param_0", 0), ("sample_param_1", 8), ("sample_param_2", 28))
    assert parse.module(HEAD).shared == "memory" and parse.module("").shared == ""


def test_every_instruction_has_its_line_and_its_parts():
    load = "@!%p1 ld.shared.v2.f32 {%f1, %f2},\n  [%rd1+-8]; // of two\n"
    entry = entry_of(load + "/* three\nlines */ shfl.sync.idx.b32 %r1|%p2, %r2, 0,\n31, -1; add.s32 %r1,%r2,%r3;")
    load, shuffle, addition, end = entry.instructions
    assert (load.line, load.guard, load.opcode, load.operands) == (15, "!%p1", "ld.shared.v2.f32", ("{%f1, %f2}", "[%rd1+-8]"))
    assert load.text == "@!%p1 ld.shared.v2.f32 {%f1, %f2}, [%rd1+-8]" and load.parts == ("ld", "shared", "v2", "f32")
    assert parse.parts_of(load.operands[0]) == ("%f1", "%f2") and parse.parts_of("%r1") == ("%r1",)
    assert (shuffle.line, shuffle.operands) == (18, ("%r1|%p2", "%r2", "0", "31", "-1"))
    assert (addition.line, addition.operands) == (19, ("%r1", "%r2", "%r3"))
    assert (end.line, end.opcode, end.operands, end.guard) == (20, "ret", (), "")


ACCESSES = {
    "add.s32 %r1, %r2, %r3": ("%r1", "%r2 %r3"),
    "@%p1 mov.u32 %r1, %tid.x": ("%r1", "%p1"),
    "mov.b64 {%r1, %r2}, %rd3": ("%r1 %r2", "%rd3"),
    "shfl.sync.bfly.b32 %r1|%p2, %r2, %r3, 31, -1": ("%r1 %p2", "%r2 %r3"),
    "ld.global.u32 %r1, [%rd2+4]": ("%r1", "%rd2"),
    "st.shared.v2.u32 [%rd2], {%r1, %r3}": ("", "%rd2 %r1 %r3"),
    "@!%p3 bra END": ("", "%p3"),
    "bar.sync 0": ("", ""),
    "barrier.cta.arrive %r1, %r2": ("", "%r1 %r2"),
    "barrier.cta.red.or.pred %p1, %r1, %r2, %p2": ("%p1", "%r1 %r2 %p2"),
    "mbarrier.arrive.shared::cta.b64 _, [%r1]": ("", "%r1"),
    "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], %r2": ("%p1", "%r1 %r2"),
    "cp.async.cg.shared.global [%r1], [%rd2], 16": ("", "%r1 %rd2"),
    "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%f1, %f2}, {%r1, %r2, %r3, %r4}, %rd1, %p1, 1, 1": (
        "%f1 %f2",
        "%f1 %f2 %r1 %r2 %r3 %r4 %rd1 %p1",
    ),
    "wgmma.wait_group.sync.aligned 1": ("", ""),
}


@pytest.mark.parametrize("text", ACCESSES)
def test_what_an_instruction_reads_and_writes_is_known(text):
    instruction = entry_of(f"{text};\nEND:").instructions[0]
    assert (instruction.writes, instruction.reads) == tuple(frozenset(names.split()) for names in ACCESSES[text])


def test_of_an_unknown_instruction_it_is_not():
    instruction = entry_of("tcgen05.ld %r1, [%r2];").instructions[0]
    with pytest.raises(parse.ParseError, match="line 15: whether tcgen05.ld has a result"):
        _ = instruction.writes


def test_names_in_inner_braces_are_their_own():
    """As in inline assembly, which uses the same names again."""
    wait = "{.reg .pred over;\nagain: mbarrier.try_wait.parity.shared::cta.b64 over, [%r1], %r2;\n@!over bra again;}\n"
    entry = entry_of(f"{wait}again: {wait}@%p1 bra again;")
    first, repeat, second, second_repeat, outer = entry.instructions[:5]
    assert first.operands[0] != second.operands[0] and repeat.guard == "!" + first.operands[0] and second_repeat.guard == "!" + second.operands[0]
    assert [entry.labels[i.operands[0]] for i in (repeat, second_repeat, outer)] == [0, 2, 2]
    assert entry.registers[first.operands[0]] == "pred" and first.writes == {first.operands[0]}
    nested = entry_of("{.reg .b32 x; mov.u32 x, %r1; {mov.u32 %r2, x;} }").instructions
    assert nested[0].operands[0] == nested[1].operands[1] != "x"


def test_every_way_on_is_followed():
    entry = entry_of("START: @%p1 bra OVER;\nadd.s32 %r1, %r1, 1;\nbra.uni START;\nOVER: @%p2 ret;\ntrap;\nmov.u32 %r1, 0;")
    assert [entry.successors(i) for i in range(len(entry.instructions))] == [(3, 1), (2,), (0,), (4,), (), (6,), ()]


def test_places_in_the_source_are_kept():
    located = ".loc\t1 240 5\nmov.u32 %r1, 1;\n.loc 2 33 1, function_name $L__info_string0, inlined_at 1 349 9\nmov.u32 %r2, 2;"
    one, two, end = entry_of(located).instructions
    assert (one.place, one.inlined_at) == (parse.Place("/src/one.cuh", 240), None)
    assert (two.place, two.inlined_at) == (end.place, end.inlined_at) == (parse.Place("two.cuh", 33), parse.Place("/src/one.cuh", 349))
    assert entry_of("mov.u32 %r1, 1;").instructions[0].place is None


WRONG = {
    ".func f() { ret; }": "functions that are called",
    ".visible .entry sample()\n{ ret; }": "how many threads",
    ENTRY + "{ ret;": "braces are left open",
    ENTRY + "{ .reg .b32 %r<2>; .reg .b32 %r1; ret; }": "%r1 is declared twice",
    ENTRY + "{ A: ret; A: ret; }": "A is declared twice",
    ENTRY + "{ .local .b8 depot[8]; ret; }": "line 7: .local .* is not read inside an entry",
}


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_what_is_not_read_is_refused(text):
    with pytest.raises(parse.ParseError, match=WRONG[text]):
        parse.module(text)


def test_branches_through_a_table_are_refused():
    entry = entry_of("brx.idx %r1, table;")
    with pytest.raises(parse.ParseError, match="through a table"):
        entry.successors(0)
