"""What is said about a run as a whole: one line for the log and the node, a warning and a note for the monitor."""

from __future__ import annotations

from . import reasons
from .recorder import Run

CROSS = reasons.CROSS_ATTENTION.split("{")[0]


def summary(run: Run) -> str:
    """One line for the log and the node."""
    return "; ".join(part for part in (_counts(run), run.warning) if part)


def _counts(run: Run) -> str:
    totals = run.totals()
    if run.note and not totals["sparse_calls"]:
        return run.note
    dense = ", ".join(f"{n} x {reason}" for reason, n in run.reasons.most_common(4))
    if not totals["sparse_calls"]:
        return f"nothing ran sparse; dense: {dense or 'no attention call was seen'}"
    text, ratio = f"{totals['sparse_calls']} calls sparse, density {totals['density']:.2f}, {totals['sparse_ms']:.0f} ms", totals["speedup"]
    if ratio:
        compared = f"{ratio:.2f}x faster than dense" if ratio >= 1 else f"{1 / ratio:.2f}x slower than dense: raise min_tokens"
        text += f", {compared} (a call, measured)"
    return "; ".join(part for part in (run.note, text, f"dense: {dense}" if dense else "") if part)


def warning_and_note(run: Run) -> tuple[str | None, str | None]:
    """What the monitor shows about a run: a warning that something is wrong, and a note that is none.

    A run without a sparse call gets a warning, once a step has ended. While it goes on it gets none where a reason is there that passes: the step
    window has not begun, or the layers are being counted. Nor does one whose calls another node of ours runs, or that is meant to be dense.
    """
    if run.sparse_calls or run.answered_above or run.warning == reasons.NO_NODE or run.note == reasons.REFERENCE:
        return run.warning, run.note
    if run.state == "done" and run.note is not None:
        return run.note, None  # NEVER_ROUTED, NOTHING_SEEN
    found = [reason for reason, _ in run.reasons.copy().most_common() if not reason.startswith(CROSS)] or list(run.reasons)
    waiting = not run.finished or any(reason in (reasons.WINDOW, reasons.COUNTING_LAYERS) for reason in found)
    if found and (run.state != "running" or not waiting):
        return reasons.NOTHING_SPARSE.format(reason=found[0]), run.note
    return run.warning, run.note
