"""What a client may ask, as data: each function here turns arguments into a `Call`.

Both clients send these and read the answers with the same `read` functions, so that they cannot
drift apart. Nothing here touches a socket or a clock.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, cast

import numpy as np
from tensorwire_protocol.errors import BadParams, BadTensor, InternalError
from tensorwire_protocol.operations import (
    MAX_CHOICES,
    OPERATIONS,
    check_param,
    milliseconds,
    write_ids,
    write_text,
    write_texts,
)
from tensorwire_protocol.tensors import RawTensor

from tensorwire.call import Call

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from tensorwire_protocol.messages import Result

    Prompt = str | list[int] | NDArray[np.integer[Any]]
    Prompts = list[str] | list[list[int]] | list[NDArray[np.integer[Any]]]
    Array = NDArray[Any] | RawTensor

T = TypeVar("T")
_SEEDS = 2**63  # that there are
MAX_IN_FLIGHT = 256  # of one list; a server takes 512 streams on one connection
_EMBED_TEXTS = 64  # in one request: their vectors must fit one frame
_EMBED_BYTES = 256 * 1024


class RequestOptions(TypedDict, total=False):
    """Options that every request to a model has; None is the same as unset."""

    timeout: float | None  # seconds in all; unset: the client's
    priority: int  # -100 to 100, higher first
    wait: bool  # False: refuse with ModelLoading rather than wait until the model is loaded


class GenerateOptions(RequestOptions, total=False):
    """Options of `generate`, `stream`, `chat` and `stream_chat`; None is the same as unset.

    What is unset comes from the model's generation config.
    """

    # How much.
    max_new_tokens: int | None  # unset: 256, or what the context leaves
    min_new_tokens: int | None  # before so many, neither stop tokens nor stop texts end it
    stop: (
        str | Sequence[str] | None
    )  # up to 8 texts, each up to 64 bytes; the text ends before them
    stop_ids: (
        Sequence[int] | NDArray[np.integer[Any]] | None
    )  # up to 64 token ids, besides the model's own
    ignore_eos: bool | None  # True: the model's own stop tokens do not end it
    n: int | None  # 1 to 8 texts for the prompt, each with a seed of its own: see `choices`

    # Which token is drawn.
    temperature: float | None  # 0 (greedy) to 100
    top_k: int | None  # among so many of the likeliest
    top_p: float | None  # among the likeliest that have this much of the probability; above 0 to 1
    min_p: float | None  # among those with at least this share of the likeliest's; 0 to 1
    seed: int | None  # 0 to 2**63 - 1: the same seed, prompt and options give the same tokens

    # What is changed about the model's logits before.
    repetition_penalty: float | None  # divides those of tokens in prompt and answer; 0.01 to 100
    presence_penalty: float | None  # taken off those of tokens in the answer; -2 to 2
    frequency_penalty: float | None  # the same for each time they are in it; -2 to 2
    logit_bias: Mapping[int, float] | None  # by token id, up to 300 of -100 to 100; is added
    bad_words: (
        Sequence[str | Sequence[int]] | None
    )  # up to 32 texts or lists of ids that never come

    # What is told besides.
    logprobs: int | None  # of each token, and of the 0 to 20 likeliest in its place
    prompt_logprobs: int | None  # the same for the prompt's tokens
    echo: bool | None  # True: the prompt's text comes before the answer's; not in a chat


def checked_timeout(seconds: float | None) -> float | None:
    """Return the timeout of all calls of a client, so that none need look at it again.

    Raises:
        BadParams: it is no duration.
    """
    if seconds is not None:
        milliseconds(seconds)
    return seconds


def _call(
    op: str,
    model: str,
    inputs: Mapping[str, Any],
    options: Mapping[str, Any],
    default_timeout_s: float | None,
    read: Callable[[Result], T],
) -> Call[T]:
    if not isinstance(model, str) or not model:
        raise BadParams(f"the model must be named by its id, not {model!r}")
    timeout_s, priority, params = default_timeout_s, 0, {}
    if options:
        params = {name: _plain(value) for name, value in options.items() if value is not None}
        timeout_s = checked_timeout(params.pop("timeout", default_timeout_s))
        priority = params.pop("priority", 0)
        if params.get("wait") is True:
            del params["wait"]
        if isinstance(params.get("stop"), str):
            params["stop"] = [params["stop"]]
        bias = params.get("logit_bias")
        if isinstance(bias, Mapping):
            params["logit_bias"] = [[_plain(id), _plain(value)] for id, value in bias.items()]
        for name in ("stop", "stop_ids"):
            if params.get(name) == []:  # what a caller's own list may be
                del params[name]
        _check_numbers(op, params)
    return Call(op, read, model, inputs, params, timeout_s, priority)


def _plain(value: Any) -> Any:
    """Return an option as the wire has it: a caller may have tuples, and numpy's numbers."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _check_numbers(op: str, params: Mapping[str, Any]) -> None:
    """Refuse what the wire cannot carry, in the words in which a server refuses the rest."""
    for name, value in params.items():
        param = OPERATIONS[op].params.get(name)
        if param is not None and isinstance(value, int | float):
            check_param(name, param, value)
        elif type(value) is int and not -(2**63) <= value < 2**64:
            raise BadParams(f"{name} must be an integer of 64 bits, not {value}")


