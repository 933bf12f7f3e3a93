"""How sparse attention compares with dense attention in the same run: measured, or not said at all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable


class Comparison:
    """Milliseconds of the calls of one run: by the tokens of their queries, and by their shape where dense calls are run to be timed."""

    def __init__(self) -> None:
        self.measuring_ms = 0.0  # what the extra dense calls took in all
        self._sparse: dict[int, list[float]] = defaultdict(list)
        self._dense: dict[int, list[float]] = defaultdict(list)
        self._sparse_by_shape: dict[Hashable, list[float]] = defaultdict(list)
        self._dense_by_shape: dict[Hashable, float] = {}

    def sparse(self, tokens: int, shape: Hashable | None, ms: float) -> None:
        """A sparse call; `shape` None where nothing is timed for it."""
        self._sparse[tokens].append(ms)
        if shape is not None:
            self._sparse_by_shape[shape].append(ms)

    def dense(self, tokens: int, ms: float) -> None:
        """A call that ComfyUI's own attention answered; one that another node answered says nothing about dense attention."""
        self._dense[tokens].append(ms)

    def measured(self, tokens: int, shape: Hashable, ms: float, cost_ms: float) -> None:
        """The extra dense call of a shape, and what measuring it took in all."""
        self.dense(tokens, ms)
        self._dense_by_shape[shape] = ms
        self.measuring_ms += cost_ms

    def factor(self) -> float | None:
        """Dense over sparse milliseconds a call, from calls of equal length; None when one of the two was not measured."""
        # Copies, here and below: the server's thread asks while the sampler's adds, and a dict must not grow under whoever walks over it.
        both = [(self._dense[tokens], sparse) for tokens, sparse in self._sparse.copy().items() if tokens in self._dense]
        dense_ms = sum(sum(dense) / len(dense) * len(sparse) for dense, sparse in both)
        return dense_ms / sum(sum(sparse) for _, sparse in both) if dense_ms > 0 else None

    def saved_ms(self) -> float | None:
        """Dense minus sparse milliseconds over the calls whose shape was measured, less what measuring took; None when none was."""
        known = [(dense, self._sparse_by_shape[shape]) for shape, dense in self._dense_by_shape.copy().items() if shape in self._sparse_by_shape]
        return sum(dense * len(sparse) - sum(sparse) for dense, sparse in known) - self.measuring_ms if known else None
