"""From a SUBMIT to something a scheduler can take, or to one sentence that says why not.

The gateway has checked the form of the options, `intake.py` that of the inputs (`operations.py` has
both checks); here is what needs the model. Everything is refused before it joins a batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorwire_protocol.errors import BadParams, UnknownOperation
from tensorwire_protocol.messages import Finish
from tensorwire_protocol.operations import read_ids, read_text, read_texts

from tensorwire_server.scheduling.sequences import Sequence
from tensorwire_server.scheduling.work import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tensorwire_protocol.messages import Submit

    from tensorwire_server.scheduling.work import ModelCard, Tokenizer

DEFAULT_NEW_TOKENS = 256


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


def build_sequence(
    submit: Submit,
    prompt_ids: list[int],
    *,
    id: int,
    card: ModelCard,
    model: str,
    arrived_at: float,
) -> Sequence | Finish:
    """Return the sequence that a generate or chat asks for, or why earlier attempts ended it.

    Args:
        id: for the scheduler, unique in this process.
        arrived_at: monotonic s.

    Raises:
        BadParams: an empty prompt, ids outside the vocabulary, or more than the context holds.
    """
    _check_ids(prompt_ids, card, model)
    params = submit.params
    stop_ids = card.eos_ids.union(params.get("stop_ids", ()))
    asked = params.get("max_new_tokens")
    max_new_tokens = _max_new_tokens(len(prompt_ids), asked, card.context_tokens, model)
    so_far = tuple(submit.so_far)
    if so_far and so_far[-1] in stop_ids:
        return Finish.STOP
    if len(so_far) >= max_new_tokens:
        return Finish.LENGTH
    return Sequence(
        id=id,
        prompt_ids=tuple(prompt_ids),
        max_new_tokens=max_new_tokens,
        sampling=_sampling(params, card.defaults, submit.key),
        so_far=so_far,
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


def _sampling(params: Mapping[str, Any], defaults: Mapping[str, Any], key: bytes) -> Sampling:
    def value(name: str, unset: Any) -> Any:
        return params[name] if name in params else defaults.get(name, unset)

    seed = params.get("seed")
    if seed is None:
        # From the request's key: a retry under the same key draws the same tokens.
        seed = int.from_bytes(key[:8], "little") & (2**63 - 1)
    return Sampling(
        temperature=float(value("temperature", 0.0)),
        top_k=value("top_k", None),
        top_p=float(value("top_p", 1.0)),
        seed=seed,
    )
