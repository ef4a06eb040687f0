"""What is aimed at: tokens/s over the other side's, by model, side and streams."""

from __future__ import annotations


def _goals() -> dict[tuple[str, str, int], float]:
    by_cell = {
        ("m1", "none"): (1.15, 1.15, 1.15),
        ("m2", "none"): (1.3, 1.3, 1.3),
        ("m3", "none"): (1.1, 1.7, 1.6),
        ("m2", "int8"): (2.2, 2.2, 1.7),
        ("m3", "int8"): (3.0, 4.5, 2.8),
        # The server beside its own engine.
        ("m2", "bare none"): (0.9, 0.9, 0.9),
        ("m3", "bare none"): (0.95, 0.95, 0.95),
    }
    return {
        (model, side, streams): goal
        for (model, side), goals in by_cell.items()
        for streams, goal in zip((1, 8, 32), goals, strict=True)
    }


GOALS = _goals()
