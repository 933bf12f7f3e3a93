"""Fixtures shared by all tests: ComfyUI in this process, and the pack as ComfyUI would import it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from required import missing

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def comfy():
    """The `comfy` package of the ComfyUI tree in use, on the CPU with PyTorch attention."""
    import comfy_launch
    import install

    tree = install.comfyui_tree()
    if not (tree / "main.py").is_file():
        missing(f"a ComfyUI tree ({tree})")
    comfy_launch.enter(tree)
    import comfy.model_management
    import comfy.sample
    import comfy.sd

    return comfy


@pytest.fixture(scope="session")
def pack(comfy):
    """The pack's root package, imported under a name of its own the way ComfyUI imports a custom node folder."""
    return load_pack("sparge_pack_under_test")


def load_pack(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
