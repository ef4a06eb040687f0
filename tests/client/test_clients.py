"""Both clients against the fake server: one suite, so that they cannot drift apart."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tensorwire
from tensorwire import (
    BadMeta,
    BadParams,
    BadTensor,
    Busy,
    ClientUnusable,
    ConnectionLost,
    DeadlineExceeded,
    ErrorCode,
    Executed,
    InternalError,
    RequestCancelled,
    SequenceError,
    TensorwireError,
    UnknownModel,
    WorkerLost,
)
from tensorwire_protocol.messages import Cancel

from .fake_server import cat_vectors, oracle_text, oracle_tokens

if TYPE_CHECKING:
    from .faces import Face
    from .fake_server import FakeServer


# -- results ---------------------------------------------------------------------------------------


def test_generate_returns_the_whole_text_with_typed_usage_and_timings(client: Face) -> None:
    made = client.call("generate", "oracle", "hello", max_new_tokens=5, seed=3)
    assert made.token_ids == oracle_tokens("hello", 5, seed=3)
    assert made.text == oracle_text(made.token_ids)
    assert made.finish_reason == "length"
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (5, 5)
    assert made.timings.queued_ms == 0.5
    assert made.timings.largest_batch == 1
    assert made.timings.first_token_ms is None  # the server did not say
    assert made.timings.extra == {"new_in_v2": 7}


def test_a_list_of_prompts_gives_a_list_in_order_over_one_connection(
    client: Face, server: FakeServer
) -> None:
    prompts = [f"prompt {i}" for i in range(600)]  # more than may be in flight at once
    made = client.call("generate", "oracle", prompts, max_new_tokens=2)
    assert [one.token_ids for one in made] == [oracle_tokens(p, 2) for p in prompts]
    assert server.num_connections == 1


@pytest.mark.parametrize("prompt", [[7, 8, 9], (7, 8, 9), np.array([7, 8, 9]), [np.int32(7), 8, 9]])
def test_a_list_of_int_is_one_prompt_of_token_ids(client: Face, prompt: Any) -> None:
    made = client.call("generate", "oracle", prompt)
    assert made.token_ids == oracle_tokens("7,8,9")


def test_a_list_of_lists_of_int_is_several_prompts(client: Face) -> None:
    made = client.call("generate", "oracle", [[1], np.array([2, 3])])
    assert [one.token_ids for one in made] == [oracle_tokens("1"), oracle_tokens("2,3")]


def test_no_prompts_give_no_generations(client: Face) -> None:
    assert client.call("generate", "oracle", []) == []


def test_n_choices_are_n_requests_with_seeds_in_a_row(client: Face, server: FakeServer) -> None:
    last = 2**63 - 1
    made = client.call("generate", "oracle", "hello", max_new_tokens=3, seed=last, n=3)
    assert [choice.token_ids for choice in made.choices] == [
        oracle_tokens("hello", 3, seed=seed) for seed in (last, 0, 1)
    ]
    assert (made.text, made.token_ids) == (made.choices[0].text, made.choices[0].token_ids)
    assert [request.params["seed"] for request in server.requests] == [last, 0, 1]
    assert len({request.key for request in server.requests}) == 3
    assert not any("n" in request.params for request in server.requests)
    assert server.num_connections == 1


def test_choices_without_a_seed_draw_what_their_keys_say(client: Face, server: FakeServer) -> None:
    made = client.call("chat", "oracle", [{"role": "user", "content": "a"}], n=2)
    assert len(made.choices) == 2
    assert not any("seed" in request.params for request in server.requests)


def test_one_choice_is_the_generation_itself(client: Face) -> None:
    assert client.call("generate", "oracle", "hello", n=1).choices == ()
    assert client.call("generate", "oracle", "hello", n=None).choices == ()


def test_each_prompt_of_a_list_has_its_choices(client: Face) -> None:
    made = client.call("generate", "oracle", ["a", "b"], max_new_tokens=2, seed=5, n=2)
    assert [[choice.token_ids for choice in one.choices] for one in made] == [
        [oracle_tokens(prompt, 2, seed=seed) for seed in (5, 6)] for prompt in ("a", "b")
    ]


@pytest.mark.parametrize("n", [0, 9, -1, 1.0, True, "2"])
@pytest.mark.parametrize("name", ["generate", "stream"])
def test_more_choices_than_eight_are_refused_before_anything_is_sent(
    client: Face, server: FakeServer, name: str, n: Any
) -> None:
    call = getattr(client.client, name)
    with pytest.raises(BadParams, match=f"n must be an integer from 1 to 8, not {n!r}"):
        asyncio.run(call("oracle", "hello", n=n))
    assert server.requests == []


def test_a_choice_that_fails_ends_all_of_them(client: Face, server: FakeServer) -> None:
    with pytest.raises(WorkerLost):
        client.call("generate", "failed:2", "hello", n=3)
    client.settle()
    assert server.wait_until(lambda: server.open_runs == 0)


def test_a_stream_of_choices_tells_them_apart(client: Face) -> None:
    stream = client.stream("oracle", "hello", max_new_tokens=4, seed=7, n=3)
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    order = []
    for delta in stream:
        assert delta.index == len(tokens[delta.choice])
        tokens[delta.choice] += delta.token_ids
        order.append(delta.choice)
    assert tokens == {i: oracle_tokens("hello", 4, seed=7 + i) for i in range(3)}
    assert order[:3] == [0, 1, 2]
    made = stream.generation
    assert [choice.token_ids for choice in made.choices] == list(tokens.values())
    assert stream.prompt_tokens == 5


def test_a_stream_of_choices_that_is_left_stops_all_of_them(
    client: Face, server: FakeServer
) -> None:
    stream = client.stream("endless", "hello", n=3)
    next(stream)
    with pytest.raises(ClientUnusable):
        _ = stream.generation
    stream.close()
    client.settle()
    assert server.wait_until(lambda: server.open_runs == 0)
    assert next(iter(stream), None) is None


def test_a_stream_of_choices_ends_with_the_first_error(client: Face, server: FakeServer) -> None:
    stream = client.stream("failed:2", "hello", n=2)
    with pytest.raises(WorkerLost):
        for _ in stream:
            pass
    client.settle()
    assert server.wait_until(lambda: server.open_runs == 0)


def test_log_probabilities_are_arrays_with_a_row_for_each_token(client: Face) -> None:
    made = client.call(
        "generate", "oracle", "hello", max_new_tokens=3, logprobs=2, prompt_logprobs=0
    )
    assert made.logprobs.token_ids.tolist() == made.token_ids
    assert made.logprobs.token_logprobs.tolist() == [0, -1, -2]
    assert made.logprobs.top_ids.tolist() == [[0, 1]] * 3
    assert made.logprobs.top_logprobs.tolist() == [[0, 0], [-1, -1], [-2, -2]]
    assert made.prompt_logprobs.token_ids.tolist() == [0, 1, 2, 3]
    assert made.prompt_logprobs.top_ids.shape == (4, 0)
    assert made.logprobs.token_logprobs.dtype == np.float32
    assert made.logprobs.top_ids.dtype == np.int32


def test_nothing_is_said_of_log_probabilities_that_nobody_asked_for(client: Face) -> None:
    made = client.call("generate", "oracle", "hello")
    assert made.logprobs is made.prompt_logprobs is None


def test_log_probabilities_that_do_not_match_the_tokens_are_the_servers_fault(
    client: Face,
) -> None:
    with pytest.raises(InternalError, match="log-probabilities cannot be read: 1 of 8 tokens"):
        client.call("generate", "short", "hello", logprobs=1)


def test_a_bias_by_token_id_travels_as_pairs(client: Face, server: FakeServer) -> None:
    client.call("generate", "oracle", "hello", logit_bias={5: -100, 7: 0.5}, bad_words=["a", [1]])
    (request,) = server.requests
    assert request.params["logit_bias"] == [[5, -100], [7, 0.5]]
    assert request.params["bad_words"] == ["a", [1]]


@pytest.mark.parametrize("name", ["seed", "max_new_tokens", "top_k"])
@pytest.mark.parametrize("value", [2**64, -(2**63) - 1])
def test_an_integer_that_no_wire_carries_is_refused_as_any_other(
    client: Face, name: str, value: int
) -> None:
    with pytest.raises(BadParams, match=rf"{name} must be an integer .*, not {value}$"):
        client.call("generate", "oracle", "hello", **{name: value})


def test_long_prompts_of_text_and_ids_arrive_whole(client: Face) -> None:
    text = "è" * 200_000
    assert client.call("generate", "oracle", text).token_ids == oracle_tokens(text)
    ids = list(range(5000))
    made = client.call("generate", "oracle", ids)
    assert made.token_ids == oracle_tokens(",".join(map(str, ids)))


def test_a_stream_yields_deltas_and_then_has_the_generation(client: Face) -> None:
    stream = client.stream("oracle", "hi", max_new_tokens=4)
    deltas = list(stream)
    tokens = oracle_tokens("hi", 4)
    assert [d.token_ids for d in deltas] == [[t] for t in tokens]
    assert [d.index for d in deltas] == [0, 1, 2, 3]
    assert "".join(d.text for d in deltas) == stream.generation.text == oracle_text(tokens)
    assert stream.generation.token_ids == tokens
    assert stream.prompt_tokens == 2
    assert list(stream) == []  # over stays over


def test_a_stream_has_no_generation_before_its_end(client: Face) -> None:
    with client.stream("endless", "hi") as stream:
        next(stream)
        with pytest.raises(ClientUnusable, match="not read to its end"):
            _ = stream.generation


def test_chat_and_stream_chat_send_roles_and_texts(client: Face, server: FakeServer) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    expected = oracle_tokens("system: be brief\nuser: hi", 3)
    assert client.call("chat", "oracle", messages, max_new_tokens=3).token_ids == expected
    stream = client.stream("oracle", messages, name="stream_chat", max_new_tokens=3)
    assert [d.token_ids[0] for d in stream] == expected
    assert [request.op for request in server.requests] == ["chat", "chat"]


def test_embed_gives_a_row_for_each_text_and_a_vector_for_one(
    client: Face, server: FakeServer
) -> None:
    texts = [f"text {i}" for i in range(200)]
    vectors = client.call("embed", "cat", texts)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, cat_vectors(texts))
    assert len(server.requests) == 4  # 64 texts each: their vectors must fit a frame
    np.testing.assert_array_equal(client.call("embed", "cat", "one"), cat_vectors(["one"])[0])
    np.testing.assert_array_equal(client.call("embed", "cat", ("a", "b")), cat_vectors("ab"))


def test_infer_sends_and_returns_arrays_by_name(client: Face) -> None:
    inputs: dict[str, Any] = {
        "image": np.arange(50_000, dtype=np.float32).reshape(2, 25_000),
        "mask": np.array([True, False]),
        "scale": 2.5,
        "rows": [[1, 2], [3, 4]],
        "empty": np.zeros((0, 3), np.int16),
    }
    outputs = client.call("infer", "cat", inputs)
    assert set(outputs) == set(inputs)
    for name, value in inputs.items():
        np.testing.assert_array_equal(outputs[name], value)
        assert outputs[name].shape == np.shape(value)
    assert outputs["image"].dtype == np.float32


def test_tokenize_and_what_the_server_says_of_itself(client: Face) -> None:
    assert client.call("tokenize", "cat", "abc") == [97, 98, 99]
    assert [m["name"] for m in client.call("models")["models"]] == ["oracle", "cat"]
    assert client.call("health")["status"] == "ready"
    assert client.call("stats")["gateway"] == {"sessions": 1}


# -- what is sent ----------------------------------------------------------------------------------


def test_unset_options_are_not_sent(client: Face, server: FakeServer) -> None:
    client.call("generate", "oracle", "x", temperature=None, wait=True)
    client.call("generate", "oracle", "x", temperature=0, stop="end", wait=False, priority=5)
    first, second = server.requests
    assert first.params == {}
    assert second.params == {"temperature": 0, "stop": ["end"], "wait": False}
    assert (first.priority, second.priority) == (0, 5)


def test_every_request_has_a_key_of_its_own(client: Face, server: FakeServer) -> None:
    client.call("generate", "oracle", ["x"] * 100, max_new_tokens=1)
    keys = {request.key for request in server.requests}
    assert len(keys) == 100
    assert {len(key) for key in keys} == {16}


def test_the_timeout_is_the_deadline_on_the_wire(client: Face, server: FakeServer) -> None:
    client.call("generate", "oracle", "x", timeout=5)
    client.call("generate", "oracle", "x")
    first, second = (request.deadline_ms for request in server.requests)
    assert first is not None
    assert 4000 < first <= 5000
    assert second is not None
    assert 299_000 < second <= 300_000  # the client's default


def test_a_clients_own_timeout_must_be_a_duration(server: FakeServer, client: Face) -> None:
    for timeout in (0, float("nan"), "5"):
        with pytest.raises(BadParams, match="timeout must be a number of seconds above 0"):
            type(client)(server.address, timeout=timeout)


def test_no_timeout_means_no_deadline(server: FakeServer, client: Face) -> None:
    with type(client)(server.address, timeout=None) as patient:
        patient.call("health")
    assert server.requests[0].deadline_ms is None


# -- errors ----------------------------------------------------------------------------------------


def test_a_refusal_has_code_retryable_and_executed(client: Face) -> None:
    with pytest.raises(UnknownModel, match="no model 'nope'") as caught:
        client.call("generate", "nope", "x")
    assert caught.value.code is ErrorCode.UNKNOWN_MODEL
    assert (caught.value.retryable, caught.value.executed) == (False, Executed.NO)
    with pytest.raises(Busy) as busy:
        client.call("generate", "busy", "x")
    assert (busy.value.retryable, busy.value.retry_after_ms) == (True, 50)
    with pytest.raises(InternalError) as broken:
        client.call("embed", "broken", ["x"])
    assert broken.value.log_id == "abc123"
    assert isinstance(broken.value, TensorwireError)
    client.call("health")  # the connection lives on


def test_an_unknown_option_is_refused_with_a_suggestion(client: Face) -> None:
    with pytest.raises(BadParams, match="did you mean 'max_new_tokens'"):
        client.call("generate", "oracle", "x", max_new_token=3)


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "error"),
    [
        ("generate", ("oracle", 5), {}, BadParams),
        ("generate", ("oracle", [1, "a"]), {}, BadParams),
        ("generate", ("oracle", np.zeros((2, 2), int)), {}, BadParams),
        ("generate", ("oracle", np.zeros(2)), {}, BadParams),
        ("generate", ("oracle", [-1]), {}, BadParams),
        ("generate", ("", "x"), {}, BadParams),
        ("generate", ("oracle", "x"), {"timeout": 0}, BadParams),
        ("health", (), {"timeout": 0}, BadParams),
        ("generate", ("oracle", "x"), {"timeout": float("nan")}, BadParams),
        ("generate", ("oracle", "\ud800"), {}, (BadParams, BadMeta)),
        ("generate", ("oracle", "\ud800" * 5000), {}, BadParams),
        ("generate", ("oracle", "x"), {"stop": object()}, BadMeta),
        ("generate", ("oracle", "x" * 2_000_000), {}, tensorwire.TooLarge),
        ("chat", ("oracle", ["hi"]), {}, BadParams),
        ("embed", ("cat", []), {}, BadParams),
        ("embed", ("cat", [b"x"]), {}, BadParams),
        ("tokenize", ("cat", None), {}, BadParams),
        ("infer", ("cat", {"x": np.array([object()])}), {}, BadTensor),
        ("infer", ("cat", {"x": [object()]}), {}, BadTensor),
        ("infer", ("cat", [1]), {}, BadParams),
    ],
)
def test_wrong_arguments_are_refused_and_harm_nothing(
    client: Face, name: str, args: Any, kwargs: Any, error: Any
) -> None:
    with pytest.raises(error):
        client.call(name, *args, **kwargs)
    assert client.call("tokenize", "cat", "a") == [97]


def test_a_failure_in_the_middle_brings_what_had_arrived(client: Face) -> None:
    with pytest.raises(WorkerLost) as caught:
        client.call("generate", "failed:3", "x")
    partial = caught.value.detail["partial"]
    assert partial.token_ids == oracle_tokens("x", 3)
    assert partial.finish_reason == "lost"
    assert caught.value.detail["attempt"] == 1


@pytest.mark.parametrize("model", ["cut:3", "eof:3"])
def test_a_lost_connection_never_looks_finished(client: Face, model: str) -> None:
    stream = client.stream(model, "x")
    got: list[int] = []
    with pytest.raises(ConnectionLost) as caught:
        got.extend(d.token_ids[0] for d in stream)
    assert caught.value.executed is Executed.MAYBE
    assert caught.value.detail["partial"].token_ids == oracle_tokens("x", 3)
    with pytest.raises(ClientUnusable):
        _ = stream.generation
    assert list(stream) == []
    with pytest.raises(ConnectionLost):
        client.call("generate", model, "x")


@pytest.mark.parametrize("model", ["gap:2", "count:2", "checksum:2"])
def test_a_gap_a_wrong_count_and_a_wrong_checksum_are_sequence_errors(
    client: Face, model: str
) -> None:
    with pytest.raises(SequenceError):
        client.call("generate", model, "x", max_new_tokens=4)
    with pytest.raises(SequenceError):
        list(client.stream(model, "x", max_new_tokens=4))
    client.call("health")


# -- time ------------------------------------------------------------------------------------------


def test_the_servers_deadline_raises_with_what_was_made(client: Face) -> None:
    with pytest.raises(DeadlineExceeded) as caught:
        client.call("generate", "endless", "x", timeout=0.05)
    partial = caught.value.partial
    assert partial.finish_reason == "deadline"
    assert partial.token_ids == oracle_tokens("x", len(partial.token_ids))
    assert caught.value.executed is Executed.YES
    with pytest.raises(DeadlineExceeded, match="the deadline passed") as silent:
        client.call("embed", "silent", ["x"], timeout=0.01)
    assert silent.value.partial is None


def test_a_server_that_does_not_answer_is_given_up_and_told(
    client: Face, server: FakeServer
) -> None:
    with pytest.raises(DeadlineExceeded, match=r"timeout of 0\.01 s") as caught:
        client.call("generate", "deaf", "x", timeout=0.01)
    assert caught.value.executed is Executed.MAYBE
    client.settle()
    assert server.wait_until(lambda: [c.reason for c in server.cancels] == ["deadline"])


# -- leaving ---------------------------------------------------------------------------------------


def test_leaving_the_loop_early_cancels(client: Face, server: FakeServer) -> None:
    for _ in itertools.islice(client.stream("endless", "x"), 3):
        pass
    gc.collect()
    client.settle()
    assert server.wait_until(lambda: len(server.cancels) == 1)
    client.call("health")  # what still came for the stream was dropped


def test_the_end_of_a_with_block_cancels(client: Face, server: FakeServer) -> None:
    with client.stream("endless", "x") as stream:
        next(stream)
    client.settle()
    assert server.wait_until(lambda: len(server.cancels) == 1)
    assert list(stream) == []
    stream.close()  # twice is once
    client.call("health")
    assert len(server.cancels) == 1


def test_a_stream_read_to_its_end_is_not_cancelled(client: Face, server: FakeServer) -> None:
    with client.stream("oracle", "x") as stream:
        list(stream)
    del stream
    client.call("health")
    assert server.cancels == []


def test_an_error_in_a_list_cancels_the_others(client: Face, server: FakeServer) -> None:
    with pytest.raises(InternalError):
        client.call("generate", "picky", ["bad", "a", "b"])
    client.settle()
    assert server.wait_until(lambda: len(server.cancels) == 2)


def test_a_cancel_from_elsewhere_is_request_cancelled(client: Face, server: FakeServer) -> None:
    stream = client.stream("endless", "x")
    next(stream)

    def cancel_all() -> None:
        for session in server.sessions:
            for number in list(session.runs):
                session._cancel(Cancel(stream=number))

    server.do(cancel_all)
    with pytest.raises(RequestCancelled) as caught:
        list(stream)
    assert caught.value.partial.token_ids[:1] == oracle_tokens("x", 1)


# -- connections -----------------------------------------------------------------------------------


def test_it_connects_at_the_first_call_and_again_after_a_loss(
    client: Face, server: FakeServer
) -> None:
    assert server.num_connections == 0
    client.call("health")
    client.call("health")
    assert server.num_connections == 1
    server.abort_all()
    client.settle()
    client.call("health")
    assert server.num_connections == 2


def test_after_goaway_streams_end_and_new_calls_go_elsewhere(
    client: Face, server: FakeServer
) -> None:
    stream = client.stream("oracle", "x", max_new_tokens=40)
    next(stream)
    server.say_goaway()
    client.settle()
    client.call("health")
    assert server.num_connections == 2
    assert len(list(stream)) == 39
    client.call("health")
    assert server.num_connections == 2


def test_no_server_is_one_clear_sentence(server: FakeServer, client: Face) -> None:
    server.stop_listening()
    with pytest.raises(ConnectionLost) as caught:
        client.call("health")
    assert str(caught.value).startswith(
        f"no server answers at {server.address}: connection refused; start one with"
        " `tensorwire serve`"
    )
    assert (caught.value.executed, caught.value.retryable) == (Executed.NO, True)


def test_a_closed_client_refuses(client: Face) -> None:
    client.call("health")
    client.close()
    client.close()
    with pytest.raises(ClientUnusable, match="closed"):
        client.call("health")


def test_closing_ends_streams_with_connection_lost(client: Face) -> None:
    stream = client.stream("silent", "x")
    client.close()
    with pytest.raises(ConnectionLost, match="closed"):
        next(stream)


# -- connections that are lost, and refusals that pass ---------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 5, 7])
def test_a_stream_goes_on_where_its_connection_was_cut(
    client: Face, server: FakeServer, at: int
) -> None:
    stream = client.stream(f"torn:{at}", "x", max_new_tokens=8)
    deltas = list(stream)
    assert stream.generation.token_ids == oracle_tokens("x", 8)
    assert [d.index for d in deltas] == sorted({d.index for d in deltas})
    assert "".join(d.text for d in deltas) == oracle_text(oracle_tokens("x", 8))
    assert server.num_connections == 2
    # What had not begun to arrive is asked for again, under its key.
    assert len(server.requests) + len(server.resumes) == 2
    assert {resume.key for resume in server.resumes} <= {server.requests[0].key}
    assert len({request.key for request in server.requests}) == 1
    for resume in server.resumes:
        arrived = oracle_tokens("x", resume.next_index)
        assert resume.next_char == len(oracle_text(arrived))


def test_a_whole_generation_survives_a_cut(client: Face) -> None:
    generation = client.call("generate", "torn:3", "x", max_new_tokens=6)
    assert generation.token_ids == oracle_tokens("x", 6)


def test_many_calls_on_one_connection_survive_its_end(client: Face, server: FakeServer) -> None:
    prompts = [f"p{i}" for i in range(4)]
    generations = client.call("generate", "torn:3", prompts, max_new_tokens=6)
    assert [g.token_ids for g in generations] == [oracle_tokens(p, 6) for p in prompts]


@pytest.mark.parametrize("arrived", [0, 2])
def test_a_cut_connection_takes_none_of_the_streams_with_it_however_many_there_are(
    client: Face, server: FakeServer, arrived: int
) -> None:
    client.call("health")  # it is known what the server can do
    prompts = [f"p{i}" for i in range(12)]  # more than the retries that a client has in store
    streams = [client.stream(f"held:{arrived}", prompt, max_new_tokens=4) for prompt in prompts]
    begun = [[next(stream) for _ in range(arrived)] for stream in streams]
    client.settle()
    assert server.wait_until(lambda: len(server.requests) == 1 + len(prompts))
    server.tear_all()
    for prompt, first, stream in zip(prompts, begun, streams, strict=True):
        deltas = [*first, *stream]
        assert [t for delta in deltas for t in delta.token_ids] == oracle_tokens(prompt, 4)
    assert server.num_connections == 2


def test_a_connection_that_is_cut_before_its_greeting_takes_no_call_with_it_however_many_there_are(
    client: Face, server: FakeServer
) -> None:
    texts = [f"t{i}" for i in range(16)]  # more than the retries that a client has in store
    server.mutes = [len(texts), len(texts)]
    each = [("cat", text) for text in texts]
    assert client.call_at_once("tokenize", each) == [list(text.encode()) for text in texts]
    assert server.num_connections == 3


def test_a_stream_goes_on_over_a_connection_that_is_cut_before_its_greeting(
    client: Face, server: FakeServer
) -> None:
    prompts = [f"p{i}" for i in range(12)]
    streams = [client.stream("held:2", prompt, max_new_tokens=4) for prompt in prompts]
    begun = [[next(stream) for _ in range(2)] for stream in streams]
    server.mutes = [1]
    server.tear_all()
    for prompt, first, stream in zip(prompts, begun, streams, strict=True):
        deltas = [*first, *stream]
        assert [t for delta in deltas for t in delta.token_ids] == oracle_tokens(prompt, 4)
    assert server.num_connections == 3


def test_a_server_that_greets_nobody_gets_no_more_connections_than_the_budget_has_retries(
    client: Face, server: FakeServer
) -> None:
    texts = [f"t{i}" for i in range(32)]
    server.mutes = [len(texts), *[1] * 1000]  # all are on one connection when it is cut
    begun_at = time.monotonic()
    outcomes = client.call_at_once("tokenize", [("cat", text) for text in texts])
    assert {type(outcome) for outcome in outcomes} == {ConnectionLost}
    # That of the first attempts, ten in store, and one a second.
    assert 3 <= server.num_connections <= 1 + 10 + time.monotonic() - begun_at


def test_a_server_that_forgot_the_stream_leaves_what_had_arrived(
    client: Face, server: FakeServer
) -> None:
    with pytest.raises(ConnectionLost) as caught:
        list(client.stream("cut:3", "x"))
    assert caught.value.executed is Executed.MAYBE
    arrived = caught.value.detail["partial"].token_ids
    assert arrived == oracle_tokens("x", len(arrived))
    assert len(server.resumes) == (1 if arrived else 0)


@pytest.mark.parametrize("model", ["flaky:1", "flaky:2"])
def test_a_refusal_that_passes_is_not_the_callers(
    client: Face, server: FakeServer, model: str
) -> None:
    generation = client.call("generate", model, "x", max_new_tokens=4)
    assert generation.token_ids == oracle_tokens("x", 4)
    assert len({request.key for request in server.requests}) == 1


def test_a_refusal_that_passes_is_raised_where_the_budget_is_spent(
    client: Face, server: FakeServer
) -> None:
    client.call("health")
    while client.client._link.budget.take(time.monotonic()):
        pass
    with pytest.raises(Busy):
        client.call("generate", "flaky:1", "x")
    assert len(server.requests) == 2


def test_a_refusal_that_stays_is_raised_after_three_attempts(
    client: Face, server: FakeServer
) -> None:
    with pytest.raises(Busy):
        client.call("generate", "flaky:3", "x")
    assert len(server.requests) == 3


def test_all_attempts_share_one_deadline(client: Face, server: FakeServer) -> None:
    with pytest.raises(Busy):  # which asks for 50 ms
        client.call("generate", "busy", "x", timeout=0.08)
    assert len(server.requests) <= 2
    sent = [request.deadline_ms or 0 for request in server.requests]
    assert sent == sorted(sent, reverse=True)


def test_closing_tells_the_server_to_stop(client: Face, server: FakeServer) -> None:
    stream = client.stream("endless", "x")
    next(iter(stream))
    assert server.wait_until(lambda: server.open_runs == 1)
    client.close()
    assert server.wait_until(lambda: len(server.cancels) == 1)
