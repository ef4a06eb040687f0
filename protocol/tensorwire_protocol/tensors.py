"""Arrays on the wire: a descriptor in the meta, the bytes in an aligned segment beside it.

A descriptor is msgpack ext type 1 around `[dtype, shape, ref]`; `ref` is a segment's index, or the
bytes themselves when they are few. Values are dense, C order, little-endian. dtype names are those
of safetensors.
"""

from __future__ import annotations

import importlib
import math
import sys
import zlib
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np

from tensorwire_protocol.errors import BadTensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from tensorwire_protocol.limits import Limits

EXT_TENSOR = 1
ALIGNMENT = 64  # a cache line, and what vectorised kernels like to load from

_NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
# numpy has no such types: ml_dtypes brings them; without it the bits travel as unsigned integers.
_EXTENDED: dict[str, tuple[str, np.dtype[Any]]] = {
    "BF16": ("bfloat16", np.dtype("<u2")),
    "F8_E4M3": ("float8_e4m3fn", np.dtype("u1")),
    "F8_E5M2": ("float8_e5m2", np.dtype("u1")),
}
_WIRE_DTYPES = _NUMPY_DTYPES | {name: bits for name, (_, bits) in _EXTENDED.items()}
_NAMES = {dtype: name for name, dtype in _NUMPY_DTYPES.items()}
_NAMES_EXTENDED = {numpy_name: name for name, (numpy_name, _) in _EXTENDED.items()}


@dataclass(frozen=True, slots=True, eq=False)
class RawTensor:
    """An array whose dtype numpy cannot name: its bits as unsigned integers of the same width."""

    dtype: str  # "BF16", "F8_E4M3" or "F8_E5M2"
    bits: NDArray[Any]


def aligned_buffer(num_bytes: int) -> memoryview:
    """Return uninitialised memory whose address is a multiple of 64."""
    block = np.empty(num_bytes + ALIGNMENT, dtype=np.uint8)
    skip = -block.ctypes.data % ALIGNMENT
    return block.data[skip : skip + num_bytes]


def padding(offset: int) -> int:
    """Return how many zero bytes bring `offset` to the next multiple of 64."""
    return -offset % ALIGNMENT


def describe(value: NDArray[Any] | RawTensor) -> tuple[str, NDArray[Any]]:
    """Return the wire name of the array's dtype, and the array in wire order.

    Raises:
        BadTensor: numpy's dtype has no name on the wire (objects, strings, complex, …).
    """
    # Not ascontiguousarray: it would turn a scalar () into (1,).
    if isinstance(value, RawTensor):
        if value.dtype not in _EXTENDED or value.bits.dtype != _EXTENDED[value.dtype][1]:
            raise BadTensor(f"a raw tensor of {value.dtype!r} cannot hold {value.bits.dtype} bits")
        return value.dtype, np.asarray(value.bits, order="C")
    name = _NAMES.get(value.dtype.newbyteorder("<")) or _NAMES_EXTENDED.get(value.dtype.name)
    if name is None:
        raise BadTensor(
            f"arrays of dtype {value.dtype} cannot be sent; allowed: {', '.join(_WIRE_DTYPES)}"
        )
    dense = np.asarray(value, dtype=value.dtype.newbyteorder("<"), order="C")
    return name, dense


class TensorSink:
    """Collects the segments of one outgoing message; `default` is its hook for msgpack."""

    def __init__(self, inline_bytes: int) -> None:
        self.segments: list[memoryview] = []
        self.num_tensors = 0
        self._inline_bytes = inline_bytes

    def default(self, value: object) -> msgpack.ExtType:
        """Return the descriptor for an array; everything else has no place on the wire."""
        if isinstance(value, np.generic):
            value = np.asarray(value)
        if not isinstance(value, np.ndarray | RawTensor):
            raise TypeError(f"{type(value).__name__} cannot be sent")
        self.num_tensors += 1
        name, dense = describe(value)
        raw = dense.reshape(-1).view(np.uint8).data
        ref: int | bytes
        if len(raw) <= self._inline_bytes:
            ref = bytes(raw)
        else:
            ref = len(self.segments)
            self.segments.append(raw)
        return msgpack.ExtType(EXT_TENSOR, msgpack.packb([name, list(dense.shape), ref]))


