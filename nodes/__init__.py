"""The pack's ComfyUI nodes."""

from __future__ import annotations


def extension():
    """What ComfyUI asks for: the list of node classes, in menu order. Imported only when ComfyUI calls the entry point."""
    from ._comfy import ComfyExtension
    from .patch import SpargeAttention
    from .report import SpargeReport

    class SpargeExtension(ComfyExtension):
        async def get_node_list(self) -> list[type]:
            return [SpargeAttention, SpargeReport]

    return SpargeExtension()
