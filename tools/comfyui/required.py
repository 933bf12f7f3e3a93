"""What a test does that lacks a tool."""

from __future__ import annotations

import os

import pytest


def missing(what: str) -> None:
    """Skips a test for want of a tool; under CI=true that is a failure, so that nothing is skipped unseen."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing, and with CI=true a missing tool is a failure")
    pytest.skip(f"{what} is missing")
