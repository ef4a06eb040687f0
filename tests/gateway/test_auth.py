"""Credentials, the file they live in, and the rights they give."""

from __future__ import annotations

import os
import re
import stat
from typing import TYPE_CHECKING

import pytest
from tensorwire_protocol.auth import (
    LOCAL,
    TOKEN_RANDOM_BYTES,
    Principal,
    Right,
    find_key_id,
    hmac_key,
    make_token,
)
from tensorwire_protocol.errors import ErrorCode, Forbidden, Unauthenticated
from tensorwire_protocol.login import TokenLogin
from tensorwire_protocol.operations import OPERATIONS
from tensorwire_server.config import ListenConfig
from tensorwire_server.gateway import auth
from tensorwire_server.gateway.auth import (
    Credential,
    Credentials,
    CredentialsError,
    add_credential,
    check_right,
    load_credentials,
)
from tensorwire_server.gateway.listener import Listener, bind

from .house import Client, house
from .test_listener import connect

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import Run

TOKEN = make_token(bytes(range(TOKEN_RANDOM_BYTES)))
OTHER = make_token(bytes(range(1, TOKEN_RANDOM_BYTES + 1)))
WRONG = TOKEN[:12] + OTHER[12:]  # a known id, another secret


def knowing(*rights: Right, token: str = TOKEN) -> Credentials:
    return Credentials([Credential.of(token, "alice", rights)], decoy=b"d" * 32)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "auth.toml"


# -- rights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("right", Right)
def test_one_right_gives_exactly_the_operations_of_the_table(op: str, right: Right) -> None:
    operation = OPERATIONS[op]
    principal = Principal(name="x", rights=frozenset({right}))
    if operation.right is right:
        check_right(principal, operation)
    else:
        with pytest.raises(Forbidden, match=f"{op} needs the right '{operation.right.value}'"):
            check_right(principal, operation)


@pytest.mark.parametrize("op", OPERATIONS)
def test_nobody_may_do_nothing_and_who_is_local_everything(op: str) -> None:
    check_right(LOCAL, OPERATIONS[op])
    with pytest.raises(Forbidden):
        check_right(Principal(name="x", rights=frozenset()), OPERATIONS[op])
    with pytest.raises(Unauthenticated):
        check_right(None, OPERATIONS[op])


def test_a_gateway_asks_the_table_before_it_does_anything(run: Run) -> None:
    async def test() -> None:
        async with house(credentials=knowing(Right.INFER)) as opened:
            config = ListenConfig(port=0)
            listener = Listener(opened.gateway, bind(config, has_auth=True), config)
            await listener.start()
            client = await connect(listener, TokenLogin(token=TOKEN))
            (await client.answered(client.ask("health", None)))
            failure = await client.failed(client.ask("stats", None))
            assert failure.code == ErrorCode.FORBIDDEN
            (session,) = opened.gateway.sessions
            assert session.principal is not None
            assert session.principal.name == "alice"
            stranger: Client = await connect(listener)
            error = await stranger.until_lost()
            assert error is not None
            assert error.code is ErrorCode.UNAUTHENTICATED
            listener.close()

    run(test)


# -- credentials ---------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [WRONG, OTHER, "", "tw_", TOKEN.upper(), TOKEN + "x", "\ud800"])
def test_only_the_very_token_is_known(token: str) -> None:
    credentials = knowing(Right.INFER)
    assert credentials.check_token(token) is None
    known = credentials.check_token(TOKEN)
    assert known is not None
    assert (known.name, known.rights) == ("alice", frozenset({Right.INFER}))


