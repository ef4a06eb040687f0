"""One run, as its command line says it: plain values that a process can be handed as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorwire_protocol.errors import BadParams

from tensorwire.loadtest.arrivals import Arrivals, Steady, parse_arrivals
from tensorwire.loadtest.lengths import Uniform, parse_lengths
from tensorwire.loadtest.slo import Slo, parse_slo
from tensorwire.loadtest.units import naming, parse_count, parse_named, parse_seconds, parse_share
from tensorwire.loadtest.workloads import (
    BYSTANDER,
    STREAMED,
    Prefixes,
    Task,
    Trouble,
    WorkloadSpec,
    parse_task,
    read_prompts,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

KINDS = ("tensorwire", "openai")
MAX_PROCESSES = 64
MAX_SEED = 2**62  # the server's bound leaves as much again for the requests' own seeds
_OPENAI_TASKS = (*STREAMED, "embed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is sent to whom, when, for how long; the texts are parsed where they are needed."""

    address: str | None = None
    kind: str = KINDS[0]
    tasks: tuple[str, ...] = ("generate:demo",)
    arrivals: str = "closed:8"
    warmup_s: float = 2.0
    duration_s: float = 20.0
    prompt_chars: str = "64"
    output_tokens: str = "32"
    prefix: str = ""
    prompts: str | None = None  # a file
    timeout_s: float = 60.0
    seed: int = 0
    connections: int = 8
    attempts: int = 1
    processes: int = 1
    verify: bool = False
    slo: str = ""
    cancel: str = ""
    slow: str = ""
    cut: str = ""
    deadline: str = ""
    bystander_per_s: float = 0.0
    log: str | None = None  # a file for one line per request

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BadParams(f"{self.kind!r} is no kind of server: {', '.join(KINDS)}")
        if not 1 <= self.processes <= MAX_PROCESSES:
            raise BadParams(f"processes must be 1 to {MAX_PROCESSES}, not {self.processes}")
        if self.connections < 1 or self.attempts < 1:
            raise BadParams("connections and attempts must be at least 1")
        if not self.duration_s > 0 or not self.warmup_s >= 0:
            raise BadParams("a run needs a duration above 0 and a warm-up of at least 0 seconds")
        if not self.timeout_s > 0:
            raise BadParams("a request needs a timeout above 0 seconds")
        if not 0 <= self.seed <= MAX_SEED:
            raise BadParams(f"a seed is a whole number from 0 to {MAX_SEED}, not {self.seed}")

    def check(self) -> None:
        """Parse everything once.

        Raises:
            BadParams: something is not what it should be.
        """
        self.parsed_arrivals()
        self.parsed_slo()
        self.bystander()
        spec = self.workload()
        if self.kind == "openai":
            tasks = {task.task for task in spec.tasks}
            if not tasks <= set(_OPENAI_TASKS):
                raise BadParams(f"an openai server does {', '.join(_OPENAI_TASKS)}, nothing else")
            if self.verify or self.slow or self.cut:
                raise BadParams("--verify, --slow and --cut are for tensorwire servers only")

    def parsed_arrivals(self) -> Arrivals:
        """Return when requests are sent."""
        with naming("--arrivals"):
            return parse_arrivals(self.arrivals)

    def parsed_slo(self) -> Slo:
        """Return what a run must keep."""
        with naming("--slo"):
            return parse_slo(self.slo)

    def workload(self) -> WorkloadSpec:
        """Return what is asked."""
        with naming("--prompt"):
            prompt_chars = parse_lengths(self.prompt_chars)
        with naming("--output"):
            output_tokens = parse_lengths(self.output_tokens)
        return WorkloadSpec(
            tasks=self._parsed_tasks(),
            prompt_chars=prompt_chars,
            output_tokens=output_tokens,
            prefixes=self._prefixes(),
            prompts=self._read_prompts(),
            trouble=self.trouble(),
            timeout_s=self.timeout_s,
            seed=self.seed,
        )

    def _parsed_tasks(self) -> tuple[Task, ...]:
        with naming("--task"):
            return tuple(map(parse_task, self.tasks))

    def _read_prompts(self) -> tuple[str, ...]:
        if self.prompts is None:
            return ()
        try:
            return read_prompts(Path(self.prompts).read_text().splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise BadParams(f"cannot read the prompts in {self.prompts}: {error}") from error

    def _prefixes(self) -> Prefixes:
        with naming("--prefix"):
            named = _shared(self.prefix, ("chars", "families"))
            return Prefixes(
                share=_share(named),
                chars=parse_count(named.get("chars", "0")),
                families=parse_count(named.get("families", "1")),
            )

    def trouble(self) -> Trouble:
        """Return what goes wrong on purpose."""
        with naming("--cancel"):
            cancel = _shared(self.cancel, ("after",))
            cancel_share = _share(cancel)
            cancel_after = parse_count(cancel.get("after", "1"), least=1)
        with naming("--slow"):
            slow = _shared(self.slow, ("for",))
            slow_share, slow_s = _share(slow), parse_seconds(slow.get("for", "1s"))
        with naming("--cut"):
            cut_share = _share(_shared(self.cut, ()))
        with naming("--deadline"):
            deadline = _shared(self.deadline, ("of",))
            deadline_share, deadline_s = _share(deadline), parse_seconds(deadline.get("of", "1s"))
        return Trouble(
            cancel_share=cancel_share,
            cancel_after=cancel_after,
            slow_share=slow_share,
            slow_s=slow_s,
            cut_share=cut_share,
            deadline_share=deadline_share,
            deadline_s=deadline_s,
        )

    def bystander(self) -> tuple[Steady, WorkloadSpec] | None:
        """Return what somebody asks who only wants little, now and then."""
        if not self.bystander_per_s:
            return None
        first = self._parsed_tasks()[0]
        spec = WorkloadSpec(
            tasks=(Task(task=first.task, model=first.model, shape=first.shape),),
            prompt_chars=Uniform(low=8, high=8),
            output_tokens=Uniform(low=4, high=4),
            timeout_s=self.timeout_s,
            seed=self.seed + 1_000_000_007,
            group=BYSTANDER,
        )
        return Steady(rate_per_s=self.bystander_per_s, cv=1), spec

    def at_rate(self, rate_per_s: float) -> Plan:
        """Return the same plan with another rate of its open loop.

        Raises:
            BadParams: it has no rate of its own.
        """
        kind, _, rest = self.arrivals.partition(":")
        if kind not in ("constant", "poisson", "bursts"):
            raise BadParams("a sweep changes the rate of constant:, poisson: or bursts: arrivals")
        _, comma, options = rest.partition(",")
        return replace(self, arrivals=f"{kind}:{rate_per_s:g}{comma}{options}")

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON carries it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Return the plan of `to_json`."""
        return cls(**{**data, "tasks": tuple(data["tasks"])})


def _shared(text: str, others: tuple[str, ...]) -> dict[str, str]:
    """Return what `share=10%,after=5` says; nothing at all may be said, but not without a share."""
    named = parse_named(text, ("share", *others))
    if named and "share" not in named:
        raise BadParams(f"{text!r} has no share=…")
    return named


def _share(named: Mapping[str, str]) -> float:
    return parse_share(named.get("share", "0"))
