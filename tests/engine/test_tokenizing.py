from __future__ import annotations

import threading
from functools import cache
from typing import TYPE_CHECKING, Any

import models_zoo
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorwire_protocol.errors import BadParams
from tensorwire_server.engine.errors import ModelLoadError
from tensorwire_server.engine.tokenizing import TextDetokenizer, TextTokenizer, load_wrapper
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

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


WORDS = [
    "the",
    "cat",
    "sat",
    "don",
    "'",
    "t",
    "##s",
    "##ing",
    "##t",
    "un",
    ".",
    ",",
    "!",
    "?",
    "n't",
]


@cache
def wordpiece() -> tokenizers.Tokenizer:
    """As BERT's: words are joined by spaces, pieces of words are not, punctuation moves up."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1) if chr(code) not in WORDS]
    pieces = [*specials, *WORDS, *letters, *(f"##{letter}" for letter in letters if letter != "s")]
    made = Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    made.add_special_tokens(specials)
    return made


@cache
def sentencepiece_bpe() -> tokenizers.Tokenizer:
    """As Llama 2's: BPE over text whose spaces are marks, bytes for what it does not know."""
    words = ["▁", "t", "h", "e", "c", "a", "▁t", "▁th", "▁the", "ca", "▁c", "▁ca", ".", "\n"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("c", "a"), ("▁", "c"), ("▁c", "a")]
    made = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, merges,
            unk_token="<unk>", fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def assert_streamed_is_whole(tokenizer: tokenizers.Tokenizer, ids: list[int], cut: int) -> None:
    assert "".join(pieces(TextDetokenizer(tokenizer, ()), ids)) == tokenizer.decode(ids)
    prompt = tokenizer.decode(ids[:cut])
    streamed = "".join(pieces(TextDetokenizer(tokenizer, ids[:cut]), ids[cut:]))
    assert prompt + streamed == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=30), st.integers(0, 30))
def test_any_word_pieces_after_any_prompt_are_streamed_as_the_whole(
    ids: list[int], cut: int
) -> None:
    tokenizer = wordpiece()
    assert_streamed_is_whole(tokenizer, [i % tokenizer.get_vocab_size() for i in ids], cut)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="the ca.\n é🙂日", max_size=30), st.integers(0, 60))
def test_any_text_of_a_sentencepiece_bpe_is_streamed_as_the_whole(text: str, cut: int) -> None:
    tokenizer = sentencepiece_bpe()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    while cut and tokenizer.decode(ids[:cut]).endswith("\ufffd"):
        cut -= 1  # a prompt of whole characters; others have a test of their own
    assert_streamed_is_whole(tokenizer, ids, cut)


@pytest.mark.parametrize(
    ("backend", "text"),
    [
        (wordpiece, "the cats don't sat, the cat sat. unsing!"),
        (sentencepiece_bpe, "the cat. the\n日本 cat 🙂"),
        (byte_level, "the cat sat — naïve 🙂"),
    ],
    ids=["wordpiece", "sentencepiece", "byte-level"],
)
def test_a_bad_word_is_known_at_the_beginning_and_in_the_middle(backend: Any, text: str) -> None:
    wrapper = transformers.PreTrainedTokenizerFast(tokenizer_object=backend())
    tokenizer = TextTokenizer(wrapper)
    word = "the"
    first, *behind = tokenizer.encode_word(word)
    assert first == backend().encode(word, add_special_tokens=False).ids
    ids = backend().encode("cat " + word, add_special_tokens=False).ids
    assert any(ids[-len(variant) :] == variant for variant in [first, *behind])
    assert tokenizer.decode(backend().encode(text).ids) == backend().decode(
        backend().encode(text).ids
    )


def test_bytes_that_spoil_what_is_out_already_are_told_as_broken() -> None:
    zero, broken, the = (id_of(metaspace(), token) for token in ("<0x00>", "<0x80>", "▁the"))
    assert metaspace().decode([zero, broken, the]) == "\ufffd\ufffd the"
    made = pieces(TextDetokenizer(metaspace(), ()), [zero, broken, the])
    assert made == ["\0", "", "\ufffd the", ""]


TURNS = """{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}
{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
CONVERSATION = [
    {"role": role, "content": f"the cat sat, {role} don't 日本 🙂"}
    for role in ("system", "user", "assistant", "tool")
]


@pytest.mark.parametrize(
    ("backend", "bos", "eos"),
    [
        (byte_level, "<s>", "</s>"),
        (metaspace, "<s>", "</s>"),
        (sentencepiece_bpe, "<s>", "</s>"),
        (wordpiece, "[CLS]", "[SEP]"),
    ],
    ids=["byte-level", "metaspace", "sentencepiece", "wordpiece"],
)
def test_texts_and_conversations_become_the_ids_that_transformers_gives(
    backend: Any, bos: str, eos: str
) -> None:
    wrapper = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend(), bos_token=bos, eos_token=eos
    )
    wrapper.chat_template = TURNS
    tokenizer = TextTokenizer(wrapper)
    assert tokenizer.encode(TEXT) == wrapper(TEXT)["input_ids"]
    expected = wrapper.apply_chat_template(
        CONVERSATION, add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.render_chat(CONVERSATION) == expected
    # What the template writes, the tokenizer does not add once more.
    assert expected.count(wrapper.bos_token_id) == 1


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
