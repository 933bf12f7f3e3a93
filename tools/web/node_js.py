"""Node, which runs the browser's code without a browser."""

from __future__ import annotations

import functools
import shutil
import subprocess

from required import missing

OLDEST = (18, 19)  # Debian 12 has it; web/package.json tells it that the .js files are modules


@functools.cache
def node() -> str:
    """Node's path; without one that is new enough the test is skipped, and fails with CI=true."""
    found = shutil.which("node")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout.strip() if found else "none"
    if not found or tuple(int(part) for part in version.removeprefix("v").split(".")[:2]) < OLDEST:
        missing(f"Node {OLDEST[0]}.{OLDEST[1]} or newer (found: {version})")
    return found
