"""The server's configuration: one frozen tree, a section for each room.

Defaults < TOML file < environment (`TENSORWIRE_SERVER__SECTION__KEY`) < `--set section.key=value`.
Command-line flags are aliases of keys.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

ENV_PREFIX = "TENSORWIRE_SERVER__"
DEFAULT_PORT = 8947
BACKENDS = ("auto", "any", "fused")
QUANTIZATIONS = ("none", "int8")
_WRONG_TYPE = re.compile(r"Expected `(.+)`, got `.+` - at `\$\.([\w.]+)`")


class ConfigError(ValueError):
    """A key or value that is not allowed; the message is one sentence for a person."""


def _require(ok: bool, key: str, rule: str, value: object) -> None:
    if not ok:
        raise ConfigError(f"{key} must be {rule}, got {value!r}")


def _require_one_of(value: str | None, key: str, allowed: tuple[str, ...]) -> None:
    rule = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
    _require(value is None or value in allowed, key, rule, value)


_SIZE = re.compile(r"([0-9]*\.?[0-9]+) *([KMGT]?)(i?B|)", re.IGNORECASE)
_SIZE_RULE = "a number of bytes, or a size like 512MiB or 2GB"


def parse_bytes(value: int | str | None, key: str) -> int | None:
    """Return the bytes that `2GiB`, `500 MB` or a bare number mean; None for None.

    Raises:
        ConfigError: it is no size above 0; names the key.
    """
    if value is None:
        return None
    found = _SIZE.fullmatch(str(value).strip())
    if found is None:
        raise ConfigError(f"{key} must be {_SIZE_RULE}, got {value!r}")
    number, prefix, unit = found.groups()
    base = 1000 if unit.lower() == "b" and prefix else 1024
    num_bytes = int(float(number) * base ** " KMGT".index(prefix.upper() or " "))
    _require(num_bytes > 0, key, _SIZE_RULE, value)
    return num_bytes


def _require_seconds(value: float, key: str) -> None:
    _require(0 <= value < math.inf, key, "a number of seconds >= 0", value)  # false for NaN


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenConfig:
    """Where clients connect, and how the server ends."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT  # 0: any free one
    max_connections: int = 10_000
    max_connections_per_source: int | None = None  # of one IPv4 address or IPv6 /64; None: no bound
    max_unauthenticated: int = 512  # of them that have not logged in; the oldest has to go
    drain_s: float = 30.0  # after SIGTERM, for what runs
    # So long after output, gateway and workers stay awake for a near answer; 0: never.
    busy_poll_us: int = 80

    def __post_init__(self) -> None:
        _require(0 <= self.port <= 65535, "listen.port", "from 0 to 65535", self.port)
        for key in ("max_connections", "max_connections_per_source", "max_unauthenticated"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"listen.{key}", ">= 1", value)
        _require_seconds(self.drain_s, "listen.drain_s")
        poll_us = self.busy_poll_us
        _require(0 <= poll_us <= 10_000, "listen.busy_poll_us", "from 0 to 10000", poll_us)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthConfig:
    """Who may use the server."""

    file: str | None = None  # of `tensorwire token new`; None: everybody on this machine


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """TLS 1.3 on the port: PEM files, both or neither."""

    cert: str | None = None  # with the chain behind it
    key: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            given, missing = ("cert", "key") if self.key is None else ("key", "cert")
            raise ConfigError(f"tls.{given} is set, tls.{missing} is not: TLS needs both")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionConfig:
    """How much may be queued or running before the answer is BUSY."""

    max_requests: int = 4096  # on the whole server
    max_requests_per_model: int = 2048
    memory_bytes: int = 1024 * 1024 * 1024  # a quarter of it for frames that are not complete
    stop_grace_s: float = 2.0  # for a worker to confirm a cancel
    merged_bytes: int = 512 * 1024 * 1024  # of tokens that clients do not take, over all of them
    meta_bytes: int = 16 * 1024  # of a client's frame, its arrays and long texts aside

    def __post_init__(self) -> None:
        _require(self.max_requests >= 1, "admission.max_requests", ">= 1", self.max_requests)
        _require(
            self.max_requests_per_model >= 1,
            "admission.max_requests_per_model",
            ">= 1",
            self.max_requests_per_model,
        )
        _require(
            self.memory_bytes >= 16 * 1024 * 1024,
            "admission.memory_bytes",
            ">= 16777216 (16 MiB)",
            self.memory_bytes,
        )
        _require_seconds(self.stop_grace_s, "admission.stop_grace_s")
        _require(self.merged_bytes >= 0, "admission.merged_bytes", ">= 0", self.merged_bytes)
        _require(
            4096 <= self.meta_bytes <= 65536,
            "admission.meta_bytes",
            "from 4096 to 65536 (64 KiB)",
            self.meta_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomesConfig:
    """What can be asked for by its request key: after a lost connection, after the end."""

    resume_grace_s: float = 5.0  # what runs goes on so long without a reader; 0: not at all
    detached_bytes: int = 64 * 1024 * 1024  # what runs without a reader keeps for it, in all
    seconds: float = 600.0  # an outcome is kept, within the next two bounds
    keys: int = 100_000
    bytes: int = 256 * 1024 * 1024

    def __post_init__(self) -> None:
        grace_s = self.resume_grace_s
        _require(0 <= grace_s <= 60, "outcomes.resume_grace_s", "from 0 to 60 seconds", grace_s)
        _require_seconds(self.seconds, "outcomes.seconds")
        for key in ("keys", "bytes", "detached_bytes"):
            value = getattr(self, key)
            _require(value >= 0, f"outcomes.{key}", ">= 0", value)


_GIB = 1024 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class BodiesConfig:
    """Messages with more than a mebibyte of arrays."""

    memory_bytes: int = _GIB  # for all requests that arrive or run; and for each worker's answers
    message_bytes: int = 256 * 1024 * 1024  # of one request

    def __post_init__(self) -> None:
        _require(
            0 < self.message_bytes <= 8 * _GIB,
            "bodies.message_bytes",
            f"from 1 to {8 * _GIB} (8 GiB)",
            self.message_bytes,
        )
        _require(
            self.memory_bytes >= self.message_bytes,
            "bodies.memory_bytes",
            f">= bodies.message_bytes ({self.message_bytes})",
            self.memory_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What one model has of its own, where it differs from `workers`."""

    source: str | None = None  # None: what the command line names
    workers: int | None = None
    threads: int | None = None
    backend: str | None = None
    quantize: str | None = None
    kv_memory: int | str | None = None  # as `workers.kv_memory`

    def __post_init__(self) -> None:
        for key in ("workers", "threads"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"{key} of a model", ">= 1", value)
        _require_one_of(self.backend, "backend of a model", BACKENDS)
        _require_one_of(self.quantize, "quantize of a model", QUANTIZATIONS)
        parse_bytes(self.kv_memory, "kv_memory of a model")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersConfig:
    """The processes that hold the models."""

    count: int = 1  # replicas of each model
    device: str = "auto"  # auto, cpu, cuda
    backend: str = "auto"  # auto, any, fused: what runs the models
    quantize: str = "none"  # none, int8: in which numbers products are computed
    threads: int | None = None  # per worker; None: cores / all workers
    remote: tuple[str, ...] = ()  # HOST:PORT of workers that run elsewhere
    # Of each for keys and values, as bytes or "2GiB"; None: a share of what is free at its start.
    kv_memory: int | str | None = None

    def __post_init__(self) -> None:
        _require(self.count >= 1, "workers.count", ">= 1", self.count)
        _require_one_of(self.device, "workers.device", ("auto", "cpu", "cuda"))
        _require_one_of(self.backend, "workers.backend", BACKENDS)
        _require_one_of(self.quantize, "workers.quantize", QUANTIZATIONS)
        _require(self.threads is None or self.threads >= 1, "workers.threads", ">= 1", self.threads)
        parse_bytes(self.kv_memory, "workers.kv_memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingConfig:
    """How requests become batches inside a worker."""

    max_running: int = 64  # sequences in one running batch
    step_tokens: int = 2048  # tokens of one step, prompts included
    max_waiting: int = 2048  # sequences that wait for a place
    max_items: int = 64  # of one batch of an encoder
    max_batch_tokens: int = 8192  # of one batch of an encoder
    max_wait_ms: float = 0.0  # the longest a lone request is held back
    max_slowdown: float = 2.0  # of running texts by a few prompts that are read beside them
    share_prefixes: bool = False  # computed prompts, between everybody who may log in

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.type == "int":
                value = getattr(self, f.name)
                _require(value >= 1, f"batching.{f.name}", ">= 1", value)
        slowdown = self.max_slowdown
        _require(slowdown >= 1, "batching.max_slowdown", ">= 1", slowdown)
        wait_ms = self.max_wait_ms
        _require(0 <= wait_ms < math.inf, "batching.max_wait_ms", ">= 0 and finite", wait_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole tree."""

    listen: ListenConfig = field(default_factory=ListenConfig)
    auth: AuthConfig = field(default_factory=AuthConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    outcomes: OutcomesConfig = field(default_factory=OutcomesConfig)
    bodies: BodiesConfig = field(default_factory=BodiesConfig)
    models: dict[str, ModelConfig] = field(default_factory=dict)


def load_config(file: Path | None, environ: Mapping[str, str], settings: Iterable[str]) -> Config:
    """Merge the sources into one tree.

    Args:
        file: a TOML file, or None.
        environ: only names with `ENV_PREFIX` count.
        settings: `section.key=value`, the last one wins.

    Raises:
        ConfigError: names the key, the value and the rule.
    """
    tree: dict[str, Any] = _read_toml(file) if file else {}
    for name, value in environ.items():
        if name.startswith(ENV_PREFIX):
            _put(tree, name[len(ENV_PREFIX) :].lower().split("__"), value, name)
    for setting in settings:
        path, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set takes section.key=value, got {setting!r}")
        _put(tree, path.strip().split("."), value, path)
    _check_names(tree)
    try:
        # Not strict: the environment and --set know only strings.
        return msgspec.convert(tree, Config, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(_sentence(error, tree)) from error


def _sentence(error: msgspec.ValidationError, tree: Mapping[str, Any]) -> str:
    if isinstance(error.__cause__, ConfigError):  # a section's own rule names the key
        return str(error.__cause__)
    found = _WRONG_TYPE.fullmatch(str(error))
    if found is None:
        return str(error).replace("`$.", "`")
    rule, key = found.groups()
    value: Any = tree
    for part in key.split("."):
        value = value[part]
    return f"{key} must be {rule}, got {value!r}"


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"the configuration {str(file)!r} cannot be read: {error.strerror}"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration {str(file)!r} is not TOML: {error}") from error


def _put(tree: dict[str, Any], path: list[str], value: str, name: str) -> None:
    if len(path) < 2:
        raise ConfigError(f"{name!r} names no section; give section.key=value")
    *sections, key = path
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{name!r} goes through a key that is no section")
    tree[key] = (
        [part.strip() for part in value.split(",") if part.strip()] if key == "remote" else value
    )


def _check_names(tree: Mapping[str, Any]) -> None:
    sections = {f.name: getattr(Config(), f.name) for f in fields(Config)}
    for name, section in tree.items():
        _known(name, sections, "section")
        if not isinstance(section, dict):
            raise ConfigError(f"{name} must be a section, got {section!r}")
        if name == "models":
            for model, own in section.items():
                for key in own if isinstance(own, dict) else ():
                    _known(key, {f.name: None for f in fields(ModelConfig)}, f"key of {model}")
        else:
            known = {f.name: None for f in fields(sections[name])}
            for key in section:
                _known(key, known, f"key of {name}")


def _known(name: str, known: Mapping[str, Any], what: str) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
        raise ConfigError(f"there is no {what} {name!r}{hint}")
