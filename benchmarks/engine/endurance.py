"""10,000 requests through one engine: does its process grow?

python -m engine.endurance
"""

from __future__ import annotations

import gc
import random
from pathlib import Path

from engine.models import load_model
from engine.stepping import Stepping

REQUESTS, ALIVE = 10_000, 24


def resident_mib() -> float:
    """Return the process's own memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise OSError("no RssAnon")


def main() -> None:
    """Print the memory after each tenth."""
    rng = random.Random(2)
    stepping = Stepping(load_model("tiny"), num_pages=400, max_running=ALIVE)
    texts = [stepping.ids(64) for _ in range(50)]
    submitted = shown = 0
    while len(stepping.finished) < REQUESTS:
        while submitted < REQUESTS and submitted - len(stepping.finished) < ALIVE + 8:
            own = stepping.ids(rng.randrange(1, 40))
            prompt = rng.choice(texts)[: rng.randrange(65)] + own
            stepping.submit(prompt, rng.randrange(1, 30), tenant=str(rng.randrange(3)))
            submitted += 1
        stepping.step()
        if len(stepping.finished) >= shown + REQUESTS // 10:
            shown += REQUESTS // 10
            gc.collect()
            print(f"{len(stepping.finished):6d} {resident_mib():.1f} MiB", flush=True)
    print(stepping.stats())


if __name__ == "__main__":
    main()
