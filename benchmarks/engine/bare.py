"""Our scheduler and engine behind a pipe: one JSON line in, one out, and where the time went.

Usage: python bare.py FOLDER BACKEND QUANTIZE
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tensorwire_protocol.codec import encode
from tensorwire_protocol.limits import CLIENT_LINK
from tensorwire_protocol.messages import Step
from tensorwire_server.engine.loading import load
from tensorwire_server.scheduling.sequences import Sequence
from tensorwire_server.scheduling.work import Sampling
from tensorwire_server.workers.loop import GenerateLoop
from tensorwire_server.workers.spec import WorkerSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from tensorwire_server.workers.loop import StepOutcome

_GREEDY = Sampling(temperature=0.0, top_k=None, top_p=1.0, seed=0)


class Clock:
    """Seconds spent in what it wraps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the same call, counted under a name."""
        self.seconds[name] = 0.0

        def counted(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                self.seconds[name] += time.perf_counter() - began

        return counted


class Bare:
    """One model, driven as a worker's compute thread drives it."""

    def __init__(self, folder: str, backend: str, quantize: str) -> None:
        self._engine = cast("Any", load(folder, backend=backend, quantize=quantize))
        self._clock = Clock()
        spec = WorkerSpec(model="m", source=folder)
        self._loop = cast("Any", GenerateLoop(self._engine, spec, post=self._take))
        timed, engine = self._clock.timed, self._engine
        # The scheduler may be compiled, and its methods its own: what is not the engine's is its.
        engine.step = timed("engine", engine.step)
        engine._model.forward = timed("forward", engine._model.forward)
        engine._sampler.run = timed("sample", engine._sampler.run)
        self._num_sequences = 0
        self._made: dict[int, list[int]] = {}
        self._num_done = 0

    def run(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """Continue all prompts; returns tokens, seconds, and microseconds for each step."""
        self._clock.seconds = dict.fromkeys(self._clock.seconds, 0.0)
        self._made, self._num_done = {}, 0
        first_step, began = self._loop.num_steps, time.perf_counter()
        for prompt in prompts:
            self._num_sequences += 1
            self._made[self._num_sequences] = []
            sequence = Sequence(
                id=self._num_sequences,
                prompt_ids=tuple(prompt),
                max_new_tokens=new_tokens,
                sampling=_GREEDY,
                stop_ids=self._engine.card.eos_ids,
                arrived_at=time.monotonic(),
            )
            self._loop._apply([sequence])
        while self._num_done < len(prompts):
            self._loop._turn()
        seconds = time.perf_counter() - began
        spent, num_steps = dict(self._clock.seconds), self._loop.num_steps - first_step
        self._loop._turn()  # what was released
        spent["schedule and commit"] = seconds - spent.pop("engine")
        per_step = {name: 1e6 * s / num_steps for name, s in spent.items()}
        per_step |= self._text_and_frame(prompts, num_steps)
        num_tokens = sum(map(len, self._made.values()))
        return {"tokens": num_tokens, "seconds": seconds, "us_per_step": per_step}

    def _take(self, outcome: StepOutcome) -> None:
        self._loop.outcome_taken()
        made = outcome.emissions
        for id_, token in zip(made.sequence_ids, made.token_ids, strict=True):
            self._made[id_].append(token)
        self._num_done += len(made.finishes)

    def _text_and_frame(self, prompts: list[list[int]], num_steps: int) -> dict[str, float]:
        """Measure afterwards what a worker does beside the next step."""
        clock = Clock()
        text = clock.timed("detokenise", self._texts)
        texts = text(prompts)
        columns = [*zip(*self._made.values(), strict=False)]
        send = clock.timed("send", _encode)
        streams = [*range(1, len(prompts) + 1)]
        for index, tokens in enumerate(columns):
            send(streams, index, [*tokens], [texts[i][index] for i in range(len(prompts))])
        return {name: 1e6 * seconds / num_steps for name, seconds in clock.seconds.items()}

    def _texts(self, prompts: list[list[int]]) -> list[list[str]]:
        texts = []
        for prompt, tokens in zip(prompts, self._made.values(), strict=True):
            detokenizer = self._engine.tokenizer.detokenizer(prompt)
            texts.append([detokenizer.push(token) for token in tokens])
        return texts


def _encode(streams: list[int], index: int, tokens: list[int], texts: list[str]) -> None:
    ones = [1] * len(streams)
    indexes = [index] * len(streams)
    encode(
        Step(
            streams=streams,
            attempts=ones,
            first_indexes=indexes,
            counts=None,
            tokens=tokens,
            texts=texts,
        ),
        CLIENT_LINK,
    )


def main() -> None:
    """Serve standard input until it ends."""
    bare = Bare(str(Path(sys.argv[1])), sys.argv[2], sys.argv[3])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(bare.run(job["prompts"], job["new"])), flush=True)


if __name__ == "__main__":
    main()
