"""Who imports whom in nodes/: arrows one way, and pictures that know neither runs nor ComfyUI."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

NODES = Path(__file__).resolve().parents[2] / "nodes"
ROOMS = {".".join(path.relative_to(NODES).with_suffix("").parts): path for path in NODES.rglob("*.py")}


def imports(room: str) -> set[str]:
    """The rooms of nodes/ that a room imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(ROOMS[room].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = room.split(".")[: -node.level] + ([node.module] if node.module else [])
            names = {".".join(base)} | {".".join([*base, alias.name]) for alias in node.names}
            found |= names & set(ROOMS)
    return found


def test_the_table_is_read_by_every_room_that_shows_numbers():
    assert {room for room in ROOMS if "statistics" in imports(room)} >= {"recorder", "export", "transport", "pictures.heat_map"}


@pytest.mark.parametrize("room", ROOMS)
def test_no_circles(room):
    seen, front = set(), imports(room)
    while front:
        seen |= front
        front = set().union(*(imports(other) for other in front)) - seen
    assert room not in seen


def test_what_the_rooms_of_numbers_may_know():
    allowed = {
        "statistics": set(),
        "speedup": {"geometry"},
        "pace": {"_comfy", "_kernels", "reasons", "settings", "speedup"},
        "maps": {"_kernels", "geometry"},
        "recorder": {"maps", "reasons", "speedup", "statistics"},
        "telemetry": {"maps", "recorder"},
        "remarks": {"reasons", "recorder"},
        "transport": {"_comfy", "maps", "recorder", "remarks", "statistics", "telemetry"},
        "pictures.animation": set(),
        "pictures.canvas": set(),
        "pictures.heat_map": {"pictures.canvas", "statistics"},
        "pictures.block_maps": {"maps", "pictures.canvas", "pictures.heat_map"},
        "export": {"pictures.block_maps", "pictures.canvas", "pictures.heat_map", "statistics"},
    }
    for room, others in allowed.items():
        assert imports(room) <= others, f"{room} imports {sorted(imports(room) - others)}"
