from __future__ import annotations

import threading
from functools import cache
from typing import TYPE_CHECKING

import models_zoo
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorwire_protocol.errors import BadParams
from tensorwire_server.engine.errors import ModelLoadError
from tensorwire_server.engine.tokenizing import TextDetokenizer, TextTokenizer, load_wrapper

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import tokenizers

TEXT = "the cat sat — naïve Größe, 日本語 🙂👩‍👩‍👧 end"


@cache
def byte_level() -> tokenizers.Tokenizer:
    return models_zoo.byte_level_tokenizer()


@cache
def metaspace() -> tokenizers.Tokenizer:
    return models_zoo.metaspace_tokenizer()


@cache
def text_tokenizer() -> TextTokenizer:
    return TextTokenizer(load_wrapper(models_zoo.tiny_model("llama")))


def pieces(detokenizer: TextDetokenizer, ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@pytest.mark.parametrize("backend", [byte_level, metaspace], ids=["byte-level", "metaspace"])
def test_pieces_add_up_and_no_character_is_split(backend: object) -> None:
    tokenizer = backend()  # type: ignore[operator]
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    made = pieces(TextDetokenizer(tokenizer, ()), ids)
    assert "".join(made) == TEXT
    assert not any("\ufffd" in piece for piece in made)
    assert len([piece for piece in made if piece]) > 20


@pytest.mark.parametrize("cut", range(1, 12))
def test_the_prompt_decides_about_the_first_space(cut: int) -> None:
    ids = metaspace().encode("the cat sat on the mat, the cat", add_special_tokens=True).ids
    whole = metaspace().decode(ids)
    made = pieces(TextDetokenizer(metaspace(), ids[:cut]), ids[cut:])
    assert metaspace().decode(ids[:cut]) + "".join(made) == whole


@pytest.mark.parametrize("backend", [byte_level, metaspace], ids=["byte-level", "metaspace"])
def test_a_character_that_began_in_the_prompt_comes_out_whole(backend: object) -> None:
    tokenizer = backend()  # type: ignore[operator]
    ids = tokenizer.encode("a 🙂", add_special_tokens=False).ids
    made = pieces(TextDetokenizer(tokenizer, ids[:-1]), ids[-1:])
    assert "".join(made) == "🙂"


@pytest.mark.parametrize("backend", [byte_level, metaspace], ids=["byte-level", "metaspace"])
def test_an_unfinished_character_becomes_a_replacement_at_the_end(backend: object) -> None:
    tokenizer = backend()  # type: ignore[operator]
    ids = tokenizer.encode("ok 🙂", add_special_tokens=False).ids
    detokenizer = TextDetokenizer(tokenizer, ())
    pushed = "".join(detokenizer.push(token_id) for token_id in ids[:-1])
    assert pushed in ("ok", "ok ")  # the space may be in one token with the character's first byte
    assert (pushed + detokenizer.flush()).rstrip("\ufffd") == "ok "
    assert detokenizer.flush() == ""


def id_of(tokenizer: tokenizers.Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None
    return found


def test_special_tokens_have_no_text() -> None:
    eos = id_of(byte_level(), models_zoo.EOS)
    ids = byte_level().encode("end").ids
    assert "".join(pieces(TextDetokenizer(byte_level(), ()), [*ids, eos])) == "end"


def test_a_prompt_of_broken_bytes_does_not_leak_into_the_output() -> None:
    lead = byte_level().encode("🙂").ids[0]
    ids = byte_level().encode(" then text").ids
    made = "".join(pieces(TextDetokenizer(byte_level(), [lead] * 40), ids))
    assert made.lstrip("\ufffd") == " then text"


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, models_zoo.VOCAB_SIZE - 1), max_size=30), st.integers(0, 30))
def test_any_tokens_after_any_prompt_give_the_text_of_the_whole(ids: list[int], cut: int) -> None:
    tokenizer = byte_level()
    ids = [token_id % tokenizer.get_vocab_size() for token_id in ids]
    assert "".join(pieces(TextDetokenizer(tokenizer, ()), ids)) == tokenizer.decode(ids)
    continued = "".join(pieces(TextDetokenizer(tokenizer, ids[:cut]), ids[cut:]))
    # What the prompt left unfinished may be finished by the output, or be broken for good.
    assert tokenizer.decode(ids).endswith(continued.lstrip("\ufffd"))


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30), st.integers(0, 30))
def test_any_text_after_any_prompt_is_whole_with_byte_fallback(text: str, cut: int) -> None:
    ids = metaspace().encode("the" + text, add_special_tokens=False).ids
    prompt = metaspace().decode(ids[:cut])
    continued = "".join(pieces(TextDetokenizer(metaspace(), ids[:cut]), ids[cut:]))
    if not prompt.endswith("\ufffd"):
        assert prompt + continued == metaspace().decode(ids)


