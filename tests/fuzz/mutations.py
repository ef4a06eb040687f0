"""What a hostile peer does to a valid conversation: changes that know what a frame is."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tensorwire_protocol.codec import encode
from tensorwire_protocol.frames import HEADER, HEADER_BYTES, PREFACE, SEGMENT_KINDS
from tensorwire_protocol.limits import WORKER_LINK
from tensorwire_protocol.messages import (
    Auth,
    Credit,
    Data,
    Failure,
    Hello,
    Kind,
    Load,
    Shm,
    Welcome,
)

from .bodies import END, in_pieces
from .cases import Step, What
from .conversations import converse, is_kind
from .packing import edited

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from tensorwire_protocol.messages import Message

    from .cases import Case

_GREETINGS = frozenset({Kind.HELLO, Kind.WELCOME, Kind.AUTH})
_SPARE_THE_GREETING = 0.9  # of the changes: behind it there is more to break
_STREAMS = [0, 1, 2, 3, 5, 512, 2**31, 2**32 - 1]
_U32 = [0, 1, 7, 8, 15, 16, 17, 63, 64, 65, 4095, 4096, 4097, 16384, 65536, 1114112, 2**32 - 1]
_LOANS: list[dict[str, Any]] = [
    {},
    {"returned": [1, 2**63]},
    {"returned": [[], {}, None]},
    {"loan": 1, "owners": [0], "offsets": [0]},
    {"loan": 1, "owners": [2, -1], "offsets": [2**63, -1]},
    {"loan": [[[[[]]]]], "owners": 1, "offsets": None},
]
_AUX = [0, 1, 2, 3, 64, 65, 256, 65535]


def mutate(case: Case, rng: Random) -> None:
    """Change a case in one to four places."""
    for _ in range(rng.choice([1, 1, 1, 2, 3, 4])):
        places = _places(case, rng)
        if places:
            rng.choice(_CHANGES)(case, rng.choice(places), rng)
    if rng.random() < 0.1:
        case.cut_seed = rng.getrandbits(32)


def _places(case: Case, rng: Random) -> list[int]:
    """Return which steps may be changed: those with frames, the greeting among them at times."""
    frames = [i for i, step in enumerate(case.steps) if step.what is What.BYTES]
    if rng.random() > _SPARE_THE_GREETING:
        return frames
    return [i for i in frames if not _is_greeting(case.steps[i].data)] or frames[-1:]


def _is_greeting(data: bytes) -> bool:
    return data == PREFACE or (len(data) > 4 and data[4] in _GREETINGS)


def _put(case: Case, place: int, data: bytes) -> None:
    case.steps[place] = Step(What.BYTES, data)


def _header(data: bytes) -> list[int]:
    return list(HEADER.unpack(data[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0")))


def _change_header(case: Case, place: int, rng: Random) -> None:
    data = case.steps[place].data
    fields = _header(data)
    which = rng.randrange(6)
    near = max(0, fields[which] + rng.choice([-1, 1, 8]))
    choices: list[list[int]] = [
        _U32,
        [int(rng.choice(list(Kind))), 0, 0x30, 0x7F, 0x80, 0xFF],
        [0, 1, 2, 4, 5, 8, 0x80],
        _AUX,
        _STREAMS,
        _U32,
    ]
    limit = (2**32, 256, 256, 2**16, 2**32, 2**32)[which]
    fields[which] = rng.choice([near % limit, *choices[which]])
    _put(case, place, HEADER.pack(*fields) + data[HEADER_BYTES:])


def _change_meta(case: Case, place: int, rng: Random) -> None:
    data = case.steps[place].data
    if len(data) <= HEADER_BYTES:
        return
    fields = _header(data)
    table = 8 * fields[3] if fields[1] in SEGMENT_KINDS else 0
    start, end = HEADER_BYTES + table, HEADER_BYTES + table + fields[5]
    meta = edited(data[start:end], rng)
    tail = data[end:]
    if tail and rng.random() < 0.8:  # segments stay where a right frame has them
        at, old = start + len(meta), -end % 64
        tail = bytes(-at % 64) + tail[old:]
    fields[5] = len(meta)
    fields[0] = table + len(meta) + len(tail)
    _put(case, place, HEADER.pack(*fields) + data[HEADER_BYTES:start] + meta + tail)


def _change_segments(case: Case, place: int, rng: Random) -> None:
    """Change the table of lengths, the padding or the bytes of the arrays."""
    with_arrays = [
        i
        for i, step in enumerate(case.steps)
        if step.what is What.BYTES
        and _header(step.data)[3]
        and _header(step.data)[1] in SEGMENT_KINDS
    ]
    if not with_arrays:
        _change_meta(case, place, rng)
        return
    place = rng.choice(with_arrays)
    data = bytearray(case.steps[place].data)
    table_end = HEADER_BYTES + 8 * _header(bytes(data))[3]
    at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(HEADER_BYTES, table_end)
    if at < len(data):
        data[at] = rng.choice([0, 1, data[at] ^ 1, 255])
    _put(case, place, bytes(data))


def _break_body(case: Case, place: int, rng: Random) -> None:
    """Put a message in pieces, or change which DATA comes when, of what, and which is the last."""
    steps = case.steps
    data = [i for i, s in enumerate(steps) if s.what is What.BYTES and is_kind(s.data, Kind.DATA)]
    if not data:
        steps[place : place + 1] = [
            Step(What.BYTES, piece) for piece in in_pieces(steps[place].data, rng)
        ]
        return
    place, other = rng.choice(data), rng.choice(data)
    fields, payload = _header(steps[place].data), steps[place].data[HEADER_BYTES:]
    match rng.randrange(6):
        case 0:
            fields[2] ^= END
        case 1:
            fields[3] = max(0, fields[3] + rng.choice([-1, 1]))
        case 2:
            payload = payload[: rng.randrange(len(payload) + 1)]
        case 3:
            payload += b"x"
        case 4:  # one of all streams
            fields[4] = _header(steps[other].data)[4]
        case _:
            steps[place], steps[other] = steps[other], steps[place]
            return
    fields[0] = len(payload)
    _put(case, place, HEADER.pack(*fields) + payload)


def _truncate(case: Case, place: int, rng: Random) -> None:
    data = case.steps[place].data
    cut = data[: rng.randrange(len(data) + 1)]
    if len(cut) > HEADER_BYTES and rng.random() < 0.7:  # and say so
        fields = _header(cut)
        fields[0] = len(cut) - HEADER_BYTES
        fields[5] = min(fields[5], fields[0])
        cut = HEADER.pack(*fields) + cut[HEADER_BYTES:]
    _put(case, place, cut)


def _flip_bits(case: Case, place: int, rng: Random) -> None:
    data = bytearray(case.steps[place].data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    _put(case, place, bytes(data))


def _splice(case: Case, place: int, rng: Random) -> None:
    one, other = case.steps[place].data, rng.choice(case.steps).data
    joined = one[: rng.randrange(len(one) + 1)] + other[rng.randrange(len(other) + 1) :]
    if len(joined) > HEADER_BYTES and rng.random() < 0.7:
        fields = _header(joined)
        fields[0] = len(joined) - HEADER_BYTES
        if fields[1] not in SEGMENT_KINDS:
            fields[5] = fields[0]
        joined = HEADER.pack(*fields) + joined[HEADER_BYTES:]
    _put(case, place, joined)


def _repeat(case: Case, place: int, rng: Random) -> None:
    case.steps[place:place] = [case.steps[place]] * rng.choice([1, 1, 2, 12])


def _drop(case: Case, place: int, rng: Random) -> None:
    del case.steps[place : place + rng.choice([1, 1, 3])]


def _reorder(case: Case, place: int, rng: Random) -> None:
    case.steps.insert(rng.randrange(len(case.steps)), case.steps.pop(place))


def _insert_frame(case: Case, place: int, rng: Random) -> None:
    """Put in a frame of another conversation, or one that honest ends do not send here."""
    if rng.random() < 0.5:
        frames = [s for s in converse(rng).steps if s.what is What.BYTES]
        case.steps.insert(place + 1, rng.choice(frames or case.steps))
        return
    stream, at = rng.choice(_STREAMS), rng.choice([0, 1, 64])
    strangers: list[Message] = [
        Credit(stream=stream, amount=1),
        Data(stream=stream, segment=at, payload=bytes(rng.choice([0, 1, 500])), last=at == 0),
        Auth(payload={"proof": bytes(32)}),
        Failure(stream=rng.choice([0, stream]), code=0x0407, message="m"),
        Load(),
        Shm(payload=rng.choice(_LOANS)),
        Shm(stream=stream, payload=rng.choice(_LOANS)),
        Hello(),
        Welcome(),
    ]
    frame = b"".join(encode(rng.choice(strangers), WORKER_LINK))
    case.steps.insert(place + 1, Step(What.BYTES, frame))


def _insert_bytes(case: Case, place: int, rng: Random) -> None:
    case.steps.insert(place + 1, Step(What.BYTES, rng.randbytes(rng.choice([1, 4, 16, 40]))))


def _insert_action(case: Case, place: int, rng: Random) -> None:
    case.steps.insert(place, Step.action(rng.randrange(16), rng.getrandbits(32)))


def _insert_wait(case: Case, place: int, rng: Random) -> None:
    case.steps.insert(place, Step(What.WAIT, bytes(rng.choice([1, 11, 60, 250, 700]))))


def _change_options(case: Case, place: int, rng: Random) -> None:
    del place
    changed: dict[str, Any] = rng.choice(
        [
            {"is_tight": not case.is_tight},
            {"has_features": not case.has_features},
            {"codec": "typed"},
        ]
    )
    for name, value in changed.items():
        setattr(case, name, value)


_CHANGES: list[Callable[[Case, int, Random], None]] = [
    *[_change_meta] * 8,
    *[_change_header] * 4,
    *[_change_segments] * 2,
    *[_insert_frame] * 3,
    *[_break_body] * 2,
    _truncate,
    _flip_bits,
    _splice,
    _repeat,
    _drop,
    _reorder,
    _insert_bytes,
    _insert_action,
    _insert_wait,
    _change_options,
]


def clone(case: Case) -> Case:
    """Return a case that can be changed without the first."""
    return replace(case, steps=list(case.steps))
