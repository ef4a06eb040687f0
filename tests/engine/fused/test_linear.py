"""Every form of a matrix multiplies like the matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from tensorwire_server.engine.errors import ModelLoadError
from tensorwire_server.engine.fused.linear import (
    HalvedLinear,
    Int8Linear,
    PackedLinear,
    PlainLinear,
    fits_in_half,
    linear_form,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tensorwire_server.engine.fused.linear import Linear

# Relative to the largest product: float32 in another order; 8 bits on both sides.
ERRORS: dict[Callable[..., Linear], float] = {
    PlainLinear: 1e-6,
    PackedLinear: 1e-6,
    HalvedLinear: 1e-6,
    Int8Linear: 0.03,
}
FORMS = sorted(ERRORS, key=str)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(*shape: int) -> torch.Tensor:
    """Weights as most models have them: float32 numbers that were published in bfloat16."""
    return numbers(*shape).bfloat16().float()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 9, 130])
@pytest.mark.parametrize("form", FORMS)
def test_it_multiplies_like_the_matrix(
    form: Callable[..., Linear], rows: int, with_bias: bool
) -> None:
    weight, x, residual = stored(70, 48), numbers(rows, 48, seed=1), numbers(rows, 70, seed=2)
    bias = numbers(70, seed=3) if with_bias else None
    right = torch.nn.functional.linear(x, weight, bias)
    with torch.inference_mode():
        linear = form(weight, bias)
        made, total = linear(x), linear.add_to(residual, x)
    allowed = ERRORS[form] * right.abs().max()
    assert (made - right).abs().max() <= allowed
    assert (total - right - residual).abs().max() <= allowed


@pytest.mark.parametrize("form", FORMS)
def test_neither_rows_nor_residual_are_changed(form: Callable[..., Linear]) -> None:
    x, residual = numbers(4, 48, seed=1), numbers(4, 70, seed=2)
    before = x.clone(), residual.clone()
    with torch.inference_mode():
        linear = form(stored(70, 48), numbers(70))
        linear(x)
        linear.add_to(residual, x)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_a_row_of_outliers_does_not_blur_its_neighbours() -> None:
    weight, x = numbers(70, 48), numbers(8, 48, seed=1)
    linear = Int8Linear(weight, None)
    with torch.inference_mode():
        alone = linear(x)
        x[3] *= 10_000
        beside = linear(x)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(alone[others], beside[others])


def test_rows_of_zeros_and_of_nothing_finite_stay_what_they_are() -> None:
    x = numbers(4, 48, seed=1)
    x[1], x[2] = 0, float("nan")
    with torch.inference_mode():
        made = Int8Linear(numbers(70, 48), None)(x)
    assert not made[1].any()
    assert made[2].isnan().all()
    assert made[[0, 3]].isfinite().all()


def test_an_output_of_zeros_has_a_scale() -> None:
    weight = numbers(70, 48)
    weight[5] = 0
    with torch.inference_mode():
        made = Int8Linear(weight, None)(numbers(4, 48, seed=1))
    assert not made[:, 5].any()
    assert made.isfinite().all()


def test_a_cpu_packs_and_other_devices_do_not() -> None:
    form = linear_form(torch.device("cpu"), torch.float32, int8=False)
    assert isinstance(form(numbers(8, 16), None), PackedLinear)
    assert isinstance(form(stored(8, 16), None), HalvedLinear)
    assert linear_form(torch.device("cpu"), torch.bfloat16, int8=False) is PlainLinear
    assert linear_form(torch.device("cuda"), torch.float32, int8=False) is PlainLinear
    assert linear_form(torch.device("cpu"), torch.float32, int8=True) is Int8Linear


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        (1.0, True),
        (65504.0, True),
        (65600.0, False),  # infinite in float16
        (1.0 + 2.0**-7, True),  # the finest step of bfloat16
        (1.0 + 2.0**-11, False),
        (2.0**-17 * (1 + 2.0**-7), True),
        (3e-30, True),  # nothing beside any other weight
        (float("nan"), False),
    ],
)
def test_weights_are_halved_only_where_float16_is_what_they_are(value: float, fits: bool) -> None:
    assert fits_in_half(torch.tensor([[0.5, value]])) is fits


def test_weights_that_float16_does_not_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="does not hold"):
        HalvedLinear(numbers(8, 16), None)


def test_8_bits_on_another_device_are_refused() -> None:
    with pytest.raises(ModelLoadError, match="quantization int8 runs on x86 CPUs only"):
        linear_form(torch.device("cuda"), torch.bfloat16, int8=True)
