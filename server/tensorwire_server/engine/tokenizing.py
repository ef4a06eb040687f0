"""Text to token ids and back, on the tokenizers library alone.

A copy of the model's tokenizer is taken once and never changed again: transformers' own wrapper
sets truncation and padding on each call, which is not safe from two threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tokenizers
from tensorwire_protocol.errors import BadParams
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from tensorwire_server.engine.errors import ModelLoadError
from tensorwire_server.engine.rendering import ChatRenderer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_REPLACEMENT = "\ufffd"  # what an unfinished or invalid character decodes to
# The text before a new token decides about its leading space, and a character may have begun in
# the prompt. A few tokens tell; the whole prompt would be decoded for each request.
_CONTEXT_TOKENS = 16


class TextDetokenizer:
    """Turns one sequence's tokens into text, never splitting a character."""

    def __init__(self, backend: tokenizers.Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._backend = backend
        self._context: list[int] = []  # tokens whose text is out, or is the prompt's
        self._pending: list[int] = []  # tokens since then
        self._prompts_own = ""  # what the prompt already shows of the pending tokens' text
        self._stream = DecodeStream(skip_special_tokens=True)
        self._start(list(prompt_ids[-_CONTEXT_TOKENS:]))

    def push(self, token_id: int) -> str:
        """Return the text that became certain with this token; often empty."""
        self._pending.append(token_id)
        try:
            text: str | None = self._stream.step(self._backend, token_id)
        except Exception as error:
            # tokenizers raises a bare Exception where a token changes text that is out already
            # (decoders that clean up spaces); what is out stays, the rest follows.
            if type(error) is not Exception:
                raise
            changed = self.flush()
            self._stream = DecodeStream(ids=self._context, skip_special_tokens=True)
            return changed
        return "" if text is None else self._emit(text)

    def flush(self) -> str:
        """Return what is left at the end; an unfinished character becomes U+FFFD."""
        if not self._pending:
            return ""
        before = self._decode(self._context)
        after = self._decode(self._context + self._pending)
        if after.startswith(before):
            return self._emit(after[len(before) :])
        return self._emit(self._decode(self._pending))

    def _emit(self, text: str) -> str:
        self._context, self._pending = self._pending, []
        own, self._prompts_own = self._prompts_own, ""
        return text.removeprefix(own)

    def _start(self, context: list[int]) -> None:
        """Begin after the last character that the prompt finished."""
        for cut in range(len(context), -1, -1):
            if not self._decode(context[:cut]).endswith(_REPLACEMENT):
                break
        self._context = context[:cut]
        self._stream = DecodeStream(ids=self._context, skip_special_tokens=True)
        if cut:  # with nothing before it, an unfinished character is the prompt's own affair
            for token_id in context[cut:]:
                self.push(token_id)
            # One token may hold a space and a character's first byte: the space was the prompt's.
            shown = self._decode(context).rstrip(_REPLACEMENT)
            self._prompts_own = shown.removeprefix(self._decode(context[:cut]))

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text


class TextTokenizer:
    """A model's tokenizer and chat template; safe to use from any thread.

    Args:
        wrapper: the tokenizer as transformers loaded it.
        max_tokens: longer texts are cut to this many tokens; None: nothing is cut.
        prefix: text that is put before every text, as some embedding models want.
        lower_case: whether texts are lower-cased first.
    """

    def __init__(
        self,
        wrapper: Any,
        *,
        max_tokens: int | None = None,
        prefix: str = "",
        lower_case: bool = False,
    ) -> None:
        self._renderer = _renderer(wrapper)
        self._prefix = prefix
        self._lower_case = lower_case
        self._backend = tokenizers.Tokenizer.from_str(wrapper.backend_tokenizer.to_str())
        self._backend.no_padding()
        if max_tokens is None:
            self._backend.no_truncation()
        else:
            self._backend.enable_truncation(max_length=max_tokens)

    renders_at_once = False  # another process does it

    @property
    def has_chat_template(self) -> bool:
        """Whether the model says how a conversation is written."""
        return self._renderer is not None

    def encode(self, text: str) -> list[int]:
        """Return the prompt's ids, special tokens added as the model wants them."""
        text = self._prefix + text
        ids: list[int] = self._backend.encode(text.lower() if self._lower_case else text).ids
        return ids

    def encode_word(self, text: str) -> list[list[int]]:
        """Return the ids of a text at the beginning and in the middle of a line, nothing added."""
        starts = (text, " " + text.lstrip(" "))
        found = [self._backend.encode(start, add_special_tokens=False).ids for start in starts]
        return found[:1] if found[0] == found[1] else found

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a prompt given as ids, without special tokens."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the ids of a conversation, ready for the assistant's turn.

        Raises:
            BadParams: the model has no chat template, or refuses these roles.
        """
        if self._renderer is None:
            raise BadParams("this model has no chat template; use generate with a prompt")
        text = self._renderer.render(messages)
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def detokenizer(self, prompt_ids: Sequence[int]) -> TextDetokenizer:
        """Return a fresh incremental decoder for text that follows `prompt_ids`."""
        return TextDetokenizer(self._backend, prompt_ids)


def _renderer(wrapper: Any) -> ChatRenderer | None:
    if not wrapper.chat_template:
        return None
    try:
        template = wrapper.get_chat_template()
    except ValueError:  # several, and none of them is for conversations as such
        return None
    return ChatRenderer(template, _plain(wrapper.special_tokens_map))


def _plain(value: Any) -> Any:
    """Return special tokens as text: transformers may have objects for them."""
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else str(value)


def load_wrapper(folder: Path) -> Any:
    """Return the tokenizer of a model folder as transformers loads it.

    Raises:
        ModelLoadError: there is none, or it is not a fast one.
    """
    try:
        wrapper = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        if not (folder / "tokenizer.json").is_file():
            raise ModelLoadError("it has no tokenizer.json") from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelLoadError(f"its tokenizer cannot be loaded: {reason}") from error
    if not isinstance(getattr(wrapper, "backend_tokenizer", None), tokenizers.Tokenizer):
        raise ModelLoadError("its tokenizer has no tokenizer.json form, which is the one read here")
    return wrapper
