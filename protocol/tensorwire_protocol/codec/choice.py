"""What a codec is, and the plain one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorwire_protocol.codec.decode import decode
from tensorwire_protocol.codec.encode import encode

if TYPE_CHECKING:
    from tensorwire_protocol.frames import Frame
    from tensorwire_protocol.limits import Limits
    from tensorwire_protocol.messages import Message


class Codec:
    """Frames to messages and back; all codecs write and read the same bytes.

    The plain one; others are made of it, because compiled code calls the methods of a class of its
    own at once, and functions that it is given through Python's call.
    """

    def decode(self, frame: Frame, limits: Limits) -> Message:
        """Return the message of a frame; raises as `codec.decode.decode`."""
        return decode(frame, limits)

    def encode(self, message: Message, limits: Limits) -> list[bytes | memoryview]:
        """Return the buffers of a message's frame; raises as `codec.encode.encode`."""
        return encode(message, limits)


PLAIN = Codec()
