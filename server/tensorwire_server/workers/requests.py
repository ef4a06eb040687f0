"""From a SUBMIT to something a scheduler can take, or to one sentence that says why not.

The gateway has checked the form of the options, `intake.py` that of the inputs (`operations.py` has
both checks); here is what needs the model. Everything is refused before it joins a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from tensorwire_protocol.errors import BadParams, UnknownOperation
from tensorwire_protocol.messages import Finish
from tensorwire_protocol.operations import read_ids, read_text, read_texts

from tensorwire_server.scheduling.sequences import Sequence
from tensorwire_server.scheduling.work import Sampling, Shaping
from tensorwire_server.workers.logprobs import check_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from collections.abc import Sequence as PySequence

    from tensorwire_protocol.messages import Submit

    from tensorwire_server.scheduling.work import Detokenizer, ModelCard, Tokenizer

DEFAULT_NEW_TOKENS = 256
MAX_ECHO_CHARS = 64 * 1024  # they travel with an event, among others
_CHARS_PER_TOKEN = 4  # about


def check_operation(op: str, card: ModelCard, model: str) -> None:
    """Refuse what this model does not do.

    Raises:
        UnknownOperation: with what it does.
    """
    if op not in card.tasks:
        offered = ", ".join(sorted(card.tasks))
        raise UnknownOperation(f"{model!r} does not offer {op!r}; it offers {offered}")


def read_prompt(submit: Submit, tokenizer: Tokenizer) -> tuple[int, Callable[[], list[int]]]:
    """Return how many characters are to be tokenized, and what does it.

    Raises:
        BadParams, BadMeta: an empty prompt, or inputs of the wrong form.
    """
    inputs = submit.inputs
    if "ids" in inputs:
        ids = read_ids(inputs["ids"])
        return 0, lambda: ids
    if submit.op == "chat":
        texts = read_texts(inputs["texts"])
        messages = [
            {"role": role, "content": text}
            for role, text in zip(inputs["roles"], texts, strict=True)
        ]
        return sum(map(len, texts)), lambda: tokenizer.render_chat(messages)
    text = read_text(inputs["prompt"], "prompt")
    if not text and submit.op != "tokenize":
        raise BadParams("the prompt is empty")
    return len(text), lambda: tokenizer.encode(text)


def read_bad_words(
    params: Mapping[str, Any], tokenizer: Tokenizer
) -> tuple[int, Callable[[], list[tuple[int, ...]]]]:
    """Return how many characters are to be tokenized, and what gives the sequences of `bad_words`.

    A word given as text is banned as it stands at the beginning of a line, and behind a space.
    """
    words: list[Any] = params.get("bad_words", [])

    def encode() -> list[tuple[int, ...]]:
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            variants = tokenizer.encode_word(word) if isinstance(word, str) else [word]
            found |= {tuple(ids): None for ids in variants if ids}
        return [*found]

    return 2 * sum(len(word) for word in words if isinstance(word, str)), encode


@dataclass(kw_only=True)  # not frozen: there is one for each request
class TextInput:
    """What a tokenizer makes of a generate or chat, before anything else is known of it."""

    prompt_ids: list[int]
    bad_words: list[tuple[int, ...]]
    detokenizer: Detokenizer  # has had the tokens so far
    texts_so_far: list[str]  # of each of these tokens
    lead: str  # is sent before the answer's text


def read_input(submit: Submit, tokenizer: Tokenizer) -> tuple[int, Callable[[], TextInput]]:
    """Return how many characters are to be turned into tokens or out of them, and what does it.

    Raises:
        BadParams, BadMeta: an empty prompt, or inputs of the wrong form.
    """
    num_chars, encode = read_prompt(submit, tokenizer)
    num_word_chars, encode_words = read_bad_words(submit.params, tokenizer)
    num_shown_ids = len(submit.so_far)
    if submit.params.get("echo") and "ids" in submit.inputs:
        num_shown_ids += len(submit.inputs["ids"])

    def read() -> TextInput:
        prompt_ids = encode()
        lead = read_echo(submit, prompt_ids, tokenizer)
        detokenizer = tokenizer.detokenizer(prompt_ids)
        return TextInput(
            prompt_ids=prompt_ids,
            bad_words=encode_words(),
            detokenizer=detokenizer,
            texts_so_far=[detokenizer.push(token_id) for token_id in submit.so_far],
            lead=lead,
        )

    return num_chars + num_word_chars + num_shown_ids * _CHARS_PER_TOKEN, read


def read_echo(submit: Submit, prompt_ids: list[int], tokenizer: Tokenizer) -> str:
    """Return the text that is sent before the answer's: the prompt's, if the client wants it.

    Raises:
        BadParams: it is too long.
    """
    if not submit.params.get("echo") or submit.so_far:  # sent with the first token
        return ""
    inputs = submit.inputs
    is_text = "prompt" in inputs
    if not is_text and len(prompt_ids) > MAX_ECHO_CHARS:  # to decode them would take its time
        raise BadParams(
            f"echo returns a prompt of up to {MAX_ECHO_CHARS} ids, not of {len(prompt_ids)}"
        )
    text = read_text(inputs["prompt"], "prompt") if is_text else tokenizer.decode(prompt_ids)
    if len(text) > MAX_ECHO_CHARS:
        raise BadParams(
            f"echo returns a prompt of up to {MAX_ECHO_CHARS} characters, not of {len(text)}"
        )
    return text


@dataclass(kw_only=True)  # not frozen: there is one for each request
class Order:
    """A generate or chat that has been checked, with nothing left unset."""

    prompt_ids: tuple[int, ...]
    so_far: tuple[int, ...]  # what earlier attempts made
    max_new_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int]
    deadline: float | None  # monotonic s
    priority: int
    arrived_at: float  # monotonic s
    tenant: str  # whose it is: prefixes are shared within it

    @property
    def finish(self) -> Finish | None:
        """Why earlier attempts ended it; None if there is more to be made."""
        if self.so_far and self.so_far[-1] in self.stop_ids:
            return Finish.STOP
        return Finish.LENGTH if len(self.so_far) >= self.max_new_tokens else None

    def sequence(self, id: int) -> Sequence:
        """Return what the scheduler is given.

        Args:
            id: for the scheduler, unique in this process.
        """
        return Sequence(
            id=id,
            prompt_ids=self.prompt_ids,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            so_far=self.so_far,
            stop_ids=self.stop_ids,
            deadline=self.deadline,
            priority=self.priority,
            arrived_at=self.arrived_at,
            tenant=self.tenant,
        )

    def scoring_sequence(self, id: int) -> Sequence:
        """Return what reads a whole answer again, and can choose nothing but its last token."""
        shaping = self.sampling.shaping or Shaping()
        only = replace(self.sampling, shaping=replace(shaping, only=self.so_far[-1]))
        again = replace(
            self, so_far=self.so_far[:-1], max_new_tokens=len(self.so_far), sampling=only
        )
        return again.sequence(id)


def build_order(
    submit: Submit,
    prompt_ids: list[int],
    *,
    card: ModelCard,
    model: str,
    arrived_at: float,
    bad_words: PySequence[tuple[int, ...]] = (),
) -> Order:
    """Return what a generate or chat asks for.

    Args:
        arrived_at: monotonic s.
        bad_words: those of the request as token ids.

    Raises:
        BadParams: an empty prompt, ids outside the vocabulary, more than the context holds, or
            more log-probabilities than an answer does.
    """
    _check_ids(prompt_ids, card, model)
    params = submit.params
    stop_ids = frozenset(params.get("stop_ids", ()))
    _check_ids_of_options(params, bad_words, card, model)
    if not params.get("ignore_eos"):
        stop_ids |= card.eos_ids
    asked = params.get("max_new_tokens")
    max_new_tokens = _max_new_tokens(len(prompt_ids), asked, card.context_tokens, model)
    sampling = _sampling(params, card.defaults, submit.key, stop_ids, bad_words, max_new_tokens)
    check_size(sampling, len(prompt_ids), max_new_tokens)
    return Order(
        prompt_ids=tuple(prompt_ids),
        so_far=tuple(submit.so_far),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_ids=stop_ids,
        deadline=None if submit.deadline_ms is None else arrived_at + submit.deadline_ms / 1000,
        priority=submit.priority,
        arrived_at=arrived_at,
        tenant=submit.tenant,
    )


def _check_ids(ids: list[int], card: ModelCard, model: str) -> None:
    if not ids:
        raise BadParams("the prompt is empty")
    if max(ids) >= card.vocab_size:
        raise BadParams(
            f"token id {max(ids)} is outside the vocabulary of {model!r}"
            f" (0 to {card.vocab_size - 1})"
        )


def _max_new_tokens(prompt: int, asked: int | None, context: int, model: str) -> int:
    room = context - prompt
    if room < 1:
        raise BadParams(
            f"prompt of {prompt} tokens leaves no room in the context of {context} of {model!r};"
            f" shorten it to at most {context - 1}"
        )
    if asked is None:
        return min(DEFAULT_NEW_TOKENS, room)
    if asked > room:
        raise BadParams(
            f"prompt of {prompt} tokens + max_new_tokens {asked} exceed the context of {context}"
            f" of {model!r}; shorten the prompt or ask for at most {room}"
        )
    return asked


def _check_ids_of_options(
    params: Mapping[str, Any], bad_words: PySequence[tuple[int, ...]], card: ModelCard, model: str
) -> None:
    ids_by_name = {
        "stop_ids": params.get("stop_ids", ()),
        "logit_bias": [token_id for token_id, _ in params.get("logit_bias", ())],
        "bad_words": [token_id for word in bad_words for token_id in word],
    }
    for name, ids in ids_by_name.items():
        if ids and max(ids) >= card.vocab_size:
            raise BadParams(
                f"token id {max(ids)} in {name} is outside the vocabulary of {model!r}"
                f" (0 to {card.vocab_size - 1})"
            )


def _sampling(
    params: Mapping[str, Any],
    defaults: Mapping[str, Any],
    key: bytes,
    stop_ids: frozenset[int],
    bad_words: PySequence[tuple[int, ...]],
    max_new_tokens: int,
) -> Sampling:
    options = {**defaults, **params}
    seed = params.get("seed")
    if seed is None:
        # From the request's key: a retry under the same key draws the same tokens.
        seed = int.from_bytes(key[:8], "little") & (2**63 - 1)
    shaping = None
    if bad_words or not _SHAPING.isdisjoint(options):
        shaping = _shaping(params, defaults, stop_ids, bad_words, max_new_tokens)
    return Sampling(
        temperature=float(options.get("temperature", 0.0)),
        top_k=options.get("top_k"),
        top_p=float(options.get("top_p", 1.0)),
        min_p=float(options.get("min_p", 0.0)),
        seed=seed,
        shaping=None if shaping == _NO_SHAPING else shaping,
        logprobs=params.get("logprobs"),
        prompt_logprobs=params.get("prompt_logprobs"),
    )


def _shaping(
    params: Mapping[str, Any],
    defaults: Mapping[str, Any],
    stop_ids: frozenset[int],
    bad_words: PySequence[tuple[int, ...]],
    max_new_tokens: int,
) -> Shaping:
    if params.get("min_new_tokens", 0) > max_new_tokens:
        raise BadParams(
            f"min_new_tokens {params['min_new_tokens']} is above the {max_new_tokens} tokens that"
            " are made at most"
        )
    options = {**defaults, **params}
    min_new_tokens = min(options.get("min_new_tokens", 0), max_new_tokens)
    return Shaping(
        bias=tuple((token_id, float(bias)) for token_id, bias in params.get("logit_bias", ())),
        repetition_penalty=float(options.get("repetition_penalty", 1.0)),
        frequency_penalty=float(params.get("frequency_penalty", 0.0)),
        presence_penalty=float(params.get("presence_penalty", 0.0)),
        # The model's own hold besides.
        bad_words=(*map(tuple, defaults.get("bad_words", ())), *bad_words),
        min_new_tokens=min_new_tokens,
        stop_ids=tuple(sorted(stop_ids)) if min_new_tokens else (),
    )


_NO_SHAPING = Shaping()
# What `_shaping` looks at: most requests have none of these.
_SHAPING: Final = frozenset({
    "bad_words", "frequency_penalty", "logit_bias", "min_new_tokens", "presence_penalty",
    "repetition_penalty",
})  # fmt: skip
