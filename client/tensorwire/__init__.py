"""Tensorwire's client library: `from tensorwire import Client, AsyncClient`.

Names are loaded when they are first used, so that `import tensorwire` costs next to nothing and
the synchronous client never imports asyncio.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorwire_protocol.tensors import RawTensor

    from tensorwire.aio import AsyncClient, AsyncStream
    from tensorwire.calls import GenerateOptions, RequestOptions
    from tensorwire.client import Client, Stream
    from tensorwire.errors import (
        BadFraming,
        BadMeta,
        BadParams,
        BadPreface,
        BadTensor,
        BadVersion,
        Busy,
        ClientUnusable,
        ConnectionFailed,
        ConnectionLost,
        DeadlineExceeded,
        Draining,
        ErrorCode,
        Executed,
        ExecutionFailed,
        Flood,
        Forbidden,
        FrameTooLarge,
        HandshakeTimeout,
        InternalError,
        KeyReused,
        ModelError,
        ModelLoading,
        NumericError,
        OutOfMemory,
        OutputTooLarge,
        PeerSilent,
        Poisoned,
        QuotaExceeded,
        RequestCancelled,
        RequestRefused,
        SequenceError,
        SlowConsumer,
        TensorwireError,
        TooLarge,
        Unauthenticated,
        Unavailable,
        UnknownKey,
        UnknownKind,
        UnknownModel,
        UnknownOperation,
        Unsupported,
        WorkerLost,
    )
    from tensorwire.logprobs import Logprobs
    from tensorwire.results import Delta, Generation, Timings, Usage

    __version__: str

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "BadFraming",
    "BadMeta",
    "BadParams",
    "BadPreface",
    "BadTensor",
    "BadVersion",
    "Busy",
    "Client",
    "ClientUnusable",
    "ConnectionFailed",
    "ConnectionLost",
    "DeadlineExceeded",
    "Delta",
    "Draining",
    "ErrorCode",
    "Executed",
    "ExecutionFailed",
    "Flood",
    "Forbidden",
    "FrameTooLarge",
    "GenerateOptions",
    "Generation",
    "HandshakeTimeout",
    "InternalError",
    "KeyReused",
    "Logprobs",
    "ModelError",
    "ModelLoading",
    "NumericError",
    "OutOfMemory",
    "OutputTooLarge",
    "PeerSilent",
    "Poisoned",
    "QuotaExceeded",
    "RawTensor",
    "RequestCancelled",
    "RequestOptions",
    "RequestRefused",
    "SequenceError",
    "SlowConsumer",
    "Stream",
    "TensorwireError",
    "Timings",
    "TooLarge",
    "Unauthenticated",
    "Unavailable",
    "UnknownKey",
    "UnknownKind",
    "UnknownModel",
    "UnknownOperation",
    "Unsupported",
    "Usage",
    "WorkerLost",
    "__version__",
]

_HOMES = {
    "AsyncClient": "tensorwire.aio",
    "AsyncStream": "tensorwire.aio",
    "Client": "tensorwire.client",
    "Stream": "tensorwire.client",
    "Logprobs": "tensorwire.logprobs",
    "Delta": "tensorwire.results",
    "Generation": "tensorwire.results",
    "Timings": "tensorwire.results",
    "Usage": "tensorwire.results",
    "GenerateOptions": "tensorwire.calls",
    "RequestOptions": "tensorwire.calls",
    "RawTensor": "tensorwire_protocol.tensors",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from tensorwire.version import version

        value: Any = version()
    elif name in __all__:
        module = importlib.import_module(_HOMES.get(name, "tensorwire.errors"))
        value = getattr(module, name)
    else:
        raise AttributeError(f"module 'tensorwire' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
