"""Faults of ours: the details go to the log under an id, and only the id leaves the process."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging


def log_fault(log: logging.Logger, event: str, error: BaseException, **facts: object) -> str:
    """Log an exception nobody foresaw; return the id that a peer may be told."""
    log_id = secrets.token_hex(4)
    shown = "".join(f" {name}={value}" for name, value in facts.items())
    log.error("%s log_id=%s%s", event, log_id, shown, exc_info=error)
    return log_id