class TensorSource:
    """Turns descriptors of one incoming frame into arrays; `ext_hook` is its hook for msgpack."""

    def __init__(self, segments: Sequence[memoryview], limits: Limits) -> None:
        self._segments = segments
        self._limits = limits
        self._used: set[int] | None = None  # segments; most messages have none
        self.num_tensors = 0

    def ext_hook(self, code: int, data: bytes) -> NDArray[Any] | RawTensor:
        """Return the array that a descriptor names, as a view of the segment where it can be.

        Raises:
            BadTensor: any other ext type, or numbers that contradict each other.
        """
        if code != EXT_TENSOR:
            raise BadTensor(f"msgpack ext type {code} is not allowed")
        self.num_tensors += 1
        try:
            descriptor = msgpack.unpackb(data, max_array_len=self._limits.tensor_dims)
        except Exception as error:
            raise BadTensor("a tensor descriptor is not readable msgpack") from error
        if type(descriptor) is not list or len(descriptor) != 3:
            raise BadTensor("a tensor descriptor must be [dtype, shape, ref]")
        return self._resolve(*descriptor)

    def _resolve(self, name: Any, shape: Any, ref: Any) -> NDArray[Any] | RawTensor:
        if type(name) is not str or name not in _WIRE_DTYPES:
            raise BadTensor(f"a tensor's dtype must be one of {', '.join(_WIRE_DTYPES)}")
        dtype = _WIRE_DTYPES[name]
        if type(shape) is not list or not all(type(n) is int and n >= 0 for n in shape):
            raise BadTensor("a tensor's shape must be a list of integers >= 0")
        raw = self._bytes(ref)
        # Python's integers do not overflow, so the product is exact whatever the peer claims.
        needed = math.prod(shape) * dtype.itemsize
        if needed != len(raw):
            raise BadTensor(f"a tensor of {name} {shape} has {needed} bytes, {len(raw)} came")
        try:
            values = np.frombuffer(raw, dtype=dtype).reshape(shape)
        except (ValueError, OverflowError) as error:  # [0, 2**63] has no bytes, and no array
            raise BadTensor("a tensor's shape is beyond what an array can have") from error
        return _extended(name, values) if name in _EXTENDED else values

    def _bytes(self, ref: Any) -> bytearray | memoryview:
        if type(ref) is bytes:
            if len(ref) > self._limits.inline_bytes:
                raise BadTensor(f"an inline tensor may have {self._limits.inline_bytes} bytes")
            return bytearray(ref)  # writable, as what comes from a segment
        if type(ref) is not int or not 0 <= ref < len(self._segments):
            raise BadTensor("a tensor's ref must be the index of a segment, or its bytes")
        # Four thousand arrays of one segment are 4 GiB as soon as somebody stacks them.
        if self._used is None:
            self._used = set()
        if ref in self._used:
            raise BadTensor(f"segment {ref} is used by two tensors")
        self._used.add(ref)
        return self._segments[ref]


def _extended(name: str, bits: NDArray[Any]) -> NDArray[Any] | RawTensor:
    try:
        ml_dtypes = importlib.import_module("ml_dtypes")
    except ImportError:
        return RawTensor(name, bits)
    viewed: NDArray[Any] = bits.view(getattr(ml_dtypes, _EXTENDED[name][0]))
    return viewed


def pack_ids(ids: Iterable[int]) -> bytes:
    """Return token ids as little-endian int32, 4 bytes each.

    Raises:
        OverflowError, TypeError: something is not an integer of 32 bits.
    """
    packed = array("i", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_ids(packed: bytes | memoryview) -> list[int]:
    """Return the token ids of `pack_ids`; the length must be a multiple of 4."""
    ids = array("i", bytes(packed))
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()


def ids_checksum(ids: Iterable[int]) -> int:
    """Return the CRC-32 (as zlib's) over `pack_ids`, which END carries."""
    return zlib.crc32(pack_ids(ids))