@pytest.mark.parametrize("token", [TOKEN, WRONG, OTHER, "nonsense"])
def test_every_token_is_compared_once_known_or_not(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[int, int]] = []

    def is_same(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return a == b

    monkeypatch.setattr(auth, "is_same", is_same)
    knowing().check_token(token)
    assert compared == [(32, 32)]


def test_an_id_that_does_not_exist_has_a_key_that_is_nobody_s() -> None:
    credentials = knowing()
    assert credentials.hmac_key(find_key_id(OTHER) or "") == (b"d" * 32, None)
    key, principal = credentials.hmac_key(find_key_id(TOKEN) or "")
    assert key == hmac_key(TOKEN)
    assert principal is not None


def test_tokens_are_taken_only_where_nobody_else_reads() -> None:
    credentials = knowing()
    assert credentials.over(is_private=True).methods == ("token", "hmac")
    assert credentials.over(is_private=False).methods == ("hmac",)


def test_what_is_kept_does_not_show_itself() -> None:
    shown = repr(Credential.of(TOKEN, "alice", [Right.INFER]))
    assert "alice" in shown
    assert "sha256" not in shown
    assert "hmac" not in shown


# -- the file ------------------------------------------------------------------------------------


def test_a_new_token_works_after_the_file_is_read_and_is_not_in_it(file: Path) -> None:
    first = add_credential(file, "alice", ["infer"])
    second = add_credential(file, "bob@example.org", ["infer", "admin"])
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    credentials = load_credentials(file)
    assert len(credentials) == 2
    alice, bob = credentials.check_token(first), credentials.check_token(second)
    assert alice == Principal(name="alice", rights=frozenset({Right.INFER}))
    assert bob == Principal(name="bob@example.org", rights=frozenset({Right.INFER, Right.ADMIN}))
    for token in (first, second):
        assert token[12:] not in file.read_text()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610, 0o601])
def test_a_file_that_others_may_use_is_refused(file: Path, mode: int) -> None:
    add_credential(file, "alice", ["infer"])
    file.chmod(mode)
    for use in (lambda: load_credentials(file), lambda: add_credential(file, "bob", ["infer"])):
        with pytest.raises(CredentialsError, match=f"its mode is {mode:04o}.*chmod 600"):
            use()


@pytest.mark.parametrize(
    ("name", "rights", "message"),
    [
        ("", ["infer"], "a name has"), ("a b", ["infer"], "a name has"),
        ('x"\n[y]', ["infer"], "a name has"), ("x" * 65, ["infer"], "a name has"),
        ("x", ["root"], "no right 'root'; known are infer, admin, upload"),
        ("x", [""], "no right ''"),
    ],
)  # fmt: skip
def test_a_wrong_name_or_right_writes_nothing(
    file: Path, name: str, rights: list[str], message: str
) -> None:
    with pytest.raises(CredentialsError, match=message):
        add_credential(file, name, rights)
    assert not file.exists()


GOOD = """[[credential]]
id = "abcdefgh"
name = "x"
rights = ["infer"]
token_sha256 = "{0}"
hmac_key = "{0}"
""".format("ab" * 32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no credentials; make one with `tensorwire token new"),
        ("tw_secret", "is not TOML"),
        ("\xff", "is not TOML"),
        ("x = 1", "may hold"),
        ("credential = 1", "may hold"),
        ("credential = [1]", "entry 1 .* must have exactly"),
        (GOOD + "extra = 1", "must have exactly"),
        (GOOD.replace('name = "x"\n', ""), "must have exactly"),
        (GOOD.replace("abcdefgh", "ABC"), "the id in"),
        (GOOD.replace('name = "x"', "name = 1"), "the name in"),
        (GOOD.replace('["infer"]', '"infer"'), "must be a list"),
        (GOOD.replace('["infer"]', '["root"]'), "no right 'root'"),
        (GOOD.replace('["infer"]', "[[]]"), "no right"),
        (GOOD.replace("abab", "xyzz", 1), "token_sha256 .* 64 hexadecimal"),
        (GOOD.replace('hmac_key = "ab', 'hmac_key = "'), "hmac_key .* 64 hexadecimal"),
        (GOOD + GOOD, "two entries with the id 'abcdefgh'"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_without_quoting_it(
    file: Path, content: str, message: str
) -> None:
    file.write_bytes(content.encode("latin-1"))
    file.chmod(0o600)
    with pytest.raises(CredentialsError, match=message) as caught:
        load_credentials(file)
    assert not re.search(r"tw_secret|ab{20}|(ab){10}", str(caught.value))
    assert caught.value.__cause__ is None


def test_a_file_that_is_missing_says_how_to_begin(file: Path) -> None:
    with pytest.raises(CredentialsError, match=r"No such file.*tensorwire token new"):
        load_credentials(file)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_cannot_be_read_is_named(file: Path) -> None:
    add_credential(file, "alice", ["infer"])
    file.chmod(0)
    with pytest.raises(CredentialsError, match="cannot be read"):
        load_credentials(file)
