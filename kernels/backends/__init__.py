"""The ordered table of backends, and which of them runs a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..block_mask import KeptBlocks
from ..call import Availability, Call, Form, Kind, Result, Rule, SelfTest
from ..errors import UnsupportedCall
from . import cuda as cuda_backend
from . import torch as torch_backend


class Backend(Protocol):
    """What a backend's module has; `quantised` and `skips_pv` as in `BackendChoice`."""

    quantised: bool
    skips_pv: bool

    def why_not(self, kind: Kind) -> str | None:
        """None, or why it declines calls of a kind."""

    def status(self) -> Availability:
        """What `report` says of it."""

    def self_test_devices(self) -> list[SelfTest]:
        """Where the self-test runs it."""

    def blocks_form(self, call: Call, rule: Rule) -> Form:
        """Of the kept blocks that the next two return: either form of `KeptBlocks.blocks`."""

    def select(self, call: Call, rule: Rule, q: Tensor, k: Tensor) -> KeptBlocks:
        """The blocks that `rule` keeps; q (B, H, S_q, D) and k (B, H_kv, S_k, D) in the caller's order."""

    def run(self, call: Call, rule: Rule, q: Tensor, k: Tensor, v: Tensor) -> Result:
        """Attention over the blocks that `rule` keeps; v is like k."""


TABLE: dict[str, Backend] = {"cuda": cuda_backend, "torch": torch_backend}
"""In the order in which `backend="auto"` asks them."""

NAMES = ("auto", *TABLE)
"""What the argument `backend` may be. Exported as `sparge_kernels.BACKEND_NAMES`."""


@dataclass(frozen=True)
class BackendStatus:
    """What a backend is on this machine.

    Attributes
    ----------
    available : bool
        Whether it can run some call here.
    reason : str or None
        Why not, or on what it runs by itself.
    quantised, skips_pv : bool
        As in `BackendChoice`.
    """

    available: bool
    reason: str | None
    quantised: bool
    skips_pv: bool


@dataclass(frozen=True)
class BackendChoice:
    """Which backend runs calls of a kind; see `sparge_kernels.can_run`.

    Attributes
    ----------
    backend : str or None
        Its name; None where none does.
    why_not : str or None
        None, or every backend's reason in one sentence.
    quantised : bool
        Whether it works on 8-bit values (else it is exact, or there is none).
    skips_pv : bool
        Whether it profits from `pvthreshd`.
    """

    backend: str | None
    why_not: str | None
    quantised: bool
    skips_pv: bool


def report() -> dict[str, BackendStatus]:
    """Every backend, whether it is available on this machine, and why not. Exported as `sparge_kernels.backends`."""
    return {name: BackendStatus(*backend.status(), backend.quantised, backend.skips_pv) for name, backend in TABLE.items()}


def choose(kind: Kind) -> str:
    """The name of the first backend that takes calls of a kind, or the one they ask for.

    Raises
    ------
    UnsupportedCall
        With every backend's reason.
    """
    reasons = {}
    for name in TABLE if kind.asked == "auto" else (kind.asked,):
        reason = TABLE[name].why_not(kind)
        if reason is None:
            return name
        reasons[name] = reason
    raise UnsupportedCall(reasons)
