"""Starts ComfyUI on any torch, in this process (`enter`) or as the server (`python comfy_launch.py TREE/main.py ...`)."""

from __future__ import annotations

import importlib.metadata
import os
import runpy
import sys
from pathlib import Path

_keep: list = []


def declare_torchvision_ops() -> None:
    """Declares the two operator schemas that a CUDA-built torchvision cannot declare beside a CPU torch.

    Importing torchvision then works; ComfyUI needs only its Python part. Does nothing where torchvision matches torch.
    """
    import torch

    if _keep or torch.version.cuda is not None or "+cpu" in importlib.metadata.version("torchvision"):
        return
    library = torch.library.Library("torchvision", "DEF")
    for op in ("nms", "qnms"):
        library.define(op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _keep.append(library)  # the schemas live as long as this object


def enter(tree: Path, arguments: tuple[str, ...] = ("--cpu", "--disable-auto-launch", "--use-pytorch-cross-attention")) -> None:
    """Makes `comfy` importable from `tree` in this process and parses `arguments` as ComfyUI's command line."""
    if "comfy.options" in sys.modules:
        return
    declare_torchvision_ops()
    sys.path.insert(0, str(tree))
    argv, sys.argv = sys.argv, ["main.py", *arguments]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args
    finally:
        sys.argv = argv


if __name__ == "__main__":
    main = Path(sys.argv[1]).resolve()
    declare_torchvision_ops()
    sys.argv = sys.argv[1:]
    sys.path.append(sys.path[0])  # behind everything else: the fixture pack's tiny models come from here
    sys.path[0] = str(main.parent)
    os.chdir(main.parent)
    runpy.run_path(str(main), run_name="__main__")
