"""The operations: which inputs and options each has, and the checks that need no model.

A gateway calls `check_request` before it admits anything. It passes the inputs on unopened: the
worker calls `check_inputs`, and checks what needs the model (ids within the vocabulary, length
against the context).
"""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tensorwire_protocol.auth import Right
from tensorwire_protocol.errors import BadMeta, BadParams, UnknownOperation
from tensorwire_protocol.messages import EMPTY
from tensorwire_protocol.tensors import RawTensor, pack_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tensorwire_protocol.messages import Request

MAX_STOPS = 8
MAX_STOP_BYTES = 64
MAX_STOP_IDS = 64
MAX_BIASES = 300
MAX_BAD_WORDS = 32
MAX_BAD_WORD_IDS = 16
MAX_LOGPROBS = 20
MAX_CHOICES = 8  # streams of one call, in a client; a server takes each of them as a request
ROLES = ("system", "user", "assistant", "tool")


class Param:
    """One option of an operation: `check` says if a value is allowed, `rule` says it in words."""

    def __init__(self, *, check: Callable[[Any], bool], rule: str) -> None:
        self.check: Final = check
        self.rule: Final = rule


class Operation:
    """What a client may ask for by name, and who may: nothing exists here without its right."""

    def __init__(
        self,
        *,
        name: str,
        right: Right,
        needs_model: bool,
        inputs: tuple[frozenset[str], ...] | None,  # the sets it accepts; None: any names
        params: Mapping[str, Param] = EMPTY,
    ) -> None:
        self.name: Final = name
        self.right: Final = right
        self.needs_model: Final = needs_model
        self.inputs: Final = inputs
        self.params: Final = params


def _is_int(low: int, high: int) -> Callable[[Any], bool]:
    return lambda v: type(v) is int and low <= v <= high


_is_id = _is_int(0, 2**31 - 1)


def _is_number(low: float, high: float, *, above: bool = False) -> Callable[[Any], bool]:
    def check(v: Any) -> bool:
        # NaN fails every comparison, and so is refused without a word of its own.
        return type(v) in (int, float) and (low < v if above else low <= v) and v <= high

    return check


def _is_short_text(v: Any) -> bool:
    return type(v) is str and 1 <= len(_encoded(v)) <= MAX_STOP_BYTES


def _is_stops(v: Any) -> bool:
    return type(v) is list and len(v) <= MAX_STOPS and all(map(_is_short_text, v))


def _is_ids(v: Any, *, low: int = 0, high: int = MAX_STOP_IDS) -> bool:
    return type(v) is list and low <= len(v) <= high and all(map(_is_id, v))


def _is_bias(v: Any) -> bool:
    return (
        type(v) is list
        and len(v) <= MAX_BIASES
        and all(type(pair) is list and len(pair) == 2 for pair in v)
        and all(_is_id(token_id) and _is_number(-100, 100)(bias) for token_id, bias in v)
        and len({token_id for token_id, _ in v}) == len(v)
    )


def _is_bad_words(v: Any) -> bool:
    return (
        type(v) is list
        and len(v) <= MAX_BAD_WORDS
        and all(_is_short_text(word) or _is_ids(word, low=1, high=MAX_BAD_WORD_IDS) for word in v)
    )


def _is_bool(v: Any) -> bool:
    return type(v) is bool


_WAIT = {
    "wait": Param(
        check=_is_bool,
        rule="true to wait while the model loads, false to be refused",
    )
}
_SAMPLING = {
    "max_new_tokens": Param(check=_is_int(1, 2**31 - 1), rule="an integer of at least 1"),
    "temperature": Param(check=_is_number(0, 100), rule="a number from 0 (greedy) to 100"),
    "top_k": Param(check=_is_int(1, 2**31 - 1), rule="an integer of at least 1"),
    "top_p": Param(check=_is_number(0, 1, above=True), rule="a number above 0, up to 1"),
    "min_p": Param(check=_is_number(0, 1), rule="a number from 0 to 1"),
    "repetition_penalty": Param(
        check=_is_number(0.01, 100), rule="a number from 0.01 to 100 (1: none)"
    ),
    "presence_penalty": Param(check=_is_number(-2, 2), rule="a number from -2 to 2"),
    "frequency_penalty": Param(check=_is_number(-2, 2), rule="a number from -2 to 2"),
    "logit_bias": Param(
        check=_is_bias,
        rule=f"up to {MAX_BIASES} pairs of a token id and a number from -100 to 100, each id once",
    ),
    "bad_words": Param(
        check=_is_bad_words,
        rule=(
            f"up to {MAX_BAD_WORDS} words: strings of 1 to {MAX_STOP_BYTES} bytes or lists of 1 to"
            f" {MAX_BAD_WORD_IDS} token ids"
        ),
    ),
    "min_new_tokens": Param(check=_is_int(0, 2**31 - 1), rule="an integer of at least 0"),
    "seed": Param(check=_is_int(0, 2**63 - 1), rule="an integer from 0 to 2**63 - 1"),
    "stop": Param(
        check=_is_stops, rule=f"up to {MAX_STOPS} strings of 1 to {MAX_STOP_BYTES} bytes each"
    ),
    "stop_ids": Param(check=_is_ids, rule=f"up to {MAX_STOP_IDS} token ids"),
    "ignore_eos": Param(
        check=_is_bool, rule="true to go on behind the model's own stop tokens, else false"
    ),
    "logprobs": Param(check=_is_int(0, MAX_LOGPROBS), rule=f"an integer from 0 to {MAX_LOGPROBS}"),
    "prompt_logprobs": Param(
        check=_is_int(0, MAX_LOGPROBS), rule=f"an integer from 0 to {MAX_LOGPROBS}"
    ),
}
_ECHO = {
    "echo": Param(
        check=_is_bool, rule="true to have the prompt's text before the answer's, else false"
    )
}

