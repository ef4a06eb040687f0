"""Bytes that no client sends: answered in a word, cut off, and noticed by nobody else."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tensorwire_protocol.connection import NOT_OURS, Connection
from tensorwire_protocol.frames import PREFACE
from tensorwire_protocol.messages import Failure, Kind, Request
from tensorwire_protocol.roles import Role

from .serving import wait_until
from .strangers import (
    MIB,
    Innocent,
    assert_costs_no_memory,
    connect,
    frames_of,
    gateway_rss,
    greeting,
    header,
    read_to_end,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .serving import RunningServer

pytestmark = pytest.mark.slow


def _request(
    stream: int, op: str, params: Mapping[str, object], inputs: Mapping[str, object]
) -> bytes:
    client = Connection(Role.CLIENT)
    client.take_output()
    fresh = Connection(Role.SERVER)
    fresh.feed(greeting())
    client.feed(b"".join(fresh.take_output()))
    model = "oracle" if op == "generate" else "echo"
    client.send(
        Request(stream=stream, op=op, key=os.urandom(16), model=model, inputs=inputs, params=params)
    )
    return b"".join(client.take_output())


GARBAGE = random.Random(1).randbytes(4096)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS ClientHello
        b"\n",
        PREFACE[:7] + b"\x0b",
        PREFACE.replace(b"1", b"2"),
        GARBAGE,
        GARBAGE * 256,
    ],
    ids=["http", "tls", "newline", "one-byte-off", "version-2", "garbage", "a-mebibyte"],
)
def test_a_wrong_preface_gets_one_line_and_the_connection_is_closed(
    server: RunningServer, innocent: Innocent, sent: bytes
) -> None:
    with connect(server) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(sent)
        answer = read_to_end(sock)
    # A peer that goes on sending into a closed socket may lose the line to a reset.
    assert answer == NOT_OURS or (not answer and len(sent) > 4096)
    innocent.see_another()


PROTOCOL_CRIMES = {
    "4-GiB-before-hello": (PREFACE + header(2**32 - 1, Kind.HELLO), "FRAME_TOO_LARGE"),
    "4-GiB-after-hello": (greeting() + header(2**32 - 1, Kind.REQ, stream=1), "FRAME_TOO_LARGE"),
    "request-before-hello": (PREFACE + header(0, Kind.REQ, stream=1), "SEQUENCE"),
    "garbage-after-preface": (PREFACE + GARBAGE, "FRAME_TOO_LARGE"),
    "garbage-after-hello": (greeting() + GARBAGE, "FRAME_TOO_LARGE"),
    "unknown-kind": (greeting() + header(0, 0x7F), "UNKNOWN_KIND"),
    "a-worker's-frame": (greeting() + header(0, Kind.SUBMIT, stream=1), "UNKNOWN_KIND"),
    "a-gateway's-frame": (greeting() + header(0, Kind.DRAIN), "UNKNOWN_KIND"),
    "second-hello": (greeting() + greeting()[len(PREFACE) :], "SEQUENCE"),
    "meta-longer-than-body": (
        greeting() + header(4, Kind.REQ, stream=1, meta=8) + bytes(4),
        "FRAMING",
    ),
    "reserved-flags": (greeting() + header(0, Kind.PING, flags=0x80), "FRAMING"),
    "stream-number-twice": (
        greeting() + 2 * _request(1, "generate", {"max_new_tokens": 3000}, {"prompt": "x"}),
        "SEQUENCE",
    ),
    "ping-flood": (greeting() + 64 * header(1, Kind.PING, meta=1) + b"\x80", None),
}


@pytest.mark.parametrize("crime", PROTOCOL_CRIMES, ids=str)
def test_a_broken_rule_gets_one_err_and_the_connection_is_closed(
    server: RunningServer, innocent: Innocent, crime: str
) -> None:
    sent, code = PROTOCOL_CRIMES[crime]
    with connect(server) as sock:
        sock.sendall(sent)
        frames = frames_of(read_to_end(sock))
    errors = [frame for frame in frames if frame.kind == Kind.ERR and frame.stream == 0]
    assert len(errors) == 1, [(frame.kind, frame.stream) for frame in frames]
    assert errors[0] is frames[-1]
    if code is not None:
        assert Failure(stream=0, code=errors[0].aux, message="").to_error().code.name == code
    innocent.see_another()


def test_half_a_frame_and_then_the_end_costs_only_its_own_connection(
    server: RunningServer, innocent: Innocent
) -> None:
    whole = greeting() + _request(1, "generate", {"max_new_tokens": 3000}, {"prompt": "x"})
    for cut in (3, 8, 11, len(greeting()) - 1, len(greeting()) + 7, len(whole) - 1):
        with connect(server) as sock:
            sock.sendall(whole[:cut])
            sock.shutdown(socket.SHUT_WR)
            frames = read_to_end(sock)
            assert frames.count(NOT_OURS) == 0
    innocent.see_another()


def test_half_a_greeting_and_then_nothing_is_cut_off_in_time(
    server: RunningServer, innocent: Innocent
) -> None:
    whole = greeting()
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connect(server)) for _ in range(6)]
        began = time.monotonic()
        for sock, cut in zip(socks, (0, 1, 7, 8, 16, len(whole) - 1), strict=True):
            sock.sendall(whole[:cut])
        for sock in socks:
            last_words = read_to_end(sock, within_s=8.0)
            kinds = [frame.kind for frame in frames_of(last_words)]
            assert kinds in ([Kind.ERR], [])
        assert time.monotonic() - began > 4.0


def test_hundreds_of_liars_do_not_grow_the_gateway(
    server: RunningServer, innocent: Innocent
) -> None:
    number = 100

    def lie() -> None:
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(connect(server)) for _ in range(number)]
            for sock in socks:
                # The largest that is believed, and only its beginning: memory must follow what
                # came, not what was announced.
                sock.sendall(greeting() + header(MIB, Kind.REQ, stream=1) + b"x" * 1000)
            wait_until(lambda: server.stats()["gateway"]["sessions"] == number + 2, "all are there")
            for sock in socks[::2]:
                sock.sendall(b"x" * MIB + header(2**32 - 1, Kind.REQ, stream=3))
        wait_until(lambda: server.stats()["gateway"]["sessions"] == 2, "all liars are gone")

    assert_costs_no_memory(server, lie)  # 50 MiB each time, and a promise of twice as much


def test_whoever_does_not_read_large_answers_is_cut_and_does_not_grow_the_gateway(
    server: RunningServer, innocent: Innocent
) -> None:
    def gorge() -> None:
        with connect(server) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(greeting())
            block = np.zeros(128 * 1024, np.float32)
            with contextlib.suppress(ConnectionError, TimeoutError):
                sock.settimeout(5.0)
                for stream in range(1, 65):
                    sock.sendall(_request(stream, "infer", {}, {"x": block}))
            innocent.see_another()
            wait_until(lambda: server.stats()["gateway"]["sessions"] == 2, "it is cut")

    assert_costs_no_memory(server, gorge)


def test_whoever_does_not_read_tokens_gets_them_merged_and_is_no_burden(
    server: RunningServer, innocent: Innocent
) -> None:
    before = gateway_rss(server)
    with connect(server) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(greeting())
        for stream in range(1, 33):
            prompt = {"prompt": os.urandom(4).hex()}
            sock.sendall(_request(stream, "generate", {"max_new_tokens": 3000}, prompt))
        wait_until(
            lambda: server.stats()["gateway"]["journal_tokens"] > 16_000, "thousands of tokens"
        )
        innocent.see_another()
        assert gateway_rss(server) - before < 8 * MIB


@pytest.mark.parametrize("seed", range(4))
def test_mutated_conversations_never_hurt_others(
    server: RunningServer, innocent: Innocent, seed: int
) -> None:
    chance = random.Random(seed)
    asks = _request(1, "generate", {"max_new_tokens": 4}, {"prompt": "x"})
    asks += _request(2, "infer", {}, {"x": np.arange(600, dtype=np.float32)})
    asks += header(0, Kind.CANCEL, stream=1)
    for _ in range(60):
        mutant = bytearray(greeting() + asks)
        for _ in range(chance.randrange(1, 6)):
            mutant[chance.randrange(len(PREFACE), len(mutant))] = chance.randrange(256)
        with connect(server) as sock:
            sock.sendall(mutant)
            sock.shutdown(socket.SHUT_WR)
            read_to_end(sock)
    innocent.see_another()
