"""What a worker process is told on its command line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """One replica of one model: what to load, and the bounds of its queues and batches."""

    model: str  # the name clients use; for messages and logs
    source: str  # a folder, a hub name, or a torch-free engine: "oracle:step_ms=5", "echo:"
    device: str = "auto"
    revision: str | None = None  # of a hub name
    context_tokens: int | None = None  # an upper bound, where the model could do more
    threads: int = 1
    backend: str = "auto"  # auto, any, fused
    quantize: str = "none"  # none, int8

    max_running: int = 64  # sequences in one step
    step_tokens: int = 2048  # decodes and prompt chunks of one step
    max_waiting: int = 2048  # requests beyond those that run
    page_tokens: int = 16
    kv_bytes: int | None = None  # of the key/value cache; None: a share of what is free
    kv_share: float = 1.0  # of what is free for caches on this machine
    share_prefixes: bool = False  # between tenants
    max_slowdown: float = 2.0  # of running sequences by prompts that are read beside them

    busy_poll_us: int = 80  # after output, while nothing runs; 0: never

    max_items: int = 64  # of one batch of embed and infer
    max_batch_tokens: int = 8192
    max_wait_ms: float = 0.0  # while one batch runs, the next one gathers by itself

    @property
    def max_requests(self) -> int:
        """How many requests may be open at once, running and waiting."""
        return self.max_running + self.max_waiting

    def to_json(self) -> str:
        """Return the spec as one command-line argument."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> WorkerSpec:
        """Return the spec of `to_json`.

        Raises:
            ValueError: not JSON, an unknown field, or a missing one.
        """
        values = json.loads(text)
        known = [f.name for f in fields(cls)]
        if not isinstance(values, dict) or not values.keys() <= set(known):
            raise ValueError(f"a worker's spec is a JSON object with the fields {', '.join(known)}")
        missing = {"model", "source"} - values.keys()
        if missing:
            raise ValueError(f"a worker's spec needs {', '.join(sorted(missing))}")
        return cls(**values)
