"""What passes from the public functions down to the workspace: which blocks are kept (`Rule`), what is asked (`Call`), what came of it (`Result`).

Both are made once, by the public functions, from checked arguments. A backend that is asked whether it takes calls of a kind sees a `Kind` alone.
"""

from __future__ import annotations

from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor

from .block_mask import KeptBlocks


class Kind(NamedTuple):
    """What a backend takes or declines a call by; the defaults ask for the device alone.

    `asked` is the caller's `backend`; `masked`: there is a key mask.
    """

    device: torch.device
    asked: str = "auto"
    dtype: torch.dtype = torch.float16
    dim: int = 64
    s_k: int = 1
    masked: bool = False


class Rule(NamedTuple):
    """What decides the kept blocks; each number may be a per-head tensor (H,) of any dtype, which counts as fp32.

    Attributes
    ----------
    topk, cdf : number, tensor or None
        Share of the visible blocks, predicted softmax mass. None: not used; both given: the union.
    sim : number or tensor
        Self-similarity below which a block is kept whatever its score; not above 0: off.
    score : "subblock" | "mean"
    block_map : bool (B|1, H|1, N_q, N_k) or None
        On the device of the call, in plan order. Its visible part is kept and nothing is selected.
    """

    topk: float | Tensor | None = None
    cdf: float | Tensor | None = None
    sim: float | Tensor = -1.0
    score: str = "subblock"
    block_map: Tensor | None = None

    @property
    def judged(self) -> bool:
        """Whether blocks are kept for their self-similarity."""
        return isinstance(self.sim, Tensor) or self.sim > 0

    @property
    def share(self) -> float | None:
        """The one number that bounds what every row keeps, where there is one."""
        if isinstance(self.topk, Tensor) or self.block_map is not None or self.cdf is not None or self.judged:
            return None
        return self.topk


class Call(NamedTuple):
    """One attention call but for q, k, v and its rule.

    The first eight fields are what q (B, H, S_q, D) and k (B, H_kv, S_k, D) are like; the others are the arguments of `sparse_attention`, checked.

    Attributes
    ----------
    backend : str
        The one that runs it.
    pvthreshd : number or tensor (H,) of any dtype, which counts as fp32
    want_lse, want_info : bool
        What the result is to hold beside the output.
    keep_q, keep_k : flat (start, end, start, end, ...)
        Token ranges in the caller's order whose blocks attend to everything visible, or are kept by every row.
    perm : int64 (S,) or None
        `perm[p]` is the caller's token at position p of the token order.
    key_mask : bool or additive float (B, S_k), or None
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    s_q: int
    s_k: int
    dim: int
    backend: str
    scale: float
    causal: bool = False
    causal_offset: int = 0
    smooth_k: bool = True
    pvthreshd: float | Tensor = 15.0
    compensate: bool = False
    want_lse: bool = False
    want_info: bool = False
    keep_q: tuple[int, ...] = ()
    keep_k: tuple[int, ...] = ()
    perm: Tensor | None = None
    key_mask: Tensor | None = None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, *rest, **more) -> Call:
        """The call of q (B, H, S_q, D) and k (B, H_kv, S_k, D); `rest` and `more` are the fields from `backend` on."""
        batch, heads, s_q, dim = q.shape
        return cls(q.device, q.dtype, batch, heads, k.shape[1], s_q, k.shape[2], dim, *rest, **more)


HINTS = get_type_hints(Rule) | get_type_hints(Call)
"""Field -> its type; no name is a field of both."""


class Form(NamedTuple):
    """What a tensor is like."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Result(NamedTuple):
    """What a backend made of a call.

    out like q; lse fp32 (B, H, S_q), None unless `want_lse`; the kept blocks, and int32 (B, H, 2), both None unless `want_info`: the tiles of kept
    blocks whose PV half was skipped, and the tiles of kept blocks in all (0 where a backend knows no tiles).
    """

    out: Tensor
    lse: Tensor | None
    kept: KeptBlocks | None
    pv_tiles: Tensor | None


class Availability(NamedTuple):
    """Whether a backend can run some call on this machine; and why not, or on what it runs by itself."""

    available: bool
    reason: str


class SelfTest(NamedTuple):
    """A device on which the self-test runs a backend, and the relative L2 error that quantisation may cost there."""

    device: torch.device
    error: float
