"""PTX text to instructions: what the translator (translate.py) and the checks of all paths read.

    module = parse.module(text)
    entry = module.entries["sparge_select"]
    for i, instruction in enumerate(entry.instructions):
        print(instruction.line, instruction.opcode, instruction.writes, entry.successors(i))

Only what NVRTC writes for kernels without calls is read: entries, registers, labels, nested braces, places of the source. Anything else raises.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

SPECIAL = ("%tid", "%ntid", "%ctaid", "%nctaid", "%laneid", "%warpid")
"""Registers that the machine writes, without their .x."""

_WITHOUT_RESULT = {
    *("st", "bra", "ret", "exit", "trap", "bar", "cp", "fence", "setmaxnreg", "prefetch", "red", "nanosleep", "membar"),
    *("barrier.cta.sync", "barrier.cta.arrive", "mbarrier.init", "mbarrier.inval"),
    *("wgmma.fence", "wgmma.commit_group", "wgmma.wait_group"),
}
_WITH_RESULT = {
    *("abs", "add", "and", "atom", "bfe", "bfi", "clz", "cvt", "cvta", "div", "ex2", "fma", "ld", "ldmatrix", "lg2", "mad", "max", "min", "mma"),
    *("mov", "mul", "neg", "not", "or", "popc", "prmt", "rcp", "rem", "rsqrt", "selp", "setp", "shfl", "shl", "shr", "sqrt", "sub", "vote", "xor"),
    *("barrier.cta.red", "mbarrier.arrive", "mbarrier.try_wait", "mbarrier.test_wait", "wgmma.mma_async"),
}
"""Instructions whose first operand is written, as the fewest leading parts of the opcode that say so."""

_NAME = r"[A-Za-z_$%][\w$]*"
_LABEL = re.compile(r"([A-Za-z_$][\w$]*)\s*:(?!:)")
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+([^\n]*)")
_INLINED = re.compile(r"inlined_at\s+(\d+)\s+(\d+)")
_ENTRY = re.compile(r"(?:\.visible\s+)?\.entry\s+(\w+)\s*\(")
_GUARD = re.compile(r"@(!?)(%?\w+)\s+")
_WORDS = re.compile(rf"0[fFdDxX][0-9a-fA-F]+|{_NAME}")


class ParseError(Exception):
    """The text is not PTX of the kind that is read here; the message names the line."""


@dataclass(frozen=True)
class Place:
    """A line of the source that an instruction was made of: the file as the compiler names it, and the line's number."""

    file: str
    line: int


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes
    ----------
    line : int
        In the PTX text, from 1.
    guard : str
        "%p1" or "!%p1", of which depends whether it is executed; "": it always is.
    opcode : str
        With its modifiers: "setp.ge.s32".
    operands : tuple of str
        As written: "%r1", "[%rd1+8]", "{%f1, %f2}", "%r1|%p1", "-1"; but a register of inner braces is "%name_s3", of a label there "name_s3", with
        the number of the braces, so that every name is one thing in the whole entry.
    text : str
        As written, guard included, on one line.
    place, inlined_at : Place or None
        Of the source, and where the function that it stands in was inlined; only with --generate-line-info.
    """

    line: int
    guard: str
    opcode: str
    operands: tuple[str, ...]
    text: str
    place: Place | None = None
    inlined_at: Place | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The opcode between its dots: ("setp", "ge", "s32")."""
        return tuple(self.opcode.split("."))

    @cached_property
    def has_result(self) -> bool:
        """Whether the first operand is written. ParseError for an opcode that is not known here."""
        parts = self.parts
        for n in range(1, len(parts) + 1):
            stem = ".".join(parts[:n])
            if stem in _WITH_RESULT or stem in _WITHOUT_RESULT:
                return stem in _WITH_RESULT
        raise ParseError(f"line {self.line}: whether {self.opcode} has a result is not known")

    @cached_property
    def writes(self) -> frozenset[str]:
        """Registers that it may write (a guarded instruction need not)."""
        return registers(self.operands[0]) if self.has_result else frozenset()

    @cached_property
    def reads(self) -> frozenset[str]:
        """Registers that it may read, those of its guard and of its addresses included; of a wgmma also the accumulators."""
        accumulates = self.opcode.startswith("wgmma.mma_async")
        found = [registers(operand) for operand in self.operands[1 if self.has_result and not accumulates else 0 :]]
        return frozenset().union(registers(self.guard), *found)


