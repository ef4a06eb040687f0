"""The state of a model, derived from the states of its replicas. Pure."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class ModelState(Enum):
    """What a client can expect of a model."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


def model_state(replicas: Iterable[ModelState]) -> ModelState:
    """Return the state of a model with these replicas: one that is ready is enough."""
    states = set(replicas)
    if ModelState.READY in states:
        return ModelState.READY
    return ModelState.FAILED if states == {ModelState.FAILED} else ModelState.LOADING