def each_choice(options: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the options of each of the `n` streams that give a prompt's choices.

    Raises:
        BadParams: `n` or the seed is out of its range.
    """
    n = _plain(options.get("n"))
    if n is None:
        return [options]
    if type(n) is not int or not 1 <= n <= MAX_CHOICES:
        raise BadParams(f"n must be an integer from 1 to {MAX_CHOICES}, not {n!r}")
    each = {name: value for name, value in options.items() if name != "n"}
    seed = _plain(options.get("seed"))
    if seed is None:  # without one, each stream's key gives it its own
        return [each] * n
    if type(seed) is not int or not 0 <= seed < _SEEDS:
        return [each]  # refused, in one voice with all other options
    return [{**each, "seed": (seed + i) % _SEEDS} for i in range(n)]


def _streamed(_: Result) -> Any:
    raise InternalError("the server answered a stream with one result")


def generate(
    model: str, prompt: Prompt, options: Mapping[str, Any], timeout_s: float | None
) -> Call[Any]:
    """Return the call that continues one prompt."""
    if isinstance(prompt, str):
        inputs: dict[str, Any] = {"prompt": _text(prompt)}
    else:
        inputs = {"ids": write_ids(_ids(prompt))}
    return _call("generate", model, inputs, options, timeout_s, _streamed)


def is_list_of_prompts(prompt: Prompt | Prompts) -> bool:
    """Say if `prompt` is several: a list of texts or of lists of ids; [] is none at all."""
    if not isinstance(prompt, list | tuple):
        return False
    return not prompt or isinstance(prompt[0], str | list | tuple | np.ndarray)


def generate_many(
    model: str, prompts: Prompts, each: list[Mapping[str, Any]], timeout_s: float | None
) -> list[Call[Any]]:
    """Return the calls for each prompt: one with each of these options."""
    return [generate(model, prompt, options, timeout_s) for prompt in prompts for options in each]


def chat(
    model: str,
    messages: Sequence[Mapping[str, str]],
    options: Mapping[str, Any],
    timeout_s: float | None,
) -> Call[Any]:
    """Return the call that answers a conversation."""
    try:
        roles = [message["role"] for message in messages]
        texts = [message["content"] for message in messages]
    except (TypeError, KeyError) as error:
        raise BadParams('a message must be {"role": …, "content": …}') from error
    inputs = {"roles": roles, "texts": _texts(texts)}
    return _call("chat", model, inputs, options, timeout_s, _streamed)


def embed(
    model: str, texts: Sequence[str], options: Mapping[str, Any], timeout_s: float | None
) -> list[Call[NDArray[np.float32]]]:
    """Return calls whose arrays, put together, embed all texts in order."""
    return [
        _call("embed", model, {"texts": _texts(part)}, options, timeout_s, _read_embeddings)
        for part in _parts(list(texts))
    ]


def _parts(texts: list[str]) -> list[list[str]]:
    """Cut texts into lists that fit a request each; no texts at all stay one (refused) request."""
    parts: list[list[str]] = [[]]
    num_bytes = 0
    for text in texts:
        size = len(text) * 4 if isinstance(text, str) else 0
        if parts[-1] and (len(parts[-1]) == _EMBED_TEXTS or num_bytes + size > _EMBED_BYTES):
            parts.append([])
            num_bytes = 0
        parts[-1].append(text)
        num_bytes += size
    return parts


def infer(
    model: str,
    inputs: Mapping[str, Any],
    options: Mapping[str, Any],
    timeout_s: float | None,
) -> Call[dict[str, Array]]:
    """Return the call that runs a model on named arrays; strings and lists of them stay text."""
    if not isinstance(inputs, dict):
        raise BadParams("inputs must be a dict of arrays by name")
    ready = {name: _infer_input(name, value) for name, value in inputs.items()}
    return _call("infer", model, ready, options, timeout_s, _read_outputs)


def _read_outputs(result: Result) -> dict[str, Array]:
    outputs = result.outputs
    return outputs if isinstance(outputs, dict) else dict(outputs)  # nobody else has it


def _infer_input(name: str, value: Any) -> Any:
    if not isinstance(name, str):
        raise BadParams("inputs must be a dict of arrays by name")
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, (np.ndarray, RawTensor)):
        return value
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return _texts(value)
    array = np.asarray(value)
    if array.dtype == object:
        raise BadTensor(f"the input {name!r} is not an array of numbers")
    return array


def tokenize(
    model: str, text: str, options: Mapping[str, Any], timeout_s: float | None
) -> Call[list[int]]:
    """Return the call that turns text into the model's token ids."""
    return _call("tokenize", model, {"prompt": _text(text)}, options, timeout_s, _read_ids)


def about_server(op: str, timeout_s: float | None) -> Call[dict[str, Any]]:
    """Return the call for `models`, `health` or `stats`."""
    return Call(op, _read_extra, None, {}, {}, checked_timeout(timeout_s))


def _read_extra(result: Result) -> dict[str, Any]:
    return dict(result.extra)


# -- arguments into inputs, outputs into results ---------------------------------------------------


def _text(text: str) -> Any:
    if not isinstance(text, str):
        raise BadParams(f"a text must be a str, not {type(text).__name__}")
    try:
        return write_text(text)
    except UnicodeEncodeError as error:
        raise BadParams(f"the text is not valid Unicode: {error.reason}") from error


def _texts(texts: list[str]) -> Any:
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    if wrong is not None:
        raise BadParams(f"a text must be a str, not {type(wrong).__name__}")
    try:
        return write_texts(texts)
    except UnicodeEncodeError as error:
        raise BadParams(f"a text is not valid Unicode: {error.reason}") from error


def _ids(ids: object) -> list[int]:
    if isinstance(ids, np.ndarray):
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise BadParams(
                f"token ids must be one row of integers, not {ids.dtype} of shape {ids.shape}"
            )
        return cast("list[int]", ids.tolist())
    if isinstance(ids, list | tuple):
        try:
            return list(map(operator.index, ids))
        except TypeError as error:
            raise BadParams("a prompt as a list must hold token ids only") from error
    raise BadParams(f"a prompt must be text or token ids, not {type(ids).__name__}")


def _only_array(result: Result, dtype: type[np.generic]) -> NDArray[Any]:
    outputs = list(result.outputs.values())
    if len(outputs) != 1 or not isinstance(outputs[0], np.ndarray):
        raise InternalError(f"the server sent the outputs {sorted(result.outputs)}, not one array")
    return outputs[0].astype(dtype, copy=False)


def _read_embeddings(result: Result) -> NDArray[np.float32]:
    return _only_array(result, np.float32)


def _read_ids(result: Result) -> list[int]:
    values = list(result.outputs.values())
    if len(values) == 1 and isinstance(values[0], list):
        return values[0]
    return cast("list[int]", _only_array(result, np.int32).tolist())