@dataclass(frozen=True)
class Entry:
    """A kernel.

    Attributes
    ----------
    name : str
    threads : int
        Most threads of a block (.maxntid).
    params : tuple of (str, int)
        Name and offset of each parameter in the block of parameters.
    params_size : int
        Bytes of that block.
    registers : dict
        Name -> type ("b32", "f32", "pred").
    labels : dict
        Name -> index of the instruction that follows.
    instructions : tuple of Instruction
    """

    name: str
    threads: int
    params: tuple[tuple[str, int], ...]
    params_size: int
    registers: dict[str, str]
    labels: dict[str, int]
    instructions: tuple[Instruction, ...]

    def successors(self, index: int) -> tuple[int, ...]:
        """Indexes of the instructions that may come after one, by every way; the end of the entry is none."""
        instruction = self.instructions[index]
        base = instruction.parts[0]
        if base == "brx":
            raise ParseError(f"line {instruction.line}: branches through a table are not followed")
        ahead = [self.labels[instruction.operands[0]]] if base == "bra" else []
        if instruction.guard or base not in ("bra", "ret", "exit", "trap"):
            ahead.append(index + 1)
        return tuple(i for i in ahead if i < len(self.instructions))


@dataclass(frozen=True)
class Module:
    """A PTX text: kernel -> entry, and the name of its external shared memory ("" where there is none)."""

    entries: dict[str, Entry]
    shared: str


def registers(operand: str) -> frozenset[str]:
    """The registers that an operand names, but the special ones."""
    return frozenset(name for name in re.findall(r"%[\w$]+", operand) if name not in SPECIAL)


def parts_of(operand: str) -> tuple[str, ...]:
    """("%r1", "%r2") of "{%r1, %r2}"; (x,) of any other."""
    return _split(operand[1:-1]) if operand.startswith("{") else (operand,)


def module(text: str) -> Module:
    """All entries of a PTX text.

    Raises
    ------
    ParseError
        Something is there that this reader does not know: functions, debugging sections inside an entry, a name that is declared twice.
    """
    files = {int(number): path for number, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.MULTILINE)}
    text = _without_comments(text)
    if re.search(r"^\s*(?:\.\w+\s+)*\.func\b", text, re.MULTILINE):
        raise ParseError("functions that are called are not read")
    shared = re.search(r"\.extern\s+\.shared\s+(?:\.align\s+\d+\s+)?\.b8\s+(\w+)\[\]", text)
    entries = {found[1]: _entry(text, found, files) for found in _ENTRY.finditer(text)}
    return Module(entries, shared[1] if shared else "")


def _without_comments(text: str) -> str:
    """Every line keeps its number."""
    text = re.sub(r"/\*.*?\*/", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL)
    return "\n".join(re.sub(r'("[^"]*")|//.*', lambda found: found[1] or "", line) for line in text.split("\n"))


def _entry(text: str, found: re.Match, files: dict[int, str]) -> Entry:
    opening = text.index("{", text.index(")", found.end()))
    head = text[found.start() : opening]
    threads = re.search(r"\.maxntid\s+(\d+)", head)
    if threads is None:
        raise ParseError(f"{found[1]} does not say how many threads it has")
    params, size = _params(head)
    body = _Body(text, opening, files)
    return Entry(found[1], int(threads[1]), params, size, body.registers, body.labels, tuple(body.instructions))


_SIZES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8}


