"""Which single weights go, how many, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import models_zoo
import pytest
import torch
from safetensors.torch import load_file
from tensorwire_server.compress import RecipeError, prune_model
from tensorwire_server.compress.blocks import blocks_of
from tensorwire_server.compress.prune import kth_smallest, least_of_rows
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from pathlib import Path

WINDOWS = [torch.arange(3, 60).unsqueeze(0), torch.arange(90, 140).unsqueeze(0)]


def load() -> Any:
    return AutoModelForCausalLM.from_pretrained(models_zoo.tiny_model("llama"))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("target", [0.5, 0.137])
def test_sparsity_counted_from_the_file_is_the_target(
    target: float, method: str, scope: str, tmp_path: Path
) -> None:
    model = load()
    pruned = prune_model(model, target, method=method, scope=scope, calibration=WINDOWS)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    matrices = {name: tensor for name, tensor in tensors.items() if ".layers." in name}
    matrices = {name: tensor for name, tensor in matrices.items() if tensor.ndim == 2}
    assert {parameter.name for parameter in pruned.parameters} == set(matrices)
    zeros = {name: int((tensor == 0).sum()) for name, tensor in matrices.items()}
    assert zeros == {parameter.name: parameter.zeros for parameter in pruned.parameters}
    size = sum(tensor.numel() for tensor in matrices.values())
    if scope == "layer":
        for name, tensor in matrices.items():
            assert zeros[name] == round(target * tensor.numel())
    else:
        assert sum(zeros.values()) == round(target * size)
        assert len({zeros[name] / matrices[name].numel() for name in zeros}) > 5
    assert (pruned.met, pruned.achieved) == (True, sum(zeros.values()) / size)
    others = {name: tensor for name, tensor in tensors.items() if name not in matrices}
    for name, tensor in load().state_dict().items():
        if name in others:
            assert torch.equal(others[name], tensor)


def test_wanda_is_what_a_loop_over_the_paper_gives() -> None:
    """Of the first block: |W_ij| ||X_j||, compared in each output's row."""
    model = load()
    first = blocks_of(model)[0]
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in first.linears}
    for name, linear in first.linears.items():
        linear.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0][0]))
    with torch.no_grad():
        for window in WINDOWS:
            model(input_ids=window)
    before = {name: linear.weight.clone() for name, linear in first.linears.items()}
    seen = {name: torch.cat(found) for name, found in inputs.items()}
    prune_model(model, 0.25, method="wanda", calibration=WINDOWS)
    for name, linear in first.linears.items():
        for row, weights in enumerate(before[name].tolist()):
            norms = [sum(x * x for x in column) ** 0.5 for column in seen[name].T.tolist()]
            scores = [abs(weight) * norm for weight, norm in zip(weights, norms, strict=True)]
            least = sorted(range(len(scores)), key=scores.__getitem__)[: len(scores) // 4]
            assert sorted(least) == (linear.weight[row] == 0).nonzero().flatten().tolist()


def test_magnitude_takes_the_smallest_of_a_matrix_or_of_all() -> None:
    for scope in ("layer", "global"):
        model, before = load(), load()
        pruned = prune_model(model, 0.3, scope=scope)
        assert pruned.errors == ()
        left, gone = [], []
        for block, old in zip(blocks_of(model), blocks_of(before), strict=True):
            for name, linear in block.linears.items():
                magnitudes, is_zero = old.linears[name].weight.abs(), linear.weight == 0
                left.append(magnitudes[~is_zero].min())
                gone.append(magnitudes[is_zero].max())
        if scope == "layer":
            assert all(most <= fewest for most, fewest in zip(gone, left, strict=True))
        else:
            assert max(gone) <= min(left)


def test_rows_share_what_is_no_whole_number_evenly() -> None:
    counts = least_of_rows(torch.rand(7, 10), 0.33).sum(1)
    assert int(counts.sum()) == round(0.33 * 70) == 23
    assert sorted(counts.tolist()) == [3, 3, 3, 3, 3, 4, 4]


def test_equal_scores_do_not_make_it_more_or_fewer() -> None:
    model = load()
    for block in blocks_of(model):
        for linear in block.linears.values():
            linear.weight.data.fill_(0.5)
    for scope in ("layer", "global"):
        assert prune_model(model, 0.4, scope=scope).achieved == pytest.approx(0.4, abs=1e-4)


def test_the_kth_smallest_of_many_is_that_of_all_together() -> None:
    generator = torch.Generator().manual_seed(3)
    parts = [torch.rand(size, generator=generator).pow(8) for size in (1, 50, 400)]
    in_order = torch.cat(parts).sort().values
    for count in (1, 2, 225, 451):
        assert kth_smallest(lambda: iter(parts), count) == in_order[count - 1]


def test_errors_of_layers_are_those_of_their_outputs() -> None:
    model = load()
    first = blocks_of(model)[0]
    name, linear = first.linear("self_attn.q_proj")
    inputs: list[torch.Tensor] = []
    with linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0])), torch.no_grad():
        model(input_ids=WINDOWS[0])
    old = linear.weight.data.clone()
    errors = {
        error.name: error.error for error in prune_model(model, 0.5, calibration=WINDOWS[:1]).errors
    }
    lost = inputs[0] @ (old - linear.weight.data).T
    assert errors[name] == pytest.approx(float(lost.norm() / (inputs[0] @ old.T).norm()), rel=1e-4)


@pytest.mark.parametrize(("scope", "total"), [("layer", 3), ("global", 6)])
def test_progress_is_told_block_by_block(scope: str, total: int) -> None:
    told: list[tuple[int, int, str]] = []
    prune_model(load(), 0.5, scope=scope, on_progress=lambda *what: told.append(what))
    assert told == [(done, total, "pruning weights") for done in range(1, total + 1)]


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        (1.2, {}, r"between 0 and 1 .*, got 1\.2"),
        (0.0, {}, "between 0 and 1"),
        (0.5, {"structure": "channels"}, "'channels' is none of unstructured, heads"),
        (0.5, {"method": "random"}, "method 'random' is none of magnitude, wanda"),
        (0.5, {"method": "wanda"}, "give calibration"),
        (0.5, {"structure": "neurons"}, "give calibration"),
        (0.2, {"structure": "layers", "calibration": WINDOWS}, r"shares are 0\.3333, 0\.6667"),
        (0.99, {"structure": "layers", "calibration": WINDOWS}, r"shares are 0\.3333, 0\.6667"),
        (0.25, {"structure": "heads", "calibration": WINDOWS}, r"2 head groups .* shares are 0\.5"),
        (0.999, {"structure": "neurons", "calibration": WINDOWS}, r"shares are 0\.9896$"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_changes_nothing(
    target: float, options: dict[str, Any], said: str
) -> None:
    model = load()
    with pytest.raises(RecipeError, match=said):
        prune_model(model, target, **options)
    for name, tensor in load().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
