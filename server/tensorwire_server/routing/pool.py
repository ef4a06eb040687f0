"""The replicas of one model, and what the server knows of the model through them."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from tensorwire_server.models.lifecycle import ModelState, model_state
from tensorwire_server.routing.router import pick

if TYPE_CHECKING:
    from tensorwire_server.routing.replica import Replica


class ModelPool:
    """One model behind the server's address."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.replicas: list[Replica] = []
        self._turn = itertools.count()

    @property
    def state(self) -> ModelState:
        """What a client can expect."""
        return model_state(replica.state for replica in self.replicas)

    @property
    def detail(self) -> str:
        """How far loading is, or why it failed."""
        details = [r.detail for r in self.replicas if r.state is self.state and r.detail]
        return details[0] if details else ""

    @property
    def card(self) -> dict[str, Any]:
        """What the model is, once a replica has loaded it."""
        for replica in self.replicas:
            if replica.card:
                return replica.card
        return {}

    def pick(self) -> Replica | None:
        """Return the replica for the next request, None if none is ready."""
        if len(self.replicas) == 1:
            return self.replicas[0] if self.replicas[0].is_ready else None
        return pick(self.replicas, next(self._turn))

    def describe(self) -> dict[str, Any]:
        """Return what `models` tells a client."""
        said_elsewhere = ("eos_ids", "model")
        card = {
            name: value
            for name, value in self.card.items()
            if name not in said_elsewhere and value not in (0, None)
        }
        return {
            "name": self.name,
            "state": self.state.value,
            "detail": self.detail,
            "replicas": len(self.replicas),
            "ready_replicas": sum(r.is_ready for r in self.replicas),
            **card,
        }
