"""The inputs of SpargeAttention in one table, and their checked values.

A field of `Settings` that is made by `_input` is a row of the table: the node's schema, the checks and the tests read it from there. A new input is
one such field, and its sentences in the locales and help pages.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from torch import Tensor

from . import _kernels, presets, reasons

DENSE_AT_TOPK_1 = True
"""Whether topk 1 is dense attention. Tests switch it off: then everything kept goes through the kernels, which must change nothing."""


@dataclass(frozen=True, eq=False)
class Rule:
    """What decides the kept blocks of a call, and what is made of the others; names and values are those of `sparse_attention`."""

    topk: float | Tensor
    cdfthreshd: float | None
    simthreshd1: float
    pvthreshd: float
    compensate: bool

    @property
    def is_dense(self) -> bool:
        """Whether topk is 1, for all heads alike."""
        return DENSE_AT_TOPK_1 and not isinstance(self.topk, Tensor) and self.topk >= 1


class Limits(NamedTuple):
    """Of a number: its range, the step of its widget, and what to do about a value outside."""

    low: float
    high: float
    step: float
    remedy: str


@dataclass(frozen=True)
class Input:
    """A widget of the node; its kind follows from the default's type, and from `choices`.

    default : what it counts as in a prompt that lacks it; new : its value on a new node, where that is another. slider : shown as one.
    advanced : few need it. by_preset : a preset may decide it. What the reader is told of it stands in the locales.
    """

    default: Any
    limits: Limits | None = None
    choices: tuple[str, ...] = ()
    new: Any = None
    slider: bool = False
    advanced: bool = False
    by_preset: bool = False

    def refusal(self, value: object) -> str | None:
        """What is wrong with a value, as the end of a sentence that begins with the input's name; None when nothing is."""
        if self.choices:
            return None if value in self.choices else f"must be one of {', '.join(self.choices)}, got {value!r}"
        if self.limits is None:
            wanted = "true or false, got {!r}; connect a boolean" if isinstance(self.default, bool) else "text, got {!r}; convert it to a string"
            return None if isinstance(value, type(self.default)) else f"must be {wanted.format(value)}"
        low, high, _, remedy = self.limits
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
            return f"must be {low:.10g} to {high:.10g}, got {value!r}; {remedy}"
        is_whole = isinstance(value, int) or not isinstance(self.default, int)
        return None if is_whole else f"must be a whole number, got {value!r}; round it"


def _input(default: Any, limits: Limits | None = None, **row) -> Any:
    return field(default=default, metadata={"input": Input(default, limits, **row)})


@dataclass(frozen=True)
class Settings:
    """The values that a run reads: the node's own, or a preset's in their place (see `for_model`).

    policy : an object with `topk(run, layer)`, a share or None for dense; or None. row : the preset in force, or None. own : what stands in the
    inputs that the preset decides, by name.
    """

    preset: str = _input("off", choices=("auto", "off", *presets.LEVELS), new="auto")
    topk: float = _input(0.5, Limits(0.05, 1.0, 0.01, "use 1 for dense attention, 0.5 to keep half of the blocks"), slider=True, by_preset=True)
    start_percent: float = _input(0.0, Limits(0.0, 1.0, 0.01, "0 starts with the first step"), by_preset=True)
    end_percent: float = _input(1.0, Limits(0.0, 1.0, 0.01, "1 ends with the last step"), by_preset=True)
    dense_blocks: str = _input("", by_preset=True)
    pvthreshd: float = _input(15.0, Limits(1.0, 50.0, 0.5, "15 is a good start, 50 is off in practice"), slider=True)
    min_tokens: int = _input(4096, Limits(0, 1 << 24, 256, "4096 is a good start"))
    simthreshd1: float = _input(-0.1, Limits(-1.0, 1.0, 0.05, "-0.1 switches the judge off"), advanced=True)
    cdfthreshd: float = _input(0.0, Limits(0.0, 1.0, 0.01, "0 switches it off"), advanced=True)
    token_order: str = _input("auto", choices=("auto", *_kernels.ORDER_KINDS), advanced=True)
    compensate: bool = _input(False, advanced=True)
    protect_references: bool = _input(False, advanced=True)
    backend: str = _input("auto", choices=_kernels.BACKEND_NAMES, advanced=True)  # all of them on every machine: a saved workflow loads anywhere
    policy: Any = None
    row: presets.Preset | None = None
    own: Mapping[str, Any] = field(default_factory=dict)

    def rule(self, run, layer: int) -> Rule | None:
        """What decides the kept blocks of layer `layer` at this point of `run`; None: dense. A policy's answer stands in for topk."""
        topk = self.topk if self.policy is None else self.policy.topk(run, layer)
        if topk is not None and not isinstance(topk, Tensor) and (isinstance(topk, bool) or not isinstance(topk, int | float)):
            raise ValueError(f"the policy's topk must be a share, a tensor of shares or None, got {topk!r}; correct the node at the policy input")
        return None if topk is None else Rule(topk, self.cdfthreshd or None, self.simthreshd1, self.pvthreshd, self.compensate)

    @property
    def is_reference(self) -> bool:
        """Whether every call is to stay dense: topk is 1, and no policy says otherwise."""
        return DENSE_AT_TOPK_1 and self.policy is None and self.topk >= 1

    def shown(self) -> dict:
        """The values in force by the inputs' names, for reports; `preset` is the label of the row in force, topk text with a policy."""
        topk = self.topk if self.policy is None else "by the policy"
        return {name: getattr(self, name) for name in INPUTS} | {"preset": self.row.label if self.row else "none", "topk": topk}

    def for_model(self, row: presets.Preset | None) -> Settings:
        """These settings with what their preset decides for a model of the family `row` (None: a family that is not in the table)."""
        chosen, decided = None if self.preset == "off" else presets.chosen(self.preset, row), list(BY_PRESET)
        if chosen is None:
            return self
        if self.preset == "auto":
            decided = [name for name in BY_PRESET if getattr(self, name) == INPUTS[name].default]
            if "start_percent" in decided and chosen.start_percent >= self.end_percent:
                decided.remove("start_percent")  # the user's end_percent would leave no window at all
        own = {name: getattr(self, name) for name in decided}
        return replace(self, row=chosen, own=own, **{name: getattr(chosen, name) for name in decided})

    def preset_line(self, few_steps: bool = False) -> str:
        """The preset and the values in force: "preset Mochi 1: start_percent 0.24", and why one is not the preset's. Without a preset: ""."""
        if self.row is None:
            return ""
        parts, unused, shown = [], [], self.shown()
        for name in BY_PRESET:
            value, wanted, default = shown[name], getattr(self.row, name), INPUTS[name].default
            own = self.own.get(name, default)
            if value == wanted == own == default:
                continue
            said = f"{name} {_plain(value)}" + (f" ({reasons.FEW_STEPS})" if few_steps and name == "start_percent" else "")
            if value != wanted and value == default:  # nobody's choice: `for_model` has left the preset's start out
                said += f" (the preset's {_plain(wanted)} is not before your end_percent)"
            elif value != wanted:
                said += f" (yours; preset: {_plain(wanted)})"
            parts.append(said)
            unused.append(_plain(own))
        not_used = self.preset != "auto" and any(getattr(self, name) != own for name, own in self.own.items())
        return f"preset {self.row.label}: {', '.join(parts)}" + (f" (the inputs' {', '.join(unused)} are not used)" if not_used else "")


