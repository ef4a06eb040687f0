"""MessagePack to plain values: one object, its containers bounded, and no bomb gets far."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, Any

import msgpack

from tensorwire_protocol.errors import BadMeta, BadTensor, TensorwireError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tensorwire_protocol.limits import Limits

_HARMLESS_BYTES = 640  # so small a meta cannot promise more than `_PROMISED_BYTES`
_PROMISED_BYTES = 1024 * 1024
_PROMISED_PER_BYTE = 80
_LONG_HEADERS = b"\xdc\xdd\xde\xdf"  # arrays and maps of more than 15 items
_LONG_HEADER = re.compile(rb"[\xdc-\xdf]")
_U16, _U32 = struct.Struct(">H"), struct.Struct(">I")


def unpack(meta: bytes, limits: Limits, ext_hook: Callable[[int, bytes], Any] | None = None) -> Any:
    """Return the one msgpack object in `meta`, its containers bounded, no key twice in a map.

    Raises:
        BadMeta: it is not readable within the limits.
        BadTensor: an ext type, where `ext_hook` does not take it.
    """
    # No container has more items than the meta has bytes.
    items = min(limits.container_items, len(meta))
    if len(meta) > _HARMLESS_BYTES:
        _check_promises(meta, items)
    try:
        return msgpack.unpackb(
            meta,
            max_array_len=items,
            max_map_len=items,
            object_pairs_hook=_unique_pairs,
            ext_hook=ext_hook or _no_ext,
        )
    except TensorwireError:
        raise
    except Exception as error:
        # msgpack raises a dozen types here; which one is no business of the peer.
        raise BadMeta("the meta is not one readable msgpack object within the limits") from error


def _check_promises(meta: bytes, items: int) -> None:
    """Refuse a meta whose containers promise far more than came.

    msgpack allocates a container when it reads its header and nests up to 1,024 of them, whatever
    depth is allowed here: 3 KiB of `dc 10 00` would cost 32 MiB before the depth is looked at.
    Bytes of texts that look like headers are counted too; almost all of them promise more than
    `items`, which msgpack refuses by itself, and so count as nothing.
    """
    allowance = _PROMISED_BYTES + _PROMISED_PER_BYTE * len(meta)
    if (len(meta) - len(meta.translate(None, _LONG_HEADERS))) * 8 * items <= allowance:
        return
    promised = 0
    for found in _LONG_HEADER.finditer(meta):
        at = found.start()
        length = _U16 if meta[at] in (0xDC, 0xDE) else _U32
        if at + 1 + length.size <= len(meta):
            (n,) = length.unpack_from(meta, at + 1)
            promised += 8 * n if n <= items else 0
        if promised > allowance:
            raise BadMeta("the meta's containers promise more than came")


def _no_ext(code: int, _: bytes) -> Any:
    raise BadTensor(f"msgpack ext type {code} is not allowed here")


def _unique_pairs(pairs: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    listed = pairs if type(pairs) is list else list(pairs)  # a list from msgpack's C code
    unique = dict(listed)
    if len(unique) != len(listed):
        raise BadMeta("a map has the same key twice")
    return unique