def _params(head: str) -> tuple[tuple[tuple[str, int], ...], int]:
    found, size = [], 0
    for align, kind, name, count in re.findall(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(\w+)(?:\[(\d+)\])?", head):
        alignment = int(align or _SIZES[kind])
        size = -(-size // alignment) * alignment
        found.append((name, size))
        size += _SIZES[kind] * int(count or 1)
    return tuple(found), size


def _split(text: str) -> tuple[str, ...]:
    """At the commas outside of braces and brackets."""
    if "{" not in text and "[" not in text:
        return tuple(part.strip() for part in text.split(",")) if text else ()
    found, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            found.append(text[start:i].strip())
            start = i + 1
    return tuple(part for part in (*found, text[start:].strip()) if part)


@dataclass(frozen=True)
class _Statement:
    line: int
    kind: str  # "label" | "open" | "close" | "statement" | "location"
    text: str


def _statements(text: str, start: int) -> list[_Statement]:
    """From an opening brace to the one that closes it."""
    found, at, depth, line = [], start, 0, text.count("\n", 0, start) + 1
    while True:
        while text[at : at + 1].isspace():
            line += text[at] == "\n"
            at += 1
        if at >= len(text):
            raise ParseError(f"line {line}: braces are left open")
        if text[at] in "{}":
            depth += 1 if text[at] == "{" else -1
            found.append(_Statement(line, "open" if text[at] == "{" else "close", ""))
            at += 1
            if depth == 0:
                return found
        elif location := _LOCATION.match(text, at):
            found.append(_Statement(line, "location", location[0]))
            at = location.end()
        elif label := _LABEL.match(text, at):
            found.append(_Statement(line, "label", label[1]))
            at = label.end()
        else:
            end = text.index(";", at)
            found.append(_Statement(line, "statement", " ".join(text[at:end].split())))
            line += text.count("\n", at, end)
            at = end + 1


class _Body:
    """The statements of one entry with every name resolved in its braces."""

    def __init__(self, text: str, opening: int, files: dict[int, str]):
        self.registers: dict[str, str] = {}
        self.labels: dict[str, int] = {}
        self.instructions: list[Instruction] = []
        self._files, self._places = files, (None, None)
        statements = _statements(text, opening)
        self._names = self._declared(statements)
        self._open: list[int] = []
        count = 0
        for statement in statements:
            if statement.kind == "open":
                count += 1
                self._open.append(count)
            elif statement.kind == "close":
                self._open.pop()
            elif statement.kind == "label":
                self.labels[self._names[self._open[-1]][statement.text]] = len(self.instructions)
            elif statement.kind == "location":
                self._places = self._located(statement.text)
            elif not statement.text.startswith((".reg", ".pragma")):
                self.instructions.append(self._instruction(statement))

    def _declared(self, statements: list[_Statement]) -> dict[int, dict[str, str]]:
        """Braces -> name as written -> name in the entry. A label may be named before its place, hence the walk of its own."""
        names: dict[int, dict[str, str]] = {}
        opened, count = [], 0
        for statement in statements:
            if statement.kind == "open":
                count += 1
                opened.append(count)
                names[count] = {}
            elif statement.kind == "close":
                opened.pop()
            elif statement.kind == "label":
                self._declare(names[opened[-1]], statement.text, opened, statement.line)
            elif statement.text.startswith(".reg") and statement.kind == "statement":
                _, kind, spec = statement.text.split(None, 2)
                for name in _spelt_out(spec):
                    unique = self._declare(names[opened[-1]], name, opened, statement.line, "" if name.startswith("%") else "%")
                    self.registers[unique] = kind.removeprefix(".")
        return names

    def _declare(self, names: dict[str, str], name: str, opened: list[int], line: int, sigil: str = "") -> str:
        unique = name if len(opened) == 1 else f"{sigil}{name}_s{opened[-1]}"
        if name in names or unique in self.registers:
            raise ParseError(f"line {line}: {name} is declared twice")
        names[name] = unique
        return unique

    def _located(self, text: str) -> tuple[Place | None, Place | None]:
        file, line, rest = _LOCATION.match(text).groups()
        inlined = _INLINED.search(rest)
        caller = Place(self._files[int(inlined[1])], int(inlined[2])) if inlined else None
        return Place(self._files[int(file)], int(line)), caller

    def _resolve(self, text: str) -> str:
        """With the entry's name for every name of inner braces."""
        if len(self._open) == 1:
            return text

        def unique(found: re.Match) -> str:
            return next((self._names[i][found[0]] for i in reversed(self._open) if found[0] in self._names[i]), found[0])

        return _WORDS.sub(unique, text)

    def _instruction(self, statement: _Statement) -> Instruction:
        text, guard = statement.text, ""
        if text.startswith("."):
            raise ParseError(f"line {statement.line}: {text[:60]} is not read inside an entry")
        if told := _GUARD.match(text):
            guard, text = told[1] + self._resolve(told[2]), text[told.end() :]
        opcode, _, rest = text.partition(" ")
        operands = tuple(self._resolve(operand) for operand in _split(rest))
        return Instruction(statement.line, guard, opcode, operands, statement.text, *self._places)


def _spelt_out(spec: str) -> list[str]:
    """Names of ".reg .b32 %r<3>, x": %r0, %r1, %r2, x."""
    found = []
    for item in map(str.strip, spec.split(",")):
        many = re.fullmatch(r"(%?\w+)<(\d+)>", item)
        found += [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [item]
    return found
