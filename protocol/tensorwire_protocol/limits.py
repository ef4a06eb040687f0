"""Every bound of the wire in one table; WELCOME announces what the server enforces."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

KIB = 1024
MIB = 1024 * KIB
MIN_FRAME_BYTES = 4 * KIB  # whatever a side announces: its ERR and WELCOME must always fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one side accepts. SPEC.md section "Limits" is this table."""

    frame_bytes: int = MIB + 64 * KIB  # body of one frame
    message_bytes: int = 256 * MIB  # of all segments of one message, with feature `body`
    client_meta_bytes: int = 16 * KIB  # meta of a frame from a client
    server_meta_bytes: int = 256 * KIB  # meta of a frame from a server or on a worker link
    preauth_bytes: int = 4 * KIB  # bodies of all frames of a peer that has not logged in
    preauth_frames: int = 4
    preauth_out_bytes: int = KIB  # to such a peer, in all
    meta_depth: int = 16
    container_items: int = 4096
    key_bytes: int = 64  # of one key in a map
    segments: int = 64
    inline_bytes: int = KIB  # a tensor this small may sit in the meta
    tensor_dims: int = 16
    streams: int = 512  # open at once on one connection
    handshake_s: float = 5.0
    ping_after_s: float = 20.0  # of silence
    dead_after_s: float = 60.0  # of silence
    ping_interval_s: float = 1.0  # a peer that pings more often (with a burst) is cut
    ping_burst: int = 8
    fault_burst: int = 200  # cancels, and frames that this side answers with an error, at once
    faults_per_s: float = 50.0
    frame_grace_s: float = 10.0  # for a frame that has begun, and besides
    frame_bytes_per_s: int = 64 * KIB  # at least
    send_high_water_bytes: int = 256 * KIB  # events merge above this
    send_pause_bytes: int = 2 * MIB  # a server reads nothing more from its client above this
    send_stuck_s: float = 10.0  # bytes above it stay unsent so long: the connection is closed
    send_hard_bytes: int = 4 * MIB  # the connection is closed above this

    def meta_bytes(self, *, is_from_opener: bool) -> int:
        """Return the bound on metas that come from the opener, or from the answerer."""
        return self.client_meta_bytes if is_from_opener else self.server_meta_bytes

    def to_wire(self) -> dict[str, int | float]:
        """Return the table as WELCOME carries it."""
        return asdict(self)

    def differing_from(self, other: Limits) -> dict[str, int | float]:
        """Return what of the table is not as in `other`: HELLO announces only that."""
        theirs = asdict(other)
        return {name: value for name, value in asdict(self).items() if value != theirs[name]}

    def announced(self, wire: dict[str, Any]) -> Limits:
        """Return these limits with a peer's announced values put in.

        Unknown names are skipped, and so are values that are not finite numbers >= 0; where a whole
        number is needed, only a whole number counts.
        """
        types = {f.name: (int,) if type(f.default) is int else (int, float) for f in fields(Limits)}
        numbers = {
            name: value
            for name, value in wire.items()
            if type(value) in types.get(name, ()) and 0 <= value < math.inf
        }
        return Limits(**{**asdict(self), **numbers})


CLIENT_LINK = Limits()
# A replica carries what many client connections bring: the bounds on streams and metas are wider,
# and nobody else can reach the link.
WORKER_LINK = Limits(
    client_meta_bytes=MIB,
    server_meta_bytes=MIB,
    container_items=65536,
    preauth_bytes=64 * KIB,
    message_bytes=8 * 1024 * MIB,
    streams=8192,
    fault_burst=65536,
    frame_grace_s=60.0,  # a worker that loads a model may not come to read for a while
    faults_per_s=65536.0,
    send_hard_bytes=64 * MIB,
)
