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
from operator import itemgetter
from typing import get_args

import torch
from torch import Tensor

from .backends import TABLE
from .block_mask import BLOCK_K, BLOCK_Q, KeptBlocks, num_blocks
from .call import HINTS, Call, Result, Rule

NAMESPACE = "sparge_" + hashlib.sha1(__package__.encode()).hexdigest()[:8]

_NOTHING = nullcontext()
_OF_TENSORS = Call._fields.index("backend")
"""Fields of a call that q and k tell."""
_FIELDS = (*Rule._fields, *Call._fields[_OF_TENSORS:])
_PER_HEAD_TYPES = (float | Tensor, float | Tensor | None)
_TYPES = {float: "float", bool: "bool", int: "int", str: "str", tuple[int, ...]: "int[]", Tensor | None: "Tensor?"}
_TYPES |= dict.fromkeys(_PER_HEAD_TYPES, "float?")
"""Type of a field -> what a schema calls it."""
_PER_HEAD = tuple(i for i, name in enumerate(_FIELDS) if HINTS[name] in _PER_HEAD_TYPES)
_RANGES = tuple(i for i, name in enumerate(_FIELDS) if _TYPES[HINTS[name]] == "int[]")
SCHEMA = ", ".join([f"{_TYPES[HINTS[name]]} {name}" for name in _FIELDS] + [f"Tensor? {_FIELDS[i]}_heads" for i in _PER_HEAD])


_tensors = itemgetter(*(i for i, name in enumerate(Rule._fields + Call._fields) if Tensor in get_args(HINTS[name])))


def pack(call: Call, rule: Rule) -> list:
    """The arguments of the operators that come after q, k and v."""
    flat = [*rule, *call[_OF_TENSORS:]]
    per_head = [flat[i] if isinstance(flat[i], Tensor) else None for i in _PER_HEAD]
    return [None if i in _PER_HEAD and isinstance(x, Tensor) else x for i, x in enumerate(flat)] + per_head


def unpack(q: Tensor, k: Tensor, packed: tuple) -> tuple[Call, Rule]:
    """What `pack` was given; an operator has its tuples as lists."""
    flat = list(packed[: len(_FIELDS)])
    for i, per_head in zip(_PER_HEAD, packed[len(_FIELDS) :], strict=True):
        if per_head is not None:
            flat[i] = per_head
    for i in _RANGES:
        flat[i] = tuple(flat[i])
    return Call.of(q, k, *flat[len(Rule._fields) :]), Rule(*flat[: len(Rule._fields)])


def select(call: Call, rule: Rule, q: Tensor, k: Tensor) -> KeptBlocks:
    """The blocks that `rule` keeps."""
    if not _watched(call, rule, q, k):
        return _select(call, rule, q, k)
    blocks, counts, visible = _select_operator(q, k, *pack(call, rule))
    return KeptBlocks(blocks, counts, visible, num_blocks(call.s_k, BLOCK_K))


def attend(call: Call, rule: Rule, q: Tensor, k: Tensor, v: Tensor) -> Result:
    """Attention over the blocks that `rule` keeps."""
    if not _watched(call, rule, q, k, v):
        return _attend(call, rule, q, k, v)
    out, lse, blocks, counts, visible, pv_tiles = _attend_operator(q, k, v, *pack(call, rule))
    kept = KeptBlocks(blocks, counts, visible, num_blocks(call.s_k, BLOCK_K)) if call.want_info else None
    return Result(out, lse if call.want_lse else None, kept, pv_tiles if call.want_info else None)


def _watched(call: Call, rule: Rule, *inputs: Tensor) -> bool:
    """Whether the dispatcher has anything to do for a call: for a compiler, a tracer, a mode, a torch.func transform, a subclass, a tensor without
    memory, or a view that is negated when read. Backends read addresses and would miss it. `make bench` measures what an operator adds to a call."""
    if torch.compiler.is_compiling() or inputs[0].is_meta or torch._C._get_tracing_state() is not None:
        return True
    if torch._C._len_torch_dispatch_stack() or _transformed() is not None or _pre_dispatch(torch._C.DispatchKey.PreDispatch):
        return True
    values = (*inputs, *_tensors((*rule, *call)))
    return any(x.is_neg() or x._is_zerotensor() if type(x) is Tensor else isinstance(x, Tensor) for x in values)


def _select(call: Call, rule: Rule, q: Tensor, k: Tensor) -> KeptBlocks:
    with _as_given(call):
        return TABLE[call.backend].select(call, rule, q, k)


def _attend(call: Call, rule: Rule, q: Tensor, k: Tensor, v: Tensor) -> Result:
    with _as_given(call):
        return TABLE[call.backend].run(call, rule, q, k, v)


def _select_real(q: Tensor, k: Tensor, *packed) -> tuple[Tensor, Tensor, Tensor]:
    kept = _select(*unpack(q, k, packed), q, k)
    return kept.blocks, kept.counts, kept.visible


def _attend_real(q: Tensor, k: Tensor, v: Tensor, *packed) -> tuple[Tensor, ...]:
    call, rule = unpack(q, k, packed)
    out, lse, kept, pv_tiles = _attend(call, rule, q, k, v)
    info = [kept.blocks, kept.counts, kept.visible, pv_tiles] if call.want_info else [q.new_empty(0) for _ in range(4)]
    return out, lse if call.want_lse else q.new_empty(0, dtype=torch.float32), *info


def _as_given(call: Call):
    """A context in which autocast leaves the backends' fp32 products alone."""
    kind = call.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING


def _select_fake(q: Tensor, k: Tensor, *packed) -> tuple[Tensor, ...]:
    return _kept_fake(q, *unpack(q, k, packed))


def _attend_fake(q: Tensor, k: Tensor, v: Tensor, *packed) -> tuple[Tensor, ...]:
    call, rule = unpack(q, k, packed)
    lse = q.new_empty(q.shape[:3] if call.want_lse else (0,), dtype=torch.float32)
    if not call.want_info:
        return torch.empty_like(q), lse, *(q.new_empty(0) for _ in range(4))
    return torch.empty_like(q), lse, *_kept_fake(q, call, rule), q.new_empty((call.batch, call.heads, 2), dtype=torch.int32)


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
        ("select", "Tensor q, Tensor k", "(Tensor, Tensor, Tensor)", _select_real, _select_fake),
        ("attend", "Tensor q, Tensor k, Tensor v", f"({', '.join(['Tensor'] * 6)})", _attend_real, _attend_fake),
    ):
        library.define(f"{name}({tensors}, {SCHEMA}) -> {returns}")
        library.impl(name, real, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    vars(_attend_real)["library"] = library  # the dispatcher holds the function, the function the library: it outlives a re-import of this module


_register()
_transformed, _pre_dispatch = torch._C._functorch.peek_interpreter_stack, torch._C._dispatch_tls_is_dispatch_key_included
_select_operator = getattr(torch.ops, NAMESPACE).select.default
_attend_operator = getattr(torch.ops, NAMESPACE).attend.default
