"""Hostile frames of every kind, from peers that have logged in and from others, beside honest ones.

    python -m soak.frames --frames 1000000

Mutants of the test vectors and of real requests. Fails if a process dies, if the gateway grows by
more than 5 MiB, or if an honest stream beside them is not what the oracle makes of its prompt.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import tensorwire
from soak.ground import MIB, PATIENCE_S, Ground, allow_descriptors, ground
from tensorwire_protocol.codec import encode
from tensorwire_protocol.connection import FEATURE_RESUME, Connection
from tensorwire_protocol.errors import ErrorCode
from tensorwire_protocol.frames import HEADER, HEADER_BYTES, FrameDecoder
from tensorwire_protocol.limits import CLIENT_LINK
from tensorwire_protocol.login import TokenLogin
from tensorwire_protocol.messages import Cancel, Kind, Message, Ping, Pong, Request, Resume
from tensorwire_protocol.roles import Role
from tensorwire_server.workers.oracle import oracle_tokens

MOST_GROWTH_BYTES = 5 * MIB
_VECTORS = Path(__file__).parents[2] / "protocol" / "vectors" / "frames.jsonl"
_MOST_BYTES = 64 * 1024  # of one vector; the largest ones would be most of the traffic
_KEY = bytes(range(16))
_QUESTION, _ANSWER = (
    b"".join(encode(message, CLIENT_LINK))
    for message in (Ping(payload=b"are you "), Pong(payload=b"are you "))
)
_OPENING = frozenset({Kind.REQ, Kind.RESUME, Kind.SUBMIT})
_WARM_SHARE = 0.1
_SETTLE_S = 8.0
_NUM_ORACLES = 2
_STREAM_TOKENS = 64


class Oracles:
    """Honest clients whose every stream is compared with what the oracle must make."""

    def __init__(self, place: Ground) -> None:
        self.num_right = 0
        self.wrong: list[str] = []
        self._place = place
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(_NUM_ORACLES)]

    def __enter__(self) -> Oracles:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def _run(self, seed: int) -> None:
        prompt = f"calm {seed}"
        with tensorwire.Client(self._place.address, token=self._place.token) as client:
            while not self._is_over.is_set():
                seed += _NUM_ORACLES
                problem = self._check(client, prompt, seed)
                with self._lock:
                    if problem is None:
                        self.num_right += 1
                    else:
                        self.wrong.append(problem)

    def _check(self, client: tensorwire.Client, prompt: str, seed: int) -> str | None:
        try:
            made = client.generate("oracle", prompt, seed=seed, max_new_tokens=_STREAM_TOKENS)
        except tensorwire.TensorwireError as error:
            return f"{type(error).__name__}: {error}"
        right = oracle_tokens(list(prompt.encode()), seed, _STREAM_TOKENS)
        return None if made.token_ids == right else f"wrong tokens for seed {seed}"


class Attacker:
    """Sends conversations of mutated frames, each on a connection of its own."""

    def __init__(self, place: Ground, seed: int) -> None:
        self.num_frames = self.num_connections = 0
        self.sent: Counter[int] = Counter()  # by kind
        self.answers: Counter[str] = Counter()
        self._place = place
        self._chance = random.Random(seed)
        self._vectors = _vectors()
        self._requests = _requests()

    def attack(self, num_frames: int) -> None:
        """Send so many frames more."""
        until = self.num_frames + num_frames
        while self.num_frames < until:
            self._converse()

    def _converse(self) -> None:
        chance = self._chance
        # The first ones are such that most fail alone, the last ones such that most end it all.
        first = [self._mutant(self._requests, i + 1) for i in range(chance.randrange(64))]
        last = [self._mutant(self._vectors, i + 100) for i in range(chance.randrange(1, 4))]
        self.num_frames += len(first) + len(last)
        self.num_connections += 1
        self.sent.update(frame[4] for frame in first + last)
        with self._place.connect() as sock, contextlib.suppress(ConnectionError):
            sock.sendall(self._greeting() + b"".join(first) + _QUESTION)
            # Longer only if a mutant swallowed the question.
            self._hear(sock, within_s=0.1)
            sock.sendall(b"".join(last))
            sock.shutdown(socket.SHUT_WR)
            self._hear(sock, within_s=5.0)

    def _greeting(self) -> bytes:
        login = TokenLogin(token=self._place.token) if self._chance.random() < 0.7 else None
        features = (FEATURE_RESUME,) if self._chance.random() < 0.5 else ()
        opener = Connection(Role.CLIENT, login=login, features=features)
        return b"".join(opener.take_output())

    def _mutant(self, frames: list[bytes], stream: int) -> bytes:
        chance = self._chance
        frame = bytearray(chance.choice(frames))
        if chance.random() < 0.8:  # the others join what ran before under the same key
            frame = frame.replace(_KEY, chance.randbytes(16))
        if frame[4] in _OPENING and chance.random() < 0.98:
            frame[8:12] = stream.to_bytes(4, "little")  # or almost all would end at the second one
        what = chance.random()
        meta = _meta_of(frame)
        if what < 0.5 and meta:
            for _ in range(chance.randrange(1, 5)):
                frame[chance.choice(meta)] ^= chance.randrange(256)
        elif what > 0.98:
            frame[chance.randrange(len(frame))] = chance.randrange(256)
        return bytes(frame)

    def _hear(self, sock: socket.socket, within_s: float) -> None:
        """Read what the server says, to its end or to the answer to our question."""
        heard = b""
        sock.settimeout(within_s)
        with contextlib.suppress(TimeoutError):
            while not heard.endswith(_ANSWER) and (part := sock.recv(65536)):
                heard += part
        decoder = FrameDecoder(max_frame_bytes=len(heard), scratch=memoryview(bytearray(heard)))
        decoder.received(len(heard))
        while heard and (frame := decoder.next_frame()) is not None:
            name = Kind(frame.kind).name
            if frame.kind == Kind.ERR:
                scope = "stream" if frame.stream else "connection"
                name = f"{scope}:{ErrorCode(frame.aux).name}"
            self.answers[name] += 1


def _meta_of(frame: bytes | bytearray) -> range:
    """Return where the meta of a frame is."""
    _, kind, _, aux, _, meta_bytes = HEADER.unpack_from(frame)
    begin = HEADER_BYTES + (8 * aux if kind in _OPENING else 0)
    return range(begin, min(begin + meta_bytes, len(frame)))


def _vectors() -> list[bytes]:
    """Return the single frames of all test vectors, good and bad, of all directions."""
    lines = [json.loads(line) for line in _VECTORS.read_text().splitlines()]
    whole = [bytes.fromhex(line["hex"]) for line in lines]
    return [
        data
        for data in whole
        if HEADER_BYTES <= len(data) <= _MOST_BYTES
        and HEADER.unpack_from(data)[0] + HEADER_BYTES == len(data)
    ]


def _requests() -> list[bytes]:
    """Return frames that the server would answer, cancel or resume."""
    asked: list[tuple[str, str | None, dict[str, Any], dict[str, Any]]] = [
        ("generate", "oracle", {"prompt": "x" * 40}, {"max_new_tokens": 4, "seed": 1}),
        ("infer", "echo", {"x": np.arange(600, dtype=np.float32), "y": [1, 2.5, "z"]}, {}),
        ("tokenize", "oracle", {"prompt": "some words"}, {}),
        ("models", None, {}, {}),
        ("health", None, {}, {}),
        ("stats", None, {}, {}),
    ]
    messages: list[Message] = [
        Request(stream=1, op=op, key=_KEY, model=model, inputs=inputs, params=params)
        for op, model, inputs, params in asked
    ]
    messages += [Cancel(stream=1), Resume(stream=1, key=_KEY, next_index=1), Pong()]
    return [b"".join(encode(message, CLIENT_LINK)) for message in messages]


def soak(place: Ground, num_frames: int, seed: int) -> bool:
    """Attack; print and judge what became of everybody else."""
    attacker = Attacker(place, seed)
    workers = place.workers()
    with Oracles(place) as oracles:
        attacker.attack(int(num_frames * _WARM_SHARE))
        time.sleep(_SETTLE_S)
        before, began_cpu_s = place.rss_bytes, place.cpu_s
        began_s = time.monotonic()
        attacker.attack(num_frames)
        took_s, cpu_s = time.monotonic() - began_s, place.cpu_s - began_cpu_s
        time.sleep(_SETTLE_S)
        grown = place.rss_bytes - before
    deaths = (not place.is_alive()) + len(workers - place.workers())
    kinds = sum(1 for kind in Kind if attacker.sent[kind])
    print(
        f"frames sent={attacker.num_frames} connections={attacker.num_connections} kinds={kinds}"
        f" of {len(Kind)} deaths={deaths} grown_kib={grown / 1024:.0f}"
        f" rss_mib={place.rss_bytes / MIB:.1f} gateway_cpu_share={cpu_s / took_s:.2f}"
        f" oracle_right={oracles.num_right} oracle_wrong={len(oracles.wrong)}"
    )
    print("answers " + " ".join(f"{what}={n}" for what, n in attacker.answers.most_common()))
    for problem in oracles.wrong[:5]:
        print(f"wrong: {problem}")
    return (
        deaths == 0 and grown <= MOST_GROWTH_BYTES and not oracles.wrong and oracles.num_right > 0
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    allow_descriptors(4096)
    with ground("oracle:", "echo:", "--set", "outcomes.keys=100") as place:
        sys.exit(0 if soak(place, given.frames, given.seed) else 1)


if __name__ == "__main__":
    main()
