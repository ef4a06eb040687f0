"""The configuration: four sources, one frozen tree, errors in one sentence."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import TYPE_CHECKING

import pytest
from tensorwire_server.config import Config, ConfigError, ModelConfig, load_config, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Load = Callable[..., Config]

PORT = "TENSORWIRE_SERVER__LISTEN__PORT"


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a tree from TOML text, variables and settings."""

    def load(toml: str | None = None, *settings: str, **environ: str) -> Config:
        file = None
        if toml is not None:
            file = tmp_path / "server.toml"
            file.write_text(toml, encoding="utf-8")
        return load_config(file, environ, settings)

    return load


def test_without_any_source_the_defaults_hold(load: Load) -> None:
    assert load() == Config()
    assert load("") == Config()


def test_each_source_beats_the_one_before(load: Load) -> None:
    toml = "[listen]\nport = 1\ndrain_s = 1\nmax_connections = 1\n"
    env = {PORT: "2", "TENSORWIRE_SERVER__LISTEN__DRAIN_S": "2"}
    listen = load(toml, "listen.port=3", "listen.port=4", **env).listen
    assert (listen.max_connections, listen.drain_s, listen.port) == (1, 2.0, 4)


def test_the_strings_of_the_environment_and_of_settings_become_values(load: Load) -> None:
    tree = load(
        None,
        "batching.max_wait_ms=1.5",
        "workers.threads=3",
        "listen.host=::1",
        **{PORT: "0", "TENSORWIRE_SERVER__WORKERS__DEVICE": "cpu"},
    )
    assert tree.listen.port == 0
    assert tree.listen.host == "::1"
    assert tree.batching.max_wait_ms == 1.5
    assert (tree.workers.threads, tree.workers.device) == (3, "cpu")


def test_variables_of_others_do_not_count(load: Load) -> None:
    assert load(None, PATH="/bin", TENSORWIRE_ADDRESS="h:1", TENSORWIRE_SERVER="x") == Config()


def test_a_value_may_hold_an_equals_sign(load: Load) -> None:
    tree = load(None, "models.m.source=oracle:step_ms=5,context=64")
    assert tree.models["m"].source == "oracle:step_ms=5,context=64"


@pytest.mark.parametrize("text", ["a:1,b:2", "a:1, b:2", ",a:1,,b:2,", " a:1 ,b:2 "])
def test_a_list_of_remote_workers_is_separated_by_commas(load: Load, text: str) -> None:
    assert load(None, f"workers.remote={text}").workers.remote == ("a:1", "b:2")


def test_a_list_of_remote_workers_is_a_list_in_toml(load: Load) -> None:
    assert load('[workers]\nremote = ["a:1", "b:2"]').workers.remote == ("a:1", "b:2")
    assert load('[workers]\nremote = ["a:1"]', "workers.remote=").workers.remote == ()


def test_models_have_settings_of_their_own(load: Load) -> None:
    toml = '[models."org/a.b"]\nsource = "x"\nworkers = 2\n[models.c]\nsource = "echo:"\n'
    models = load(toml, "models.c.threads=3").models
    assert (models["org/a.b"].source, models["org/a.b"].workers) == ("x", 2)
    assert (models["c"].source, models["c"].workers, models["c"].threads) == ("echo:", None, 3)


