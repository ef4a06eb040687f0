"""When a client sends its token, when it proves it, and what its TLS arguments mean."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any

import pytest
from tensorwire import AsyncClient, BadParams, Client
from tensorwire.access import Access, make_access
from tensorwire.address import Address, parse_address
from tensorwire_protocol.auth import TOKEN_RANDOM_BYTES, hmac_key, make_token
from tensorwire_protocol.login import HmacLogin, TokenLogin

if TYPE_CHECKING:
    from pathlib import Path

TOKEN = make_token(bytes(range(TOKEN_RANDOM_BYTES)))


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORWIRE_TOKEN", raising=False)


def made(address: str, token: str | None = None, **options: Any) -> tuple[Address, Access]:
    options = {"tls": None, "ca": None, "server_name": None} | options
    return make_access(parse_address(address), token, **options)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.9.9.9"])
def test_on_loopback_the_token_itself_is_sent(host: str) -> None:
    address, access = made(f"{host}:1", TOKEN)
    assert access.login(address) == TokenLogin(token=TOKEN)


@pytest.mark.parametrize("host", ["192.0.2.1", "example.org", "127.1", "localhost.example.org"])
def test_elsewhere_it_is_sent_over_tls_only_and_else_proven(host: str) -> None:
    address, access = made(f"{host}:1", TOKEN)
    first, second = access.login(address), access.login(address)
    assert isinstance(first, HmacLogin)
    assert isinstance(second, HmacLogin)
    assert (first.key_id, first.key) == (TOKEN[3:11], hmac_key(TOKEN))
    assert first.nonce != second.nonce
    secure, access = made(f"tensorwires://{host}:1", TOKEN)
    assert access.login(secure) == TokenLogin(token=TOKEN)


def test_without_a_token_there_is_no_login() -> None:
    address, access = made("192.0.2.1:1")
    assert access.login(address) is None


def test_the_token_comes_from_the_environment_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORWIRE_TOKEN", TOKEN)
    address, access = made("127.0.0.1:1")
    assert access.login(address) == TokenLogin(token=TOKEN)
    monkeypatch.setenv("TENSORWIRE_TOKEN", "")
    assert made("127.0.0.1:1")[1].token is None


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_what_is_no_token_is_refused_at_once_and_not_repeated(kind: type) -> None:
    with pytest.raises(BadParams, match="has not the form") as caught:
        kind("127.0.0.1:1", token="hunter2hunter2")
    assert "hunter2" not in str(caught.value)


def test_a_token_does_not_show_itself() -> None:
    assert TOKEN[12:] not in repr(made("127.0.0.1:1", TOKEN)[1])


def test_tls_is_asked_for_by_the_address_or_the_argument() -> None:
    for address, access in (made("tensorwires://h:1"), made("h:1", tls=True)):
        assert address.is_tls
        assert str(address) == "h:1"
        assert access.tls is not None
        assert access.tls.minimum_version == ssl.TLSVersion.TLSv1_3
        assert access.tls.check_hostname
        assert access.tls.verify_mode == ssl.CERT_REQUIRED
        assert access.server_name_at(address) == "h"
    plain, access = made("tensorwire://h:1")
    assert not plain.is_tls
    assert access.server_name_at(plain) is None
    address, access = made("h:1", tls=True, server_name="other")
    assert access.server_name_at(address) == "other"


@pytest.mark.parametrize(
    ("address", "options", "message"),
    [
        ("tensorwires://h:1", {"tls": False}, "contradicts the address"),
        ("h:1", {"ca": "x.pem"}, "are for TLS"),
        ("h:1", {"server_name": "x"}, "are for TLS"),
        ("h:1", {"tls": True, "ca": "/does/not/exist.pem"}, "cannot be read: No such file"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(
    address: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadParams, match=message):
        made(address, **options)


def test_a_file_without_certificates_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("nothing")
    with pytest.raises(BadParams, match="holds no certificates"):
        made("h:1", tls=True, ca=empty)
