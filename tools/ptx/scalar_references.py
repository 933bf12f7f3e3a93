"""What every instruction of one thread gives, in Python's integers, fractions and numpy: the table `SCALARS`.

Operands and results are the bits of registers as non-negative integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

NAN = 0x7FFFFFFF
"""The NaN that arithmetic gives."""

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().tolist()
"""Code -> value."""


@dataclass(frozen=True)
class Scalar:
    """An instruction.

    Attributes
    ----------
    result, operands : str
        Types of registers, those of the operands with spaces in between: "f32", "b32 b32". "count" is a b32 that says how far to shift.
    compute : callable
        Operands -> result, of which the bits that the result has count.
    ulps : int
        How far an approximation may be off.
    """

    result: str
    operands: str
    compute: Callable
    ulps: int = 0


def signed(x: int, bits: int) -> int:
    return x - (1 << bits) if x >> bits - 1 else x


def number(bits: int) -> float:
    """The value of an fp32 code."""
    return float(np.uint32(bits).view(np.float32))


def code(x: float) -> int:
    """The bits of an fp32 number, NaN as arithmetic gives it."""
    with np.errstate(over="ignore"):
        return NAN if math.isnan(x) else int(np.float32(x).view(np.uint32))


def rounded(exact: Fraction, precision: int, least: int) -> Fraction:
    """To the nearest multiple of what the last of `precision` places is worth, at least 2 ** least; ties to even."""
    if exact == 0:
        return exact
    exponent = abs(exact).numerator.bit_length() - abs(exact).denominator.bit_length()
    exponent -= abs(exact) < Fraction(2) ** exponent
    unit = Fraction(2) ** max(exponent - precision + 1, least)
    return round(exact / unit) * unit  # Python's round takes ties to even


# ---- fp32 ----------------------------------------------------------------------------------------------------------------------------------------


def fused(a: int, b: int, c: int) -> int:
    x, y, z = number(a), number(b), number(c)
    exact = Fraction(x) * Fraction(y) + Fraction(z) if all(map(math.isfinite, (x, y, z))) else 0
    if exact == 0:  # or what is not finite: fp64 gives the sign, or the infinity, or NaN
        with np.errstate(invalid="ignore"):
            return code(np.float64(x) * np.float64(y) + np.float64(z))
    result = rounded(exact, 24, -149)
    return code(math.copysign(math.inf if abs(result) >= 2**128 else float(result), exact))


def in_float32(operation: Callable) -> Callable:
    """numpy's fp32, which rounds as IEEE 754 says."""

    def compute(*codes: int) -> int:
        with np.errstate(all="ignore"):
            return code(operation(*(np.uint32(x).view(np.float32) for x in codes)))

    return compute


def in_float64(operation: Callable) -> Callable:
    def compute(a: int) -> int:
        with np.errstate(all="ignore"):
            return code(operation(np.float64(number(a))))

    return compute


def exp2_flushed(x: np.float64) -> np.float64:
    y = np.exp2(x if math.isnan(x) or abs(x) >= 2.0**-126 else np.float64(0))
    return y if math.isnan(y) or y >= 2.0**-126 else np.float64(0)


def extreme(best: Callable) -> Callable:
    """Of two floats: a number wins against NaN, and -0 is less than +0."""

    def compute(a: int, b: int) -> int:
        numbers = [x for x in (a, b) if not math.isnan(number(x))]
        return best(numbers, key=lambda x: (number(x), x >> 31 == 0)) if numbers else NAN

    return compute


COMPARE = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
}


def compare_floats(name: str, with_nan: bool) -> Callable:
    def compute(a: int, b: int) -> bool:
        x, y = number(a), number(b)
        return with_nan if math.isnan(x) or math.isnan(y) else COMPARE[name](x, y)

    return compute


def _floats() -> dict[str, Scalar]:
    one, two = ("f32", "f32"), ("f32", "f32 f32")
    found = {
        "add.f32": Scalar(*two, in_float32(lambda a, b: a + b)),
        "sub.f32": Scalar(*two, in_float32(lambda a, b: a - b)),
        "mul.f32": Scalar(*two, in_float32(lambda a, b: a * b)),
        "div.rn.f32": Scalar(*two, in_float32(lambda a, b: a / b)),
        "fma.rn.f32": Scalar("f32", "f32 f32 f32", fused),
        "rcp.rn.f32": Scalar(*one, in_float32(lambda a: np.float32(1) / a)),
        "sqrt.rn.f32": Scalar(*one, in_float32(np.sqrt)),
        "neg.f32": Scalar(*one, lambda a: a ^ 1 << 31),
        "abs.f32": Scalar(*one, lambda a: a & ~(1 << 31)),
        "max.f32": Scalar(*two, extreme(max)),
        "min.f32": Scalar(*two, extreme(min)),
        "ex2.approx.ftz.f32": Scalar(*one, in_float64(exp2_flushed), 1),
        "lg2.approx.f32": Scalar(*one, in_float64(np.log2), 1),
        "rsqrt.approx.f32": Scalar(*one, in_float64(lambda a: 1 / np.sqrt(a)), 1),
    }
    for name in COMPARE:
        found[f"setp.{name}.f32"] = Scalar("pred", "f32 f32", compare_floats(name, False))
        found[f"setp.{name}u.f32"] = Scalar("pred", "f32 f32", compare_floats(name, True))
    return found