def test_back_end_and_quantization_are_set_for_all_models_and_for_one(load: Load) -> None:
    toml = '[workers]\nbackend = "any"\n[models.m]\nbackend = "fused"\nquantize = "int8"\n'
    tree = load(toml)
    assert (tree.workers.backend, tree.workers.quantize) == ("any", "none")
    assert (tree.models["m"].backend, tree.models["m"].quantize) == ("fused", "int8")
    assert (ModelConfig().backend, ModelConfig().quantize) == (None, None)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lsten.port=1", "there is no section 'lsten'; did you mean 'listen'?"),
        ("x.y=1", "there is no section 'x'; known are listen, auth, tls, admission, workers"),
        ("listen.prt=1", "there is no key of listen 'prt'; did you mean 'port'?"),
        ("listen.zzz=1", "there is no key of listen 'zzz'; known are host, port"),
        ("models.m.sorce=x", "there is no key of m 'sorce'; did you mean 'source'?"),
        ("port=1", "'port' names no section; give section.key=value"),
        ("listen.port", "--set takes section.key=value, got 'listen.port'"),
        ("listen.port=abc", "listen.port must be int, got 'abc'"),
        ("listen.port=1.5", "listen.port must be int, got '1.5'"),
        ("listen.port=", "listen.port must be int, got ''"),
        ("listen.drain_s=soon", "listen.drain_s must be float, got 'soon'"),
        ("listen.port.x=1", "listen.port must be int, got {'x': '1'}"),
        ("workers.device=gpu", "workers.device must be auto, cpu or cuda, got 'gpu'"),
        ("workers.backend=best", "workers.backend must be auto, any or fused, got 'best'"),
        ("workers.quantize=int4", "workers.quantize must be none or int8, got 'int4'"),
        ("models.m.backend=x", "backend of a model must be auto, any or fused, got 'x'"),
        ("models.m.quantize=x", "quantize of a model must be none or int8, got 'x'"),
    ],
)
def test_a_wrong_setting_is_named_with_its_rule(load: Load, setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(None, setting)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("listen = 5", "listen must be a section, got 5"),
        ("models = 5", "models must be a section, got 5"),
        ("[listen]\nport = true", "listen.port must be int, got True"),
        ("[listen]\nport = 80.5", "listen.port must be int, got 80.5"),
        ("[listen]\nhost = 5", "listen.host must be str, got 5"),
        ('[workers]\nremote = "a:1"', "workers.remote must be array, got 'a:1'"),
        ('[models]\nm = "folder"', "Expected `object`, got `str`"),
        ("[listen", "is not TOML"),
    ],
)
def test_a_wrong_file_is_refused_in_words(load: Load, toml: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(toml)
    assert message in str(error.value)


def test_a_wrong_variable_is_named(load: Load) -> None:
    with pytest.raises(ConfigError, match="'TENSORWIRE_SERVER__PORT' names no section"):
        load(None, TENSORWIRE_SERVER__PORT="1")
    with pytest.raises(ConfigError, match="did you mean 'port'"):
        load(None, TENSORWIRE_SERVER__LISTEN__PROT="1")


def test_a_setting_cannot_go_through_a_value(load: Load) -> None:
    with pytest.raises(
        ConfigError, match=r"'listen\.port\.x' goes through a key that is no section"
    ):
        load("[listen]\nport = 1", "listen.port.x=1")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'.*nothing\.toml' cannot be read: No such file or directory$"
    ):
        load_config(tmp_path / "nothing.toml", {}, [])
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"'.*binary\.toml' is not TOML"):
        load_config(binary, {}, [])


LOWEST = {
    "listen.port": 0,
    "listen.max_connections": 1,
    "listen.max_connections_per_source": 1,
    "listen.max_unauthenticated": 1,
    "listen.drain_s": 0,
    "listen.busy_poll_us": 0,
    "admission.max_requests": 1,
    "admission.max_requests_per_model": 1,
    "admission.memory_bytes": 16 * 1024 * 1024,
    "admission.stop_grace_s": 0,
    "admission.merged_bytes": 0,
    "admission.meta_bytes": 4096,
    "workers.count": 1,
    "workers.threads": 1,
    "batching.max_running": 1,
    "batching.step_tokens": 1,
    "batching.max_waiting": 1,
    "batching.max_items": 1,
    "batching.max_batch_tokens": 1,
    "batching.max_wait_ms": 0,
    "batching.max_slowdown": 1,
    "outcomes.resume_grace_s": 0,
    "outcomes.seconds": 0,
    "outcomes.keys": 0,
    "outcomes.bytes": 0,
    "outcomes.detached_bytes": 0,
    "bodies.message_bytes": 1,
    "bodies.memory_bytes": 256 * 1024 * 1024,  # one message
}


