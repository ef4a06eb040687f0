"""Tokens, their hashes, and proofs."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import replace

import pytest
from tensorwire_protocol.auth import (
    LOCAL,
    TOKEN_RANDOM_BYTES,
    Right,
    Transcript,
    find_key_id,
    hmac_key,
    key_id_of,
    make_token,
    token_hash,
)
from tensorwire_protocol.errors import BadParams
from tensorwire_protocol.operations import OPERATIONS, Operation

TOKEN = "tw_aaaqeaye_BQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4fICEiIyQ"
# The whole table. Whoever adds an operation decides here who may do it.
RIGHTS = {
    "generate": "infer", "chat": "infer", "embed": "infer", "tokenize": "infer",
    "infer": "infer", "models": "infer", "health": "infer", "stats": "admin",
}  # fmt: skip
SEEN = Transcript(
    preface=b"P" * 8, hello=b"H" * 40, welcome=b"W" * 50,
    client_nonce=b"c" * 32, server_nonce=b"s" * 32,
)  # fmt: skip


def test_each_operation_has_exactly_the_right_of_the_table() -> None:
    assert {name: op.right.value for name, op in OPERATIONS.items()} == RIGHTS


def test_an_operation_without_a_right_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="right"):
        Operation(name="new", needs_model=False, inputs=None)  # type: ignore[call-arg]


def test_a_token_names_its_entry_and_holds_all_the_chance() -> None:
    assert make_token(bytes(range(TOKEN_RANDOM_BYTES))) == TOKEN
    assert key_id_of(TOKEN) == "aaaqeaye"


@pytest.mark.parametrize(
    "wrong",
    ["", "tw_", TOKEN[:-1], TOKEN + "A", TOKEN + "\n", TOKEN.upper(), TOKEN.replace("q", "1", 1)],
)
def test_what_is_no_token_is_refused_without_repeating_it(wrong: str) -> None:
    assert find_key_id(wrong) is None
    with pytest.raises(BadParams) as caught:
        key_id_of(wrong)
    assert len(wrong) < 10 or wrong not in str(caught.value)


def test_a_server_keeps_two_hashes_that_do_not_give_one_another() -> None:
    assert token_hash(TOKEN) == hashlib.sha256(TOKEN.encode()).digest()
    assert hmac_key(TOKEN) == hashlib.sha256(b"tensorwire hmac" + TOKEN.encode()).digest()


def test_any_text_can_be_hashed() -> None:
    assert len(token_hash("\ud800")) == len(hmac_key("\ud800")) == 32


def test_a_proof_is_an_hmac_over_all_that_was_seen_and_says_whose_it_is() -> None:
    message = b"tensorwire client proof\0" + b"P" * 8 + b"H" * 40 + b"W" * 50
    message += b"c" * 32 + b"s" * 32
    assert SEEN.client_proof(b"k" * 32) == hmac.new(b"k" * 32, message, "sha256").digest()
    assert SEEN.server_proof(b"k" * 32) != SEEN.client_proof(b"k" * 32)


@pytest.mark.parametrize("part", ["preface", "hello", "welcome", "client_nonce", "server_nonce"])
def test_no_part_of_the_greeting_can_be_changed(part: str) -> None:
    other = replace(SEEN, **{part: b"x" + getattr(SEEN, part)[1:]})
    assert other.client_proof(b"k") != SEEN.client_proof(b"k")
    assert other.server_proof(b"k") != SEEN.server_proof(b"k")


def test_without_any_login_everything_is_allowed() -> None:
    assert LOCAL.rights == set(Right)
