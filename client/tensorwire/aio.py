"""The asynchronous client, for any asyncio event loop."""

from __future__ import annotations

import contextlib
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

import numpy as np

from tensorwire import calls
from tensorwire.access import make_access
from tensorwire.address import parse_address
from tensorwire.aio_link import AsyncLink
from tensorwire.dialing import CONNECT_TIMEOUT_S, MAX_CONNECTIONS, Route
from tensorwire.errors import ClientUnusable
from tensorwire.results import Delta, Generation, grouped, with_choices
from tensorwire.retrying import MAX_ATTEMPTS

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
    from types import TracebackType
    from typing import Self, Unpack

    from numpy.typing import NDArray

    from tensorwire.aio_lane import AsyncReply
    from tensorwire.call import Call
    from tensorwire.calls import Array, GenerateOptions, Prompt, Prompts, RequestOptions

T = TypeVar("T")


async def _change(reply: AsyncReply[Any]) -> None:
    """Wait until something has changed; cancelling the task cancels the call."""
    change = reply.change()
    try:
        await change
    except BaseException:
        reply.leave()
        raise


async def _outcome(reply: AsyncReply[T]) -> T:
    """Wait for the end; return the result or raise the error."""
    while not reply.is_ended:
        change = reply.change()
        try:
            await change  # not through `_change`: this is on the way of every call
        except BaseException:
            reply.leave()
            raise
    result: T = reply.outcome()
    return result


class AsyncStream:
    """Text as it is made: `async for` gives `Delta`s; afterwards `generation` is the whole.

    The request is sent when the iteration or the `async with` block begins. Leaving the loop
    early, `close()`, the end of an `async with` block, cancelling the task and garbage collection
    all tell the server to stop. One task at a time may iterate.
    """

    def __init__(self, link: AsyncLink, call: Call[Any]) -> None:
        self._link = link
        self._call = call
        self._reply: AsyncReply[Any] | None = None
        self._is_over = False

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        """Return what came next.

        Raises:
            ConnectionLost, WorkerLost, …: it was cut; `detail["partial"]` is what had arrived.
            DeadlineExceeded, RequestCancelled: it was stopped; so is `partial`.
        """
        if self._is_over:
            raise StopAsyncIteration
        reply = self._reply or await self._start()
        assert reply.deltas is not None
        while not reply.deltas:
            if reply.is_ended:
                self._is_over = True
                if reply.error is not None:
                    raise reply.error
                raise StopAsyncIteration
            await _change(reply)
        return reply.deltas.popleft()

    async def _start(self) -> AsyncReply[Any]:
        self._reply = await self._link.open(self._call, keeps_deltas=True)
        return self._reply

    @property
    def prompt_tokens(self) -> int | None:
        """How many tokens the prompt has, once the server has accepted it."""
        return self._reply.collector.prompt_tokens if self._reply else None

    @property
    def generation(self) -> Generation:
        """The whole text, once the stream has ended.

        Raises:
            ClientUnusable: it has not ended, or was left early.
        """
        if self._reply is None or self._reply.result is None:
            raise ClientUnusable("the stream has no generation: it was not read to its end")
        return cast("Generation", self._reply.result)

    async def close(self) -> None:
        """Tell the server to stop if it has not ended; idempotent."""
        self._is_over = True
        if self._reply is not None:
            self._reply.cancel()

    async def __aenter__(self) -> Self:
        if self._reply is None and not self._is_over:
            await self._start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        # May run on any thread, and in the middle of the loop's own work; the loop may be gone.
        with contextlib.suppress(Exception):
            reply = self._reply
            if reply is not None and not reply.is_ended and self._link.home.is_here:
                reply.loop.call_soon_threadsafe(reply.cancel)


