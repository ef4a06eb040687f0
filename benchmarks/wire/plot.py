"""Draws a run: how many times its goal each ratio is. Runs in the peers' environment.

Usage: python plot.py RESULT.json PICTURE.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl  # type: ignore[import-not-found,unused-ignore]

mpl.use("Agg")
from matplotlib import pyplot as plt  # type: ignore[import-not-found,unused-ignore]


def main() -> None:
    """Draw one bar for each row, with its range, and a mark at its goal."""
    rows = json.loads(Path(sys.argv[1]).read_text())["rows"]
    figure, axes = plt.subplots(figsize=(9, 0.36 * len(rows) + 1.2))
    for at, row in enumerate(reversed(rows)):
        # Drawn as "how many times better", so that right is good in every row.
        better = [row["ratio"], row["ratio_min"], row["ratio_max"], row["hold"], row["aim"]]
        if not row["more_is_better"]:
            better = [1 / value if value else None for value in better]
        ratio, low, high, hold, aim = better
        color = {True: "#4c9a5b", False: "#c4473a", None: "#8a8f98"}[row["met"]]
        axes.barh(at, ratio, color=color, height=0.62)
        axes.plot(sorted((low, high)), (at, at), color="black", linewidth=1)
        for bound, style in ((hold, "|"), (aim, "4")):
            if bound:
                axes.plot(bound, at, style, color="black", markersize=14)
    names = [f"{row['cell']}, {row['metric']} / {row['against']}" for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), names)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times better than the other side; bar: median, line: range, |: goal")
    figure.tight_layout()
    figure.savefig(sys.argv[2], dpi=130)


if __name__ == "__main__":
    main()
