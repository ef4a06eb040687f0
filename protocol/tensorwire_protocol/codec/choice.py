"""What a codec is: two functions that every connection is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from tensorwire_protocol.frames import Frame
    from tensorwire_protocol.limits import Limits
    from tensorwire_protocol.messages import Message


class Codec(NamedTuple):
    """Frames to messages and back; all codecs write and read the same bytes."""

    decode: Callable[[Frame, Limits], Message]
    encode: Callable[[Message, Limits], list[bytes | memoryview]]
