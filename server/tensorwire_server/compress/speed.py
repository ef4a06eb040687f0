"""How fast parent and child are served: two servers, asked in turn for the same work.

The machine is never the same for long, so only neighbours are compared: each round has parent and
child do the same, taking turns at who begins, and gives one ratio. What is told is the median and
the range of the ratios; a range that spans 1 says that no difference was seen.
"""

from __future__ import annotations

import random
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tensorwire_server.compress.loads import Decode, Embed, Prefill
from tensorwire_server.compress.serving import ServedModel

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from tensorwire_server.compress.loads import Load, Server

STREAMS = (1, 8, 32)
_TEXTS = tuple(
    f"{who} {what} {where}."
    for who in ("The first measurement", "A server that nobody asks", "Every text of this kind")
    for what in ("says little", "takes as long as it takes", "is read once and then forgotten")
    for where in ("by itself", "when the machine is busy with something else", "on a quiet day")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """The speed of one kind of work, before and after."""

    name: str
    unit: str
    before: tuple[float, ...]  # by round
    after: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """How many times as fast the child was, by round."""
        return tuple(after / before for before, after in zip(self.before, self.after, strict=True))

    @property
    def ratio(self) -> float:
        """How many times as fast the child is: the median."""
        return statistics.median(self.ratios)

    @property
    def is_same(self) -> bool:
        """Say if both were the faster one in some round: no difference was seen."""
        return min(self.ratios) <= 1 <= max(self.ratios)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What two servers on this machine did."""

    rates: tuple[Rate, ...]
    resident_bytes_before: int  # of the worker's process, its libraries included
    resident_bytes_after: int

    @property
    def typical(self) -> Rate:
        """The rate that stands for all: of some streams at once, as a server mostly has them."""
        return self.rates[min(1, len(self.rates) - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long to measure."""

    rounds: int = 5
    run_s: float = 1.0  # about, for the parent, of each kind of work
    streams: tuple[int, ...] = STREAMS


def measure_speed(
    parent: str | os.PathLike[str],
    child: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    seed: int = 0,
    device: str = "auto",
    texts: Sequence[str] = _TEXTS,
    on_progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Speed:
    """Serve both, each by a process of its own, and compare them.

    Args:
        parent, child: folders, or what else `tensorwire serve` takes.
        plan: how long to measure.
        seed: decides on the prompts.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        texts: what encoders embed.
        on_progress: called with how much is done, of how much, and what it is.

    Raises:
        MeasurementError: a server cannot be started, or fails.
    """
    plan = plan or Plan()
    with ExitStack() as stack:
        # Both at once, because most of a start is reading libraries.
        servers = [
            stack.enter_context(ServedModel(str(source), device=device))
            for source in (parent, child)
        ]
        before, after = (server.connect() for server in servers)
        loads = find_loads(before.describe(), plan.streams, texts)
        rates = compare(
            before, after, loads, plan=plan, seed=seed, now=time.perf_counter, report=on_progress
        )
        return Speed(
            rates=rates,
            resident_bytes_before=before.resident_bytes(),
            resident_bytes_after=after.resident_bytes(),
        )


def find_loads(
    model: Mapping[str, Any], streams: Sequence[int], texts: Sequence[str]
) -> list[Load]:
    """Return what can be asked of a model, by how its server describes it."""
    if "generate" not in model["tasks"]:
        return [Embed(texts_at_once=count, texts=texts) for count in streams]
    sizes = {"context_tokens": model["context_tokens"], "vocab_size": model["vocab_size"]}
    return [*(Decode(streams=count, **sizes) for count in streams), Prefill(**sizes)]


def compare(
    parent: Server,
    child: Server,
    loads: Sequence[Load],
    *,
    plan: Plan,
    seed: int,
    now: Callable[[], float],
    report: Callable[[int, int, str], None],
) -> tuple[Rate, ...]:
    """Have both servers do each load in turn.

    Args:
        now: monotonic seconds.
    """
    total = len(loads) * (plan.rounds + 1)
    rates = []
    for number, load in enumerate(loads):
        done = number * (plan.rounds + 1)
        amount = _warm_up(parent, child, load, plan.run_s, now)
        report(done + 1, total, load.name)
        speeds: dict[Server, list[float]] = {parent: [], child: []}
        for turn in range(plan.rounds):
            # Who begins changes, so that a machine which grows slower favours nobody.
            for server in (parent, child) if turn % 2 == 0 else (child, parent):
                chance = random.Random(f"{seed} {load.name} {turn}")
                began = now()
                count = load.run(server, amount, chance)
                speeds[server].append(count / (now() - began))
            report(done + turn + 2, total, load.name)
        rates.append(
            Rate(
                name=load.name,
                unit=load.unit,
                before=tuple(speeds[parent]),
                after=tuple(speeds[child]),
            )
        )
    return tuple(rates)


def _warm_up(
    parent: Server, child: Server, load: Load, run_s: float, now: Callable[[], float]
) -> int:
    """Return which amount takes the parent about `run_s`, after both have done so much."""
    chance = random.Random(load.name)
    amount, took_s = 1, 0.0
    while True:
        began = now()
        load.run(parent, amount, chance)
        took_s = now() - began
        # A tenth is enough to go by, and the smallest amounts are mostly overhead.
        if amount == load.most or took_s >= run_s / 10:
            break
        amount = min(2 * amount, load.most)
    amount = min(max(round(amount * run_s / took_s), 1), load.most)
    # What a server does for the first time (buffers, threads) must not fall on a measured round.
    for server in (parent, child):
        load.run(server, amount, chance)
    return amount
