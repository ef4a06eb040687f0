"""What calls return: plain values that belong to the caller."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, dataclass_transform

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tensorwire.logprobs import Logprobs

_T = TypeVar("_T")


@dataclass_transform(frozen_default=True)
def light(cls: type[_T]) -> type[_T]:
    """Make a dataclass that is frozen for the type checker only.

    For what is made for each token or call: a really frozen one costs three times as much.
    """
    return dataclass(slots=True)(cls)


@light
class Delta:
    """What a text model has just added to a stream."""

    text: str  # whole characters; may be empty while one is unfinished
    token_ids: list[int]  # usually one; empty when only text was held back
    index: int  # position of the first of them, counted from 0
    choice: int = 0  # of a stream with n > 1: which of its texts this is


class _Named:
    """Numbers by name: those known here as fields, those of later servers in `extra`."""

    __slots__: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_wire(cls, numbers: Mapping[str, Any]) -> Self:
        """Return the numbers a server sent; absent ones are None."""
        known: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        for name, value in numbers.items():
            (known if name in cls.__slots__ and name != "extra" else extra)[name] = value
        make: Any = cls
        whole: Self = make(**known, extra=extra)
        return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage(_Named):
    """How much a request used."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None  # of the prompt, found in the prefix cache
    extra: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings(_Named):
    """Where a request's time went, as the server saw it, in milliseconds."""

    queued_ms: float | None = None
    first_token_ms: float | None = None  # from receipt
    prefill_ms: float | None = None
    decode_ms: float | None = None
    write_stall_ms: float | None = None  # the client did not read
    total_ms: float | None = None  # in the worker
    gateway_ms: float | None = None  # from receipt to the last word
    largest_batch: int | None = None  # it ran in; a count
    extra: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Generation:
    """A finished text, or in an error's `partial` as much of it as arrived."""

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop" or "length"; of a partial one "cancelled", "deadline" or "lost"
    usage: Usage
    timings: Timings
    logprobs: Logprobs | None = None  # with option `logprobs`: of `token_ids`
    prompt_logprobs: Logprobs | None = None  # with that option: of the prompt, without its first
    choices: tuple[Generation, ...] = ()  # with n > 1: all of them; the fields above are the first

    def __repr__(self) -> str:
        """Return what fits a screen: all text, but neither many tokens nor every choice again."""
        shown = [f"text={self.text!r}", f"token_ids={reprlib.repr(self.token_ids)}"]
        for name in ("finish_reason", "usage", "timings", "logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            shown += [] if value is None else [f"{name}={value!r}"]
        shown += [f"choices=<{len(self.choices)}>"] if self.choices else []
        return f"Generation({', '.join(shown)})"


def with_choices(generations: Sequence[Generation]) -> Generation:
    """Return the first of some texts for one prompt, with all of them as its choices."""
    return replace(generations[0], choices=tuple(generations))


def grouped(generations: list[Generation], num_choices: int) -> list[Generation]:
    """Return one text for each prompt, out of all choices of all prompts in order."""
    if num_choices == 1:
        return generations
    starts = range(0, len(generations), num_choices)
    return [with_choices(generations[start : start + num_choices]) for start in starts]