# ---- integers and bits ---------------------------------------------------------------------------------------------------------------------------


def on_signed(bits: int, operation: Callable) -> Callable:
    return lambda *operands: operation(*(signed(x, bits) for x in operands))


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _integers() -> dict[str, Scalar]:
    found = {}
    for bits in (16, 32, 64):
        found[f"add.s{bits}"] = Scalar(f"b{bits}", f"b{bits} b{bits}", lambda a, b: a + b)
        for name, operation in COMPARE.items():
            found[f"setp.{name}.s{bits}"] = Scalar("pred", f"b{bits} b{bits}", on_signed(bits, operation))
    for name, operation in COMPARE.items():
        found[f"setp.{name}.u32"] = Scalar("pred", "b32 b32", operation)
    found["setp.eq.b32"], found["setp.ne.b32"] = (Scalar("pred", "b32 b32", COMPARE[name]) for name in ("eq", "ne"))
    for bits in (32, 64):
        two = (f"b{bits}", f"b{bits} b{bits}")
        found[f"sub.s{bits}"] = Scalar(*two, lambda a, b: a - b)
        found[f"mul.lo.s{bits}"] = Scalar(*two, lambda a, b: a * b)
        for name, operation in (("max", max), ("min", min)):
            found[f"{name}.u{bits}"] = Scalar(*two, operation)
            found[f"{name}.s{bits}"] = Scalar(*two, on_signed(bits, operation))
        divided = (f"b{bits}", f"b{bits} nonzero{bits}")
        found[f"div.u{bits}"] = Scalar(*divided, lambda a, b: a // b)
        found[f"rem.u{bits}"] = Scalar(*divided, lambda a, b: a % b)
        found[f"div.s{bits}"] = Scalar(*divided, on_signed(bits, quotient))
        found[f"rem.s{bits}"] = Scalar(*divided, on_signed(bits, lambda a, b: a - quotient(a, b) * b))
    found["neg.s32"] = Scalar("b32", "b32", lambda a: -a)
    found["mad.lo.s32"] = Scalar("b32", "b32 b32 b32", lambda a, b, c: a * b + c)
    found["mul.wide.u16"] = Scalar("b32", "b16 b16", lambda a, b: a * b)
    found["mul.wide.u32"] = Scalar("b64", "b32 b32", lambda a, b: a * b)
    found["mul.wide.s32"] = Scalar("b64", "b32 b32", on_signed(32, lambda a, b: a * b))
    found["mul.hi.u32"] = Scalar("b32", "b32 b32", lambda a, b: a * b >> 32)
    found["mul.hi.s32"] = Scalar("b32", "b32 b32", on_signed(32, lambda a, b: a * b >> 32))
    return found


def permuted(a: int, b: int, selector: int) -> int:
    data = (b << 32 | a).to_bytes(8, "little")
    nibbles = [selector >> 4 * i & 15 for i in range(4)]
    return int.from_bytes(bytes((0xFF if data[n & 7] & 0x80 else 0) if n & 8 else data[n] for n in nibbles), "little")


def inserted(a: int, b: int, start: int, length: int) -> int:
    mask = ((1 << (length & 255)) - 1 << (start & 255)) & 0xFFFFFFFF
    return b & ~mask | a << (start & 255) & mask


def _bits() -> dict[str, Scalar]:
    found = {}
    for kind in ("pred", "b16", "b32", "b64"):
        for name, operation in (("and", lambda a, b: a & b), ("or", lambda a, b: a | b), ("xor", lambda a, b: a ^ b)):
            found[f"{name}.{kind}"] = Scalar(kind, f"{kind} {kind}", operation)
    found["not.pred"] = Scalar("pred", "pred", lambda a: a ^ 1)
    for bits in (32, 64):
        found[f"not.b{bits}"] = Scalar(f"b{bits}", f"b{bits}", lambda a: ~a)
        found[f"shl.b{bits}"] = Scalar(f"b{bits}", f"b{bits} count", lambda a, n: a << min(n, 64))
        found[f"shr.u{bits}"] = Scalar(f"b{bits}", f"b{bits} count", lambda a, n: a >> n)
        found[f"shr.s{bits}"] = Scalar(f"b{bits}", f"b{bits} count", lambda a, n, bits=bits: signed(a, bits) >> n)
    found["popc.b32"] = Scalar("b32", "b32", lambda a: a.bit_count())
    found["prmt.b32"] = Scalar("b32", "b32 b32 b32", permuted)
    found["bfi.b32"] = Scalar("b32", "b32 b32 count count", inserted)
    return found


# ---- conversions and moves -----------------------------------------------------------------------------------------------------------------------


def half(a: int) -> int:
    with np.errstate(over="ignore"):
        return 0x7FFF if math.isnan(number(a)) else int(np.float16(np.float32(number(a))).view(np.uint16))


def bfloat(a: int) -> int:
    x = number(a)
    if math.isnan(x):
        return 0x7FFF
    result = abs(rounded(Fraction(x), 8, -133)) if math.isfinite(x) else math.inf
    return code(math.copysign(float(result) if result < 2**128 else math.inf, x)) >> 16


def e4m3(a: int) -> int:
    """The nearest of all codes, the even one of two."""
    x = number(a)
    if math.isnan(x):
        return 0x7F
    negative = 0x80 if a >> 31 else 0
    nearest = min(max(x, -448.0), 448.0)
    return min(range(negative, negative + 0x7F), key=lambda i: (abs(E4M3[i] - nearest), i & 1))


def packed(a: int, b: int, c: int) -> int:
    low, high = (max(-128, min(127, signed(x, 32))) & 255 for x in (b, a))
    return low | high << 8 | c << 16


def to_s32(rounding: Callable) -> Callable:
    def compute(a: int) -> int:
        x = number(a)
        if math.isnan(x):
            return 0
        return max(-(2**31), min(2**31 - 1, rounding(x) if math.isfinite(x) else int(math.copysign(2**40, x))))

    return compute


def same(a: int) -> int:
    return a


def _conversions() -> dict[str, Scalar]:
    return {
        "cvt.f32.f16": Scalar("f32", "b16", lambda a: code(float(np.uint16(a).view(np.float16)))),
        "cvt.rn.f16x2.f32": Scalar("b32", "f32 f32", lambda a, b: half(a) << 16 | half(b)),
        "cvt.rn.bf16x2.f32": Scalar("b32", "f32 f32", lambda a, b: bfloat(a) << 16 | bfloat(b)),
        "cvt.rn.satfinite.e4m3x2.f32": Scalar("b16", "f32 f32", lambda a, b: e4m3(a) << 8 | e4m3(b)),
        "cvt.pack.sat.s8.s32.b32": Scalar("b32", "b32 b32 b32", packed),
        "cvt.rn.f32.s32": Scalar("f32", "b32", lambda a: code(float(rounded(Fraction(signed(a, 32)), 24, -149)))),
        "cvt.rn.f32.u32": Scalar("f32", "b32", lambda a: code(float(rounded(Fraction(a), 24, -149)))),
        "cvt.rni.s32.f32": Scalar("b32", "f32", to_s32(round)),
        "cvt.rzi.s32.f32": Scalar("b32", "f32", to_s32(int)),
        "cvt.rmi.f32.f32": Scalar("f32", "f32", in_float32(np.floor)),
        "cvt.s64.s32": Scalar("b64", "b32", lambda a: signed(a, 32)),
        "cvt.u64.u32": Scalar("b64", "b32", same),
        "cvt.u32.u64": Scalar("b32", "b64", same),
        "cvt.u32.u16": Scalar("b32", "b16", same),
        "cvt.u16.u32": Scalar("b16", "b32", same),
        "cvta.to.global.u64": Scalar("b64", "b64", same),
    }


def _moves() -> dict[str, Scalar]:
    found = {f"mov.{kind}": Scalar(register, register, same) for kind, register in _REGISTERS.items()}
    for kind, register in (*_REGISTERS.items(), ("b64", "b64")):
        if kind not in ("pred", "u64"):
            found[f"selp.{kind}"] = Scalar(register, f"{register} {register} pred", lambda a, b, c: a if c else b)
    return found


_REGISTERS = {"pred": "pred", "u16": "b16", "u32": "b32", "b32": "b32", "f32": "f32", "u64": "b64"}

SCALARS: dict[str, Scalar] = _floats() | _integers() | _bits() | _conversions() | _moves()
"""Opcode -> what it gives."""
