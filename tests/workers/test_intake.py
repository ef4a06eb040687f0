"""What waits for the tokenizer's thread, and whether it still matters when its turn comes."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from tensorwire_protocol.messages import Ack, End, Finish, Message, Submit
from tensorwire_server.scheduling.sequences import Sequence
from tensorwire_server.workers.intake import INLINE_CHARS, Intake
from tensorwire_server.workers.oracle import ByteTokenizer, OracleEngine
from tensorwire_server.workers.registry import Registry

if TYPE_CHECKING:
    from tensorwire_server.workers.streams import Stream


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


def test_what_ended_while_it_waited_for_the_thread_is_not_tokenized() -> None:
    async def main() -> None:
        tokenizer, link, posted = Gated(), FakeLink(), asyncio.Queue[list[Any]]()
        engine: Any = OracleEngine("oracle:")
        engine.tokenizer = tokenizer
        registry = Registry("m", max_requests=8)
        registry.compute = cast("Any", SimpleNamespace(engine=engine, post=posted.put_nowait))
        intake = Intake(registry)
        for number, letter in enumerate("ABC", 1):
            inputs = {"prompt": letter * (INLINE_CHARS + 1)}
            submit = Submit(stream=number, op="generate", key=bytes(16), attempt=1, inputs=inputs)
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