def test_bytes_that_spoil_what_is_out_already_are_told_as_broken() -> None:
    zero, broken, the = (id_of(metaspace(), token) for token in ("<0x00>", "<0x80>", "▁the"))
    assert metaspace().decode([zero, broken, the]) == "\ufffd\ufffd the"
    made = pieces(TextDetokenizer(metaspace(), ()), [zero, broken, the])
    assert made == ["\0", "", "\ufffd the", ""]


def test_text_becomes_the_ids_that_transformers_gives() -> None:
    wrapper = load_wrapper(models_zoo.tiny_model("llama"))
    assert text_tokenizer().encode(TEXT) == wrapper(TEXT)["input_ids"]


def test_texts_are_cut_prefixed_and_lowered_where_the_model_wants_it() -> None:
    wrapper = load_wrapper(models_zoo.tiny_model("llama"))
    plain = text_tokenizer().encode("query: hello there")
    fancy = TextTokenizer(wrapper, max_tokens=4, prefix="Query: ", lower_case=True)
    assert fancy.encode("HELLO There") == plain[:4]


def test_a_conversation_ends_where_the_assistant_begins() -> None:
    messages = [{"role": "user", "content": "hi 🙂"}, {"role": "assistant", "content": "ho"}]
    ids = text_tokenizer().render_chat(messages)
    expected = "<user>hi 🙂</user><assistant>ho</assistant><assistant>"
    assert "".join(pieces(text_tokenizer().detokenizer(()), ids)) == expected


def test_a_role_the_template_refuses_is_the_clients_error() -> None:
    with pytest.raises(BadParams, match="unknown role oracle"):
        text_tokenizer().render_chat([{"role": "oracle", "content": "hi"}])


def test_a_message_without_content_is_the_clients_error() -> None:
    with pytest.raises(BadParams, match="refuses these messages"):
        text_tokenizer().render_chat([{"content": "hi"}])


def test_without_a_template_chat_is_refused(tmp_path: Path) -> None:
    models_zoo.save_tokenizer(tmp_path, byte_level(), chat=False)
    tokenizer = TextTokenizer(load_wrapper(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(BadParams, match="no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "hi"}])


def test_templates_cannot_reach_out_of_their_sandbox(tmp_path: Path) -> None:
    models_zoo.save_tokenizer(tmp_path, byte_level())
    (tmp_path / "chat_template.jinja").write_text(
        "{{ messages.__class__.__base__.__subclasses__() }}"
    )
    with pytest.raises(BadParams, match="refuses"):
        TextTokenizer(load_wrapper(tmp_path)).render_chat([{"role": "user", "content": "hi"}])


def test_a_folder_without_a_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"it has no tokenizer\.json") as caught:
        load_wrapper(tmp_path)
    assert "\n" not in str(caught.value)


def test_many_threads_may_use_one_tokenizer() -> None:
    expected = text_tokenizer().encode(TEXT)
    wrong: list[object] = []

    def work() -> None:
        for _ in range(50):
            ids = text_tokenizer().encode(TEXT)
            text = "".join(pieces(text_tokenizer().detokenizer(()), ids))
            chat = text_tokenizer().render_chat([{"role": "user", "content": "x"}])
            if ids != expected or text != TEXT or not chat:
                wrong.append((ids, text))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
