"""Both clients behind one synchronous face, so that one suite tests both."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from tensorwire import AsyncClient, Client, Delta, TensorwireError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from tensorwire import AsyncStream, Generation


class SyncFace:
    """The sync client as it is."""

    def __init__(self, address: str | None, **options: Any) -> None:
        self.client = Client(address, **options)

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method and return its result."""
        return getattr(self.client, name)(*args, **kwargs)

    def call_at_once(self, name: str, each: list[tuple[Any, ...]]) -> list[Any]:
        """Call a method with each of these arguments; return results and errors in order."""

        def run(args: tuple[Any, ...]) -> Any:
            try:
                return self.call(name, *args)
            except TensorwireError as error:
                return error

        with ThreadPoolExecutor(len(each)) as pool:
            return list(pool.map(run, each))

    def stream(self, *args: Any, name: str = "stream", **kwargs: Any) -> Any:
        """Return a stream that has begun."""
        return getattr(self.client, name)(*args, **kwargs)

    def settle(self) -> None:
        """Let what was begun happen."""

    def close(self) -> None:
        self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncFace:
    """The async client on an event loop that runs whenever something is asked."""

    def __init__(self, address: str | None, **options: Any) -> None:
        self.runner = asyncio.Runner()
        self.client = AsyncClient(address, **options)

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        async def run() -> Any:
            return await getattr(self.client, name)(*args, **kwargs)

        return self.runner.run(run())

    def call_at_once(self, name: str, each: list[tuple[Any, ...]]) -> list[Any]:
        async def run() -> list[Any]:
            method = getattr(self.client, name)
            return await asyncio.gather(*(method(*args) for args in each), return_exceptions=True)

        return self.runner.run(run())

    def stream(self, *args: Any, name: str = "stream", **kwargs: Any) -> AsyncFaceStream:
        face_stream = AsyncFaceStream(self.runner, getattr(self.client, name)(*args, **kwargs))
        return face_stream.__enter__()

    def settle(self) -> None:
        self.runner.run(asyncio.sleep(0.01))

    def close(self) -> None:
        self.runner.run(self.client.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self.runner.close()


class AsyncFaceStream:
    """An async stream, iterated step by step."""

    def __init__(self, runner: asyncio.Runner, stream: AsyncStream) -> None:
        self._runner = runner
        self._stream = stream

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        async def step() -> Delta | None:
            # An exception may not leave a coroutine as StopAsyncIteration's sync kin.
            return await anext(self._stream, None)

        delta = self._runner.run(step())
        if delta is None:
            raise StopIteration
        return delta

    def __enter__(self) -> Self:
        self._runner.run(self._stream.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._runner.run(self._stream.close())

    @property
    def generation(self) -> Generation:
        return self._stream.generation

    @property
    def prompt_tokens(self) -> int | None:
        return self._stream.prompt_tokens


Face = SyncFace | AsyncFace
