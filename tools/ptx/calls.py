"""Whole calls of the public functions that the PTX of the kernels is run through. What they must give stands in tools/emulator/whole_call.py.

calls.run(machine, ("sm_90", "fp8"), calls.PLAIN["topk"](64))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from executor import ptx_of
from sparge_kernels import block_sparse_attention, config, order, sparse_attention
from torch import Tensor
from whole_call import check as check_numbers
from whole_call import clustered, falling, normal

HALF = torch.float16
HOPPER = ("sm_90", "fp8")


def earlier_with(variant: config.Variant, arch: str) -> str | None:
    """The first of the packaged architectures before `arch` whose kernels of that variant have the same instructions."""

    def instructions(arch: str) -> str:
        return ptx_of(variant, arch).partition(".address_size")[2]

    before = config.SHIPPED[: config.SHIPPED.index(arch)]
    return next((other for other in before if variant in config.variants(other) and instructions(other) == instructions(arch)), None)


class WholeCall(NamedTuple):
    """One call: q, k, v in the layout that `options` (the public function's) say, and a block map where the caller has chosen."""

    tensors: tuple[Tensor, Tensor, Tensor]
    options: dict
    block_mask: Tensor | None = None


def tokens(dim: int, *, heads: tuple[int, int] = (2, 1), lengths: tuple[int, int] = (300, 391), batch: int = 1, dtype: torch.dtype = HALF):
    """q, k, v with `heads` of queries and of keys, and as many of the two `lengths`."""
    (h, h_kv), (s_q, s_k) = heads, lengths
    return clustered(1, batch, h, s_q, dim, dtype), clustered(3, batch, h_kv, s_k, dim, dtype), clustered(5, batch, h_kv, s_k, dim, dtype)


def lists(lengths: tuple[int, ...], *, rows: int = 3, columns: int = 9) -> Tensor:
    """A block map (1, 2, rows, columns) whose rows keep so many blocks each, one length after the other, anywhere."""
    made = torch.zeros(2 * rows, columns, dtype=torch.bool)
    generator = torch.Generator().manual_seed(5)
    for i, row in enumerate(made):
        row[torch.randperm(columns, generator=generator)[: lengths[i % len(lengths)]]] = True
    return made.view(1, 2, rows, columns)


def key_mask(kind: str, s_k: int = 391) -> Tensor:
    """For one batch element: "bool" and "bias" hide a whole block and scattered keys, "nothing" shows none."""
    valid = torch.rand(1, s_k, generator=torch.Generator().manual_seed(2)) > 0.3
    valid[:, 128:192] = False
    return {"bool": valid, "bias": torch.where(valid, normal(6, 1, s_k), -math.inf), "nothing": torch.zeros_like(valid)}[kind]


def _plan() -> order.OrderPlan:
    return order.plan("hilbert", (30, (4, 8, 10), 17))


LENGTHS = (0, 1, 3, 8, 9, 2)

PLAIN: dict[str, Callable[[int], WholeCall]] = {
    "topk": lambda d: WholeCall(tokens(d), dict(topk=0.6)),
    "lists of 0 to 9 blocks": lambda d: WholeCall(tokens(d, lengths=(300, 560)), {}, lists(LENGTHS)),
    "tiles drop out": lambda d: WholeCall(falling(d, dtype=HALF), dict(topk=1, pvthreshd=4.0)),
    "causal, offset 91": lambda d: WholeCall(tokens(d), dict(topk=0.5, causal=True, causal_offset=91)),
    "causal, offset -40": lambda d: WholeCall(tokens(d), dict(topk=0.5, causal=True, causal_offset=-40)),
    "cdf and the judge": lambda d: WholeCall(tokens(d), dict(cdfthreshd=0.6, simthreshd1=0.3)),
    "means, always_keep": lambda d: WholeCall(
        tokens(d), dict(cdfthreshd=0.5, score="mean", always_keep={"q": [(130, 140)], "k": [(70, 71), (300, 391)]})
    ),
    "batch 2, tiles drop out of one head": lambda d: WholeCall(
        tuple(torch.cat((x, 0.9 * x)) for x in falling(d, dtype=HALF)), dict(topk=1, pvthreshd=torch.tensor([4.0, 300.0]))
    ),
    "compensate": lambda d: WholeCall(tokens(d), dict(topk=0.35, compensate=True)),
    "compensate, causal": lambda d: WholeCall(tokens(d), dict(topk=0.35, compensate=True, causal=True)),
    "Hilbert order": lambda d: WholeCall(tokens(d, lengths=(_plan().length,) * 2), dict(topk=0.5, order=_plan())),
    "batch 2, GQA, NHD": lambda d: WholeCall(
        tuple(x.transpose(1, 2).contiguous() for x in tokens(d, heads=(4, 2), lengths=(140, 200), batch=2)), dict(topk=0.5, layout="NHD")
    ),
    "one query, one key": lambda d: WholeCall(tokens(d, lengths=(1, 1)), dict(topk=0.5)),
    "scores in the hundreds": lambda d: WholeCall(tuple(x * m for x, m in zip(tokens(d), (30, 1, 1), strict=True)), dict(topk=1)),
}
"""What kernels without a key mask run, by head size; the first three are the shortest way through all of an attention kernel."""

MASKED: dict[str, Callable[[int], WholeCall]] = {
    "bool": lambda d: WholeCall(tokens(d), dict(topk=0.6, key_mask=key_mask("bool"))),
    "bias, causal, compensate": lambda d: WholeCall(
        tokens(d), dict(topk=0.4, key_mask=key_mask("bias"), causal=True, causal_offset=60, compensate=True)
    ),
    "bool, lists, tiles drop out": lambda d: WholeCall(
        falling(d, 300, 560, HALF), dict(key_mask=key_mask("bool", 560), pvthreshd=4.0), lists(LENGTHS)
    ),
    "bias": lambda d: WholeCall(tokens(d), dict(topk=0.6, key_mask=key_mask("bias"))),
    "bool, compensate": lambda d: WholeCall(tokens(d), dict(topk=0.3, key_mask=key_mask("bool"), compensate=True)),
    "nothing is seen": lambda d: WholeCall(tokens(d), dict(topk=0.6, key_mask=key_mask("nothing"))),
}
"""What kernels with one run."""

SHORT = {name: make for group in (PLAIN, MASKED) for name, make in list(group.items())[:3]}

TYPES: dict[torch.dtype, tuple[int, ...]] = {torch.float32: (48, 96), torch.bfloat16: (33, 100), HALF: (40, 127)}
"""Input types, each with head sizes that the pre-pass pads to 64 and to 128."""


def of_type(dtype: torch.dtype, dim: int) -> WholeCall:
    """One that reads rows of any alignment, and writes such."""
    return WholeCall(tokens(dim, heads=(4, 2), lengths=(140, 200), dtype=dtype), dict(topk=0.4, compensate=True))


def long_lists(dim: int) -> WholeCall:
    """Six items of dense rows: on one block of the grid the ring of tiles is gone round sixteen times."""
    return WholeCall(tokens(dim, lengths=(300, {64: 2100, 128: 1400}[dim])), dict(topk=1))


class Result(NamedTuple):
    out: Tensor
    lse: Tensor
    info: object

    @property
    def bits(self) -> tuple[Tensor, ...]:
        """All that a call gives, as bytes."""
        told = (self.out, self.lse, self.info.pv_tiles, self.info.kept.counts, self.info.kept.to_map())
        return tuple(x.contiguous().view(torch.uint8) for x in told)


def attend(call: WholeCall, name: str = "cuda") -> Result:
    """The call on the machine that the backend of that name finds."""
    how = dict(backend=name, return_lse=True, return_info=True, **call.options)
    if call.block_mask is None:
        return Result(*sparse_attention(*call.tensors, **how))
    return Result(*block_sparse_attention(*call.tensors, call.block_mask, **how))


_REFERENCE = {"compensate", "key_mask", "causal", "causal_offset", "pvthreshd"}


def check(call: WholeCall, arch: str, pv: str, result: Result) -> None:
    """The blocks are the torch backend's, the numbers within the bounds of whole_call.py."""
    out, (q, k, v), plain = result.out, call.tensors, attend(call, "torch").info
    kept, wanted = result.info.kept, plain.kept
    assert torch.equal(kept.to_map(), wanted.to_map()) and torch.equal(kept.visible, wanted.visible), "other blocks"
    if call.options.get("layout") == "NHD":
        out, q, k, v = (x.transpose(1, 2) for x in (out, q, k, v))
    how = {name: value for name, value in call.options.items() if name in _REFERENCE}
    if "order" in call.options:
        how["perm"] = call.options["order"].perm
    if "pvthreshd" in how:
        assert result.info.pv_skipped.max() > 0.1, "no tile drops out: the call says nothing"
    form = "sm90" if config.attention_kernel(arch, pv) is config.SM90 else pv
    check_numbers(out, result.lse, result.info, q, k, v, form=form, flat=False, **how)


def run(machine: Callable, form: tuple[str, str], call: WholeCall, **how) -> None:
    """`check` of the call on what the fixture `machine` makes for (arch, pv)."""
    machine(*form, **how)
    check(call, *form, attend(call))
