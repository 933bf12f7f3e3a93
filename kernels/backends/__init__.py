"""The ordered table of backends. Each is a module with `why_not(call)`, `select(...)`, `attend(...)`, and the facts below as constants."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UnsupportedCall
from . import torch as torch_backend

TABLE = {"torch": torch_backend}
"""Name -> module, in the order in which `backend="auto"` asks them."""

NAMES = ("auto", *TABLE)


@dataclass(frozen=True)
class BackendStatus:
    """What a backend is on this machine.

    Attributes
    ----------
    available : bool
        Whether it can run some call here.
    reason : str or None
        Why not, or on what it runs by itself.
    quantised : bool
        Whether it works on 8-bit values (else it is exact).
    skips_pv : bool
        Whether it profits from `pvthreshd`.
    """

    available: bool
    reason: str | None
    quantised: bool
    skips_pv: bool


def report() -> dict[str, BackendStatus]:
    """Every backend, whether it is available on this machine, and why not. Exported as `sparge_kernels.backends`."""
    return {
        "torch": BackendStatus(True, "any device; chosen by itself on the CPU only", torch_backend.quantised, torch_backend.skips_pv),
    }


def choose(call) -> str:
    """The name of the first backend that takes `call` (an `ops.Call`), or the one it asks for.

    Raises
    ------
    UnsupportedCall
        With every backend's reason.
    """
    names = tuple(TABLE) if call.backend == "auto" else (call.backend,)
    reasons = {}
    for name in names:
        reasons[name] = TABLE[name].why_not(call)
        if reasons[name] is None:
            return name
    raise UnsupportedCall(reasons)
