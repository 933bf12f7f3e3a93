"""Other nodes' attention overrides: whether calling one leads to ours."""

from __future__ import annotations

DEPTH = 6
"""Links that are followed; a chain that is longer counts as one that forgot ours."""


def leads_to(override, ours) -> bool:
    """Whether calling `override` may reach `ours`: it is ours, or it holds ours in an attribute or a closure, a few links deep."""
    seen, front = set(), [override]
    for _ in range(DEPTH):
        following = []
        for item in front:
            if item is ours:
                return True
            if item is None or id(item) in seen or not callable(item):
                continue
            seen.add(id(item))
            following += _held_by(item)
        front = following
    return any(item is ours for item in front)


def _held_by(item) -> list:
    held = [content for cell in getattr(item, "__closure__", None) or () for content in _contents(cell)]
    held += [*(getattr(item, "__defaults__", None) or ()), *(getattr(item, "__kwdefaults__", None) or {}).values()]
    held += [getattr(item, "func", None), *getattr(item, "args", ())] if type(item).__name__ == "partial" else []
    owner = getattr(item, "__self__", item)
    held += list(getattr(owner, "__dict__", {}).values())
    return held


def _contents(cell) -> tuple:
    try:
        return (cell.cell_contents,)
    except ValueError:  # a name that its function has not set yet
        return ()