INPUTS: dict[str, Input] = {f.name: f.metadata["input"] for f in fields(Settings) if f.metadata}
"""The table: every widget of the node by name, in the order of the node."""

BY_PRESET = tuple(name for name, row in INPUTS.items() if row.by_preset)


def _plain(value) -> str:
    return value or "empty" if isinstance(value, str) else f"{value:g}"


def _entries(text: str) -> list[str]:
    return [entry for entry in re.split(r"[,;\s]+", text) if entry]


def parse_blocks(text: str) -> tuple[tuple[int, int], ...]:
    """ "0, 3-5, -1" -> ((0, 0), (3, 5), (-1, -1)): first and last layers, negative numbers from the end; commas, spaces and semicolons separate.

    Raises
    ------
    ValueError
        For anything that is not a number or a range of them from front to back; one that starts from the end must stop there, too.
    """
    ranges = []
    for entry in _entries(text):
        match = re.fullmatch(r"(-?\d+)(?:-(-?\d+))?", entry)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if (first < 0, first) > (last < 0, last):
            rule = "layer numbers, and ranges of them from front to back, such as '0, 3-5, -1'"
            raise ValueError(f"dense_blocks must hold {rule}, got {entry!r}; correct it or leave it empty")
        ranges.append((first, last))
    return tuple(ranges)


def layer_listed(layer: int, listed: tuple[tuple[int, int], ...], total: int | None) -> bool | None:
    """Whether a layer is in the ranges of `parse_blocks`; None when that hangs on negative numbers and the total is not known yet."""
    unknown = False
    for first, last in listed:
        if last < 0 and total is None:
            unknown = True
            continue
        low, high = (n + total if n < 0 else n for n in (first, last))
        if low <= layer <= high:
            return True
    return None if unknown else False


def listing_none(text: str, total: int) -> str:
    """The entries of `dense_blocks` that list none of a model's `total` layers ("40" of 30, "5--10" of 12), as text; "" when there are none."""
    ranges = {entry: parse_blocks(entry) for entry in _entries(text)}
    return ", ".join(entry for entry, listed in ranges.items() if not any(layer_listed(layer, listed, total) for layer in range(total)))


def check(values: Mapping[str, Any]) -> str | None:
    """What is wrong with the node's plain values, as a sentence; None when nothing is. Values that come over a link are absent or None."""
    given = {name: value for name in INPUTS if (value := values.get(name)) is not None}
    for name, value in given.items():
        wrong = INPUTS[name].refusal(value)
        if wrong is not None:
            return f"{name} {wrong}"
    start, end = given.get("start_percent", 0.0), given.get("end_percent", 1.0)
    if start > end and given.get("preset") not in presets.LEVELS:  # which decide both
        return f"start_percent must not be above end_percent, got {start:g} and {end:g}; swap them"
    try:
        parse_blocks(given.get("dense_blocks", ""))
    except ValueError as error:
        return str(error)
    return None


def parse(values: Mapping[str, Any]) -> Settings:
    """The settings of checked values by name; what is absent has its default.

    Raises
    ------
    ValueError
        For a value that is missing (None) or wrong; the message says which and what to do.
    """
    for name in INPUTS:
        if name in values and values[name] is None:
            raise ValueError(f"{name} must have a value, got None; set it on the node or connect it")
    wrong = check(values)
    if wrong is not None:
        raise ValueError(wrong)
    return Settings(**{**values, "dense_blocks": ", ".join(_entries(values.get("dense_blocks", "")))})
