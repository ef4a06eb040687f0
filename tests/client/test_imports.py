"""What importing the library costs, in modules: times depend on the machine, lists do not."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata

import pytest
import tensorwire

LOADED = "import sys, json; before = set(sys.modules); {}; print(json.dumps(list(sys.modules)))"
HEAVY = {"torch", "transformers", "uvloop", "tensorwire_server", "pandas", "scipy"}


def modules_after(statement: str) -> set[str]:
    """Return the modules that a fresh interpreter has loaded after a statement."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(statement)],
        check=True,
        capture_output=True,
        text=True,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_tensorwire_loads_nothing_but_itself() -> None:
    loaded = modules_after("import tensorwire")
    assert not loaded & (HEAVY | {"numpy", "msgpack", "asyncio", "socket", "typer", "rich"})


def test_the_sync_client_loads_no_asyncio_and_no_more_than_numpy_and_msgpack() -> None:
    loaded = modules_after("from tensorwire import Client") - modules_after("import numpy, msgpack")
    assert not loaded & (
        HEAVY | {"asyncio", "ssl", "typer", "rich", "msgspec", "importlib.metadata"}
    )
    ours = {name for name in loaded if name.startswith("tensorwire")}
    assert len(loaded - ours) < 25


def test_the_async_client_loads_no_uvloop_and_no_torch() -> None:
    loaded = modules_after("from tensorwire import AsyncClient")
    assert not loaded & (HEAVY | {"typer", "rich"})


def test_help_loads_neither_numpy_nor_the_server() -> None:
    loaded = modules_after("from tensorwire.cli.app import run; run(['--help'])")
    assert not loaded & (HEAVY | {"numpy", "msgpack", "asyncio", "rich.console"})


@pytest.mark.parametrize("name", tensorwire.__all__)
def test_every_exported_name_exists(name: str) -> None:
    assert getattr(tensorwire, name) is not None
    assert name in dir(tensorwire)


def test_every_error_of_the_protocol_is_exported() -> None:
    from tensorwire_protocol import errors

    public = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert public <= set(tensorwire.__all__)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Clint'"):
        _ = tensorwire.Clint


def test_the_version_is_the_distributions() -> None:
    assert tensorwire.__version__ == metadata.version("tensorwire")
