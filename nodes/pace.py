"""Never slower: the calls that sparse attention slowed down when it was measured, kept in ComfyUI's user folder; later runs leave them dense.

A decision is made once, at the end of the run that measured, for one device, one version of pack and PyTorch, one shape of call, one set of settings
and one attention that it is compared with; another mode of a node is another attention. A run goes by what it read when it opened: none changes in
its middle, so a seed gives its picture again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import re
import threading
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from . import _comfy, _kernels, reasons
from .settings import Settings
from .speedup import FEWEST, CallKind, Comparison, Pair

logger = logging.getLogger("sparge_attention")

FOLDER, NAME = "sparge_attention", "pace.json"
SHOWN = f"{FOLDER}/{NAME} in ComfyUI's user folder"
VERSION = 1
MAX_KEPT = 500  # decisions; beyond it the oldest go
MAX_BYTES = 1 << 20  # of a file that is read
MAX_SAID = 3
SAYS_OFF = re.compile(rb"""(["']off["']|\boff\s*[:=])(?!\s*:?\s*false)""", re.IGNORECASE)
"""What a file that is not understood has in it where the user may have meant to switch this off; files of ours say `"off": false`."""
ABOUT = 'Attention calls that were slower sparse than dense when measured. Delete this file to measure again; "off": true switches this off for good.'
SETTINGS = ("topk", "cdfthreshd", "simthreshd1", "pvthreshd", "compensate", "token_order", "protect_references")
"""The inputs of Sparge Attention that a call's time hangs on, but for the backend, of which the one that runs the call counts."""


class Slower(NamedTuple):
    """Milliseconds of a sparse call and of a dense one in its place, the medians of so many pairs."""

    sparse_ms: float
    dense_ms: float
    pairs: int


@dataclass(frozen=True)
class Kept:
    """What the file holds: decisions by the JSON text of what they hold for, oldest first; `off`: the user wants none."""

    off: bool = False
    slower: dict[str, Slower] = field(default_factory=dict)


class Pace:
    """What one run knows of earlier measurements, and what it adds to them.

    A run whose monitors all have measure_dense off neither knows nor adds anything, nor does one with a policy, whose topk may be another in every
    call. A run without a monitor adds nothing.
    """

    def __init__(self, settings: Settings, monitors: dict[str, bool]):
        measures, folder = any(monitors.values()), _comfy.user_folder()
        is_on = folder is not None and settings.policy is None and (measures or not monitors)
        self._path = folder / FOLDER / NAME if folder is not None and is_on else None
        self._learns = measures
        self._backend = settings.backend
        self._settings = {name: getattr(settings, name) for name in SETTINGS}
        kept = _load(self._path) if self._path is not None else Kept()
        self._slower = {} if kept.off else kept.slower
        self._reasons: dict[CallKind, str | None] = {}

    @property
    def knows_any(self) -> bool:
        """Whether `reason` can have an answer."""
        return bool(self._slower)

    def reason(self, kind: CallKind) -> str | None:
        """Why a call of this kind stays dense; None where it was never measured to be slower sparse."""
        if kind not in self._reasons:
            found = self._slower.get(self._key(kind))
            times = found and {"sparse": _plain(found.sparse_ms), "dense": _plain(found.dense_ms)}
            self._reasons[kind] = reasons.SLOWER.format(**times, instead=kind.instead, file=SHOWN) if times else None
        return self._reasons[kind]

    def learn(self, measured: Comparison) -> str:
        """Decides about what a run has measured; the kinds of calls that later runs will leave dense, as text, or ""."""
        if self._path is None or not self._learns:
            return ""
        found = {kind: slower for kind in measured.kinds() if (slower := slower_by(measured.pairs(kind))) is not None}
        if not found:
            return ""
        kept = _load(self._path)  # once more: another run may have ended since
        if kept.off:
            return ""
        entries = {**kept.slower, **{self._key(kind): ms for kind, ms in found.items()}}
        if not _write(self._path, Kept(False, dict(list(entries.items())[-MAX_KEPT:]))):
            return ""
        said = [
            f"{_plain(ms.sparse_ms)} ms against {_plain(ms.dense_ms)} ms for {kind.instead} at {kind.shape.s_k:,} tokens"
            for kind, ms in found.items()
        ]
        return ", ".join(said[:MAX_SAID] + ["and others"] * (len(said) > MAX_SAID))

    def _key(self, kind: CallKind) -> str:
        shape, dtype = kind.shape, str(kind.dtype).removeprefix("torch.")
        head_dim = shape.q[-1] if len(shape.q) == 4 else shape.q[-1] // shape.heads
        backend = _kernels.backend_for(kind.device, self._backend, head_dim, kind.dtype, shape.masked).backend
        versions = {"pack": _kernels.VERSION, "torch": str(torch.__version__)}
        call = {**shape._asdict(), "dtype": dtype, "backend": backend, "instead": kind.instead, "attention": kind.attention}
        return _text({"device": device_name(kind.device), **versions, "call": call, "settings": self._settings})


def slower_by(pairs: list[Pair]) -> Slower | None:
    """Slower, if the fastest sparse call of the steps of these pairs, all of one kind, took longer than the slowest dense one; else None.

    Fewer than `FEWEST` steps say too little: what held the machine up for a moment may have met all of one step.
    """
    sparse, dense = sorted(pair.sparse_ms for pair in pairs), sorted(pair.dense_ms for pair in pairs)
    if len({pair.step for pair in pairs}) < FEWEST or min(pair.fastest_ms for pair in pairs) <= dense[-1]:
        return None
    return Slower(sparse[len(pairs) // 2], dense[len(pairs) // 2], len(pairs))


@lru_cache(maxsize=16)
def device_name(device: torch.device) -> str:
    """What kind of device it is, as far as speed hangs on it; no name of a machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {platform.machine()}, {torch.get_num_threads()} threads"


def _plain(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2g}"


def _text(what: object) -> str:
    return json.dumps(what, sort_keys=True, allow_nan=False)


# The file.


@lru_cache(maxsize=16)
def _warn(sentence: str) -> None:
    """Once for each cause."""
    logger.warning(sentence)


def _load(path: Path) -> Kept:
    """What is kept; nothing where there is no file. One that is broken or not ours is written anew.

    What cannot be read, or may be meant to switch this off, counts as switched off: the user's word is never written over.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return Kept()
    except OSError as error:
        _warn(f"Sparge Attention: what was measured cannot be read from {path} ({error}); nothing is kept, and later runs measure again")
        return Kept(off=True)
    try:
        return _parsed(content)
    except Exception as error:  # whatever is in it, no run ends by it
        if SAYS_OFF.search(content.replace(b"\0", b"")):  # of UTF-16
            _warn(
                f'Sparge Attention: {path} is not understood ({error}) but has "off" in it; it is left alone, and nothing is kept. Write '
                '{"off": true} into it to switch this off, or delete it to measure again'
            )
            return Kept(off=True)
        logger.warning("Sparge Attention: %s is not what was measured, or broken (%s); it is ignored and written anew", path, error)
        _write(path, Kept())
    return Kept()


def _parsed(content: bytes) -> Kept:
    if len(content) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES:,} bytes")
    data = json.loads(content.decode("utf-8-sig"))
    if isinstance(data, dict) and data.get("off") is True:
        return Kept(off=True)
    if not isinstance(data, dict) or data.get("version") != VERSION or data.get("off", False) is not False:
        raise ValueError(f'it has no version {VERSION}, or an "off" that is neither true nor false')
    entries = data.get("slower", [])
    if not isinstance(entries, list) or not all(_is_entry(entry) for entry in entries):
        raise ValueError("an entry is not understood")
    slower = {_text(entry["of"]): Slower(entry["sparse_ms"], entry["dense_ms"], entry["pairs"]) for entry in entries}
    return Kept(slower=slower)


def _is_entry(entry: object) -> bool:
    numbers = [entry.get(name) for name in Slower._fields] if isinstance(entry, dict) and isinstance(entry.get("of"), dict) else [None]
    return all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) and n > 0 for n in numbers)


def _write(path: Path, kept: Kept) -> bool:
    """Puts a whole file in the place of the old one, so that nobody reads half of one; whether that went well."""
    entries = [{"of": json.loads(of), **slower._asdict()} for of, slower in kept.slower.items()]
    text = json.dumps({"about": ABOUT, "version": VERSION, "off": kept.off, "slower": entries}, indent=1, allow_nan=False)
    new = path.with_name(f"{NAME}.{os.getpid()}.{threading.get_ident()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except OSError as error:
        _warn(f"Sparge Attention: what was measured cannot be kept in {path} ({error}); later runs measure again")
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        return False
    return True
