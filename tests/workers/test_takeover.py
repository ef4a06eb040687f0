"""What one worker begins and another ends: its tokens, text and log-probabilities are one whole."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any

import models_zoo
import numpy as np
import pytest
from tensorwire_protocol.messages import End, Finish
from tensorwire_protocol.tensors import unpack_ids

from .dispatching import LOADS_S, Answer, Dispatcher, supervised

if TYPE_CHECKING:
    from collections.abc import Mapping

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PROMPT = "The quick brown fox jumps over"
COUNT = 40
# A chunk of a prompt is computed in other shapes than a token alone: float32 differs in its last
# bits, here up to some 1e-5.
TOLERANCE = 1e-4
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {
        "temperature": 0.9, "top_p": 0.95, "min_p": 0.01, "seed": 11, "repetition_penalty": 1.2,
        "frequency_penalty": 0.4, "presence_penalty": 0.2, "logit_bias": [[7, 1.5]],
        "bad_words": ["the", [9, 10]], "min_new_tokens": 30,
    },
]  # fmt: skip


def params_of(settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "max_new_tokens": COUNT, "ignore_eos": True, "logprobs": 3, "prompt_logprobs": 2,
        **settings, **more,
    }  # fmt: skip


async def whole(link: Dispatcher, params: dict[str, Any]) -> tuple[Answer, End]:
    return await link.ended(link.generate(PROMPT, **params))


def floats(packed: bytes) -> np.ndarray[Any, Any]:
    return np.frombuffer(packed, dtype="<f4")


def assert_same_reports(found: End, expected: End) -> None:
    for name in ("logprobs", "prompt_logprobs"):
        one: Mapping[str, bytes] = found.extra[name]
        other: Mapping[str, bytes] = expected.extra[name]
        assert one.keys() == other.keys()
        assert unpack_ids(one["top_ids"]) == unpack_ids(other["top_ids"])
        for column in ("token_logprobs", "top_logprobs"):
            np.testing.assert_allclose(
                floats(one[column]), floats(other[column]), rtol=0, atol=TOLERANCE
            )


def assert_whole(end: End, num_prompt: int) -> None:
    assert len(floats(end.extra["logprobs"]["token_logprobs"])) == end.count
    assert len(floats(end.extra["logprobs"]["top_logprobs"])) == 3 * end.count
    prompt = end.extra["prompt_logprobs"]
    assert len(floats(prompt["token_logprobs"])) == num_prompt - 1
    assert len(unpack_ids(prompt["token_ids"])) == num_prompt - 1
    assert len(floats(prompt["top_logprobs"])) == 2 * (num_prompt - 1)


def test_a_worker_that_is_killed_leaves_no_gap_in_what_its_successor_reports() -> None:
    source = str(models_zoo.tiny_model("llama"))

    async def main() -> None:
        async with supervised(source) as worker:
            first = await worker.ready(within_s=LOADS_S)
            expected = [await whole(first, params_of(settings)) for settings in SETTINGS]
            for answer, end in expected:
                assert answer.ack is not None
                assert answer.ack.prompt_tokens is not None
                assert_whole(end, answer.ack.prompt_tokens)
            streams = [first.generate(PROMPT, **params_of(settings)) for settings in SETTINGS]
            begun = [first.answers[stream] for stream in streams]
            await first.until(lambda: all(len(answer.tokens) > 3 for answer in begun))
            assert worker.process.pid is not None
            os.kill(worker.process.pid, signal.SIGKILL)
            second = await worker.ready(life=2, within_s=LOADS_S)
            rest = [
                second.submit(
                    "generate", {"prompt": PROMPT}, attempt=2, so_far=answer.tokens,
                    params=params_of(settings),
                )
                for answer, settings in zip(begun, SETTINGS, strict=True)
            ]  # fmt: skip
            for stream, old, (answer, end) in zip(rest, begun, expected, strict=True):
                new, new_end = await second.ended(stream)
                assert 0 < len(old.tokens) < COUNT
                assert [*old.tokens, *new.tokens] == answer.tokens
                assert old.text + new.text == answer.text
                assert_same_reports(new_end, end)

    asyncio.run(main())


def test_wherever_an_answer_is_taken_over_it_is_reported_whole() -> None:
    """From no token at all to all of them, when nothing is left but to read them again."""
    source = str(models_zoo.tiny_model("llama"))

    async def main() -> None:
        async with supervised(source) as worker:
            link = await worker.ready(within_s=LOADS_S)
            for settings in SETTINGS:
                answer, end = await whole(link, params_of(settings))
                cuts = [0, 1, 2, 17, COUNT - 1, COUNT]
                streams = [
                    link.submit(
                        "generate", {"prompt": PROMPT}, attempt=2, so_far=answer.tokens[:cut],
                        params=params_of(settings),
                    )
                    for cut in cuts
                ]  # fmt: skip
                for stream, cut in zip(streams, cuts, strict=True):
                    again, its_end = await link.ended(stream)
                    assert again.tokens == answer.tokens[cut:]
                    assert (its_end.finish, its_end.count) == (Finish.LENGTH, COUNT)
                    assert its_end.checksum == end.checksum
                    assert_same_reports(its_end, end)

    asyncio.run(main())


def test_an_answer_that_a_stop_text_had_ended_is_reported_whole() -> None:
    source = str(models_zoo.tiny_model("llama"))

    async def main() -> None:
        async with supervised(source) as worker:
            link = await worker.ready(within_s=LOADS_S)
            plain, _ = await whole(link, params_of(SETTINGS[0]))
            stop = plain.text[len(plain.text) // 2 :][:3]
            params = params_of(SETTINGS[0], stop=[stop])
            answer, end = await whole(link, params)
            assert end.finish is Finish.STOP
            assert 0 < end.count < COUNT
            assert end.count == len(floats(end.extra["logprobs"]["token_logprobs"]))
            again = link.submit(
                "generate", {"prompt": PROMPT}, attempt=2, so_far=answer.tokens, params=params
            )
            _, its_end = await link.ended(again)
            assert (its_end.finish, its_end.count) == (Finish.STOP, end.count)
            assert_same_reports(its_end, end)
            while (await link.stats())["kv_sequences"]:  # a step later at most
                assert not link.is_lost

    asyncio.run(main())
