"""PTX to C++ over machine.h: every kernel becomes a function of one thread.

Strict: an instruction, a modifier or an operand that forms.py does not know stops the translation, with the line and the reason.
"""

from __future__ import annotations

import re

import parse
from forms import BITS, FORMS, STORAGE, Operands, UnknownInstruction, variable

POISON = {1: "false", 16: "0xbeef", 32: "0xffbadbadu", 64: "0xdeadbeefdeadbeefull"}
"""What a register that nothing was written to holds, by its width: as fp32 a NaN."""

_BRANCHES = ("bra", "bra.uni")
_ASYNC_PROXY = ("wgmma.mma_async", "cp.async.bulk")


def translate(text: str) -> str:
    """The C++ of all kernels of a PTX text: for each a `ptx::Kernel`, called `symbol_of` its name.

    Raises
    ------
    UnknownInstruction, parse.ParseError
    """
    module = parse.module(text)
    functions = [_function(entry, module.shared) for entry in module.entries.values()]
    return "\n".join(["#include <machine.h>", "using namespace ptx;", *functions, ""])


def symbol_of(name: str) -> str:
    """What a kernel's `ptx::Kernel` is called in the library: not as a function of C."""
    return f"kernel_{name}"


def opcodes(text: str) -> frozenset[str]:
    """Every form of instruction in a PTX text that is not a branch."""
    entries = parse.module(text).entries.values()
    return frozenset(instruction.opcode for entry in entries for instruction in entry.instructions) - {*_BRANCHES}


def _function(entry: parse.Entry, shared: str) -> str:
    places: dict[int, list[str]] = {}
    for label, index in entry.labels.items():
        places.setdefault(index, []).append(label)
    lines = [f"static void run_{entry.name}(Thread& me) {{", *_variables(entry)]
    for index, instruction in enumerate(entry.instructions):
        lines += [f"{_label(name)}:;" for name in places.get(index, ())]
        lines.append(_statement(entry, shared, index, instruction))
    lines += [f"{_label(name)}:;" for name in places.get(len(entry.instructions), ())]
    proxy = any(instruction.opcode.startswith(_ASYNC_PROXY) for instruction in entry.instructions)
    kernel = f'{{"{entry.name}", run_{entry.name}, {entry.threads}, {entry.params_size}, {str(proxy).lower()}}}'
    symbol = symbol_of(entry.name)
    visible = '__attribute__((visibility("default")))'
    return "\n".join([*lines, "}", f'extern "C" {{ extern {visible} const Kernel {symbol}; const Kernel {symbol} = {kernel}; }}'])


def _variables(entry: parse.Entry) -> list[str]:
    used = {name for instruction in entry.instructions for text in (instruction.guard, *instruction.operands) for name in parse.registers(text)}
    names: dict[int, list[str]] = {}
    for name, kind in entry.registers.items():
        if name not in used:
            continue
        if kind not in BITS:
            raise UnknownInstruction(f"{entry.name}: the register {name} of type {kind}")
        names.setdefault(BITS[kind], []).append(f"{variable(name)} = {POISON[BITS[kind]]}")
    return [f"{STORAGE[bits]} {', '.join(found)};" for bits, found in names.items()]


def _label(name: str) -> str:
    return "at_" + re.sub(r"\W", "_", name)


def _statement(entry: parse.Entry, shared: str, index: int, instruction: parse.Instruction) -> str:
    operands = Operands(entry, shared, instruction)
    try:
        statement = _branch(entry, index, instruction) if instruction.opcode in _BRANCHES else _known(instruction)(operands)
        if not instruction.guard:
            return statement
        return f"if ({operands.value_of(instruction.guard, 1)}) {{ {statement} }}"
    except UnknownInstruction as error:
        raise UnknownInstruction(f"{entry.name}, line {instruction.line}, `{instruction.text[:120]}`: {error}") from None


def _known(instruction: parse.Instruction):
    if instruction.opcode not in FORMS:
        raise UnknownInstruction(f"{instruction.opcode} is not among the known instructions")
    return FORMS[instruction.opcode]


def _branch(entry: parse.Entry, index: int, instruction: parse.Instruction) -> str:
    (name,) = instruction.operands
    if name not in entry.labels:
        raise UnknownInstruction(f"the label {name}")
    jump = f"goto {_label(name)};"
    return f"{{ tick(me); {jump} }}" if entry.labels[name] <= index else jump  # every loop counts, so that one without an end is noticed
