"""Models that several modules measure; loading one takes a second."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import models_zoo
import pytest
import transformers
from tensorwire_server.engine.encoder import Encoder
from tensorwire_server.engine.generator import Generator
from tensorwire_server.engine.loading import load

from .demo_text import DEMO
from .pairs import MINILM, changed_copy, rounded, smallest_zeroed

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def pruned_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("demo") / "pruned"
    return changed_copy(DEMO, to, smallest_zeroed, of="_proj")


@pytest.fixture(scope="session")
def rounded_minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("minilm") / "rounded"
    return changed_copy(MINILM, to, rounded, of="encoder.layer")


@pytest.fixture(scope="session")
def demo() -> Generator:
    return _generator(DEMO)


@pytest.fixture(scope="session")
def child(pruned_demo: Path) -> Generator:
    return _generator(pruned_demo)


@pytest.fixture(scope="session")
def other_words() -> Generator:
    return _generator(models_zoo.tiny_model("llama"))


@pytest.fixture(scope="session")
def minilm() -> Encoder:
    encoder = load(MINILM)
    assert isinstance(encoder, Encoder)
    return encoder


@pytest.fixture(scope="session")
def plain_demo() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype="float32").eval()


@pytest.fixture(scope="session")
def plain_child(pruned_demo: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(pruned_demo, dtype="float32").eval()


def _generator(folder: Path) -> Generator:
    generator = load(folder)
    assert isinstance(generator, Generator)
    return generator
