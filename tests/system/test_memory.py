"""What the gateway weighs, and what an import costs."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from .serving import RunningServer

pytestmark = pytest.mark.slow

MIB = 1024 * 1024


def test_a_gateway_with_two_models_stays_under_60_mib(serve: Callable[..., RunningServer]) -> None:
    server = serve("oracle:", "echo:").ready()
    with server.client() as client:
        client.generate("oracle", ["warm"] * 256, max_new_tokens=32)
        for _ in range(64):
            client.infer("echo", {"x": [1.0] * 1000})
        rss = server.stats()["gateway"]["rss_bytes"]
        print(f"measured gateway_rss_mib={round(rss / MIB, 1)}")
        assert rss < 60 * MIB


def test_neither_gateway_nor_torch_free_workers_load_torch(server: RunningServer) -> None:
    for pid in (server.pid, *server.children()):
        with open(f"/proc/{pid}/maps") as maps:
            mapped = maps.read()
        assert "numpy" in mapped
        for heavy in ("libtorch", "tokenizers", "safetensors", "transformers"):
            assert heavy not in mapped, f"process {pid} has mapped {heavy}"


def _python(code: str) -> str:
    # -I: without what a developer's environment would add.
    ran = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    return ran.stdout


HEAVY = (
    "asyncio", "click", "jinja2", "msgspec", "numpy", "rich", "safetensors", "ssl",
    "tensorwire_server", "tokenizers", "torch", "transformers", "typer", "uvloop",
)  # fmt: skip


def test_import_tensorwire_loads_nothing_heavy() -> None:
    code = "import json, sys, tensorwire; print(json.dumps(sorted(sys.modules)))"
    loaded = {name.partition(".")[0] for name in json.loads(_python(code))}
    assert not loaded & set(HEAVY)


def test_the_blocking_client_loads_neither_asyncio_nor_the_server() -> None:
    code = (
        "import json, sys; from tensorwire import Client; Client('127.0.0.1:1');"
        " print(json.dumps(sorted(sys.modules)))"
    )
    loaded = {name.partition(".")[0] for name in json.loads(_python(code))}
    # msgspec decodes where the server happens to be installed too.
    assert not loaded & (set(HEAVY) - {"numpy", "msgspec"})


def test_import_tensorwire_costs_less_than_150_ms() -> None:
    # CPU time of the process and not the clock: other processes do not count against it.
    measure = (
        "import resource; used = resource.getrusage(resource.RUSAGE_SELF);"
        " print(1000 * (used.ru_utime + used.ru_stime))"
    )

    def cpu_ms(code: str) -> float:
        return statistics.median(float(_python(f"{code}; {measure}")) for _ in range(5))

    bare_ms = cpu_ms("pass")
    import_ms = cpu_ms("import tensorwire") - bare_ms
    client_ms = cpu_ms("from tensorwire import Client") - bare_ms
    print(f"measured import_tensorwire_ms={round(import_ms, 1)}")
    print(f"measured import_client_ms={round(client_ms, 1)}")
    assert import_ms < 150
    assert client_ms < 600  # numpy's share depends on the machine
