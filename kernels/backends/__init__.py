"""The ordered table of backends. Each is a module with these functions, and the facts of `BackendStatus` as constants.

why_not(call) -> str | None
    None, or why it declines the `ops.Call`.
status() -> (available, reason), self_test_devices() -> [(device, relative L2 error that quantisation may cost)]
    What `report` and the self-test ask.
blocks_form(call, rule) -> (shape, dtype)
    Of the kept blocks that the next two return: a bool map (B, H, N_q, N_k), or int16 lists (B, H, N_q, capacity) of unsigned key block numbers.
select(call, q, k, rule, key_mask) -> (blocks, counts, visible)
    counts int32 (B, H, N_q): kept blocks of each row; visible int32 (B, 1, N_q).
run(call, q, k, v, rule, block_map, key_mask) -> (out, lse, blocks, counts, visible, skips)
    Selection by `rule`, or the visible part of `block_map` (the other one is None), and attention. lse fp32 (B, H, S_q), empty unless asked for;
    skips int32 (B, H, 2): dropped tiles, and the tiles of kept blocks in all.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UnsupportedCall
from . import cuda as cuda_backend
from . import torch as torch_backend

TABLE = {"cuda": cuda_backend, "torch": torch_backend}
"""Name -> module, in the order in which `backend="auto"` asks them."""

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
    quantised : bool
        Whether it works on 8-bit values (else it is exact).
    skips_pv : bool
        Whether it profits from `pvthreshd`.
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
    return {name: BackendStatus(*module.status(), module.quantised, module.skips_pv) for name, module in TABLE.items()}


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
