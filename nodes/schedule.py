"""Where in the schedule a model call is: its step, and whether the window of sparse steps is open. Sigmas fall from noise to picture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

from .presets import FEW_STEPS

SAME = 1 + 1e-5
"""Sigmas this close are one: schedules are float32, percentages of them are not, and a step may begin just where the window does."""

NEAR = 1e-3
"""As a share of the largest sigma: this far some samplers move the first and the last one."""


class Window(NamedTuple):
    """The sigmas of sparse model calls: from `start`, included, down to `end`, excluded."""

    start: float
    end: float

    def holds(self, sigma: float) -> bool:
        return self.end * SAME < sigma <= self.start * SAME

    def dense_steps(self, sigmas: list[float]) -> str:
        """Which steps of a schedule begin outside: "step 1 of 4 stays dense", "steps 1 to 5 and 20 of 20 stay dense"; "" for none."""
        dense = [step for step, sigma in enumerate(sigmas[:-1], 1) if not self.holds(sigma)]
        runs = [list(run) for _, run in itertools.groupby(dense, key=lambda step: step - dense.index(step))]
        parts = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
        few = len(dense) == 1
        return f"step{'s' * (not few)} {' and '.join(parts)} of {len(sigmas) - 1} stay{'s' * few} dense" if dense else ""


def window(start_percent: float, end_percent: float, percent_to_sigma: Callable[[float], float]) -> Window:
    """The window between two shares of the schedule. An end of 1 excludes nothing: the first model call of a schedule that rises ("unsampling") is at
    sigma 0, which is not above the sigma of 1 and would fall out."""
    return Window(percent_to_sigma(start_percent), percent_to_sigma(end_percent) if end_percent < 1 else -math.inf)


def step_at(sigma: float, sigmas: list[float]) -> int:
    """The step of a model call at `sigma`: the last one that starts there or, in a falling schedule, above."""
    near = NEAR * max(sigmas, default=0.0)
    falling = not sigmas or sigmas[0] >= sigmas[-1]
    begun = (start >= sigma - near if falling else start <= sigma + near for start in sigmas[:-1])
    return max((step for step, has_begun in enumerate(begun) if has_begun), default=0)


def few_steps_window(given: Window, sigmas: list[float], percent_to_sigma: Callable[[float], float]) -> Window | None:
    """The window in place of a preset's where that would keep more than the first of a few steps dense; None where it would not.

    A run may be a part of its schedule (the samplers of a two-stage workflow, denoise below 1): 5 steps over a quarter of it are a part of 20, and
    only the part that begins the schedule has its first step. Schedules whose steps are no even shares of it are judged by the part that is seen.
    """
    called = sorted(sigmas[:-1], reverse=True)
    if not called:
        return None

    def share(sigma: float) -> float:  # the inverse of percent_to_sigma, which falls
        low, high = 0.0, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if percent_to_sigma(middle) > sigma else (low, middle)
        return (low + high) / 2

    before, covered = share(max(sigmas)), share(min(sigmas)) - share(max(sigmas))
    steps = round(len(called) / max(covered, 1e-6))
    if steps > FEW_STEPS:
        return None
    dense = 1 if steps > 1 and before * steps < 0.5 else 0
    # Above the sigma of the first step that is to be sparse, by as little as samplers move the first and last ones.
    latest = called[dense] + NEAR * called[0] if dense < len(called) else 0.0
    return Window(latest, given.end) if any(given.start * SAME < sigma < latest for sigma in called) else None
