"""The one exception of the package that is not a plain ValueError or TypeError."""

from __future__ import annotations


class UnsupportedCall(RuntimeError):
    """No backend can run this call.

    Attributes
    ----------
    reasons : dict[str, str]
        For every backend that was asked, why it declined.
    """

    def __init__(self, reasons: dict[str, str]):
        self.reasons = dict(reasons)
        super().__init__("no backend can run this attention call: " + "; ".join(f"{name}: {why}" for name, why in self.reasons.items()))
