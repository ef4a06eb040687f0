from __future__ import annotations

import pytest
from tensorwire.loadtest.oracle import DEFAULT_VOCAB, chat_prompt, oracle_tokens
from tensorwire_server.workers import oracle as server


@pytest.mark.parametrize("prompt", [b"a", b"Return a list of", "prompt äöü".encode(), b"x" * 5000])
@pytest.mark.parametrize("seed", [0, 1, 2**63 + 11])
def test_the_rule_is_the_servers(prompt: bytes, seed: int) -> None:
    expected = server.oracle_tokens(list(prompt), seed, 300)
    assert oracle_tokens(prompt, seed, 300) == expected


def test_the_rule_is_the_servers_for_another_vocabulary_and_for_a_conversation() -> None:
    assert server.DEFAULT_VOCAB == DEFAULT_VOCAB
    assert oracle_tokens(b"abc", 5, 50, vocab=1000) == server.oracle_tokens(
        list(b"abc"), 5, 50, 1000
    )
    rendered = server.ByteTokenizer().render_chat([{"role": "user", "content": "hé"}])
    assert list(chat_prompt("hé")) == rendered
