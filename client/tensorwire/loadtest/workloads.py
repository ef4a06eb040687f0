"""What is asked. Pure: request `index` of a workload is the same in every run and every process."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from tensorwire_protocol.errors import BadParams

from tensorwire.loadtest.lengths import Lengths, Uniform
from tensorwire.loadtest.units import parse_count, parse_number

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

LOAD, TROUBLE, BYSTANDER = GROUPS = "load", "trouble", "bystander"
STREAMED = ("generate", "chat")
TASKS = (*STREAMED, "embed", "infer")
_BLOCK = 1024  # requests drawn together
_POOL_CHARS = 1 << 16
_PROMPT_CHARS = Uniform(low=64, high=64)
_OUTPUT_TOKENS = Uniform(low=32, high=32)
_TASK = re.compile(
    r"(?P<task>[^:]+):(?P<model>[^\[\]*]+)(\[(?P<dims>[0-9x]+)\])?(\*(?P<weight>.+))?"
)
_HOW = "task of a model: write generate:MODEL, embed:MODEL*2 or infer:MODEL[64x64]"
_MAX_ARRAY_BYTES = 1 << 30
_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", np.uint8)


@dataclass(slots=True, kw_only=True)
class Ask:
    """One request: what the server gets, and what is done to it on purpose."""

    index: int
    task: str
    model: str
    text: str = ""  # the prompt, or the text to embed
    array: NDArray[np.float32] | None = None
    seed: int = 0
    max_new_tokens: int = 0
    timeout_s: float | None = None
    cancel_after: int | None = None  # tokens
    is_slow: bool = False  # stops reading for a while
    is_cut: bool = False  # its connection is cut once, and the stream resumed
    group: str = LOAD  # what is measured apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One kind of request of a mix."""

    task: str
    model: str
    weight: float = 1.0
    shape: tuple[int, ...] = (16,)  # of the float32 array that `infer` sends

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise BadParams(f"{self.task!r} is no task: it must be one of {', '.join(TASKS)}")
        if not self.weight > 0:
            raise BadParams(f"the weight of {self.task} must be above 0, not {self.weight:g}")
        if (size := 4 * math.prod(self.shape)) > _MAX_ARRAY_BYTES:
            raise BadParams(f"an array of {size} bytes is too large: at most {_MAX_ARRAY_BYTES}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefixes:
    """A share of the prompts begins with one of a few texts that they have in common."""

    share: float = 0.0
    chars: int = 0
    families: int = 1

    def __post_init__(self) -> None:
        if self.share and not (self.chars and self.families):
            raise BadParams("a share of prefixes needs chars=… and families=… of at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """What a share of the requests suffers on purpose."""

    cancel_share: float = 0.0
    cancel_after: int = 1  # tokens
    slow_share: float = 0.0
    slow_s: float = 1.0  # so long it does not read
    cut_share: float = 0.0
    deadline_share: float = 0.0
    deadline_s: float = 1.0

    def __post_init__(self) -> None:
        if self.total > 1:
            raise BadParams(f"the shares of trouble are {self.total:.0%} together, at most 100%")
        if not self.deadline_s > 0:
            raise BadParams("--deadline: a deadline must be above 0 seconds")

    @property
    def total(self) -> float:
        """The share of all requests that suffer something."""
        return self.cancel_share + self.slow_share + self.cut_share + self.deadline_share


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSpec:
    """All that a workload is made of."""

    tasks: tuple[Task, ...]
    prompt_chars: Lengths = _PROMPT_CHARS
    output_tokens: Lengths = _OUTPUT_TOKENS
    prefixes: Prefixes = Prefixes()
    prompts: tuple[str, ...] = ()  # taken in turn instead of made-up ones
    trouble: Trouble = Trouble()
    timeout_s: float | None = 60.0
    seed: int = 0
    group: str = LOAD


@dataclass(slots=True)
class _Drawn:
    """Chance for one block of requests."""

    task: list[int]
    chars: list[int]
    tokens: list[int]
    starts: list[int]
    family: list[int]  # -1: no shared prefix
    fate: list[float]


@dataclass(slots=True)
class Workload:
    """Makes the requests that a spec describes."""

    spec: WorkloadSpec
    _pool: str = field(init=False, repr=False)
    _block: int = field(init=False, default=-1)
    _drawn: _Drawn = field(init=False, repr=False)
    _array: dict[int, NDArray[np.float32]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        random = np.random.default_rng((self.spec.seed, 2))
        self._pool = random.choice(_LETTERS, _POOL_CHARS).tobytes().decode()

    def ask(self, index: int) -> Ask:
        """Return request `index`; cheapest when they are asked for in order."""
        block, at = divmod(index, _BLOCK)
        if block != self._block:
            self._block, self._drawn = block, self._draw(block)
        spec, drawn = self.spec, self._drawn
        number = drawn.task[at]
        task = spec.tasks[number]
        ask = Ask(
            index=index,
            task=task.task,
            model=task.model,
            timeout_s=spec.timeout_s,
            seed=spec.seed + index,
            group=spec.group,
        )
        if task.task == "infer":
            ask.array = self._array_of(number, task)
        else:
            ask.text = self._text(index, at)
        if task.task in STREAMED:
            ask.max_new_tokens = drawn.tokens[at]
        if spec.trouble.total:
            _afflict(ask, spec.trouble, drawn.fate[at])
        return ask

    def _draw(self, block: int) -> _Drawn:
        spec = self.spec
        random = np.random.default_rng((spec.seed, 3, block))
        weights = np.array([task.weight for task in spec.tasks])
        chars = spec.prompt_chars.draw(random, _BLOCK)
        family = random.integers(0, max(spec.prefixes.families, 1), _BLOCK)
        family[random.random(_BLOCK) >= spec.prefixes.share] = -1
        return _Drawn(
            task=random.choice(len(weights), _BLOCK, p=weights / weights.sum()).tolist(),
            chars=chars.tolist(),
            tokens=spec.output_tokens.draw(random, _BLOCK).tolist(),
            starts=random.integers(0, _POOL_CHARS, _BLOCK).tolist(),
            family=family.tolist(),
            fate=random.random(_BLOCK).tolist(),
        )

    def _text(self, index: int, at: int) -> str:
        if self.spec.prompts:
            return self.spec.prompts[index % len(self.spec.prompts)]
        drawn, prefixes = self._drawn, self.spec.prefixes
        chars, family = drawn.chars[at], drawn.family[at]
        prefix = ""
        if family >= 0:
            prefix = self._stretch(family * 7919, min(prefixes.chars, chars))
        # The index makes each prompt another one: a cache must not help where it would not.
        own = f"{index:x} {self._stretch(drawn.starts[at], chars)}"
        return prefix + own[: chars - len(prefix)]

    def _stretch(self, start: int, chars: int) -> str:
        start %= _POOL_CHARS
        text = self._pool[start : start + chars]
        while len(text) < chars:
            text += self._pool[: chars - len(text)]
        return text

    def _array_of(self, number: int, task: Task) -> NDArray[np.float32]:
        if number not in self._array:
            random = np.random.default_rng((self.spec.seed, 4))
            self._array[number] = random.random(task.shape, np.float32)
        return self._array[number]


def _afflict(ask: Ask, trouble: Trouble, fate: float) -> None:
    """Give a request its share of the trouble; `fate` is from 0 to 1."""
    if fate < trouble.deadline_share:
        ask.timeout_s = trouble.deadline_s
        ask.group = TROUBLE
        return
    fate -= trouble.deadline_share
    if ask.task not in STREAMED:
        return
    if fate < trouble.cancel_share:
        ask.cancel_after = trouble.cancel_after
    elif fate < trouble.cancel_share + trouble.slow_share:
        ask.is_slow = True
    elif fate < trouble.cancel_share + trouble.slow_share + trouble.cut_share:
        ask.is_cut = True
    else:
        return
    ask.group = TROUBLE


def parse_task(text: str) -> Task:
    """Return what `TASK:MODEL[*WEIGHT]` means, for infer `infer:MODEL[64x64]*2`.

    Raises:
        BadParams: it is no task.
    """
    found = _TASK.fullmatch(text)
    if found is None:
        raise BadParams(f"{text!r} is no {_HOW}")
    options: dict[str, Any] = {}
    if found["dims"] is not None:
        options["shape"] = tuple(map(parse_count, found["dims"].split("x")))
    weight = parse_number(found["weight"] or "1")
    return Task(task=found["task"], model=found["model"], weight=weight, **options)


def read_prompts(lines: Iterable[str]) -> tuple[str, ...]:
    """Return the prompts of a file: each line is one, or a JSON object with "prompt".

    Raises:
        BadParams: a line is no such object, or there is no prompt.
    """
    prompts = tuple(_prompt(line) for line in map(str.strip, lines) if line)
    if not prompts:
        raise BadParams("the file of prompts is empty")
    return prompts


def _prompt(line: str) -> str:
    if not line.startswith("{"):
        return line
    try:
        prompt = json.loads(line).get("prompt")
    except ValueError as error:
        raise BadParams(f"a line of the file of prompts is no JSON: {error}") from error
    if not isinstance(prompt, str) or not prompt:
        raise BadParams('a line of the file of prompts has no text under "prompt"')
    return prompt
