"""What the browser tests share: one browser."""

from __future__ import annotations

import chromium
import install
import pytest
from required import missing


@pytest.fixture(scope="session")
def browser():
    program = chromium.find()
    if program is None:
        missing("Chromium")
    if not (install.comfyui_tree() / "main.py").is_file() or not install.venv_python().is_file():
        missing("a ComfyUI tree or .venv")
    with chromium.Chromium(program) as started:
        yield started
