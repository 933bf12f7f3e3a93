"""The package's torch.library operators: what torch.compile sees of a call, and the one place that hands calls to backends.

The operator namespace is `sparge_` and eight hex digits of the sha1 of the package's own name, so that two copies of the package (ComfyUI loads
the folder, a script imports the installed one) live in one process without touching each other.

An operator takes tensors and plain values, so that `Rule` and `Call` are flattened before it and restored after it: `SCHEMA`, `pack` and `unpack`
are made from the fields of the two, in their order, without what q and k tell. What may be a number or a tensor per head is a number there, and the
tensors follow all fields.
"""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import fields

import torch
from torch import Tensor

from .backends import TABLE
from .block_mask import BLOCK_K, BLOCK_Q, KeptBlocks, num_blocks
from .call import Call, Result, Rule

NAMESPACE = "sparge_" + hashlib.sha1(__package__.encode()).hexdigest()[:8]

_OF_RULE, _OF_CALL = fields(Rule), fields(Call)[8:]
_RULE_NAMES, _CALL_NAMES = (tuple(item.name for item in items) for items in (_OF_RULE, _OF_CALL))
_PER_HEAD = tuple(i for i, item in enumerate(_OF_RULE + _OF_CALL) if item.type.startswith("float | Tensor"))
_RANGES = tuple(i for i, item in enumerate(_OF_RULE + _OF_CALL) if item.type.startswith("tuple"))
_TYPES = {"float | Tensor": "float?", "float | Tensor | None": "float?", "Tensor | None": "Tensor?", "tuple[int, ...]": "int[]"}
"""Types of fields that an operator calls otherwise."""
SCHEMA = ", ".join(
    [f"{_TYPES.get(item.type, item.type)} {item.name}" for item in _OF_RULE + _OF_CALL]
    + [f"Tensor? {(_RULE_NAMES + _CALL_NAMES)[i]}_heads" for i in _PER_HEAD]
)


def pack(call: Call, rule: Rule) -> list:
    """The arguments of the operators that come after q, k and v."""
    flat = [getattr(rule, name) for name in _RULE_NAMES] + [getattr(call, name) for name in _CALL_NAMES]
    for i in _PER_HEAD:
        per_head = isinstance(flat[i], Tensor)
        flat.append(flat[i] if per_head else None)
        flat[i] = None if per_head else flat[i]
    return flat


def unpack(q: Tensor, k: Tensor, packed: tuple) -> tuple[Call, Rule]:
    """What `pack` was given; an operator has its tuples as lists."""
    flat = list(packed[: -len(_PER_HEAD)])
    for i, per_head in zip(_PER_HEAD, packed[-len(_PER_HEAD) :], strict=True):
        flat[i] = flat[i] if per_head is None else per_head
    for i in _RANGES:
        flat[i] = tuple(flat[i])
    return Call.of(q, k, *flat[len(_OF_RULE) :]), Rule(*flat[: len(_OF_RULE)])


def select(call: Call, rule: Rule, q: Tensor, k: Tensor) -> KeptBlocks:
    """The blocks that `rule` keeps."""
    return KeptBlocks(*_select_operator(q, k, *pack(call, rule)), num_blocks(call.s_k, BLOCK_K))


def attend(call: Call, rule: Rule, q: Tensor, k: Tensor, v: Tensor) -> Result:
    """Attention over the blocks that `rule` keeps."""
    out, *rest = _attend_operator(q, k, v, *pack(call, rule))
    lse = rest[0] if call.want_lse else None
    if not call.want_info:
        return Result(out, lse, None, None)
    *kept, pv_tiles = rest[-4:]
    return Result(out, lse, KeptBlocks(*kept, num_blocks(call.s_k, BLOCK_K)), pv_tiles)


def _select(q: Tensor, k: Tensor, *flat) -> tuple[Tensor, Tensor, Tensor]:
    call, rule = unpack(q, k, flat)
    with _as_given(call):
        kept = TABLE[call.backend].select(call, rule, q, k)
    return kept.blocks, kept.counts, kept.visible


def _attend(q: Tensor, k: Tensor, v: Tensor, *flat) -> list[Tensor]:
    call, rule = unpack(q, k, flat)
    with _as_given(call):
        out, lse, kept, pv_tiles = TABLE[call.backend].run(call, rule, q, k, v)
    result = [out]
    if call.want_lse:
        result.append(lse)
    if call.want_info:
        result += [kept.blocks, kept.counts, kept.visible, pv_tiles]
    return result


def _as_given(call: Call):
    """A context in which autocast leaves the backends' fp32 products alone."""
    kind = call.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _select_fake(q: Tensor, k: Tensor, *flat) -> tuple[Tensor, ...]:
    return _kept_fake(q, *unpack(q, k, flat))


def _attend_fake(q: Tensor, k: Tensor, v: Tensor, *flat) -> list[Tensor]:
    call, rule = unpack(q, k, flat)
    result = [torch.empty_like(q)]
    if call.want_lse:
        result.append(q.new_empty(q.shape[:3], dtype=torch.float32))
    if call.want_info:
        result += [*_kept_fake(q, call, rule), q.new_empty((call.batch, call.heads, 2), dtype=torch.int32)]
    return result


def _kept_fake(q: Tensor, call: Call, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    form, n_q = TABLE[call.backend].blocks_form(call, rule), num_blocks(call.s_q, BLOCK_Q)
    counts = q.new_empty((call.batch, call.heads, n_q), dtype=torch.int32)
    return q.new_empty(form.shape, dtype=form.dtype), counts, q.new_empty((call.batch, 1, n_q), dtype=torch.int32)


def _register() -> None:
    namespace = getattr(torch.ops, NAMESPACE)
    if hasattr(namespace, "attend"):
        return  # this package was imported before in this process; its operators are as good as ours
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name, tensors, returns, real, fake in (
        ("select", "Tensor q, Tensor k", "(Tensor, Tensor, Tensor)", _select, _select_fake),
        ("attend", "Tensor q, Tensor k, Tensor v", "Tensor[]", _attend, _attend_fake),
    ):
        library.define(f"{name}({tensors}, {SCHEMA}) -> {returns}")
        library.impl(name, real, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    _attend.library = library  # the dispatcher holds the function, the function the library: it outlives a re-import of this module


_register()
_select_operator = getattr(torch.ops, NAMESPACE).select.default
_attend_operator = getattr(torch.ops, NAMESPACE).attend.default
