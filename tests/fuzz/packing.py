"""MessagePack that no honest packer writes: changed trees, doubled keys, lies, long forms.

A tree is what `msgpack.unpackb` gives, except that maps are `Pairs` (keys may come twice) and that
a `Raw` stands for bytes that are put in as they are.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgpack

if TYPE_CHECKING:
    from random import Random


@dataclass(slots=True)
class Raw:
    """Packed bytes, right or wrong."""

    packed: bytes


@dataclass(slots=True)
class Pairs:
    """A map as a list of [key, value]."""

    items: list[list[Any]]


# What costs much to read, or has no place in a meta.
BOMBS = [
    b"\xc1",  # never used
    b"\xdd\xff\xff\xff\xff",  # an array of four billion
    b"\xdf\x7f\xff\xff\xff",
    b"\xdc\x10\x00" * 200,
    b"\xde\x0f\xff\xa1a" * 100,
    b"\x91" * 1100 + b"\xc0",
    b"\x81\xa1a" * 40 + b"\xc0",
    b"\xdc\x0f\xff" + b"\x80" * 4095,
    b"\xdb\xff\xff\xff\xff",
    b"\xc6\x00\xff\xff\xff",
    b"\xa2\xff\xfe",  # no UTF-8
    b"\xa3\xed\xa0\x80",  # half a surrogate pair
    b"\xd6\xff\x00\x00\x00\x00",  # a timestamp
    b"\xc7\x00\x01",  # a tensor of nothing
    b"\xd4\x05\x00",
    b"\x82\xa1a\x01\xa1a\x02",
    b"\xca\x7f\xc0\x00\x00",
    b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\xd3\x80\x00\x00\x00\x00\x00\x00\x00",
]
SCALARS: list[Any] = [
    None, True, False, 0, 1, -1, 2**31 - 1, 2**31, -(2**31) - 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1,
    -(2**63), 1.0, float("nan"), float("inf"), "", "stop", "a" * 65, "no", "token", "hmac",
    b"", b"x" * 16, b"y" * 32, [], Pairs([]), [0] * 70, Pairs([["method", "token"]]),
]  # fmt: skip
_TENSOR = 1
_DEEPER = 4  # as likely as a leaf is what has something inside, where fewer come by chance


def unpack(meta: bytes) -> Any:
    """Return the tree of a packed object; anything unreadable is `Raw`."""
    try:
        return msgpack.unpackb(
            meta,
            object_pairs_hook=lambda pairs: Pairs([list(pair) for pair in pairs]),
            strict_map_key=False,
        )
    except Exception:  # of a dozen types
        return Raw(meta)


def pack(tree: Any, rng: Random | None = None) -> bytes:
    """Return a tree's bytes; with `rng` now and then in longer forms than it needs."""
    if isinstance(tree, Raw):
        return tree.packed
    if isinstance(tree, list):
        items = b"".join(pack(item, rng) for item in tree)
        return _header(len(tree), 0x90, 0xDC, rng) + items
    if isinstance(tree, Pairs):
        items = b"".join(pack(part, rng) for pair in tree.items for part in pair)
        return _header(len(tree.items), 0x80, 0xDE, rng) + items
    if type(tree) is int and 0 <= tree < 2**32 and rng is not None and rng.random() < 0.02:
        return b"\xce" + struct.pack(">I", tree)
    packed: bytes = msgpack.packb(tree)
    return packed


def _header(length: int, fix: int, long: int, rng: Random | None) -> bytes:
    if rng is not None and rng.random() < 0.03:
        return bytes([long + 1]) + struct.pack(">I", length)
    if length < 16:
        return bytes([fix | length])
    return bytes([long]) + struct.pack(">H", length)


def edited(meta: bytes, rng: Random) -> bytes:
    """Return a meta with one node of its tree changed."""
    tree = _edit(unpack(meta), rng, depth=0)
    try:
        return pack(tree, rng)
    except (ValueError, OverflowError, RecursionError):  # too deep for the packer
        return meta


def _edit(tree: Any, rng: Random, depth: int) -> Any:
    children = _children(tree)
    if children and rng.random() < (0.95 if depth == 0 else 0.6):
        weights = [_DEEPER if _has_inside(holder[place]) else 1 for holder, place in children]
        holder, place = rng.choices(children, weights)[0]
        if rng.random() < 0.2:
            _reshape(holder, place, rng)
        else:
            holder[place] = _edit(holder[place], rng, depth + 1)
        return tree
    if isinstance(tree, msgpack.ExtType) and tree.code == _TENSOR and rng.random() < 0.8:
        return msgpack.ExtType(_TENSOR, edited(tree.data, rng))
    return _instead(tree, rng)


def _children(tree: Any) -> list[tuple[list[Any], int]]:
    if isinstance(tree, list):
        return [(tree, place) for place in range(len(tree))]
    if isinstance(tree, Pairs):
        return [(pair, part) for pair in tree.items for part in (0, 1)]
    return []


def _has_inside(tree: Any) -> bool:
    return isinstance(tree, msgpack.ExtType) or bool(_children(tree))


def _reshape(holder: list[Any], place: int, rng: Random) -> None:
    match rng.randrange(4):
        case 0:
            del holder[place:]
        case 1:
            holder.insert(place, rng.choice(SCALARS))
        case 2:
            holder.append(holder[place])
        case _:
            other = rng.randrange(len(holder))
            holder[place], holder[other] = holder[other], holder[place]


def _instead(tree: Any, rng: Random) -> Any:
    chance = rng.random()
    if chance < 0.15:
        return Raw(rng.choice(BOMBS))
    if chance < 0.3 and type(tree) is int:
        return max(-(2**63), min(tree + rng.choice([-1, 1, 256, -256]), 2**64 - 1))
    if chance < 0.4 and isinstance(tree, Pairs):
        return Pairs(tree.items * 2)
    if chance < 0.5:
        return [tree] * rng.choice([1, 2, 17])
    if chance < 0.6:
        return Pairs([[rng.choice(["a", "x" * 65, 1, None, [], Pairs([])]), tree]])
    if chance < 0.65 and type(tree) is str:
        return tree.encode()
    if chance < 0.75 and type(tree) in (str, bytes):
        return rng.choice([tree[:-1], tree + tree[:1]])
    if chance < 0.7:
        return msgpack.ExtType(rng.choice([0, _TENSOR, 5]), rng.randbytes(rng.randrange(9)))
    return rng.choice(SCALARS)
