"""Messages to frames and back, in plain msgpack: the reference codec (`typed` is the fast one).

Metas of hot messages are positional arrays: no keys to spell, none to duplicate. A shorter array
leaves the last fields at their defaults, a longer one comes from a later minor version and its
tail is skipped. Maps occur only in inputs, params and rare messages; duplicate keys are refused.
"""

import msgpack

from tensorwire_protocol.codec.choice import PLAIN, Codec
from tensorwire_protocol.codec.decode import decode
from tensorwire_protocol.codec.encode import encode

__all__ = ["PLAIN", "Codec", "decode", "encode"]

# Older ones crash or balloon on hostile input (CVE-2026-57585 and kin).
if msgpack.version < (1, 2, 4):
    raise ImportError(f"msgpack >= 1.2.4 is needed, found {'.'.join(map(str, msgpack.version))}")
