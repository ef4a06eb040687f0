"""Staying awake for a moment after output, and where that stops."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from tensorwire_protocol.connection import Connection
from tensorwire_protocol.frames import PREFACE
from tensorwire_protocol.limits import CLIENT_LINK
from tensorwire_protocol.messages import Hello, Ping
from tensorwire_protocol.roles import Role
from tensorwire_protocol.transports.aio import AioTransport
from tensorwire_protocol.transports.polling import AnswerWatch, BusyPoll

from protocol.samples import wire
from protocol.transports.driving import PATIENCE_S, Recorder

if TYPE_CHECKING:
    from collections.abc import Iterator

WINDOW_S = 1.0
PATIENCE = 8  # outputs without a near answer


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def turn(loop: asyncio.AbstractEventLoop) -> None:
    """Let a loop run what is due."""
    loop.run_until_complete(asyncio.sleep(0))


def test_a_loop_stays_awake_until_the_moment_and_no_longer(
    clock: Clock, loop: asyncio.AbstractEventLoop
) -> None:
    poll = BusyPoll(loop, WINDOW_S, now=clock)
    poll.look_until(clock.seconds + 1)
    for _ in range(100):
        turn(loop)
        assert poll.is_looking
    clock.seconds += 0.5
    poll.look_until(clock.seconds + 1)
    clock.seconds += 0.9
    turn(loop)
    assert poll.is_looking, "the later moment counts"
    clock.seconds += 0.1
    turn(loop)
    assert not poll.is_looking
    poll.look_until(clock.seconds + 1)
    assert poll.is_looking, "again"


def test_a_loop_with_better_things_to_do_does_not_look(
    clock: Clock, loop: asyncio.AbstractEventLoop
) -> None:
    running = ["a step"]
    poll = BusyPoll(loop, WINDOW_S, is_free=lambda: not running, now=clock)
    poll.look_until(clock.seconds + 1)
    turn(loop)
    assert not poll.is_looking
    poll.look_until(clock.seconds + 1)
    running.clear()  # the output was the last of what ran
    for _ in range(10):
        turn(loop)
        assert poll.is_looking
    running.append("another")
    turn(loop)
    assert not poll.is_looking


class Watched:
    """A connection's watch, and whether its loop looks after output."""

    def __init__(self, clock: Clock, loop: asyncio.AbstractEventLoop) -> None:
        self._clock, self._loop = clock, loop
        self._poll = BusyPoll(loop, WINDOW_S, now=clock)
        self.watch = AnswerWatch(self._poll)

    def looks_after_output(self) -> bool:
        self.watch.note_output()
        looks = self._poll.is_looking
        self._clock.seconds += 10 * WINDOW_S
        turn(self._loop)
        assert not self._poll.is_looking
        return looks

    def answer_after(self, seconds: float) -> None:
        self.watch.note_output()
        self._clock.seconds += seconds
        self.watch.note_input()
        self._clock.seconds += 10 * WINDOW_S
        turn(self._loop)


def test_output_without_near_answers_soon_costs_nothing_any_more(
    clock: Clock, loop: asyncio.AbstractEventLoop
) -> None:
    watched = Watched(clock, loop)
    looks = [watched.looks_after_output() for _ in range(PATIENCE + 2)]
    assert looks == [True] * PATIENCE + [False] * 2
    watched.answer_after(4 * WINDOW_S)
    assert not watched.looks_after_output(), "an answer that took longer changes nothing"


def test_one_near_answer_makes_it_look_again(clock: Clock, loop: asyncio.AbstractEventLoop) -> None:
    watched = Watched(clock, loop)
    for _ in range(2 * PATIENCE):
        watched.looks_after_output()
    watched.answer_after(2 * WINDOW_S)  # as long as it takes when both sides sleep
    assert [watched.looks_after_output() for _ in range(PATIENCE)] == [True] * PATIENCE
    assert not watched.looks_after_output()


def test_a_transport_looks_after_output_while_its_peer_answers(clock: Clock) -> None:
    asyncio.run(_transport_looks(clock))


async def _transport_looks(clock: Clock) -> None:
    loop = asyncio.get_running_loop()
    poll = BusyPoll(loop, WINDOW_S, now=clock)
    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    recorder, limits = Recorder(), replace(CLIENT_LINK, ping_burst=1000)
    _, transport = await loop.create_connection(
        lambda: AioTransport(Connection(Role.SERVER, limits=limits), recorder, poll), sock=near
    )
    async with asyncio.timeout(PATIENCE_S):
        await loop.sock_sendall(far, PREFACE + wire(Hello()))
        for i in range(3 * PATIENCE):
            assert await loop.sock_recv(far, 65536)
            await _settled()
            assert poll.is_looking, i
            clock.seconds += 2 * WINDOW_S  # near, if not at once
            await _settled()
            assert not poll.is_looking
            await loop.sock_sendall(far, wire(Ping()))
        assert await loop.sock_recv(far, 65536)
        await _settled()
        for _ in range(2 * PATIENCE):
            transport.send(Ping())
            assert await loop.sock_recv(far, 65536)
            await _settled()
            clock.seconds += 10 * WINDOW_S
            await _settled()
        transport.send(Ping())
        assert await loop.sock_recv(far, 65536)
        await _settled()
        assert not poll.is_looking, "nobody has answered for long"
        far.close()
        await recorder.until_lost()


async def _settled() -> None:
    for _ in range(3):
        await asyncio.sleep(0)
