"""The other doors that a peer's bytes come through: frames, the codecs, the operations' checks."""

from __future__ import annotations

from itertools import repeat
from random import Random
from typing import TYPE_CHECKING, Any, TypeAlias

from tensorwire_protocol.codec import PLAIN
from tensorwire_protocol.codec.typed import PACKING, TYPED
from tensorwire_protocol.errors import BadFraming, FrameTooLarge, RequestRefused, TensorwireError
from tensorwire_protocol.frames import FrameDecoder
from tensorwire_protocol.limits import CLIENT_LINK, WORKER_LINK
from tensorwire_protocol.messages import Kind, Packed, Request
from tensorwire_protocol.operations import check_inputs, check_request

from .cases import CLIENT_LINK_ROLES, What
from .conversations import TIGHT
from .shapes import misshapen
from .trial import Finding, check_survives, packed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from tensorwire_protocol.frames import Frame
    from tensorwire_protocol.limits import Limits
    from tensorwire_protocol.messages import Message

    from .cases import Case

Decode: TypeAlias = "Callable[[Frame, Limits], Message]"
# All must accept the same and make the same of it; another implementation is one line here.
CODECS: dict[str, Decode] = {"plain": PLAIN.decode, "typed": TYPED.decode}
_KINDS = frozenset(Kind)
_LARGE_BYTES = 64 * 1024  # not to be cut into thousands of pieces


def check_case(case: Case, codecs: Mapping[str, Decode] = CODECS) -> None:
    """Send the bytes of a case through every other door.

    Raises:
        Finding: one of them broke.
    """
    limits = CLIENT_LINK if case.role in CLIENT_LINK_ROLES else WORKER_LINK
    if case.is_tight:
        limits = TIGHT
    for step in case.steps:
        if step.what is not What.BYTES:
            continue
        frames = check_frames(step.data, limits, case.cut_seed)
        for frame in frames:
            if frame.kind in _KINDS:
                check_codecs(frame, limits, codecs)


def check_frames(data: bytes, limits: Limits, cut_seed: int) -> list[Frame]:
    """Return the frames in `data`; the same must come out however it is cut."""
    whole, error = _cut(data, repeat(len(data)), limits)
    cuts = Random(cut_seed)
    few = [1, 3, 16, 64, 1000] if len(data) < _LARGE_BYTES else [17, 100_000]
    parts, other = _cut(data, (cuts.choice(few) for _ in data), limits)
    if [_plain(f) for f in whole] != [_plain(f) for f in parts] or str(error) != str(other):
        raise Finding("the same bytes are other frames when they are cut elsewhere")
    return whole


def _cut(
    data: bytes, sizes: Iterable[int], limits: Limits
) -> tuple[list[Frame], TensorwireError | None]:
    decoder = FrameDecoder(
        max_frame_bytes=limits.frame_bytes,
        max_segments=limits.segments,
        scratch=memoryview(bytearray(max(1, len(data)))),
    )
    frames: list[Frame] = []
    view = memoryview(data)
    try:
        for size in sizes:
            if not len(view):
                break
            piece, view = view[:size], view[size:]
            while len(piece):
                buffer = decoder.get_buffer()
                part = piece[: len(buffer)]
                buffer[: len(part)] = part
                decoder.received(len(part))
                piece = piece[len(part) :]
                while (frame := decoder.next_frame()) is not None:
                    # Those of DATA live in memory that is used again.
                    frame.segments = [memoryview(bytearray(s)) for s in frame.segments]
                    frames.append(frame)
    except (BadFraming, FrameTooLarge) as error:
        return frames, error
    except Exception as error:
        raise Finding(f"{type(error).__name__} left the frame decoder: {error}") from error
    return frames, None


def _plain(frame: Frame) -> tuple[Any, ...]:
    segments = [bytes(segment) for segment in frame.segments]
    return frame.kind, frame.flags, frame.aux, frame.stream, frame.meta, segments


def check_codecs(frame: Frame, limits: Limits, codecs: Mapping[str, Decode] = CODECS) -> None:
    """Let every codec read a frame, and compare what they make of it."""
    read = {name: _read(name, codec, frame, limits) for name, codec in codecs.items()}
    first, *others = read.items()
    for name, message in others:
        if _packed(message) != _packed(first[1]):
            raise Finding(f"the codecs {first[0]} and {name} read a frame differently")
    unopened = _read("packing", PACKING.decode, frame, limits)
    if unopened is None and first[1] is not None:
        raise Finding(f"a gateway refuses a {first[1].KIND.name} that is right")
    for message in (*read.values(), unopened):
        if message is not None:
            _check_message(message)


def _check_message(message: Message) -> None:
    if (field := misshapen(message)) is not None:
        raise Finding(f"{field} of a decoded {message.KIND.name} has another type")
    check_survives(message)
    if isinstance(message, Request):
        _check_operation(message)


def _read(name: str, codec: Decode, frame: Frame, limits: Limits) -> Message | None:
    try:
        return codec(frame, limits)
    except RequestRefused:
        return None
    except Exception as error:
        raise Finding(f"{type(error).__name__} left the codec {name}: {error}") from error


def _packed(message: Message | None) -> bytes:
    return b"" if message is None else packed(message)


def _check_operation(request: Request) -> None:
    try:
        operation = check_request(request)
        if not isinstance(request.inputs, Packed):
            check_inputs(operation, request.inputs)
    except RequestRefused:
        return
    except Exception as error:
        raise Finding(f"{type(error).__name__} left the operation's checks: {error}") from error