class AsyncChoiceStream(AsyncStream):
    """The texts of one prompt as they are made, in turn: each `Delta` says which it is of."""

    def __init__(self, streams: list[AsyncStream]) -> None:
        self._streams = streams
        self._open = deque(range(len(streams)))
        self._is_begun = False

    async def __anext__(self) -> Delta:
        """Return what came next; an error of one ends all."""
        try:
            if not self._is_begun:
                await self._begin()
            while self._open:
                choice = self._open.popleft()
                delta = await anext(self._streams[choice], None)
                if delta is not None:
                    self._open.append(choice)
                    return Delta(delta.text, delta.token_ids, delta.index, choice)
        except BaseException:
            await self.close()
            raise
        raise StopAsyncIteration

    async def _begin(self) -> None:
        """Send all requests, so that they run together."""
        self._is_begun = True
        for stream in self._streams:
            await stream.__aenter__()

    @property
    def prompt_tokens(self) -> int | None:
        """How many tokens the prompt has, once the server has accepted it."""
        return self._streams[0].prompt_tokens

    @property
    def generation(self) -> Generation:
        """All texts, once the stream has ended: the first, with all of them as `choices`.

        Raises:
            ClientUnusable: it has not ended, or was left early.
        """
        return with_choices([stream.generation for stream in self._streams])

    async def close(self) -> None:
        """Tell the server to stop those that have not ended; idempotent."""
        self._open.clear()
        for stream in self._streams:
            await stream.close()

    async def __aenter__(self) -> Self:
        if not self._is_begun and self._open:
            try:
                await self._begin()
            except BaseException:
                await self.close()
                raise
        return self

    def __del__(self) -> None:
        """Each stream sees to itself."""


