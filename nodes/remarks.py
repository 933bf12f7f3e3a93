"""What is said about a run as a whole: one line for the log and the node, a warning and a note for the monitor."""

from __future__ import annotations

from . import reasons
from .recorder import Run

CROSS = reasons.CROSS_ATTENTION.split("{")[0]
SLOWER = reasons.SLOWER.split("{")[0]
MEANT = (reasons.REFERENCE, reasons.DENSE_HERE)
MOST_REASONS = 4


def summary(run: Run) -> str:
    """One line for the log and the node."""
    return "; ".join(part for part in (_counts(run), run.warning) if part)


def _counts(run: Run) -> str:
    totals = run.totals()
    if run.notes and not totals["sparse_calls"]:
        return run.notes
    counted = run.reasons.most_common()
    dense = ", ".join(f"{n} x {reason}" for at, (reason, n) in enumerate(counted) if at < MOST_REASONS or reason.startswith(SLOWER))
    if not totals["sparse_calls"]:
        return f"nothing ran sparse; dense: {dense or 'no attention call was seen'}"
    text = f"{totals['sparse_calls']} calls sparse, density {_share(totals['density'])}, {totals['sparse_ms']:.0f} ms"
    parts = run.notes, ", ".join(filter(None, (text, compared(run)))), f"dense: {dense}" if dense else ""
    return "; ".join(part for part in parts if part)


def _share(density: float | None) -> str:
    return "not known" if density is None else f"{density:.2f}"


def compared(run: Run) -> str:
    """How sparse attention compares with what would have run instead: "2.1x faster than dense (1.9 to 2.4, 5 measured calls)"; "" if not measured."""
    totals, than = run.totals(), run.against_dense.instead()
    low, high, calls, middle = (totals[name] for name in ("speedup_low", "speedup_high", "compared_calls", "speedup"))
    if not calls:
        return ""
    if not low or not high:
        return f"too few calls to compare with {than} ({calls} measured)"
    if middle is None:
        digits = 2 if high - low < 0.1 or low < 0.1 else 1
        return f"no clear difference from {than} ({low:.{digits}f} to {high:.{digits}f}x, {calls} measured calls)"
    word, remedy = "faster", ""
    if middle < 1:
        word, remedy, low, middle, high = "slower", ": raise min_tokens", 1 / high, 1 / middle, 1 / low
    digits = 2 if low < 1.1 else 1
    return f"{middle:.{digits}f}x {word} than {than} ({low:.{digits}f} to {high:.{digits}f}, {calls} measured calls){remedy}"


def warning_and_note(run: Run) -> tuple[str | None, str | None]:
    """What the monitor shows about a run: a warning that something is wrong, and a note that is none.

    A run without a sparse call gets a warning, once a step has ended. While it goes on it gets none where a reason is there that passes: the step
    window has not begun, or the layers are being counted. Nor does one whose calls another node of ours runs, or that is meant to be dense.
    """
    if run.sparse_calls or run.answered_above or run.warning == reasons.NO_NODE or run.note in MEANT:
        return run.warning, run.notes
    if run.state == "done" and run.notes is not None:
        return run.notes, None  # NEVER_ROUTED, NOTHING_SEEN
    found = [reason for reason, _ in run.reasons.copy().most_common() if not reason.startswith(CROSS)] or list(run.reasons)
    waiting = not run.finished or any(reason in (reasons.WINDOW, reasons.COUNTING_LAYERS) for reason in found)
    if found and (run.state != "running" or not waiting):
        return reasons.NOTHING_SPARSE.format(reason=found[0]), run.notes
    return run.warning, run.notes
