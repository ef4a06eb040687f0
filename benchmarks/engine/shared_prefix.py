"""Time to the first token behind 1,024 tokens that others had before, and that nobody had.

python -m engine.shared_prefix m2
"""

from __future__ import annotations

import statistics
import sys

from engine.models import load_model
from engine.stepping import Stepping

PREFIX, OWN, ROUNDS = 1024, 8, 5


def main(shape: str) -> None:
    """Alternate misses and hits; print the medians and their ratio."""
    engine = load_model(shape)
    stepping = Stepping(engine, num_pages=2048, max_running=8)
    times: dict[str, list[float]] = {"miss": [], "hit": []}
    for _ in range(ROUNDS):
        prefix = stepping.ids(PREFIX)
        for kind in ("miss", "hit"):
            number = stepping.submit(prefix + stepping.ids(OWN), 2)
            times[kind].append(stepping.seconds_to_token(number))
            stepping.run()
    miss, hit = (statistics.median(times[kind]) for kind in ("miss", "hit"))
    ratios = [m / h for m, h in zip(times["miss"], times["hit"], strict=True)]
    print(f"{shape}: miss {miss * 1e3:.0f} ms, hit {hit * 1e3:.1f} ms CPU: {miss / hit:.1f}x")
    print(f"by round {min(ratios):.1f}x to {max(ratios):.1f}x; {stepping.stats()}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "m2")
