"""The synchronous client: a blocking socket, no thread and no event loop of its own."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

import numpy as np
from tensorwire_protocol.messages import Ack, End, Event, Result

from tensorwire import calls
from tensorwire.access import make_access
from tensorwire.address import parse_address
from tensorwire.dialing import CONNECT_TIMEOUT_S, MAX_CONNECTIONS, Route
from tensorwire.errors import ClientUnusable
from tensorwire.link import Link
from tensorwire.results import Delta, Generation, grouped, with_choices
from tensorwire.retrying import MAX_ATTEMPTS

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Self, Unpack

    from numpy.typing import NDArray

    from tensorwire.call import Call
    from tensorwire.calls import Array, GenerateOptions, Prompt, Prompts, RequestOptions
    from tensorwire.link import Reply

T = TypeVar("T")


class Stream:
    """Text as it is made: iterate for `Delta`s; afterwards `generation` is the whole.

    Leaving the loop early, `close()`, the end of a `with` block and garbage collection all tell
    the server to stop. One thread at a time may iterate.
    """

    def __init__(self, reply: Reply[Any]) -> None:
        self._reply = reply
        self._generation: Generation | None = None

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        """Return what came next.

        Raises:
            ConnectionLost, WorkerLost, …: it was cut; `detail["partial"]` is what had arrived.
            DeadlineExceeded, RequestCancelled: it was stopped; so is `partial`.
        """
        reply = self._reply
        if reply.is_ended:
            raise StopIteration
        try:
            while True:
                message = reply.receive()
                if isinstance(message, Event):
                    if not (message.tokens or message.text):
                        continue
                    delta = Delta(message.text, cast("list[int]", message.tokens), message.index)
                    reply.collector.add(delta.token_ids, delta.text)
                    return delta
                if isinstance(message, End):
                    self._generation = reply.collector.finish(message)
                    raise StopIteration
                _note_other(reply, message)
        except BaseException:
            reply.cancel()
            raise

    @property
    def prompt_tokens(self) -> int | None:
        """How many tokens the prompt has, once the server has accepted it."""
        return self._reply.collector.prompt_tokens

    @property
    def generation(self) -> Generation:
        """The whole text, once the stream has ended.

        Raises:
            ClientUnusable: it has not ended, or was left early.
        """
        if self._generation is None:
            raise ClientUnusable("the stream has no generation: it was not read to its end")
        return self._generation

    def close(self) -> None:
        """Tell the server to stop if it has not ended; idempotent."""
        self._reply.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class ChoiceStream(Stream):
    """The texts of one prompt as they are made, in turn: each `Delta` says which it is of."""

    def __init__(self, streams: list[Stream]) -> None:
        self._streams = streams
        self._open = deque(range(len(streams)))

    def __next__(self) -> Delta:
        """Return what came next; an error of one ends all."""
        try:
            while self._open:
                choice = self._open.popleft()
                delta = next(self._streams[choice], None)
                if delta is not None:
                    self._open.append(choice)
                    return Delta(delta.text, delta.token_ids, delta.index, choice)
        except BaseException:
            self.close()
            raise
        raise StopIteration

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

    def close(self) -> None:
        """Tell the server to stop those that have not ended; idempotent."""
        self._open.clear()
        for stream in self._streams:
            stream.close()


def _note_other(reply: Reply[Any], message: object) -> None:
    if isinstance(message, Ack):
        reply.collector.prompt_tokens = message.prompt_tokens
    elif isinstance(message, Result):
        reply.call.read(message)  # a stream's: refuses


def _generation(reply: Reply[Any]) -> Generation:
    collector = reply.collector
    with reply:
        while True:
            message = reply.receive()
            if isinstance(message, Event):
                collector.add(message.tokens, message.text)
            elif isinstance(message, End):
                return collector.finish(message)
            else:
                _note_other(reply, message)


def _result(reply: Reply[T]) -> T:
    with reply:
        while True:
            message = reply.receive()
            if isinstance(message, Result):
                return reply.call.read(message)
            if isinstance(message, End):
                reply.collector.finish(message)  # raises: an accepted call was cut short


class Client:
    """A client for threads: any number of them may share one, and its connections.

    One connection serves all calls until there are as many at once as the server takes on it (512);
    large arrays have one of their own, so that small calls do not wait behind them. It connects at
    the first call, and again at the first call after the connection ended. It works inside a
    running event loop too (in notebooks), which it blocks while a call waits.

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
        max_connections: for calls, and as many for large arrays. Where all are full, a call is
            refused (Busy) like one that the server refuses.
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
        self._link = Link(route, max_attempts)
        self._timeout_s = calls.checked_timeout(timeout)

    @property
    def address(self) -> str:
        """Where the server is, as host:port."""
        return str(self._link.address)

    # -- text ---------------------------------------------------------------------------------

    @overload
    def generate(
        self, model: str, prompt: Prompt, **options: Unpack[GenerateOptions]
    ) -> Generation: ...

    @overload
    def generate(
        self, model: str, prompt: Prompts, **options: Unpack[GenerateOptions]
    ) -> list[Generation]: ...

    def generate(
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
            return grouped(self._all(many, _generation), len(each))
        one = cast("Prompt", prompt)
        return self._choices(
            [calls.generate(model, one, options, self._timeout_s) for options in each]
        )

    def stream(self, model: str, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Stream:
        """Continue one prompt, and return its text as it is made; the request is sent at once."""
        each = calls.each_choice(options)
        return self._stream(
            [calls.generate(model, prompt, options, self._timeout_s) for options in each]
        )

    def chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, str]],
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Answer a conversation: `messages` are {"role": …, "content": …}, the oldest first."""
        each = calls.each_choice(options)
        return self._choices(
            [calls.chat(model, messages, options, self._timeout_s) for options in each]
        )

    def stream_chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, str]],
        **options: Unpack[GenerateOptions],
    ) -> Stream:
        """Answer a conversation, and return the answer as it is made."""
        each = calls.each_choice(options)
        return self._stream(
            [calls.chat(model, messages, options, self._timeout_s) for options in each]
        )

    def _choices(self, each: list[Call[Any]]) -> Generation:
        if len(each) == 1:
            return _generation(self._link.call(each[0]))
        return with_choices(self._all(each, _generation))

    def _stream(self, each: list[Call[Any]]) -> Stream:
        if len(each) == 1:
            return Stream(self._link.call(each[0]))
        streams: list[Stream] = []
        try:
            for call in each:
                streams.append(Stream(self._link.call(call)))
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return ChoiceStream(streams)

    # -- arrays -------------------------------------------------------------------------------

    def embed(
        self, model: str, texts: str | Sequence[str], **options: Unpack[RequestOptions]
    ) -> NDArray[np.float32]:
        """Return texts as vectors: float32 (n, d) for a list, (d,) for a single text."""
        is_one = isinstance(texts, str)
        listed = [texts] if isinstance(texts, str) else texts
        parts = self._all(calls.embed(model, listed, options, self._timeout_s), _result)
        return parts[0][0] if is_one else np.concatenate(parts)

    def infer(
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
        return _result(self._link.call(calls.infer(model, inputs, options, self._timeout_s)))

    def tokenize(self, model: str, text: str, **options: Unpack[RequestOptions]) -> list[int]:
        """Return the token ids that `text` has as a prompt."""
        return _result(self._link.call(calls.tokenize(model, text, options, self._timeout_s)))

    # -- the server ---------------------------------------------------------------------------

    def models(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Return what the server says of its models, under "models" a list with one dict each."""
        return self._about_server("models", timeout)

    def health(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Return the server's state, under "status" in one word."""
        return self._about_server("health", timeout)

    def stats(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Return the server's counters."""
        return self._about_server("stats", timeout)

    def _about_server(self, op: str, timeout_s: float | None) -> dict[str, Any]:
        return _result(
            self._link.call(
                calls.about_server(op, self._timeout_s if timeout_s is None else timeout_s)
            )
        )

    def _all(self, many: list[Call[Any]], read: Any) -> list[Any]:
        """Return the results of many calls, in flight at once, in order."""
        open_replies: deque[Reply[Any]] = deque()
        results: list[Any] = []
        try:
            for call in many:
                if len(open_replies) >= calls.MAX_IN_FLIGHT:
                    results.append(read(open_replies.popleft()))
                open_replies.append(self._link.call(call))
            while open_replies:
                results.append(read(open_replies.popleft()))
        finally:
            for reply in open_replies:
                reply.cancel()
        return results

    # -- life ---------------------------------------------------------------------------------

    def close(self) -> None:
        """End the connection; calls that wait on other threads get ConnectionLost. Idempotent."""
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
