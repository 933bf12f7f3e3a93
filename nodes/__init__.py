"""The pack's ComfyUI nodes."""

from __future__ import annotations


def extension():
    """What ComfyUI asks for: the list of node classes, in menu order. Imported only when ComfyUI calls the entry point."""
    from . import transport
    from ._comfy import ComfyExtension
    from .monitor import SpargeMonitor
    from .patch import SpargeAttention
    from .report import SpargeReport

    class SpargeExtension(ComfyExtension):
        async def get_node_list(self) -> list[type]:
            return [SpargeAttention, SpargeMonitor, SpargeReport]

    transport.register()  # before the server adds its routes, which is after all extensions have loaded
    return SpargeExtension()
