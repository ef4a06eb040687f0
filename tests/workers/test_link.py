"""A link to a real worker process: what comes back for what is sent."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tensorwire_protocol.errors import ErrorCode, Executed
from tensorwire_protocol.messages import Drain, End, Failure, Finish, Result
from tensorwire_protocol.operations import write_texts
from tensorwire_server.workers.echo import echo_embedding
from tensorwire_server.workers.oracle import oracle_text, oracle_tokens

from .dispatching import KEY, Dispatcher, connected

if TYPE_CHECKING:
    from collections.abc import Coroutine

Address = tuple[str, int, int]


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


def seed_of_key(key: bytes) -> int:
    return int.from_bytes(key[:8], "little") & (2**63 - 1)


# -- text ------------------------------------------------------------------------------------------


def test_a_prompt_gives_the_tokens_and_the_text_of_the_oracle(oracle: Address) -> None:
    async def main() -> None:
        async with connected(oracle) as link:
            answer, end = await link.ended(link.generate("Once", max_new_tokens=20, seed=5))
            expected = oracle_tokens(b"Once", 5, 20)
            assert answer.tokens == expected
            assert answer.text == oracle_text(expected)
            assert answer.ack is not None
            assert answer.ack.prompt_tokens == 4
            assert list(answer.ack.prompt_ids or ()) == list(b"Once")
            assert end.finish is Finish.LENGTH
            assert end.usage == {"prompt_tokens": 4, "completion_tokens": 20, "cached_tokens": 0}
            assert end.extra == {"attempt": 1}
            timings = dict(end.timings)
            assert timings.pop("largest_batch") == 1
            assert set(timings) == {
                "queued_ms", "first_token_ms", "prefill_ms", "decode_ms", "total_ms",
            }  # fmt: skip
            assert all(ms > 0 for ms in timings.values())
            assert timings["total_ms"] >= timings["first_token_ms"] + timings["decode_ms"]

    run(main())


def test_a_prompt_that_came_before_says_how_much_of_it_was_in_the_cache(oracle: Address) -> None:
    async def main() -> None:
        async with connected(oracle) as link:
            for cached in (0, 48):
                prompt = "a prompt of fifty characters that comes twice here"
                _, end = await link.ended(link.generate(prompt, max_new_tokens=2, seed=5))
                assert (end.usage["prompt_tokens"], end.usage["cached_tokens"]) == (50, cached)

    run(main())


def test_ids_a_long_prompt_and_a_conversation_are_prompts_too(oracle: Address) -> None:
    async def main() -> None:
        async with connected(oracle) as link:
            params = {"max_new_tokens": 3, "seed": 1}
            long = "x" * 900  # beyond what is tokenized on the spot
            chat = {"roles": ["user"], "texts": ["hi"]}
            streams = [
                link.submit("generate", {"ids": [1, 2, 3]}, params=params),
                link.submit("generate", {"prompt": long}, params=params),
                link.submit("chat", chat, params=params),
            ]
            answers = await link.answered(*streams)
            prompts = [[1, 2, 3], long.encode(), b"user: hi\nassistant: "]
            for answer, prompt in zip(answers, prompts, strict=True):
                assert answer.tokens == oracle_tokens(list(prompt), 1, 3)

    run(main())


def test_without_a_seed_the_key_decides(oracle: Address) -> None:
    async def main() -> None:
        async with connected(oracle) as link:
            answer, _ = await link.ended(link.generate("Once", max_new_tokens=5))
            assert answer.tokens == oracle_tokens(b"Once", seed_of_key(KEY), 5)

    run(main())


def test_streams_that_run_together_share_one_frame_per_step(oracle: Address) -> None:
    async def main() -> None:
        async with connected(oracle) as link:
            # The first may run alone for some steps, until the others have come.
            streams = [link.generate(f"{i}", max_new_tokens=500, seed=i) for i in range(10)]
            answers = await link.answered(*streams)
            for i, answer in enumerate(answers):
                assert answer.tokens == oracle_tokens(f"{i}".encode(), i, 500)
                assert isinstance(answer.terminal, End)
                assert answer.terminal.timings["largest_batch"] == 10
            assert len(link.steps) <= 2 * 500  # one for each stream and step would be 5,000
            assert sum(len(step.streams) == 10 for step in link.steps) > len(link.steps) / 2

    run(main())


def test_a_later_attempt_goes_on_after_the_tokens_so_far(oracle: Address) -> None:
    async def main() -> None:
        async with connected(oracle) as link:
            whole = oracle_tokens(b"Once", 5, 20)
            stream = link.submit(
                "generate", {"prompt": "Once"}, attempt=2, so_far=whole[:8],
                params={"max_new_tokens": 20, "seed": 5},
            )  # fmt: skip
            answer, end = await link.ended(stream)
            assert answer.tokens == whole[8:]
            assert answer.text == oracle_text(whole[8:])
            assert (end.count, end.extra) == (20, {"attempt": 2})
            done = link.submit(
                "generate", {"prompt": "Once"}, attempt=3, so_far=whole,
                params={"max_new_tokens": 20, "seed": 5},
            )  # fmt: skip
            answer, end = await link.ended(done)
            assert (answer.tokens, end.finish, end.count) == ([], Finish.LENGTH, 20)

    run(main())


def test_a_stop_string_cuts_the_text_and_ends_the_stream(oracle: Address) -> None:
    async def main() -> None:
        async with connected(oracle) as link:
            tokens = oracle_tokens(b"Once", 5, 40)
            text = oracle_text(tokens)
            stop = text[10:14]
            at = text.index(stop)
            stream = link.generate("Once", max_new_tokens=1000, seed=5, stop=["@@", stop])
            answer, end = await link.ended(stream)
            assert end.finish is Finish.STOP
            assert answer.text == text[:at]
            assert answer.tokens == tokens[: at + 4]
            assert not any(answer.texts[at:])
            await until_idle(link)

    run(main())


def test_text_held_back_for_a_stop_string_comes_with_the_last_token(oracle: Address) -> None:
    async def main() -> None:
        async with connected(oracle) as link:
            text = oracle_text(oracle_tokens(b"Once", 5, 10))
            stream = link.generate("Once", max_new_tokens=10, seed=5, stop=[text[7:] + "@"])
            answer, end = await link.ended(stream)
            assert end.finish is Finish.LENGTH
            assert answer.text == text
            assert answer.texts[7:] == ["", "", text[7:]]

    run(main())


def test_a_stop_id_ends_the_stream_and_is_emitted(oracle: Address) -> None:
    async def main() -> None:
        async with connected(oracle) as link:
            tokens = oracle_tokens(b"Once", 5, 40)
            at = tokens.index(tokens[6])
            stream = link.generate("Once", max_new_tokens=40, seed=5, stop_ids=[tokens[6]])
            answer, end = await link.ended(stream)
            assert end.finish is Finish.STOP
            assert answer.tokens == tokens[: at + 1]

    run(main())


# -- ends before the end ---------------------------------------------------------------------------


def test_cancel_ends_at_once_with_the_usage_so_far(oracle: Address) -> None:
    async def main() -> None:
        async with connected(oracle) as link:
            stream = link.generate("Once", max_new_tokens=1000)
            await link.until(lambda: len(link.answers[stream].tokens) >= 3)
            link.cancel(stream)
            link.cancel(stream)
            answer, end = await link.ended(stream)
            assert end.finish is Finish.CANCELLED
            assert end.usage["completion_tokens"] == len(answer.tokens) >= 3
            await until_idle(link)
            late = link.generate("Once", max_new_tokens=1000)
            link.cancel(late, reason="deadline")
            _, end = await link.ended(late)
            assert end.finish is Finish.DEADLINE

    run(main())


def test_a_deadline_ends_what_runs(oracle: Address) -> None:
    async def main() -> None:
        async with connected(oracle) as link:
            stream = link.submit(
                "generate", {"prompt": "Once"}, deadline_ms=300, params={"max_new_tokens": 1000}
            )
            answer, end = await link.ended(stream)
            assert end.finish is Finish.DEADLINE
            assert 0 < len(answer.tokens) < 1000
            assert end.timings["total_ms"] >= 300
            await until_idle(link)

    run(main())


def test_a_deadline_ends_what_waits(oracle: Address) -> None:
    async def main() -> None:
        async with connected(oracle) as link:
            hogs = [link.generate(f"{i}", max_new_tokens=900) for i in range(32)]
            stream = link.submit("generate", {"prompt": "Once"}, deadline_ms=100, priority=-1)
            answer, end = await link.ended(stream)
            assert (answer.tokens, end.finish) == ([], Finish.DEADLINE)
            assert end.usage["completion_tokens"] == 0
            for hog in hogs:
                link.cancel(hog)
            await link.answered(*hogs)

    run(main())


def test_a_deadline_is_kept_while_a_step_takes_long(slow_echo: Address) -> None:
    async def main() -> None:
        async with connected(slow_echo) as link:
            streams = [link.submit("infer", {"i": i}, deadline_ms=1) for i in range(8)]
            answers = await link.answered(*streams)
            ends = [answer.terminal for answer in answers]
            assert all(isinstance(end, End) and end.finish is Finish.DEADLINE for end in ends)

    run(main())


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "inputs", "params", "code", "words"),
    [
        ("embed", {"texts": ["a"]}, {}, ErrorCode.UNKNOWN_OP, "it offers chat, generate, tokenize"),
        ("generate", {}, {}, ErrorCode.BAD_META, "generate takes the inputs {prompt} or {ids}"),
        ("generate", {"prompt": [1]}, {}, ErrorCode.BAD_META, "prompt must be text"),
        ("generate", {"prompt": ""}, {}, ErrorCode.BAD_PARAMS, "the prompt is empty"),
        ("generate", {"ids": [320]}, {}, ErrorCode.BAD_PARAMS, "token id 320 is outside"),
        (
            "generate", {"prompt": "x" * 500}, {"max_new_tokens": 600}, ErrorCode.BAD_PARAMS,
            "prompt of 500 tokens + max_new_tokens 600 exceed the context of 1024 of 'm'",
        ),
    ],
)  # fmt: skip
def test_what_the_model_cannot_do_is_refused_before_it_runs(
    oracle: Address, op: str, inputs: dict[str, Any], params: dict[str, Any], code: int, words: str
) -> None:
    async def main() -> None:
        async with connected(oracle) as link:
            refusal = await link.refused(op, inputs, params=params)
            assert (refusal.code, refusal.executed) == (code, Executed.NO)
            assert words in refusal.message
            assert link.answers[1].ack is None

    run(main())


def test_more_requests_than_the_bound_are_busy_and_the_others_unharmed(oracle: Address) -> None:
    async def main() -> None:
        async with connected(oracle) as link:
            streams = [link.generate(f"{i}", max_new_tokens=5, seed=1) for i in range(200)]
            answers = await link.answered(*streams)
            ends = [a for a in answers if isinstance(a.terminal, End)]
            refused = [a for a in answers if isinstance(a.terminal, Failure)]
            assert all(a.ack is None for a in refused)
            busy = [a.terminal for a in refused if isinstance(a.terminal, Failure)]
            assert len(ends) + len(busy) == 200
            assert len(ends) >= 96  # 32 run, 64 wait
            assert busy
            assert all(b.code == ErrorCode.BUSY and b.retryable for b in busy)
            for i, answer in enumerate(answers):
                assert answer.tokens in ([], oracle_tokens(f"{i}".encode(), 1, 5))

    run(main())


def test_a_row_that_is_not_finite_fails_alone(oracle: Address) -> None:
    async def main() -> None:
        async with connected(oracle) as link:
            streams = [link.generate("ok", max_new_tokens=9, seed=1), link.generate("so !NAN")]
            good, bad = await link.answered(*streams)
            assert good.tokens == oracle_tokens(b"ok", 1, 9)
            assert isinstance(bad.terminal, Failure)
            assert bad.terminal.code == ErrorCode.NUMERIC
            assert bad.ack is not None

    run(main())


# -- answered once ---------------------------------------------------------------------------------


def test_echo_gives_back_arrays_and_text(echo: Address) -> None:
    async def main() -> None:
        async with connected(echo) as link:
            big = np.arange(10_000, dtype=np.float32).reshape(100, 100)
            result = await link.result("infer", {"big": big, "small": np.int64(3), "text": "hi"})
            assert np.array_equal(result.outputs["big"], big)
            assert result.outputs["small"] == 3
            assert result.outputs["text"] == "hi"
            assert result.extra == {"attempt": 1}

    run(main())


def test_embed_gives_a_row_for_each_text(slow_echo: Address) -> None:
    async def main() -> None:
        async with connected(slow_echo) as link:
            texts = [f"text {i}" for i in range(10)]  # batches of four
            stream = link.submit("embed", {"texts": texts})
            (answer,) = await link.answered(stream)
            assert isinstance(answer.terminal, Result)
            embeddings = answer.terminal.outputs["embeddings"]
            assert (embeddings.dtype, embeddings.shape) == (np.float32, (10, 8))
            for row, text in zip(embeddings, texts, strict=True):
                assert np.array_equal(row, echo_embedding(list(text.encode())))
            assert answer.ack is not None
            assert answer.terminal.usage == {"prompt_tokens": 60}
            assert answer.terminal.timings["largest_batch"] == 4

    run(main())


def test_tokenize_gives_ids(echo: Address, oracle: Address) -> None:
    async def main() -> None:
        for address in (echo, oracle):
            async with connected(address) as link:
                result = await link.result("tokenize", {"prompt": "hi"})
                assert result.outputs["ids"].dtype == np.int32
                assert result.outputs["ids"].tolist() == [104, 105]
                assert result.usage == {"prompt_tokens": 2}

    run(main())


def test_what_is_answered_once_can_be_cancelled_too(slow_echo: Address) -> None:
    async def main() -> None:
        async with connected(slow_echo) as link:
            streams = [link.submit("infer", {"i": i}) for i in range(12)]
            for stream in streams[1::2]:
                link.cancel(stream)
            answers = await link.answered(*streams)
            for i, answer in enumerate(answers):
                if i % 2:
                    assert isinstance(answer.terminal, End)
                    assert answer.terminal.finish is Finish.CANCELLED
                else:
                    assert isinstance(answer.terminal, Result)
                    assert answer.terminal.outputs == {"i": i}

    run(main())


def test_an_answer_that_does_not_fit_a_frame_fails_its_request_alone(echo: Address) -> None:
    async def main() -> None:
        async with connected(echo) as link:
            for _ in range(2):  # the first leaves nothing that would make the second too many
                refusal = await link.refused("embed", {"texts": write_texts([""] * 40_000)})
                assert refusal.code == ErrorCode.OUTPUT_TOO_LARGE
            assert (await link.result("infer", {"x": 1})).outputs == {"x": 1}

    run(main())


# -- the life of a link ----------------------------------------------------------------------------


def test_a_lost_link_takes_its_work_along_and_the_worker_lives_on(oracle: Address) -> None:
    async def main() -> None:
        async with connected(oracle) as other:
            kept = other.generate("kept", max_new_tokens=300, seed=1)
            async with connected(oracle) as link:
                for i in range(20):
                    link.generate(f"{i}", max_new_tokens=1000)
                await link.until(lambda: len(link.steps) >= 3)
            await until_idle(other, open_streams=1)
            answer, _ = await other.ended(kept)
            assert answer.tokens == oracle_tokens(b"kept", 1, 300)

    run(main())


def test_a_draining_link_finishes_what_runs_refuses_the_rest_and_closes(oracle: Address) -> None:
    async def main() -> None:
        async with connected(oracle) as link:
            running = link.generate("Once", max_new_tokens=50, seed=1)
            await link.until(lambda: bool(link.steps))
            link.transport.send(Drain())
            refusal = await link.refused("generate", {"prompt": "late"})
            assert refusal.code == ErrorCode.DRAINING
            assert refusal.retryable
            answer, _ = await link.ended(running)
            assert answer.tokens == oracle_tokens(b"Once", 1, 50)
            await link.until(lambda: link.is_lost)

    run(main())


def test_a_drain_does_not_wait_longer_than_its_grace(oracle: Address) -> None:
    async def main() -> None:
        async with connected(oracle) as link:
            running = link.generate("Once", max_new_tokens=1000)
            await link.until(lambda: bool(link.steps))
            link.transport.send(Drain(grace_ms=50))
            await link.until(lambda: link.is_lost)
            failure = link.answers[running].terminal
            assert isinstance(failure, Failure)
            assert failure.retryable

    run(main())


def test_heartbeats_tell_the_card_once_and_then_the_load(oracle: Address) -> None:
    async def main() -> None:
        async with connected(oracle) as link:
            card = link.beats[-1].card
            assert card is not None
            assert card["tasks"] == ["chat", "generate", "tokenize"]
            assert (card["context_tokens"], card["vocab_size"], card["eos_ids"]) == (1024, 320, [])
            link.generate("Once", max_new_tokens=1000)
            num_beats = len(link.beats)
            await link.until(lambda: len(link.beats) > num_beats)
            beat = link.beats[-1]
            assert beat.card is None
            assert beat.steps > link.beats[num_beats - 1].steps
            assert beat.load["running"] == 1
            assert 0 < beat.load["pages_used"] <= beat.load["pages_total"]

    run(main())


def test_after_random_cancels_everything_is_as_before(oracle: Address) -> None:
    async def main() -> None:
        chance = random.Random(7)
        async with connected(oracle) as link:
            await until_idle(link)
            before = await link.stats()
            for _ in range(5):
                streams = [
                    link.submit(
                        "generate",
                        {"prompt": "x" * chance.choice([3, 300, 700])},
                        params={"max_new_tokens": chance.randint(1, 200), "stop": ["q"]},
                        deadline_ms=chance.choice([None, 5, 5000]),
                    )
                    for _ in range(60)
                ]
                for stream in chance.sample(streams, 50):
                    if chance.random() < 0.2:
                        await link.stats()  # some steps go by
                    link.cancel(stream)
                await link.answered(*streams)
            after = await until_idle(link)
            for name in ("open_streams", "waiting", "running", "pages_used", "kv_sequences"):
                assert after[name] == 0, name
            for name in ("fds", "asyncio_tasks"):
                assert after[name] == before[name], name
            # The tokenizer's thread is started when the first long prompt comes.
            assert after["threads"] <= before["threads"] + 1

    run(main())


async def until_idle(link: Dispatcher, *, open_streams: int = 0) -> dict[str, Any]:
    """Ask until only `open_streams` are left, in the scheduler too; return the last answer.

    It takes a few steps: what was not dropped would go on for hundreds.
    """
    stats = await link.stats()
    last_step = stats["steps"] + 50
    while True:
        in_scheduler = stats["running"] + stats["waiting"]
        if stats["open_streams"] <= open_streams and in_scheduler <= open_streams:
            return stats
        assert stats["steps"] < last_step, stats
        stats = await link.stats()