class AsyncClient:
    """A client for asyncio: any number of tasks of one event loop share its connections.

    One connection serves all calls until there are as many at once as the server takes on it (512);
    large arrays have one of their own, so that small calls do not wait behind them. It connects at
    the first call, and again at the first call after the connection ended. The event loop of the
    first call is the one it belongs to.

    Args:
        address: "host:port", "[::1]:port" or "tensorwire://host:port"; by default
            TENSORWIRE_ADDRESS, else 127.0.0.1:8947. "tensorwires://host:port" means TLS.
        token: by default TENSORWIRE_TOKEN. It is sent over TLS and loopback; elsewhere client and
            server prove to each other that they know it, and what follows can be read.
        timeout: seconds for each call in all, connecting included; None for no limit.
        connect_timeout: seconds for the connecting part of it.
        tls: True for TLS 1.3, whatever the address says.
        ca: PEM file with whoever signed the server's certificate; by default the system's.
        server_name: in the server's certificate, where it is not the address's host.
        max_attempts: how often in a row a call is tried without anything arriving: a lost
            connection is replaced, and what the server surely did not run, or knows again by its
            request key, is sent again. Streams go on where they were. 1: never.
        max_connections: for calls, and as many for large arrays. Where all are full, calls wait in
            the order in which they came.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        token: str | None = None,
        timeout: float | None = 300.0,
        connect_timeout: float = CONNECT_TIMEOUT_S,
        tls: bool | None = None,
        ca: str | os.PathLike[str] | None = None,
        server_name: str | None = None,
        max_attempts: int = MAX_ATTEMPTS,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        where, access = make_access(
            parse_address(address), token, tls=tls, ca=ca, server_name=server_name
        )
        route = Route(
            address=where,
            access=access,
            connect_timeout_s=connect_timeout,
            max_connections=max_connections,
        )
        self._link = AsyncLink(route, max_attempts)
        self._timeout_s = calls.checked_timeout(timeout)

    @property
    def address(self) -> str:
        """Where the server is, as host:port."""
        return str(self._link.address)

    # -- text ---------------------------------------------------------------------------------

    @overload
    async def generate(
        self, model: str, prompt: Prompt, **options: Unpack[GenerateOptions]
    ) -> Generation: ...

    @overload
    async def generate(
        self, model: str, prompt: Prompts, **options: Unpack[GenerateOptions]
    ) -> list[Generation]: ...

    async def generate(
        self, model: str, prompt: Prompt | Prompts, **options: Unpack[GenerateOptions]
    ) -> Generation | list[Generation]:
        """Continue a prompt, and return the whole text.

        Args:
            model: model id, `name` or `name@revision`.
            prompt: text, or token ids as a list of int or an array (n,); or a list of prompts,
                which all run at once and give a list (the first error ends them all).
            options: see `GenerateOptions`; `timeout` is for all prompts together.

        Raises:
            TensorwireError: see `.code`, `.retryable` and `.executed`.
        """
        each = calls.each_choice(options)
        if calls.is_list_of_prompts(prompt):
            prompts = cast("Prompts", prompt)
            many = calls.generate_many(model, prompts, each, self._timeout_s)
            return grouped(await self._all(many), len(each))
        one = cast("Prompt", prompt)
        return await self._choices(
            [calls.generate(model, one, options, self._timeout_s) for options in each]
        )

    def stream(self, model: str, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """Continue one prompt, and return its text as it is made."""
        each = calls.each_choice(options)
        return self._stream(
            [calls.generate(model, prompt, options, self._timeout_s) for options in each]
        )

    async def chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, str]],
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Answer a conversation: `messages` are {"role": …, "content": …}, the oldest first."""
        each = calls.each_choice(options)
        return await self._choices(
            [calls.chat(model, messages, options, self._timeout_s) for options in each]
        )

    def stream_chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, str]],
        **options: Unpack[GenerateOptions],
    ) -> AsyncStream:
        """Answer a conversation, and return the answer as it is made."""
        each = calls.each_choice(options)
        return self._stream(
            [calls.chat(model, messages, options, self._timeout_s) for options in each]
        )

    async def _choices(self, each: list[Call[Any]]) -> Generation:
        if len(each) == 1:
            return cast("Generation", await self._one(each[0]))
        return with_choices(await self._all(each))

    def _stream(self, each: list[Call[Any]]) -> AsyncStream:
        if len(each) == 1:
            return AsyncStream(self._link, each[0])
        return AsyncChoiceStream([AsyncStream(self._link, call) for call in each])

    # -- arrays -------------------------------------------------------------------------------

    async def embed(
        self, model: str, texts: str | Sequence[str], **options: Unpack[RequestOptions]
    ) -> NDArray[np.float32]:
        """Return texts as vectors: float32 (n, d) for a list, (d,) for a single text."""
        is_one = isinstance(texts, str)
        listed = [texts] if isinstance(texts, str) else texts
        parts = await self._all(calls.embed(model, listed, options, self._timeout_s))
        return parts[0][0] if is_one else np.concatenate(parts)

    async def infer(
        self, model: str, inputs: Mapping[str, Any], **options: Unpack[RequestOptions]
    ) -> dict[str, Array]:
        """Run a model on named arrays, and return its named arrays.

        Args:
            model: model id, `name` or `name@revision`.
            inputs: arrays by name, as the model wants them; anything that numpy makes an array of
                numbers; str and lists of str go as text.
            options: see `RequestOptions`.

        Returns:
            Arrays by name, read-only. bfloat16 and float8 come as ml_dtypes' arrays where that
            package is installed, else as `RawTensor`.
        """
        return await self._one(calls.infer(model, inputs, options, self._timeout_s))

    async def tokenize(self, model: str, text: str, **options: Unpack[RequestOptions]) -> list[int]:
        """Return the token ids that `text` has as a prompt."""
        return await self._one(calls.tokenize(model, text, options, self._timeout_s))

    # -- the server ---------------------------------------------------------------------------

    async def models(self, *, timeout: float | None = None) -> dict[str, Any]:  # noqa: ASYNC109
        """Return what the server says of its models, under "models" a list with one dict each."""
        return await self._about_server("models", timeout)

    async def health(self, *, timeout: float | None = None) -> dict[str, Any]:  # noqa: ASYNC109
        """Return the server's state, under "status" in one word."""
        return await self._about_server("health", timeout)

    async def stats(self, *, timeout: float | None = None) -> dict[str, Any]:  # noqa: ASYNC109
        """Return the server's counters."""
        return await self._about_server("stats", timeout)

    async def _about_server(self, op: str, timeout_s: float | None) -> dict[str, Any]:
        return await self._one(
            calls.about_server(op, self._timeout_s if timeout_s is None else timeout_s)
        )

    def _one(self, call: Call[T]) -> Coroutine[Any, Any, T]:
        # Not a coroutine of its own around another: each costs every call.
        reply = self._link.begin(call)
        return _outcome(reply) if reply.was_sent else self._outcome_once_sent(reply)

    async def _outcome_once_sent(self, reply: AsyncReply[T]) -> T:
        await self._link.connect(reply)
        return await _outcome(reply)

    async def _all(self, many: list[Call[Any]]) -> list[Any]:
        """Return the results of many calls, in flight at once, in order."""
        open_replies: deque[AsyncReply[Any]] = deque()
        results: list[Any] = []
        try:
            for call in many:
                if len(open_replies) >= calls.MAX_IN_FLIGHT:
                    results.append(await _outcome(open_replies.popleft()))
                open_replies.append(await self._link.open(call))
            while open_replies:
                results.append(await _outcome(open_replies.popleft()))
        finally:
            for reply in open_replies:
                reply.cancel()
        return results

    # -- life ---------------------------------------------------------------------------------

    async def close(self) -> None:
        """End the connection; calls that wait get ConnectionLost. Idempotent."""
        await self._link.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
