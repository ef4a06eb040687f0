"""What a recipe means, and that a wrong one is one sentence before anything is loaded."""

from __future__ import annotations

from typing import Any

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
    make_recipe,
    parse_floors,
    parse_pruning,
    parse_quantization,
    parse_recipe,
    parse_tables,
    refine,
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


def test_flags_are_tables_of_the_same_recipe() -> None:
    tables: dict[str, Any] = {
        "prune": [parse_pruning("unstructured:0.5"), parse_pruning("heads:0.25")],
        "quantize": parse_quantization("int4"),
        "calibrate": "a.txt",
    }
    refine(tables, method="wanda", scope="global", rounding="nearest", group_size=64)
    assert make_recipe(tables) == Recipe(
        prune=(
            Pruning(
                structure=Structure.UNSTRUCTURED,
                target=0.5,
                method=Method.WANDA,
                scope=Scope.GLOBAL,
            ),
            Pruning(structure=Structure.HEADS, target=0.25),
        ),
        quantize=Quantization(bits=4, rounding=Rounding.NEAREST, group_size=64),
        calibrate="a.txt",
    )
    assert parse_floors(["cosine=0.99"]) == (Floor(metric=Metric.COSINE, limit=0.99),)


def test_flags_change_the_steps_of_a_file() -> None:
    tables = parse_tables(FULL)
    refine(tables, method="magnitude", group_size=128)
    found = make_recipe(tables)
    assert found.prune[0].method is Method.MAGNITUDE
    assert found.quantize == Quantization(bits=4, rounding=Rounding.GPTQ, group_size=128)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"method": "wanda"}, "method wanda is of prune unstructured, which this recipe does not"),
        ({"scope": "global"}, "scope global is of prune unstructured"),
        ({"rounding": "gptq"}, "rounding gptq is of quantize, which this recipe does not ask for"),
        ({"group_size": 64}, "group_size 64 is of quantize"),
        ({"rounding": "gibberish"}, "rounding 'gibberish' is not known; known are nearest, gptq"),
    ],
)
def test_flags_of_a_step_that_there_is_not_are_refused(
    flags: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(RecipeError, match=sentence):
        refine({"prune": [parse_pruning("heads:0.5")]}, **flags)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("text", "rounding"), [(None, Rounding.NEAREST), ("a.txt", Rounding.GPTQ)])
def test_rounding_is_calibrated_where_there_is_a_text_however_it_was_written(
    bits: int, text: str | None, rounding: Rounding
) -> None:
    wanted = Quantization(bits=bits, rounding=rounding, group_size=32 if bits == 4 else None)
    given: dict[str, Any] = {} if text is None else {"calibrate": text}
    assert Recipe(quantize=Quantization(bits=bits), **given).quantize == wanted
    tables = {"quantize": parse_quantization(f"int{bits}"), **given}
    assert make_recipe(tables).quantize == wanted


def test_a_calibration_text_may_come_after_the_rest_of_a_recipe() -> None:
    tables = parse_tables("[[prune]]\nstructure = 'heads'\ntarget = 0.5")
    assert make_recipe({**tables, "calibrate": "a.txt"}).calibrate == "a.txt"


def test_a_floor_keeps_its_digits() -> None:
    recipe = Recipe(
        quantize=Quantization(bits=8), evaluate="b.txt", floors=parse_floors(["ppl=1.0123456789x"])
    )
    assert parse_recipe(write_recipe(recipe)) == recipe


@pytest.mark.parametrize(
    ("floor", "sentence"),
    [
        ("kl=1.1x", "cannot be relative"),
        ("accuracy=95", "can never be met: accuracy is at most 1"),
        ("cosine=99", "can never be met"),
        ("agreement=1.01x", "can never be met"),
    ],
)
def test_a_floor_that_nothing_can_meet_is_refused(floor: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        parse_floors([floor])


def test_the_accuracy_may_have_to_grow() -> None:
    assert parse_floors(["accuracy=1.05x"])[0].limit == 1.05


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
        ("seed = -1\n[quantize]\nbits = 8", "seed must be 0 or more, got -1"),
        ("floors = 3\n[quantize]\nbits = 8", "floors must be a table of limits"),
        ("floors = [1]\n[quantize]\nbits = 8", "floors must be a table of limits"),
        (
            "[[prune]]\nstructure = 'heads'\ntarget = 0.5\nmethod = 'wanda'",
            "method and scope are of prune unstructured; prune heads has neither",
        ),
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
        make_recipe({"prune": [parse_pruning(text)]})


def test_what_stands_twice_is_refused() -> None:
    half = Pruning(structure=Structure.UNSTRUCTURED, target=0.5)
    with pytest.raises(RecipeError, match="prune unstructured stands there twice"):
        Recipe(prune=(half, half))
    with pytest.raises(RecipeError, match="floor ppl stands there twice"):
        parse_floors(["ppl=1.1x", "ppl=9"])
