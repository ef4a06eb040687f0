"""What waits for the tokenizer's thread, and whether it still matters when its turn comes."""

from __future__ import annotations

import asyncio
import threading
import tracemalloc
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from tensorwire_protocol.messages import Ack, End, Failure, Finish, Message, Submit
from tensorwire_server.scheduling.sequences import Sequence
from tensorwire_server.workers.intake import INLINE_CHARS, Intake
from tensorwire_server.workers.oracle import ByteTokenizer, OracleEngine
from tensorwire_server.workers.registry import Registry
from tensorwire_server.workers.waiting import MAX_WAITING_CHARS

if TYPE_CHECKING:
    from collections.abc import Callable

    from tensorwire_server.workers.streams import Stream, TextStream


class Gated(ByteTokenizer):
    """Waits with every text that begins with "A" until it is let through."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.read: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.read.append(text[0])
        if text.startswith("A"):
            assert self.gate.wait(20.0)
        return super().encode(text)


class FakeLink:
    is_draining = False

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.streams: dict[int, Stream] = {}

    def send(self, message: Message) -> None:
        self.sent.append(message)

    def on_stream_ended(self) -> None: ...


def open_intake(
    tokenizer: ByteTokenizer, post: Callable[[list[Any]], None]
) -> tuple[Registry, Intake]:
    engine: Any = OracleEngine("oracle:")
    engine.tokenizer = tokenizer
    registry = Registry("m", max_requests=8)
    registry.compute = cast("Any", SimpleNamespace(engine=engine, post=post))
    return registry, Intake(registry)


def submit_of(number: int, text: str) -> Submit:
    inputs = {"prompt": text}
    return Submit(stream=number, op="generate", key=bytes(16), attempt=1, inputs=inputs)


def test_a_cancelled_text_leaves_memory_and_the_bound_before_its_turn_comes() -> None:
    async def main() -> None:
        tokenizer, link, posted = Gated(), FakeLink(), asyncio.Queue[list[Any]]()
        registry, intake = open_intake(tokenizer, posted.put_nowait)
        intake.submit(cast("Any", link), submit_of(1, "A" * 1000), 0.0)
        try:
            tracemalloc.start()
            for number in range(2, 40):
                intake.submit(cast("Any", link), submit_of(number, "B" * 1_000_000), 0.0)
                registry.cut(link.streams[number], Finish.CANCELLED)
            held, _ = tracemalloc.get_traced_memory()
            assert held < 4_000_000  # of 38 MB
        finally:
            tracemalloc.stop()
            tokenizer.gate.set()
            await asyncio.wait_for(posted.get(), 20.0)

    asyncio.run(main())


def test_texts_above_the_bound_are_refused_while_others_wait() -> None:
    async def main() -> None:
        tokenizer, link, posted = Gated(), FakeLink(), asyncio.Queue[list[Any]]()
        _, intake = open_intake(tokenizer, posted.put_nowait)
        try:
            intake.submit(cast("Any", link), submit_of(1, "A" * 1000), 0.0)
            intake.submit(cast("Any", link), submit_of(2, "B" * MAX_WAITING_CHARS), 0.0)
            assert isinstance(link.sent[0], Failure)
            assert "wait to be tokenized" in link.sent[0].message
            assert list(link.streams) == [1]
        finally:
            tokenizer.gate.set()
            await asyncio.wait_for(posted.get(), 20.0)

    asyncio.run(main())


def test_what_ended_while_it_waited_for_the_thread_is_not_tokenized() -> None:
    async def main() -> None:
        tokenizer, link, posted = Gated(), FakeLink(), asyncio.Queue[list[Any]]()
        registry, intake = open_intake(tokenizer, posted.put_nowait)
        for number, letter in enumerate("ABC", 1):
            submit = submit_of(number, letter * (INLINE_CHARS + 1))
            intake.submit(cast("Any", link), submit, 0.0)
        registry.cut(link.streams[2], Finish.CANCELLED)
        tokenizer.gate.set()
        begun: list[Sequence] = []
        async with asyncio.timeout(20.0):
            while len(begun) < 2:
                begun += [c for c in await posted.get() if isinstance(c, Sequence)]
        assert tokenizer.read == ["A", "C"]
        assert [sequence.prompt_ids[0] for sequence in begun] == [ord("A"), ord("C")]
        kinds = [(type(message), message.stream) for message in link.sent]  # type: ignore[union-attr]
        assert kinds == [(End, 2), (Ack, 1), (Ack, 3)]

    asyncio.run(main())


class Whereabouts(ByteTokenizer):
    """Notes the threads on which tokens become text."""

    def __init__(self) -> None:
        self.threads: set[int] = set()

    def decode(self, ids: Any) -> str:
        self.threads.add(threading.get_ident())
        return super().decode(ids)

    def detokenizer(self, prompt_ids: Any) -> Any:
        self.threads.add(threading.get_ident())
        return super().detokenizer(prompt_ids)


@pytest.mark.parametrize(
    "fields",
    [
        {"inputs": {"ids": [104] * 1000}, "params": {"echo": True}},
        {"inputs": {"ids": [104]}, "so_far": [105] * 1000, "params": {"max_new_tokens": 2000}},
    ],
)
def test_many_tokens_become_text_on_the_tokenizers_thread(fields: dict[str, Any]) -> None:
    async def main() -> None:
        tokenizer, link, posted = Whereabouts(), FakeLink(), asyncio.Queue[list[Any]]()
        _, intake = open_intake(tokenizer, posted.put_nowait)
        submit = Submit(stream=1, op="generate", key=bytes(16), attempt=1, **fields)
        intake.submit(cast("Any", link), submit, 0.0)
        (sequence,) = await asyncio.wait_for(posted.get(), 20.0)
        assert isinstance(sequence, Sequence)
        assert tokenizer.threads
        assert threading.get_ident() not in tokenizer.threads
        (stream,) = link.streams.values()
        assert cast("TextStream", stream).tokens == fields.get("so_far", [])

    asyncio.run(main())