OPERATIONS: Final[dict[str, Operation]] = {
    op.name: op
    for op in (
        Operation(
            name="generate",
            right=Right.INFER,
            needs_model=True,
            inputs=(frozenset({"prompt"}), frozenset({"ids"})),
            params=_SAMPLING | _ECHO | _WAIT,
        ),
        Operation(
            name="chat",
            right=Right.INFER,
            needs_model=True,
            inputs=(frozenset({"roles", "texts"}),),
            params=_SAMPLING | _WAIT,
        ),
        Operation(
            name="embed",
            right=Right.INFER,
            needs_model=True,
            inputs=(frozenset({"texts"}),),
            params=_WAIT,
        ),
        Operation(
            name="tokenize",
            right=Right.INFER,
            needs_model=True,
            inputs=(frozenset({"prompt"}),),
            params=_WAIT,
        ),
        Operation(name="infer", right=Right.INFER, needs_model=True, inputs=None, params=_WAIT),
        Operation(name="models", right=Right.INFER, needs_model=False, inputs=(frozenset(),)),
        Operation(name="health", right=Right.INFER, needs_model=False, inputs=(frozenset(),)),
        Operation(name="stats", right=Right.ADMIN, needs_model=False, inputs=(frozenset(),)),
    )
}
STREAMED = frozenset({"generate", "chat"})


def check_request(request: Request) -> Operation:
    """Return the operation of a request whose options are of the right form.

    Raises:
        UnknownOperation, BadMeta, BadParams: in one sentence what was found and what is allowed.
    """
    operation = OPERATIONS.get(request.op)
    if operation is None:
        raise UnknownOperation(
            f"there is no operation {request.op[:64]!r}; known are {', '.join(OPERATIONS)}"
        )
    if operation.needs_model and not request.model:
        raise BadMeta(f"{operation.name} needs a model id")
    for name, value in request.params.items():
        param = operation.params.get(name)
        if param is None:
            raise BadParams(_unknown_option(operation, name))
        check_param(name, param, value)
    return operation


def check_param(name: str, param: Param, value: Any) -> None:
    """Check one option.

    Raises:
        BadParams: in one sentence what was found and what is allowed.
    """
    if not param.check(value):
        raise BadParams(f"{name} must be {param.rule}, not {_shown(value)}")


