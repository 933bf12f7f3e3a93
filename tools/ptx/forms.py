"""How each form of instruction becomes C++ over machine.h: the table `FORMS`, opcode with all its modifiers -> what writes the statement.

What is not in the table is not translated. Every row is tried against numpy or plain integers in test_ptx_instructions.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product

import parse

BITS = {"pred": 1, "b16": 16, "u16": 16, "s16": 16, "b32": 32, "u32": 32, "s32": 32, "f32": 32, "b64": 64, "u64": 64, "s64": 64}
"""Type of a register -> its width."""

STORAGE = {1: "bool", 16: "u16", 32: "u32", 64: "u64"}
"""Width of a register -> the C++ type of its variable, which holds its bits."""

_SPECIAL = {"%tid.x": "me.thread", "%ntid.x": "me.threads", "%ctaid.x": "me.block", "%nctaid.x": "me.blocks"}
_ADDRESS = re.compile(r"\[\s*([^+\]\s]+)\s*(?:\+\s*(-?\d+))?\s*\]")


class UnknownInstruction(Exception):
    """The translator does not know an instruction, or a form of its operands; the message names the line and says what."""


class Operands:
    """The operands of one instruction as C++.

    Parameters
    ----------
    entry : parse.Entry
    shared : str
        The name of the dynamic shared memory.
    instruction : parse.Instruction
    """

    def __init__(self, entry: parse.Entry, shared: str, instruction: parse.Instruction):
        self.line = instruction.line
        self._entry, self._shared, self._operands = entry, shared, instruction.operands

    def __len__(self) -> int:
        return len(self._operands)

    def need(self, *counts: int) -> None:
        """That there are so many."""
        if len(self) not in counts:
            raise UnknownInstruction(f"{len(self)} operands, known are {counts}")

    def text(self, i: int) -> str:
        """As the PTX has it."""
        return self._operands[i]

    def constant(self, i: int) -> int:
        """The number that an operand must be."""
        try:
            return int(self._operands[i], 0)
        except ValueError:
            raise UnknownInstruction(f"{self._operands[i]} is not a constant") from None

    def value(self, i: int, bits: int, *, wider: bool = False) -> str:
        """An expression for `bits` bits; with `wider` the register may have more, of which the lower ones count."""
        return self.value_of(self._operands[i], bits, wider=wider)

    def values(self, i: int, count: int, bits: int) -> list[str]:
        """Expressions for the parts of a vector; of one part for what has no braces."""
        return [self.value_of(part, bits, wider=True) for part in self._parts(i, count)]

    def result(self, i: int, bits: int, *, wider: bool = False) -> str:
        """The variable of the register that is written."""
        return self._variable(self._operands[i], bits, wider)

    def results(self, i: int, count: int, bits: int, *, wider: bool = False) -> list[str]:
        """The variables of the registers in a vector."""
        return [self._variable(part, bits, wider) for part in self._parts(i, count)]

    def width(self, name: str) -> int:
        """Bits of a register."""
        return BITS[self._entry.registers[name]]

    def address(self, i: int) -> str:
        """An expression for the 64 bits of an address."""
        found = _ADDRESS.fullmatch(self._operands[i])
        if found is None:
            raise UnknownInstruction(f"{self._operands[i]} is not an address")
        base, offset = found[1], int(found[2] or 0)
        bits = self.width(base) if base in self._entry.registers else 64
        return f"((u64){self.value_of(base, bits)} + (u64){offset}ll)"

    def value_of(self, operand: str, bits: int, *, wider: bool = False) -> str:
        """An expression for one operand, or a part of one."""
        if operand.startswith("!"):
            return f"!{self.value_of(operand[1:], bits)}"
        if operand in self._entry.registers:
            name = self._variable(operand, bits, wider)
            return f"({STORAGE[bits]}){name}" if wider else name
        number = self._number(operand, bits)
        if number is not None:
            return f"({STORAGE[bits]}){number:#x}ull"
        if operand in _SPECIAL and bits == 32:
            return _SPECIAL[operand]
        if operand == self._shared and bits == 64:
            return "(u64)kSharedBase"
        offset = dict(self._entry.params).get(operand)
        if offset is not None and bits == 64:
            return f"(u64){offset}"
        raise UnknownInstruction(f"the operand {operand} of {bits} bits")

    def _number(self, operand: str, bits: int) -> int | None:
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", operand):
            return int(operand[2:], 16)
        if not re.fullmatch(r"-?(\d+|0[xX][0-9a-fA-F]+)U?", operand):
            return None
        number = int(operand.rstrip("U"), 0)
        if bits > 1 and not -(1 << bits - 1) <= number < 1 << bits:
            raise UnknownInstruction(f"{operand} has more than {bits} bits")
        return int(number != 0) if bits == 1 else number & (1 << bits) - 1

    def _variable(self, name: str, bits: int, wider: bool) -> str:
        if name not in self._entry.registers:
            raise UnknownInstruction(f"{name} is not a register")
        if self.width(name) != bits and not (wider and self.width(name) > bits):
            raise UnknownInstruction(f"{name} has {self.width(name)} bits instead of {bits}")
        return variable(name)

    def _parts(self, i: int, count: int) -> tuple[str, ...]:
        parts = parse.parts_of(self._operands[i])
        if len(parts) != count:
            raise UnknownInstruction(f"{self._operands[i]} has {len(parts)} parts instead of {count}")
        return parts


def variable(name: str) -> str:
    """The C++ variable of a register."""
    plain = re.sub(r"\W", "_", name.removeprefix("%"))
    return plain if re.fullmatch(r"(?:p|rs|r|rd|f)\d+", plain) else f"named_{plain}"


Rule = Callable[[Operands], str]
"""Operands -> the C++ statement."""


def _expression(result: int, widths: tuple[int, ...], text: str, *, wider: bool = False) -> Rule:
    """`text` of the operands {a}, {b}, .. of these widths, and {line}. With `wider` the registers may have more bits."""

    def write(operands: Operands) -> str:
        operands.need(1 + len(widths))
        names = {"abcd"[i]: operands.value(i + 1, bits, wider=wider) for i, bits in enumerate(widths)}
        return f"{operands.result(0, result)} = {text.format(**names, line=operands.line)};"

    return write


def _unary_f32(text: str) -> Rule:
    return _expression(32, (32,), text)


# ---- arithmetic ----------------------------------------------------------------------------------------------------------------------------------


def _arithmetic() -> dict[str, Rule]:
    forms = {}
    for name, sign in (("add", "+"), ("sub", "-"), ("mul", "*"), ("div.rn", "/")):
        stem, _, rounding = name.partition(".")
        opcode = f"{stem}.{rounding}.f32" if rounding else f"{stem}.f32"
        forms[opcode] = _expression(32, (32, 32), f"result(as_float({{a}}) {sign} as_float({{b}}))")
    forms["fma.rn.f32"] = _expression(32, (32,) * 3, "result(__builtin_fmaf(as_float({a}), as_float({b}), as_float({c})))")
    forms["rcp.rn.f32"] = _unary_f32("result(1.0f / as_float({a}))")
    forms["sqrt.rn.f32"] = _unary_f32("result(sqrtf(as_float({a})))")
    forms["neg.f32"] = _unary_f32("{a} ^ 0x80000000u")
    forms["abs.f32"] = _unary_f32("{a} & 0x7fffffffu")
    forms["max.f32"] = _expression(32, (32, 32), "max_f32({a}, {b})")
    forms["min.f32"] = _expression(32, (32, 32), "min_f32({a}, {b})")
    forms["ex2.approx.ftz.f32"] = _unary_f32("exp2_ftz({a})")
    forms["lg2.approx.f32"] = _unary_f32("log2_approx({a})")
    forms["rsqrt.approx.f32"] = _unary_f32("rsqrt_approx({a})")
    return forms | _integer_arithmetic()


def _integer_arithmetic() -> dict[str, Rule]:
    forms = {}
    for bits in (16, 32, 64):
        forms[f"add.s{bits}"] = _expression(bits, (bits, bits), "{a} + {b}")
    for bits in (32, 64):
        two = (bits, bits)
        forms[f"sub.s{bits}"] = _expression(bits, two, "{a} - {b}")
        forms[f"mul.lo.s{bits}"] = _expression(bits, two, "{a} * {b}")
        for name in ("max", "min"):
            function = {"max": "larger", "min": "smaller"}[name]
            forms[f"{name}.u{bits}"] = _expression(bits, two, f"{function}({{a}}, {{b}})")
            forms[f"{name}.s{bits}"] = _expression(bits, two, f"(u{bits}){function}(as_signed({{a}}), as_signed({{b}}))")
        for name, sign in (("div", "/"), ("rem", "%")):
            forms[f"{name}.u{bits}"] = _expression(bits, two, f"{{a}} {sign} (u{bits})divisor(me, {{b}}, {{line}})")
            # In 128 bits, for the least number divided by -1 is none of C++'s.
            quotient = f"(__int128)as_signed({{a}}) {sign} (s{bits})divisor(me, (u64)(s64)as_signed({{b}}), {{line}})"
            forms[f"{name}.s{bits}"] = _expression(bits, two, f"(u{bits})({quotient})")
    forms["neg.s32"] = _expression(32, (32,), "0u - {a}")
    forms["mad.lo.s32"] = _expression(32, (32,) * 3, "{a} * {b} + {c}")
    forms["mul.wide.u16"] = _expression(32, (16, 16), "(u32){a} * (u32){b}")
    forms["mul.wide.u32"] = _expression(64, (32, 32), "(u64){a} * (u64){b}")
    forms["mul.wide.s32"] = _expression(64, (32, 32), "(u64)((s64)as_signed({a}) * (s64)as_signed({b}))")
    forms["mul.hi.u32"] = _expression(32, (32, 32), "(u32)((u64){a} * (u64){b} >> 32)")
    forms["mul.hi.s32"] = _expression(32, (32, 32), "(u32)((s64)as_signed({a}) * (s64)as_signed({b}) >> 32)")
    return forms


def _bits() -> dict[str, Rule]:
    forms = {}
    for kind, (name, sign) in product(("pred", "b16", "b32", "b64"), (("and", "&"), ("or", "|"), ("xor", "^"))):
        forms[f"{name}.{kind}"] = _expression(BITS[kind], (BITS[kind],) * 2, f"{{a}} {sign} {{b}}")
    forms["not.pred"] = _expression(1, (1,), "!{a}")
    for bits in (32, 64):
        forms[f"not.b{bits}"] = _expression(bits, (bits,), "~{a}")
        forms[f"shl.b{bits}"] = _expression(bits, (bits, 32), "shifted_left({a}, {b})")
        forms[f"shr.u{bits}"] = _expression(bits, (bits, 32), "shifted_right({a}, {b})")
        forms[f"shr.s{bits}"] = _expression(bits, (bits, 32), "shifted_right(as_signed({a}), {b})")
    forms["popc.b32"] = _expression(32, (32,), "(u32)__builtin_popcount({a})")
    forms["prmt.b32"] = _expression(32, (32,) * 3, "permuted_bytes({a}, {b}, {c})")
    forms["bfi.b32"] = _expression(32, (32,) * 4, "inserted_bits({a}, {b}, {c}, {d})")
    return forms


# ---- comparisons, conversions, moves -------------------------------------------------------------------------------------------------------------

COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


def _comparisons() -> dict[str, Rule]:
    forms = {}
    for (name, sign), kind in product(COMPARISONS.items(), ("s16", "s32", "s64", "u32", "b32", "f32")):
        if kind == "b32" and name not in ("eq", "ne"):
            continue
        one = {"s": "as_signed({})", "f": "as_float({})"}.get(kind[0], "{}")
        two = [one.format(operand) for operand in ("{a}", "{b}")]
        compared = f"{two[0]} {sign} {two[1]}"
        widths = (BITS[kind],) * 2
        if kind == "f32":  # with a NaN the plain ones are false, those with a u true
            forms[f"setp.{name}u.f32"] = _expression(1, widths, f"!ordered({two[0]}, {two[1]}) || {compared}")
            compared = f"ordered({two[0]}, {two[1]}) && {compared}"
        forms[f"setp.{name}.{kind}"] = _expression(1, widths, compared)
    return forms


def _conversions() -> dict[str, Rule]:
    forms = {
        "cvt.f32.f16": _expression(32, (16,), "float_of_half({a})"),
        "cvt.rn.f16x2.f32": _expression(32, (32, 32), "(u32)half_of_float({a}) << 16 | half_of_float({b})"),
        "cvt.rn.bf16x2.f32": _expression(32, (32, 32), "(u32)bfloat_of_float({a}) << 16 | bfloat_of_float({b})"),
        "cvt.rn.satfinite.e4m3x2.f32": _expression(16, (32, 32), "(u16)(e4m3_of_float({a}) << 8 | e4m3_of_float({b}))"),
        "cvt.pack.sat.s8.s32.b32": _expression(32, (32,) * 3, "pack_s8({a}, {b}, {c})"),
        "cvt.rn.f32.s32": _unary_f32("as_bits((float)as_signed({a}))"),
        "cvt.rn.f32.u32": _unary_f32("as_bits((float){a})"),
        "cvt.rni.s32.f32": _unary_f32("s32_of_float(nearbyintf(as_float({a})))"),
        "cvt.rzi.s32.f32": _unary_f32("s32_of_float(truncf(as_float({a})))"),
        "cvt.rmi.f32.f32": _unary_f32("result(floorf(as_float({a})))"),
        "cvta.to.global.u64": _expression(64, (64,), "{a}"),
        "cvta.shared.u64": _expression(64, (64,), "generic_of_shared(me, {a})"),
    }
    for to, of in (("s64", "s32"), ("u64", "u32"), ("u32", "u64"), ("u32", "u16"), ("u16", "u32")):
        signed = "(s64)as_signed({a})" if of == "s32" else "{a}"
        forms[f"cvt.{to}.{of}"] = _expression(BITS[to], (BITS[of],), f"({STORAGE[BITS[to]]}){signed}", wider=True)
    return forms


def _moves() -> dict[str, Rule]:
    forms = {}
    for kind in ("pred", "u16", "u32", "f32", "u64"):
        forms[f"mov.{kind}"] = _expression(BITS[kind], (BITS[kind],), "{a}")
    for kind in ("u16", "u32", "f32", "b32", "b64"):
        forms[f"selp.{kind}"] = _expression(BITS[kind], (BITS[kind], BITS[kind], 1), "{c} ? {a} : {b}")
    return forms | {"mov.b32": _move_parts(32), "mov.b64": _move_parts(64)}


def _move_parts(bits: int) -> Rule:
    """Between a register and two of half its size, the lower one first; or between two registers."""
    half = bits // 2

    def write(operands: Operands) -> str:
        operands.need(2)
        if operands.text(0).startswith("{"):
            low, high = operands.results(0, 2, half)
            return f"{{ u{bits} whole = {operands.value(1, bits)}; {low} = (u{half})whole; {high} = (u{half})(whole >> {half}); }}"
        if operands.text(1).startswith("{"):
            low, high = operands.values(1, 2, half)
            return f"{operands.result(0, bits)} = (u{bits}){low} | (u{bits}){high} << {half};"
        return f"{operands.result(0, bits)} = {operands.value(1, bits)};"

    return write


# ---- memory --------------------------------------------------------------------------------------------------------------------------------------

SPACES = {"global": "global", "shared": "shared_to_{}", "": "generic_to_{}", "param": "param"}
"""State space -> the function of machine.h that finds an access; "" is the generic one."""

_BYTES = {"u8": 1, "u16": 2, "u32": 4, "s32": 4, "f32": 4, "u64": 8}
VECTORS = {("v2", "u32"), ("v2", "f32"), ("v2", "u64"), ("v4", "u32"), ("v4", "f32")}


def _memory() -> dict[str, Rule]:
    forms = {}
    shapes = [("", kind) for kind in _BYTES] + sorted(VECTORS)
    for space, (vector, kind) in product(SPACES, shapes):
        modifiers = ".".join(part for part in (space, vector, kind) if part)
        count = int(vector[1:] or 1)
        forms[f"ld.{modifiers}"] = _load(SPACES[space].format("read"), kind, count)
        if space != "param" and kind != "s32":
            forms[f"st.{modifiers}"] = _store(SPACES[space].format("write"), kind, count)
    return forms | {"atom.global.add.u32": _atomic_add}


def _load(function: str, kind: str, count: int) -> Rule:
    size = _BYTES[kind]
    kept = f"s{8 * size}" if kind.startswith("s") else f"u{8 * size}"

    def write(operands: Operands) -> str:
        operands.need(2)
        targets = operands.results(0, count, 8 * size, wider=kind != "f32")
        loads = " ".join(f"{target} = load<{kept}>(at + {i * size});" for i, target in enumerate(targets))
        return f"{{ const char* at = {function}(me, {operands.address(1)}, {count * size}, {operands.line}); {loads} }}"

    return write


def _store(function: str, kind: str, count: int) -> Rule:
    size = _BYTES[kind]

    def write(operands: Operands) -> str:
        operands.need(2)
        values = operands.values(1, count, max(16, 8 * size))
        stores = " ".join(f"store<u{8 * size}>(at + {i * size}, {value});" for i, value in enumerate(values))
        return f"{{ char* at = {function}(me, {operands.address(0)}, {count * size}, {operands.line}); {stores} }}"

    return write


def _atomic_add(operands: Operands) -> str:
    operands.need(3)
    return f"{operands.result(0, 32)} = atomic_add(me, {operands.address(1)}, {operands.value(2, 32)}, {operands.line});"


# ---- threads together ----------------------------------------------------------------------------------------------------------------------------


def _meet(operands: Operands, kind: str, inputs: list[str], results: list[str], settings: tuple = ()) -> str:
    """A collective of the warp; with what is the same for all lanes in `settings`."""
    words = ", ".join(f"(u32){value}" for value in inputs) or "0"
    same = ", ".join(map(str, settings)) or "0"
    after = " ".join(f"{name} = out[{i}];" for i, name in enumerate(results) if name)
    arrays = f"u32 in[] = {{{words}}}, out[{max(2, len(results))}], settings[] = {{{same}}};"
    return f"{{ {arrays} meet(me, {kind}, {operands.line}, settings, in, out); {after} }}"


def _all_lanes(operands: Operands, i: int) -> str:
    return f"need_all_lanes(me, {operands.value(i, 32)}, {operands.line}); "


def _shuffle(kind: str) -> Rule:
    def write(operands: Operands) -> str:
        operands.need(5)
        target, _, inside = operands.text(0).partition("|")
        (result,) = [variable(target)] if operands.width(target) == 32 else [operands.result(0, 32)]
        results = [result, variable(inside) if inside else ""]
        return _all_lanes(operands, 4) + _meet(operands, kind, [operands.value(i, 32) for i in (1, 2, 3)], results)

    return write


def _vote(kind: str, bits: int) -> Rule:
    def write(operands: Operands) -> str:
        operands.need(3)
        return _all_lanes(operands, 2) + _meet(operands, kind, [operands.value(1, 1)], [operands.result(0, bits)])

    return write


def _load_matrix(kind: str) -> Rule:
    def write(operands: Operands) -> str:
        operands.need(2)
        return _meet(operands, kind, [operands.address(1)], operands.results(0, 4, 32))

    return write


def _mma(kind: str) -> Rule:
    def write(operands: Operands) -> str:
        operands.need(4)
        inputs = [word for i, count in ((1, 4), (2, 2), (3, 4)) for word in operands.values(i, count, 32)]
        return _meet(operands, kind, inputs, operands.results(0, 4, 32))

    return write


def _sync_warp(operands: Operands) -> str:
    operands.need(1)
    return _all_lanes(operands, 0) + _meet(operands, "kSyncWarp", [], [])


def _bar_sync(operands: Operands) -> str:
    operands.need(1, 2)
    count = operands.value(1, 32) if len(operands) == 2 else "me.threads"
    return f"barrier_sync(me, {operands.value(0, 32)}, {count}, true, false, {operands.line});"


def _barrier_sync(operands: Operands) -> str:
    operands.need(2)
    return f"barrier_sync(me, {operands.value(0, 32)}, {operands.value(1, 32)}, false, false, {operands.line});"


def _barrier_arrive(operands: Operands) -> str:
    operands.need(2)
    return f"barrier_arrive(me, {operands.value(0, 32)}, {operands.value(1, 32)}, {operands.line});"


def _barrier_or(operands: Operands) -> str:
    operands.need(4)
    result, count = operands.result(0, 1), operands.value(2, 32)
    return f"{result} = barrier_sync(me, {operands.value(1, 32)}, {count}, false, {operands.value(3, 1)}, {operands.line});"


def _together() -> dict[str, Rule]:
    return {
        "shfl.sync.bfly.b32": _shuffle("kShuffleButterfly"),
        "shfl.sync.idx.b32": _shuffle("kShuffleIndex"),
        "shfl.sync.up.b32": _shuffle("kShuffleUp"),
        "shfl.sync.down.b32": _shuffle("kShuffleDown"),
        "vote.sync.any.pred": _vote("kVoteAny", 1),
        "vote.sync.all.pred": _vote("kVoteAll", 1),
        "vote.sync.ballot.b32": _vote("kVoteBallot", 32),
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16": _load_matrix("kLoadMatrix"),
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16": _load_matrix("kLoadMatrixTransposed"),
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32": _mma("kMmaS8S8"),
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32": _mma("kMmaU8S8"),
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": _mma("kMmaF16"),
        "bar.warp.sync": _sync_warp,
        "bar.sync": _bar_sync,
        "barrier.cta.sync": _barrier_sync,
        "barrier.cta.arrive": _barrier_arrive,
        "barrier.cta.red.or.pred": _barrier_or,
        "trap": lambda operands: f"trap(me, {operands.line});",
        "ret": lambda operands: "return;",
    }


# ---- asynchronous copies and Hopper --------------------------------------------------------------------------------------------------------------

WGMMA_S8, WGMMA_E4M3 = (64, 128, 192), (32, 40, 64, 72, 128, 136)
"""Columns of the products that are known, with both operands in shared memory and with A in registers."""


def _wgmma_s8(columns: int) -> Rule:
    def write(operands: Operands) -> str:
        operands.need(4)
        settings = (columns, operands.value(3, 1), *_halves(operands.value(1, 64)), *_halves(operands.value(2, 64)))
        sums = operands.results(0, columns // 2, 32)
        return _meet(operands, "kWgmmaS8", sums, sums, settings)

    return write


def _wgmma_e4m3(columns: int) -> Rule:
    def write(operands: Operands) -> str:
        operands.need(6)
        if (operands.constant(4), operands.constant(5)) != (1, 1):
            raise UnknownInstruction("a product whose operands are negated")
        settings = (columns, operands.value(3, 1), 0, 0, *_halves(operands.value(2, 64)))
        sums = operands.results(0, columns // 2, 32)
        return _meet(operands, "kWgmmaE4m3", operands.values(1, 4, 32) + sums, sums, settings)

    return write


def _halves(value: str) -> tuple[str, str]:
    return f"(u32){value}", f"(u32)({value} >> 32)"


def _setting(kind: str) -> Rule:
    """A collective with one constant."""

    def write(operands: Operands) -> str:
        operands.need(1)
        return _meet(operands, kind, [], [], (operands.constant(0),))

    return write


def _plain(kind: str) -> Rule:
    """A collective without operands."""

    def write(operands: Operands) -> str:
        operands.need(0)
        return _meet(operands, kind, [], [])

    return write


def _call(text: str, *kinds: str) -> Rule:
    """A call of the runtime; `kinds` of the operands: address, value, constant, sink (the result that nobody wants)."""

    def write(operands: Operands) -> str:
        operands.need(len(kinds))
        given = []
        for i, kind in enumerate(kinds):
            if kind == "sink" and operands.text(i) != "_":
                raise UnknownInstruction(f"a result ({operands.text(i)})")
            if kind != "sink":
                given.append({"address": operands.address, "value": lambda i: operands.value(i, 32), "constant": operands.constant}[kind](i))
        return text.format(*given, line=operands.line) + ";"

    return write


def _try_wait(operands: Operands) -> str:
    operands.need(3)
    return f"{operands.result(0, 1)} = mbarrier_try_wait(me, {operands.address(1)}, {operands.value(2, 32)}, {operands.line});"


def _async() -> dict[str, Rule]:
    bulk = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    arrive = "mbarrier_arrive(me, {}, {}, {{line}})"
    forms = {
        "cp.async.cg.shared.global": _call("copy_async(me, {}, {}, {}, {line})", "address", "address", "constant"),
        "cp.async.commit_group": _call("copy_async_commit(me)"),
        "cp.async.wait_group": _call("copy_async_wait(me, {})", "constant"),
        bulk: _call("bulk_copy(me, {}, {}, {}, {}, {line})", "address", "address", "value", "address"),
        "mbarrier.init.shared::cta.b64": _call("mbarrier_init(me, {}, {}, {line})", "address", "value"),
        "mbarrier.arrive.shared::cta.b64": _call(arrive.format("{}", "0"), "sink", "address"),
        "mbarrier.arrive.expect_tx.shared::cta.b64": _call(arrive.format("{}", "{}"), "sink", "address", "value"),
        "mbarrier.try_wait.parity.shared::cta.b64": _try_wait,
        "fence.proxy.async.shared::cta": _call("fence_proxy_async(me)"),
        "fence.mbarrier_init.release.cluster": _call("fence_mbarrier_init(me)"),
        "setmaxnreg.dec.sync.aligned.u32": _setting("kRegistersDown"),
        "setmaxnreg.inc.sync.aligned.u32": _setting("kRegistersUp"),
        "wgmma.fence.sync.aligned": _plain("kWgmmaFence"),
        "wgmma.commit_group.sync.aligned": _plain("kWgmmaCommit"),
        "wgmma.wait_group.sync.aligned": _setting("kWgmmaWait"),
    }
    forms |= {f"wgmma.mma_async.sync.aligned.m64n{n}k32.s32.s8.s8": _wgmma_s8(n) for n in WGMMA_S8}
    return forms | {f"wgmma.mma_async.sync.aligned.m64n{n}k32.f32.e4m3.e4m3": _wgmma_e4m3(n) for n in WGMMA_E4M3}


FORMS: dict[str, Rule] = _arithmetic() | _bits() | _comparisons() | _conversions() | _moves() | _memory() | _together() | _async()
"""Opcode -> what writes its statement. Branches alone are not here: where they go is the entry's (translate.py)."""
