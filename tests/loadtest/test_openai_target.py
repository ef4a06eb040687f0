"""The adapter for HTTP servers, against a small one."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest
from system.serving import wait_until
from tensorwire.errors import BadParams
from tensorwire.loadtest.http_connection import Base
from tensorwire.loadtest.openai_target import OpenAiTarget
from tensorwire.loadtest.outcomes import Outcome
from tensorwire.loadtest.workloads import Ask

from .conftest import number
from .fake_openai import FakeOpenAi

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .conftest import Bench


@pytest.fixture
def fake() -> Iterator[FakeOpenAi]:
    with FakeOpenAi() as server:
        yield server


def performed(fake: FakeOpenAi, *asks: Ask) -> list[Outcome]:
    """Return what came of requests, sent one after the other."""

    async def main() -> list[Outcome]:
        target = OpenAiTarget(fake.address, connections=1)
        await target.connect()
        outcomes = []
        for ask in asks:
            outcome = Outcome(ask, time.monotonic(), 0.0, time.monotonic())
            await target.perform(outcome)
            outcomes.append(outcome)
        await target.close()
        return outcomes

    return asyncio.run(main())


def ask(model: str, task: str = "generate", **fields: Any) -> Ask:
    options: dict[str, Any] = {"text": "hello", "max_new_tokens": 5, "timeout_s": 10.0} | fields
    return Ask(index=0, task=task, model=model, **options)


def test_a_stream_is_timed_chunk_by_chunk(fake: FakeOpenAi) -> None:
    (outcome,) = performed(fake, ask("plain"))
    assert (outcome.status, outcome.tokens_out, outcome.tokens_in) == ("ok", 5, 7)
    assert outcome.has_end
    assert len(outcome.times) == 5
    assert outcome.planned_at < outcome.times[0] < outcome.times[4] <= outcome.ended_at
    assert fake.requests == [
        ("/v1/completions", {
            "model": "plain", "prompt": "hello", "max_tokens": 5, "seed": 0, "stream": True,
            "stream_options": {"include_usage": True},
        }),
    ]  # fmt: skip


def test_chat_and_embeddings_have_their_own_places(fake: FakeOpenAi) -> None:
    chat, embed = performed(fake, ask("plain", "chat"), ask("plain", "embed"))
    assert (chat.status, chat.tokens_out) == ("ok", 5)
    assert (embed.status, embed.tokens_in, embed.times) == ("ok", 3, [])
    (chat_path, chat_value), (embed_path, embed_value) = fake.requests
    assert (chat_path, embed_path) == ("/v1/chat/completions", "/v1/embeddings")
    assert chat_value["messages"] == [{"role": "user", "content": "hello"}]
    assert embed_value == {"model": "plain", "input": "hello"}


def test_a_reason_ends_a_stream_as_well_as_done_does(fake: FakeOpenAi) -> None:
    outcomes = performed(fake, ask("terse"), ask("terse"))
    assert [(o.status, o.has_end, o.tokens_out) for o in outcomes] == [("ok", True, 5)] * 2
    assert fake.num_connections == 1


def test_what_a_model_thinks_is_counted(fake: FakeOpenAi) -> None:
    (outcome,) = performed(fake, ask("thinking", "chat"))
    assert (outcome.status, outcome.tokens_out) == ("ok", 5)


def test_the_servers_own_count_of_tokens_is_believed(fake: FakeOpenAi) -> None:
    (outcome,) = performed(fake, ask("double"))
    assert outcome.tokens_out == 10
    assert len(outcome.gaps()) == 9


def test_a_connection_is_used_again(fake: FakeOpenAi) -> None:
    outcomes = performed(fake, *[ask("plain"), ask("busy"), ask("plain", "embed")] * 3)
    assert [outcome.status for outcome in outcomes] == ["ok", "HTTP_503", "ok"] * 3
    assert fake.num_connections == 1


def test_a_connection_that_the_server_closes_behind_an_answer_costs_no_request(
    fake: FakeOpenAi,
) -> None:
    outcomes = performed(fake, *[ask("parting")] * 4)
    assert [(outcome.status, outcome.tokens_out) for outcome in outcomes] == [("ok", 5)] * 4
    assert len(fake.requests) == fake.num_connections == 4


@pytest.mark.parametrize(
    ("model", "status", "has_end"),
    [
        ("busy", "HTTP_503", True),
        ("cut", "CONNECTION_LOST", False),
        ("silent", "DEADLINE", False),
        ("nonsense", "BAD_ANSWER", False),
        ("rude", "CONNECTION_LOST", False),
    ],
)
def test_each_failure_has_its_name(
    fake: FakeOpenAi, model: str, status: str, has_end: bool
) -> None:
    (outcome,) = performed(fake, ask(model, timeout_s=0.3 if model == "silent" else 10.0))
    assert (outcome.status, outcome.has_end) == (status, has_end)
    assert outcome.message


def test_a_stream_that_is_left_ends_at_the_server_too(fake: FakeOpenAi) -> None:
    (outcome,) = performed(fake, ask("endless", cancel_after=3))
    assert (outcome.status, outcome.tokens_out) == ("cancelled", 3)
    wait_until(lambda: fake.num_left == 1, "the server notices")


@pytest.mark.parametrize(
    ("address", "base"),
    [
        ("http://a:80", Base(host="a", port=80, path="/v1", is_tls=False)),
        ("a:8000", Base(host="a", port=8000, path="/v1", is_tls=False)),
        ("https://a/api/v3/", Base(host="a", port=443, path="/api/v3", is_tls=True)),
    ],
)
def test_an_address_is_read(address: str, base: Base) -> None:
    assert Base.parse(address) == base


@pytest.mark.parametrize("address", [None, "", "ftp://a", "http://", "http://a:port"])
def test_what_is_no_address_is_refused(address: str | None) -> None:
    with pytest.raises(BadParams):
        Base.parse(address)


@pytest.mark.slow
def test_the_command_puts_the_same_load_on_it(fake: FakeOpenAi, bench: Bench) -> None:
    words = ("--kind", "openai", "--arrivals", "constant:20", "--warmup", "0s", "--duration", "1s")
    ran = bench(*words, "--task", "chat:plain", "--output", "6", "--json", address=fake.address)
    assert ran.exit_code in {0, 3}, ran.err
    assert number(ran.result, "ok") == 20
    assert number(ran.result, "tokens_out") == 120
    for refused in (("--task", "infer:plain"), ("--task", "chat:plain", "--verify")):
        assert bench(*words, *refused, address=fake.address).exit_code == 1
