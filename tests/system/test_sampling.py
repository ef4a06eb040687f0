"""Sampling through the whole server, on a real model: what is asked is what happens, and told."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import models_zoo
import numpy as np
import pytest
import torch
import transformers
from tensorwire import BadParams, Client, Generation, Logprobs

from .serving import RunningServer

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

MODEL = "llama"
LOADS_S = 100.0  # on a machine that others use
PROMPT = "The quick brown fox"
# The server reads prompts and tokens in other shapes than one pass over everything: float32 differs
# in its last bits.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def real_model() -> Iterator[RunningServer]:
    with RunningServer(f"--model={MODEL}={models_zoo.tiny_model(MODEL)}") as server:
        yield server.ready(LOADS_S)


@pytest.fixture
def client(real_model: RunningServer) -> Iterator[Client]:
    with real_model.client() as client:
        yield client


def reference(ids: list[int]) -> torch.Tensor:
    """Return how likely each token of the vocabulary was at each place behind the first."""
    model = transformers.AutoModelForCausalLM.from_pretrained(models_zoo.tiny_model(MODEL)).eval()
    with torch.no_grad():
        rows: torch.Tensor = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return rows


def assert_reports(found: Logprobs, rows: torch.Tensor, ids: list[int], num_top: int) -> None:
    assert found.token_ids.tolist() == ids
    own = rows[range(len(ids)), ids].numpy()
    np.testing.assert_allclose(found.token_logprobs, own, atol=TOLERANCE, rtol=0)
    best = rows.topk(num_top)
    np.testing.assert_allclose(found.top_logprobs, best.values.numpy(), atol=TOLERANCE, rtol=0)
    assert (found.top_ids == best.indices.numpy()).mean() > 0.99  # ties may be the other way round


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 3, "top_p": 0.9}])
def test_log_probabilities_are_those_of_transformers(
    client: Client, settings: dict[str, Any]
) -> None:
    prompt_ids = client.tokenize(MODEL, PROMPT * 5)
    made = client.generate(
        MODEL, prompt_ids, max_new_tokens=20, logprobs=5, prompt_logprobs=3, **settings
    )
    rows = reference([*prompt_ids, *made.token_ids])
    num_prompt = len(prompt_ids)
    assert made.logprobs is not None
    assert made.prompt_logprobs is not None
    assert_reports(made.prompt_logprobs, rows[: num_prompt - 1], prompt_ids[1:], 3)
    assert_reports(made.logprobs, rows[num_prompt - 1 : -1], made.token_ids, 5)


EVERYTHING: dict[str, Any] = {
    "temperature": 1.1, "top_k": 200, "top_p": 0.98, "min_p": 0.001, "repetition_penalty": 1.2,
    "presence_penalty": 0.3, "frequency_penalty": 0.2, "logit_bias": {9: 2.0, 11: -1.0},
    "bad_words": ["fox", [12, 13]], "min_new_tokens": 20, "max_new_tokens": 24, "logprobs": 1,
}  # fmt: skip


def test_choices_with_every_setting_are_drawn_together_as_they_are_alone(client: Client) -> None:
    together = client.generate(MODEL, PROMPT, n=8, seed=100, **EVERYTHING)
    alone = [client.generate(MODEL, PROMPT, seed=100 + i, **EVERYTHING) for i in range(8)]
    assert [choice.token_ids for choice in together.choices] == [one.token_ids for one in alone]
    assert [choice.text for choice in together.choices] == [one.text for one in alone]
    assert len({choice.text for choice in together.choices}) > 4
    assert max(choice.timings.largest_batch or 0 for choice in together.choices) > 1


def test_choices_have_their_prompt_read_once_and_stats_tell(
    real_model: RunningServer, client: Client
) -> None:
    def counts() -> dict[str, float]:
        (worker,) = real_model.stats()["workers"].values()
        return dict(worker)

    before = counts()
    ids = [3 + 7 * i % 500 for i in range(100)]  # that no other test here begins with
    # Long enough to be there still when the last one comes.
    made = client.generate(
        MODEL, ids, n=8, seed=1, temperature=1.0, max_new_tokens=64, ignore_eos=True
    )
    after = counts()
    found = sorted(choice.usage.cached_tokens or 0 for choice in made.choices)
    assert found == [0, *[99] * 7]
    assert after["prefix_hit_tokens"] - before["prefix_hit_tokens"] == 7 * 99
    assert after["prefix_asked_tokens"] - before["prefix_asked_tokens"] == 8 * 100
    rate = after["prefix_hit_tokens"] / after["prefix_asked_tokens"]
    assert after["prefix_hit_rate"] == pytest.approx(rate, abs=1e-4)


def ids_of(client: Client, **options: Any) -> list[int]:
    made = client.generate(MODEL, PROMPT, **{"max_new_tokens": 24, **options})
    return made.token_ids


def test_what_is_banned_does_not_come_and_what_is_favoured_does(client: Client) -> None:
    plain = ids_of(client, ignore_eos=True)
    banned, pair = plain[0], plain[4:6]
    without = ids_of(client, bad_words=[[banned], pair], ignore_eos=True)
    assert banned not in without
    assert all(without[i : i + 2] != pair for i in range(len(without)))
    assert ids_of(client, logit_bias={33: 100}) == [33] * 24
    assert len(set(ids_of(client, repetition_penalty=100, ignore_eos=True))) == 24


def test_stop_tokens_wait_for_the_least_length(client: Client) -> None:
    plain = ids_of(client, ignore_eos=True)
    stop = plain[2]
    assert ids_of(client, stop_ids=[stop], ignore_eos=True) == plain[:3]
    longer = ids_of(client, stop_ids=[stop], ignore_eos=True, min_new_tokens=10)
    assert len(longer) >= 10
    assert stop not in longer[:10]
    assert ids_of(client, stop_ids=[], stop=[]) == ids_of(client)


def test_a_prompt_is_echoed_before_the_answer(client: Client) -> None:
    plain = client.generate(MODEL, PROMPT, max_new_tokens=5)
    made = client.generate(MODEL, PROMPT, max_new_tokens=5, echo=True, stop=["quick"])
    assert made.text == PROMPT + plain.text
    assert made.token_ids == plain.token_ids
    with client.stream(MODEL, PROMPT, max_new_tokens=5, echo=True) as stream:
        deltas = list(stream)
    assert deltas[0].text.startswith(PROMPT)
    assert "".join(delta.text for delta in deltas) == made.text
    ids = client.tokenize(MODEL, PROMPT)
    assert client.generate(MODEL, ids, max_new_tokens=5, echo=True).text == made.text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"top_p": 1.5}, "top_p must be a number above 0, up to 1, not 1.5"),
        ({"logit_bias": {512: 1}}, "token id 512 in logit_bias is outside the vocabulary"),
        ({"bad_words": [[512]]}, "token id 512 in bad_words is outside the vocabulary"),
        ({"max_new_tokens": 320}, "exceed the context of 320"),
        ({"n": 9}, "n must be an integer from 1 to 8, not 9"),
        ({"logprobs": 21}, "logprobs must be an integer from 0 to 20, not 21"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens 9 is above the 8 tokens"),
    ],
)
def test_a_wrong_setting_is_refused_for_that_request_alone(
    client: Client, options: dict[str, Any], sentence: str
) -> None:
    with client.stream(MODEL, PROMPT, max_new_tokens=40, ignore_eos=True) as stream:
        next(stream)
        with pytest.raises(BadParams) as refused:
            client.generate(MODEL, PROMPT, **options)
        rest = list(stream)
    assert sentence in refused.value.message
    assert stream.generation.usage.completion_tokens == 40
    assert rest


def test_the_client_in_javascript_reads_log_probabilities(
    client: Client, real_model: RunningServer
) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    params = {"max_new_tokens": 6, "logprobs": 2, "prompt_logprobs": 1, "logit_bias": [[9, 1.5]]}
    script = Path(__file__).parents[2] / "protocol" / "examples" / "client.mjs"
    words = [node, str(script), real_model.address, "generate", MODEL, PROMPT, json.dumps(params)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    made: Generation = client.generate(
        MODEL, PROMPT, max_new_tokens=6, logprobs=2, prompt_logprobs=1, logit_bias={9: 1.5}
    )
    assert made.logprobs is not None
    assert made.prompt_logprobs is not None
    for entries, ours in (
        (said["logprobs"], made.logprobs), (said["promptLogprobs"], made.prompt_logprobs),
    ):  # fmt: skip
        own = [entry["logprob"] for entry in entries]
        np.testing.assert_allclose(own, ours.token_logprobs, atol=TOLERANCE)
        assert [[id for id, _ in entry["top"]] for entry in entries] == ours.top_ids.tolist()
    tokens = [entry["token"] for entry in said["promptLogprobs"]]
    assert tokens == made.prompt_logprobs.token_ids.tolist()


def test_a_replayed_outcome_has_its_log_probabilities(client: Client) -> None:
    """The same key again: the server answers with what it kept, byte for byte."""
    from tensorwire import calls
    from tensorwire.client import _generation

    options = {"max_new_tokens": 8, "logprobs": 2, "prompt_logprobs": 1}
    call = calls.generate(MODEL, PROMPT, options, 30.0)
    first, again = (_generation(client._link.call(call)) for _ in range(2))
    assert again.token_ids == first.token_ids
    assert again.timings == first.timings
    assert first.logprobs is not None
    assert again.logprobs is not None
    np.testing.assert_array_equal(again.logprobs.top_logprobs, first.logprobs.top_logprobs)
