"""What runs a model is chosen by whoever starts the server, and told to whoever asks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import models_zoo
import pytest
from quantized_folders import quantize_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .serving import Command, RunningServer

pytestmark = pytest.mark.slow

MODELS_LOAD_S = 90.0
PROMPT = "Return a list of"


def test_each_model_runs_as_it_was_asked_to(
    tmp_path: Path, serve: Callable[..., RunningServer], launch: Callable[..., Command]
) -> None:
    quantize_folder(models_zoo.tiny_model("qwen3"), tmp_path, bits=4, group_size=32)
    settings = ("models.modules.backend=any", "models.small.quantize=int8", "workers.threads=1")
    words = (
        "--model=auto=demo",
        "--model=modules=demo",
        "--model=small=demo",
        f"--model=stored={tmp_path}",
    )
    server = serve(*words, *(f"--set={setting}" for setting in settings)).ready(MODELS_LOAD_S)
    with server.client() as client:
        listed = {model["name"]: model for model in client.models()["models"]}
        chosen = {name: (m["backend"], m["quantization"]) for name, m in listed.items()}
        assert chosen == {
            "auto": ("fused", "none"),
            "modules": ("any", "none"),
            "small": ("fused", "int8"),
            "stored": ("fused", "int4"),
        }
        answers = {
            name: client.generate(name, PROMPT, max_new_tokens=24, temperature=0.0).token_ids
            for name in ("auto", "modules", "small")
        }
        assert answers["auto"] == answers["modules"]
        assert answers["small"][:2] == answers["auto"][:2]
    command = launch("models", "--address", server.address, "--json")
    assert command.wait() == 0
    printed = {model["name"]: model for model in json.loads(command.stdout)["models"]}
    assert printed["small"]["quantization"] == "int8"
    assert printed["stored"]["quantization"] == "int4"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--backend", "fused"), "the back end fused does not know its architecture GPT2LMHead"),
        (("--quantize", "int8"), "quantization int8 does not know its architecture GPT2LMHead"),
    ],
)
def test_what_an_architecture_cannot_run_in_is_one_sentence_and_exit_code_1(
    launch: Callable[..., Command], words: tuple[str, str], sentence: str
) -> None:
    folder = models_zoo.tiny_model("gpt2")
    command = launch("serve", str(folder), "--port", "0", *words)
    assert command.wait(MODELS_LOAD_S) == 1
    assert sentence in command.stderr.splitlines()[-1]
