"""What a prompt of 4,096 tokens does to 8 streams that run beside it.

python -m engine.long_prompt m1 [slowdown ...]
"""

from __future__ import annotations

import statistics
import sys

from engine.models import load_model
from engine.stepping import Stepping

STREAMS, PROMPT, UNDISTURBED = 8, 4096, 60


def main(shape: str, slowdowns: list[float]) -> None:
    """Print, for each setting, how long steps take before and while the prompt is read."""
    engine = load_model(shape)
    for slowdown in slowdowns:
        stepping = Stepping(engine, num_pages=2048, max_running=16, slowdown=slowdown)
        for _ in range(STREAMS):
            stepping.submit(stepping.ids(128), 3000)
        while stepping.num_rows < STREAMS or stepping.num_prompt_tokens:
            stepping.step()
        alone = [stepping.step() or 0.0 for _ in range(UNDISTURBED)]
        number = stepping.submit(stepping.ids(PROMPT), 2)
        beside, chunks = [], []
        began = stepping.now_s
        while not stepping.tokens[number]:
            beside.append(stepping.step() or 0.0)
            chunks.append(stepping.num_prompt_tokens)
        median = statistics.median(alone)
        p99 = statistics.quantiles(beside, n=100)[98]
        print(
            f"{shape} slowdown {slowdown}: undisturbed median {median * 1e3:.1f} ms; beside the"
            f" prompt median {statistics.median(beside) / median:.2f}x, p99 {p99 / median:.2f}x,"
            f" worst {max(beside) / median:.2f}x; chunks of {min(chunks)} to {max(chunks)};"
            f" prompt read in {stepping.now_s - began:.2f} s CPU",
            flush=True,
        )
        stepping.cancel_all()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "m1", [float(s) for s in sys.argv[2:]] or [2.0])
