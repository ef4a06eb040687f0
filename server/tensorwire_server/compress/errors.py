"""What can go wrong while a compressed model is measured."""

from __future__ import annotations


class MeasurementError(RuntimeError):
    """Something could not be measured; the message is one sentence for a person."""