def _unknown_option(operation: Operation, name: str) -> str:
    close = difflib.get_close_matches(name, operation.params, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    known = ", ".join(operation.params) or "none"
    return f"{operation.name} has no option {name!r}{hint} (options: {known})"


def _shown(value: Any, to_text: Callable[[Any], str] = repr) -> str:
    text = to_text(value)
    return text if len(text) <= 64 else text[:61] + "..."


def check_inputs(operation: Operation, inputs: Mapping[str, Any]) -> None:
    """Check the form of a request's inputs.

    Raises:
        BadMeta, BadParams: in one sentence what was found and what is allowed.
    """
    if operation.inputs is None:  # the model's own names: even one called "ids" is just an array
        return
    if frozenset(inputs) not in operation.inputs:
        sets = " or ".join("{" + ", ".join(sorted(s)) + "}" for s in operation.inputs)
        found = _shown("{" + ", ".join(sorted(inputs)) + "}", str)
        raise BadMeta(f"{operation.name} takes the inputs {sets}, not {found}")
    if "prompt" in inputs:
        read_text(inputs["prompt"], "prompt")
    if "ids" in inputs:
        read_ids(inputs["ids"])
    if operation.name in ("embed", "chat"):
        texts = read_texts(inputs["texts"])
        if not texts:
            raise BadParams(f"{operation.name} needs at least one text")
    if "roles" in inputs:
        _check_roles(inputs["roles"], len(texts))


def _check_roles(roles: Any, num_texts: int) -> None:
    if type(roles) is not list or len(roles) != num_texts:
        raise BadMeta("a chat needs one role for each text")
    for role in roles:
        if type(role) is not str or role not in ROLES:  # arrays answer `in` in a way of their own
            raise BadParams(f"a role must be one of {', '.join(ROLES)}, not {_shown(role)}")


# -- texts and token ids: in the meta while they are short, else as a segment of bytes -------------

INLINE_TEXT_BYTES = 4096
INLINE_IDS = 256


def write_text(text: str) -> str | np.ndarray[Any, Any]:
    """Return a text as an input: itself, or its UTF-8 bytes as a U8 array when it is long.

    Raises:
        BadParams: the text holds half a surrogate pair, which has no bytes.
    """
    if len(text) * 4 <= INLINE_TEXT_BYTES:
        _check_encodable(text)
        return text
    return np.frombuffer(_encoded(text), dtype=np.uint8)


def _check_encodable(text: str) -> None:
    """Refuse half a surrogate pair here, where the sentence can say what it is."""
    if not text.isascii():
        _encoded(text)


def read_text(value: Any, name: str) -> str:
    """Return the text of `write_text`."""
    if type(value) is str:
        return value
    return _utf8(_array(value, np.uint8, name), name)


def write_texts(texts: list[str]) -> list[Any]:
    """Return texts as an input: themselves, or [bytes U8, lengths I32] when they are long.

    Raises:
        BadParams: as `write_text`.
    """
    if sum(map(len, texts)) * 4 <= INLINE_TEXT_BYTES and len(texts) <= INLINE_IDS:
        for text in texts:
            _check_encodable(text)
        return texts
    encoded = [_encoded(text) for text in texts]
    lengths = np.asarray([len(e) for e in encoded], dtype=np.int32)
    return [np.frombuffer(b"".join(encoded), dtype=np.uint8), lengths]


def read_texts(value: Any) -> list[str]:
    """Return the texts of `write_texts`."""
    if type(value) is not list:
        raise BadMeta("texts must be a list")
    if all(type(text) is str for text in value):
        return value
    if len(value) != 2:
        raise BadMeta("texts must be strings, or their bytes (U8) and lengths (I32)")
    joined, lengths = _array(value[0], np.uint8, "texts"), _array(value[1], np.int32, "lengths")
    if (lengths < 0).any() or int(lengths.sum(dtype=np.int64)) != joined.size:
        raise BadMeta("the lengths of the texts do not add up to their bytes")
    ends = np.cumsum(lengths, dtype=np.int64)
    return [
        _utf8(joined[end - length : end], "texts")
        for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)
    ]


def write_ids(ids: list[int]) -> Any:
    """Return token ids as an input: a list, or an I32 array when there are many.

    Raises:
        BadParams: an id is not an integer of 32 bits.
    """
    if len(ids) <= INLINE_IDS:
        return ids
    try:
        # Not asarray(ids, int32): it would cut 1.5 to 1 without a word.
        return np.frombuffer(pack_ids(ids), dtype="<i4")
    except (OverflowError, TypeError) as error:
        raise BadParams("token ids must be integers of 32 bits") from error


def read_ids(value: Any) -> list[int]:
    """Return the ids of `write_ids`."""
    if type(value) is list:
        if not all(type(i) is int and 0 <= i < 2**31 for i in value):
            raise BadParams("token ids must be integers from 0 to 2**31 - 1")
        return value
    ids: list[int] = _array(value, np.int32, "ids").tolist()
    if min(ids, default=0) < 0:
        raise BadParams("token ids must be integers from 0 to 2**31 - 1")
    return ids


def _array(value: Any, dtype: type[np.generic], name: str) -> np.ndarray[Any, Any]:
    if isinstance(value, RawTensor) or not isinstance(value, np.ndarray) or value.ndim != 1:
        raise BadMeta(f"{name} must be text, a list, or an array with one dimension")
    if value.dtype != dtype:
        raise BadMeta(f"{name} as an array must be {np.dtype(dtype).name}, not {value.dtype}")
    return value


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise BadParams("a text holds half a surrogate pair, which has no UTF-8") from error


def _utf8(raw: np.ndarray[Any, Any], name: str) -> str:
    try:
        return raw.tobytes().decode()
    except UnicodeDecodeError as error:
        raise BadMeta(f"{name} is not valid UTF-8") from error


def milliseconds(seconds: Any) -> int:
    """Return a duration as the wire carries it, at least 1 ms and never early.

    Raises:
        BadParams: not a finite number above 0.
    """
    if not (isinstance(seconds, int | float) and 0 < seconds < math.inf):  # false for NaN
        raise BadParams(f"timeout must be a number of seconds above 0, not {_shown(seconds)}")
    return max(1, math.ceil(min(seconds * 1000, 2**32 - 1)))