@pytest.mark.parametrize(("key", "lowest"), LOWEST.items())
def test_a_number_may_be_as_low_as_its_rule_says_and_no_lower(
    load: Load, key: str, lowest: int
) -> None:
    section, name = key.split(".")
    assert getattr(getattr(load(None, f"{key}={lowest}"), section), name) == lowest
    with pytest.raises(ConfigError) as error:
        load(None, f"{key}={lowest - 1}")
    assert str(error.value).startswith(f"{key} must be ")
    assert str(error.value).endswith(f"got {lowest - 1}") or str(error.value).endswith(
        f"got {float(lowest - 1)}"
    )


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("4096", 4096), (4096, 4096), ("2GiB", 2 << 30), ("2gib", 2 << 30), ("2G", 2 << 30),
        ("500 MB", 500_000_000), ("1.5KiB", 1536), ("1TB", 10**12), ("10B", 10), (None, None),
    ],
)  # fmt: skip
def test_a_size_may_be_written_as_people_write_it(
    text: str | int | None, num_bytes: int | None
) -> None:
    assert parse_bytes(text, "k") == num_bytes


@pytest.mark.parametrize("text", ["", "many", "-1", "0", "0.1B", "1XB", "1 2", "inf", "1e9"])
def test_what_is_no_size_is_refused_by_its_key(load: Load, text: str) -> None:
    rule = "must be a number of bytes, or a size like 512MiB or 2GB, got"
    with pytest.raises(ConfigError, match=f"workers.kv_memory {rule}"):
        load(None, f"workers.kv_memory={text}")
    with pytest.raises(ConfigError, match=f"kv_memory of a model {rule}"):
        load(None, f"models.demo.kv_memory={text}")


def test_every_number_has_a_tested_bound() -> None:
    numbers = {
        f"{section.name}.{f.name}"
        for section in fields(Config)
        if is_dataclass(getattr(Config(), section.name))
        for f in fields(getattr(Config(), section.name))
        if f.type in ("int", "float", "int | None")
    }
    assert numbers == LOWEST.keys()


@pytest.mark.parametrize(
    "key", ["listen.drain_s", "admission.stop_grace_s", "batching.max_wait_ms"]
)
@pytest.mark.parametrize("value", ["inf", "nan", "-inf"])
def test_a_duration_is_a_finite_number(load: Load, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} must be"):
        load(None, f"{key}={value}")


@pytest.mark.parametrize("key", ["workers", "threads"])
def test_a_model_has_at_least_one_worker_and_thread(load: Load, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} of a model must be >= 1, got 0"):
        load(None, "models.m.source=echo:", f"models.m.{key}=0")


def test_the_highest_port_is_the_last(load: Load) -> None:
    assert load(None, "listen.port=65535").listen.port == 65535
    with pytest.raises(ConfigError, match=r"listen\.port must be from 0 to 65535, got 65536"):
        load(None, "listen.port=65536")


@pytest.mark.parametrize(
    ("key", "highest"),
    [("admission.meta_bytes", 64 * 1024), ("bodies.message_bytes", 8 * 1024**3)],
)
def test_a_limit_of_the_wire_may_be_as_high_as_its_rule_says_and_no_higher(
    load: Load, key: str, highest: int
) -> None:
    room = f"bodies.memory_bytes={16 * 1024**3}"
    load(None, room, f"{key}={highest}")
    with pytest.raises(ConfigError, match=rf"{key} must be from \d+ to {highest}"):
        load(None, room, f"{key}={highest + 1}")


def test_nobody_can_write_to_the_tree(load: Load) -> None:
    tree = load()
    with pytest.raises(FrozenInstanceError):
        tree.listen.port = 1  # type: ignore[misc]
