"""What can go wrong beyond a recipe: measurements, and memory."""

from __future__ import annotations


class MeasurementError(RuntimeError):
    """Something could not be measured; the message is one sentence for a person."""


def is_out_of_memory(error: BaseException) -> bool:
    """Say if there was not enough memory; torch has no class of its own for that of the CPU."""
    said = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("allocate memory" in said or "out of memory" in said)
    )
