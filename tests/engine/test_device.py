import pytest
import torch
from tensorwire_server.engine.device import pick_device, pick_dtype
from tensorwire_server.engine.errors import ModelLoadError


def test_auto_is_cuda_where_there_is_one() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_cpu_is_cpu() -> None:
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["tpu", "cpu:0", "cuda:x", "", "cuda:-1", "auto:1"])
def test_an_unknown_device_is_refused_by_name(name: str) -> None:
    with pytest.raises(ModelLoadError, match="is unknown"):
        pick_device(name)


def test_a_device_that_is_not_here_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="torch finds"):
        pick_device("cuda:99")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, None])
def test_a_cpu_computes_in_float32(stored: torch.dtype | None) -> None:
    assert pick_dtype(torch.device("cpu"), stored) is torch.float32


def test_cuda_computes_in_the_stored_format() -> None:
    assert pick_dtype(torch.device("cuda"), torch.bfloat16) is torch.bfloat16
