"""Which back end runs what, and what is refused."""

from __future__ import annotations

import pytest
from tensorwire_server.engine.backends import Backend, Quantization, choose
from tensorwire_server.engine.errors import ModelLoadError


@pytest.mark.parametrize(
    ("architecture", "asked", "expected"),
    [
        ("LlamaForCausalLM", "auto", Backend.FUSED),
        ("LlamaForCausalLM", "fused", Backend.FUSED),
        ("LlamaForCausalLM", "any", Backend.ANY),
        ("GPT2LMHeadModel", "auto", Backend.ANY),
        ("GPT2LMHeadModel", "any", Backend.ANY),
    ],
)
def test_a_known_family_is_fused_unless_told_otherwise(
    architecture: str, asked: str, expected: Backend
) -> None:
    assert choose(architecture, asked=asked, quantize="none").backend is expected


def test_8_bits_are_fused() -> None:
    choice = choose("Qwen2ForCausalLM", asked="auto", quantize="int8")
    assert choice.backend is Backend.FUSED
    assert choice.quantization is Quantization.INT8


@pytest.mark.parametrize(
    ("asked", "quantize", "expected"),
    [("auto", "none", True), ("fused", "none", False), ("auto", "int8", False)],
)
def test_what_was_asked_for_by_name_does_not_fall_back(
    asked: str, quantize: str, expected: bool
) -> None:
    assert choose("LlamaForCausalLM", asked=asked, quantize=quantize).may_fall_back is expected


@pytest.mark.parametrize(
    ("asked", "quantize", "sentence"),
    [
        ("fused", "none", "the back end fused does not know its architecture GPT2LMHeadModel; kno"),
        ("auto", "int8", "quantization int8 does not know its architecture GPT2LMHeadModel; known"),
        ("any", "int8", "quantization int8 needs the back end fused, not any"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_sentence(
    asked: str, quantize: str, sentence: str
) -> None:
    with pytest.raises(ModelLoadError) as caught:
        choose("GPT2LMHeadModel", asked=asked, quantize=quantize)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "stored", "quantize", "expected"),
    [
        ("Qwen2ForCausalLM", "int8", "none", (Backend.FUSED, Quantization.INT8, False, True)),
        ("Qwen2ForCausalLM", "int8", "int8", (Backend.FUSED, Quantization.INT8, True, False)),
        ("Qwen2ForCausalLM", "int4", "none", (Backend.FUSED, Quantization.INT4, False, True)),
        ("GPTNeoXForCausalLM", "int4", "none", (Backend.ANY, Quantization.INT4, False, True)),
    ],
)
def test_how_weights_are_stored_is_told_and_needs_no_back_end(
    architecture: str, stored: str, quantize: str, expected: tuple[object, ...]
) -> None:
    choice = choose(architecture, asked="auto", quantize=quantize, stored=stored)
    found = choice.backend, choice.quantization, choice.rounds_to_int8, choice.may_fall_back
    assert found == expected


def test_what_is_stored_in_fewer_bits_is_not_quantized_again() -> None:
    with pytest.raises(ModelLoadError, match="stored as int4; quantizing them again would only"):
        choose("Qwen2ForCausalLM", asked="auto", quantize="int8", stored="int4")
