"""Our side: the public clients, through the gateway and a worker process.

Usage: python -m wire.ours HOST:PORT
"""

from __future__ import annotations

import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from tensorwire import AsyncClient, Client
from wire.load import Call, Figures, Job, do_jobs, measure, measure_blocking, new_runner

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PROMPT = "What is the next word?"


def inputs_of(job: Job) -> dict[str, Any]:
    """Return what is echoed."""
    if job.kind == "array":
        return {"array": np.zeros(job.size_bytes // 4, np.float32)}
    if job.kind == "tensor":
        return {"tensor": np.ones(job.size_bytes, np.uint8)}
    return {"text": "x" * job.size_bytes}


@asynccontextmanager
async def connect(address: str, job: Job) -> AsyncIterator[Call]:
    """Give the call for one connection."""
    async with AsyncClient(address) as client:
        inputs = inputs_of(job)

        async def echo() -> int:
            await client.infer("echo", inputs)
            return 1

        async def stream() -> int:
            tokens = 0
            async for delta in client.stream("oracle", PROMPT, max_new_tokens=job.tokens):
                tokens += len(delta.token_ids)
            return tokens

        if job.kind == "tokens":
            yield stream
        else:
            np.testing.assert_array_equal(
                list((await client.infer("echo", inputs)).values()), list(inputs.values())
            )
            yield echo


def main() -> None:
    """Do jobs until stdin ends."""
    address = sys.argv[1]

    def do(job: Job) -> Figures:
        if job.kind != "blocking":
            with new_runner() as runner:
                return runner.run(measure(lambda job: connect(address, job), job))
        with Client(address) as client:
            inputs = inputs_of(job)
            return measure_blocking(lambda: client.infer("echo", inputs), job)

    do_jobs(do)


if __name__ == "__main__":
    main()
