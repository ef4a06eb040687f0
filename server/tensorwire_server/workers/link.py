"""One connection to a gateway: messages in, frames out."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from tensorwire_protocol.bodies import FEATURE_BODY, FEATURE_SHM
from tensorwire_protocol.codec.typed import TYPED
from tensorwire_protocol.connection import Connection
from tensorwire_protocol.limits import CLIENT_LINK, WORKER_LINK
from tensorwire_protocol.messages import Cancel, Drain, Heartbeat, Hello, Submit
from tensorwire_protocol.roles import Role, State
from tensorwire_protocol.transports.aio import AioTransport, shared_scratch

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from tensorwire_protocol.bodies import Sharing
    from tensorwire_protocol.errors import TensorwireError
    from tensorwire_protocol.messages import Message
    from tensorwire_protocol.transports.polling import BusyPoll

    from tensorwire_server.workers.service import Service
    from tensorwire_server.workers.streams import Stream

# A gateway passes on what a client sent without opening it: here the client's bounds are kept.
_CLOSED: Final = State.CLOSED  # see `roles`
_LIMITS = replace(WORKER_LINK, container_items=CLIENT_LINK.container_items)


class Link:
    """A gateway as the worker sees it.

    Args:
        on_greeted: the peer is known; it wants to hear how far the model is.
        on_lost: nothing comes or goes any more; its work is already dropped.
        sharing: memory in common with the gateway, where it runs on this machine.
        poll: keeps the loop awake while requests are near.
    """

    def __init__(
        self,
        service: Service,
        *,
        on_greeted: Callable[[Link], None],
        on_lost: Callable[[Link], None],
        sharing: Sharing | None = None,
        poll: BusyPoll | None = None,
    ) -> None:
        self.streams: dict[int, Stream] = {}  # open ones, by their number on this link
        self.is_draining = False
        self._service = service
        self._on_greeted = on_greeted
        self._on_lost = on_lost
        self._grace: asyncio.TimerHandle | None = None
        self._loop = service.registry.loop
        self._connection = Connection(
            Role.WORKER,
            limits=_LIMITS,
            scratch=shared_scratch(),
            software="tensorwire-worker",
            features=(FEATURE_BODY,) if sharing is None else (FEATURE_BODY, FEATURE_SHM),
            codec=TYPED,
            sharing=sharing,
        )
        self.transport = AioTransport(self._connection, self, poll)

    @property
    def is_greeted(self) -> bool:
        """Whether frames can be sent to the peer."""
        return self._connection.state is State.OPEN

    def on_messages(self, messages: Sequence[Message]) -> None:
        """Take what one read completed; the compute side gets it in one go."""
        now = time.monotonic()
        for message in messages:
            if type(message) is Submit:
                self._service.submit(self, message, now)
            elif type(message) is Cancel:
                self._service.cancel(self, message)
            elif type(message) is Drain:
                self.drain(message.grace_ms / 1000)
            elif type(message) is Hello:
                self._on_greeted(self)
        self._service.registry.flush()

    def on_writable(self) -> None:
        """Nothing is held back: a gateway that does not read is cut by the transport."""

    def on_lost(self, error: TensorwireError | None) -> None:
        """Drop the work of a link that is gone."""
        if self._grace is not None:
            self._grace.cancel()
        self._service.registry.abandon(self)
        self._on_lost(self)

    def send(self, message: Message) -> None:
        """Queue a frame; to a peer that is gone it is dropped.

        Raises:
            TooLarge, OutputTooLarge, BadTensor, BadMeta: it cannot be sent; nothing changed.
        """
        if self._connection.state is not _CLOSED:
            self.transport.send(message)

    def beat(self, heartbeat: Heartbeat) -> None:
        """Tell the peer how things stand, and let time pass on the connection."""
        self.transport.on_timer()
        if self.is_greeted:
            self.send(heartbeat)

    def drain(self, grace_s: float) -> None:
        """Take nothing new; close when the last stream has ended, at most after `grace_s` (> 0)."""
        self.is_draining = True
        if grace_s > 0 and self._grace is None:
            self._grace = self._loop.call_later(grace_s, self._service.registry.give_up, self)
        self.on_stream_ended()

    def on_stream_ended(self) -> None:
        """Close a draining link once it is idle."""
        if self.is_draining and not self.streams:
            self._loop.call_soon(self.transport.close)
