"""The package's environment variables, all of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .config import PV


def cache_dir(platform: str = sys.platform) -> Path | None:
    """Where device code that was compiled on this machine is kept, or None where the user has no home folder.

    SPARGE_CACHE_DIR, else `sparge_kernels` in the platform's own cache folder. The folder may not exist yet.
    """
    given = os.environ.get("SPARGE_CACHE_DIR")
    if given:
        return Path(given).expanduser()
    try:
        if platform == "win32":
            base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
        elif platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # what Path.home says of a user without a home folder
        return None
    return Path(base) / "sparge_kernels"


def log() -> bool:
    """SPARGE_LOG: whether every new kind of call has its line in the log at level WARNING, where it is seen without any set-up; unset: DEBUG."""
    return os.environ.get("SPARGE_LOG", "0") not in ("", "0")


def pv() -> str | None:
    """SPARGE_PV: how the GPU kernels hold P and V ("int8", "fp8", "fp16"), or None where the choice is theirs.

    Raises
    ------
    ValueError
        When it is set to anything else.
    """
    given = os.environ.get("SPARGE_PV")
    if not given:
        return None
    if given not in PV:
        raise ValueError(f"the environment variable SPARGE_PV must be one of {', '.join(PV)}, got {given!r}; correct it or unset it")
    return given
