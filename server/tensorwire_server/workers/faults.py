"""From an exception nobody foresaw to what may leave the process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorwire_protocol.errors import InternalError, ModelError, OutOfMemory, TensorwireError

from tensorwire_server.telemetry.faults import log_fault

if TYPE_CHECKING:
    import logging


def as_wire_error(
    error: BaseException, event: str, model: str, log: logging.Logger
) -> TensorwireError:
    """Return what the peer is told of an engine's failure; the details go to the log."""
    if isinstance(error, TensorwireError):
        return error
    log_id = log_fault(log, event, error, model=model)
    if is_out_of_memory(error):
        return OutOfMemory(f"the device of {model!r} ran out of memory", log_id=log_id)
    return ModelError(f"{model!r} failed while it computed", log_id=log_id)


def as_internal_error(error: BaseException, model: str, log: logging.Logger) -> TensorwireError:
    """Return what the peer is told of a fault of ours."""
    if isinstance(error, TensorwireError):
        return error
    log_id = log_fault(log, "request_failed", error, model=model)
    return InternalError("the worker failed on this request", log_id=log_id)


def is_out_of_memory(error: BaseException) -> bool:
    """Say if memory was short; torch's own class is known here by name only."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(
        error
    )
