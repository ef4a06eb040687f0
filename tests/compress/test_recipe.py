"""What a recipe means, and that a wrong one is one sentence before anything is loaded."""

from __future__ import annotations

import pytest
from tensorwire_server.compress.recipe import (
    Floor,
    Method,
    Metric,
    Pruning,
    Quantization,
    Recipe,
    RecipeError,
    Rounding,
    Scope,
    Structure,
    parse_floors,
    parse_pruning,
    parse_quantization,
    parse_recipe,
    write_recipe,
)

FULL = """
calibrate = "a.txt"
evaluate = "b.txt"
seed = 7

[[prune]]
structure = "unstructured"
target = 0.5
method = "wanda"

[quantize]
bits = 4
rounding = "gptq"
group_size = 64

[floors]
ppl = "1.10x"
agreement = 0.9
"""


def test_a_recipe_in_toml_says_all_that_flags_can() -> None:
    assert parse_recipe(FULL) == Recipe(
        prune=(Pruning(structure=Structure.UNSTRUCTURED, target=0.5, method=Method.WANDA),),
        quantize=Quantization(bits=4, rounding=Rounding.GPTQ, group_size=64),
        calibrate="a.txt",
        evaluate="b.txt",
        floors=(
            Floor(metric=Metric.PERPLEXITY, limit=1.1, relative=True),
            Floor(metric=Metric.AGREEMENT, limit=0.9),
        ),
        seed=7,
    )


def test_a_recipe_survives_being_written_and_read() -> None:
    recipe = parse_recipe(FULL)
    assert parse_recipe(write_recipe(recipe)) == recipe
    small = Recipe(quantize=Quantization(bits=8))
    assert parse_recipe(write_recipe(small)) == small


def test_flags_mean_what_they_say() -> None:
    assert parse_pruning("neurons:0.25", method="magnitude", scope="global") == Pruning(
        structure=Structure.NEURONS, target=0.25, scope=Scope.GLOBAL
    )
    assert parse_floors(["cosine=0.99"]) == (Floor(metric=Metric.COSINE, limit=0.99),)


def test_int4_is_calibrated_where_there_is_a_text_and_grouped_always() -> None:
    def made(text: str, *, calibrated: bool) -> Quantization:
        return parse_quantization(text, rounding=None, group_size=None, is_calibrated=calibrated)

    assert made("int4", calibrated=True) == Quantization(
        bits=4, rounding=Rounding.GPTQ, group_size=32
    )
    assert made("int4", calibrated=False).rounding is Rounding.NEAREST
    assert made("int8", calibrated=False) == Quantization(bits=8)


@pytest.mark.parametrize(
    ("toml", "sentence"),
    [
        ("", "nothing to do; give prune"),
        ("[quantize]\nbits = 3", "quantize must be int8 or int4, got int3"),
        ("[quantize]\nbits = 4\ngroup_size = 12", "group_size must be a multiple of 8"),
        ("[quantize]\nbits = 8\ngroup_size = 32", "int8 has one scale for each output"),
        ("[quantize]\nbit = 8", "there is no key quantize.bit; did you mean bits?"),
        ("qantize = 1", "there is no key qantize; did you mean quantize?"),
        ("[[prune]]\nstructure = 'heads'\ntarget = 1.2", "must lie between 0 and 1"),
        ("[[prune]]\nstructure = 'heads'\ntarget = 0.5", "give one with --calibrate FILE"),
        ("[[prune]]\nstructure = 'tails'\ntarget = 0.5", "tails"),
        ("seed = 'x'", "Expected `int`"),
        ("[quantize]\nbits = 8\n[floors]\nppl = '1.1x'", "give one with --eval FILE"),
        ("[quantize]\nbits = 8\n[floors]\naccuracy = 0.9", "give one with --labels FILE"),
        ("[quantize]\nbits = 8\n[floors]\nfluency = 0.9", "floor 'fluency' is not known"),
        ("[quantize]\nbits = 8\n[floors]\nppl = 'low'", "neither a number above 0"),
        ("this is no TOML", "Expected '='"),
    ],
)
def test_a_wrong_recipe_is_one_sentence(toml: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence.replace("(", r"\(")) as caught:
        parse_recipe(toml)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["unstructured", "unstructured:half", "unstructured:1.2", "x:0.5"])
def test_a_wrong_share_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_pruning(text, method="magnitude", scope="layer")


def test_what_stands_twice_is_refused() -> None:
    half = Pruning(structure=Structure.UNSTRUCTURED, target=0.5)
    with pytest.raises(RecipeError, match="prune unstructured stands there twice"):
        Recipe(prune=(half, half))
    with pytest.raises(RecipeError, match="floor ppl stands there twice"):
        parse_floors(["ppl=1.1x", "ppl=9"])
