"""SPEC.md says what the code does: its tables are the code's, its examples are real frames."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from tensorwire_protocol.auth import Transcript, hmac_key, key_id_of
from tensorwire_protocol.codec import decode, encode
from tensorwire_protocol.connection import FEATURE_PASSIVE, NOT_OURS
from tensorwire_protocol.errors import BY_CODE, ErrorCode, Executed
from tensorwire_protocol.frames import HEADER, HEADER_BYTES, PREFACE, Flag
from tensorwire_protocol.limits import CLIENT_LINK, MIN_FRAME_BYTES, WORKER_LINK, Limits
from tensorwire_protocol.messages import Finish, Kind, Message, field_names
from tensorwire_protocol.operations import OPERATIONS, ROLES, STREAMED
from tensorwire_protocol.roles import ACCEPTS, Role
from tensorwire_protocol.tensors import ids_checksum, pack_ids
from vectors.tagged import tagged, untagged

from .samples import EXAMPLES, cut

SPEC = (Path(__file__).parents[2] / "protocol" / "SPEC.md").read_text(encoding="utf-8")
YES_NO = {True: "yes", False: "no"}


def table(first: str, second: str) -> list[list[str]]:
    """Return the rows of the one table whose head begins with these two columns."""
    found = re.findall(rf"^\| {first} \| {second} .*\n\|[-|]+\n((?:\|.*\n)+)", SPEC, re.M)
    assert len(found) == 1, f"{len(found)} tables begin with {first}, {second}"
    return [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in found[0].splitlines()
    ]


def number(text: str) -> float:
    plain = text.replace(",", "")
    return float(plain) if "." in plain else int(plain)


# -- tables ---------------------------------------------------------------------------------------


def test_the_table_of_limits_is_that_of_the_code() -> None:
    rows = table("name", "client link")
    assert [row[0] for row in rows] == [f.name for f in fields(Limits)]
    assert {name: number(client) for name, client, *_ in rows} == asdict(Limits())
    assert asdict(Limits()) == asdict(CLIENT_LINK)
    assert {name: number(worker) for name, _, worker, _ in rows} == asdict(WORKER_LINK)
    assert all(type(number(row[1])) is type(getattr(Limits(), row[0])) for row in rows)


def test_the_least_that_a_side_must_accept_is_that_of_the_code() -> None:
    assert f"at least {MIN_FRAME_BYTES:,}" in SPEC


def test_the_table_of_errors_is_that_of_the_code() -> None:
    rows = {int(code, 16): rest for code, *rest in table("number", "name")}
    assert {code: row[0] for code, row in rows.items()} == {int(c): c.name for c in ErrorCode}
    for code, cls in BY_CODE.items():
        _, retryable, executed, _ = rows[code]
        assert retryable == YES_NO[cls.default_retryable], rows[code]
        assert executed == cls.default_executed.value, rows[code]
    assert all(row[-1] for row in rows.values())


def direction(kind: Kind, up: Role, down: Role) -> str:
    match int(kind) in ACCEPTS[down], int(kind) in ACCEPTS[up]:
        case True, True:
            return "both"
        case True, False:
            return "c>s" if up is Role.CLIENT else "g>w"
        case False, True:
            return "s>c" if up is Role.CLIENT else "w>g"
    return "-"


def test_the_table_of_kinds_is_that_of_the_code() -> None:
    rows = table("number", "kind")
    assert [(int(row[0], 16), row[1]) for row in rows] == [(int(k), k.name) for k in Kind]
    for row in rows:
        kind = Kind(int(row[0], 16))
        if kind is Kind.ERR:  # its directions depend on the stream
            continue
        client, worker = (column.split(",")[0] for column in row[2:4])
        assert client == direction(kind, Role.CLIENT, Role.SERVER), kind
        assert worker == direction(kind, Role.DISPATCHER, Role.WORKER), kind


def test_the_table_of_flags_is_that_of_the_code() -> None:
    rows = table("flag", "name")
    assert [int(row[0], 16) for row in rows] == [int(flag) for flag in Flag]


def test_the_header_is_that_of_the_code() -> None:
    rows = table("offset", "field")
    letters = {"u8": "B", "u16": "H", "u32": "I"}
    assert "<" + "".join(letters[row[2]] for row in rows) == HEADER.format
    assert [row[1] for row in rows] == ["body_len", "kind", "flags", "aux", "stream", "meta_len"]


def test_the_tables_of_operations_are_those_of_the_code() -> None:
    rows = table("op", "model")
    assert [row[0] for row in rows] == list(OPERATIONS)
    rules: dict[str, str] = {row[0]: row[2] for row in table("param", "of")}
    sampling = {row[0] for row in table("param", "of") if row[1] == "sampling"}
    for name, model, inputs, params, answer in rows:
        operation = OPERATIONS[name]
        assert model == YES_NO[operation.needs_model], name
        expected = set(re.findall(r"`?(\w+)`", params)) if "`" in params else {params}
        expected -= {"none"}
        if params.startswith("sampling"):
            expected = sampling | expected | {"wait"}
        assert expected == set(operation.params), name
        for param in operation.params:
            assert rules[param] == operation.params[param].rule
        assert (answer == "streamed") == (name in STREAMED), name
        for names in operation.inputs or ():
            assert all(f"{each}" in inputs for each in names), name


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda m: m.KIND.name)
def test_every_field_of_a_message_is_named(example: Message) -> None:
    aside = {"stream", "code"}
    names = {*field_names(example)} - aside
    if example.KIND in (Kind.PING, Kind.PONG, Kind.CREDIT, Kind.DATA):  # which have no array
        return
    assert all(f"`{name}`" in SPEC or f"[{name}:" in SPEC for name in names)


def test_small_closed_choices_are_those_of_the_code() -> None:
    for choices in ([f.value for f in Finish], [e.value for e in Executed]):
        words = ", ".join(f"`{choice}`" for choice in choices[:-1]) + f" or `{choices[-1]}`"
        assert words in SPEC
    assert ", ".join(f"`{role}`" for role in ROLES) in SPEC
    assert f"`{FEATURE_PASSIVE}`" in SPEC


# -- bytes ----------------------------------------------------------------------------------------


def test_the_preface_and_the_line_for_strangers_are_those_of_the_code() -> None:
    assert f"```\n{PREFACE.hex(' ').upper()}\n```" in SPEC
    assert f"```\n{NOT_OURS.decode()}```" in SPEC


def test_the_example_of_the_checksum_is_right() -> None:
    (block,) = re.findall(r"```checksum\n(.*?)```", SPEC, re.S)
    lines = dict(line.split(" ", 1) for line in block.splitlines())
    ids = [int(word) for word in lines["tokens"].split()]
    assert pack_ids(ids) == bytes.fromhex(lines["bytes"])
    assert ids_checksum(ids) == int(lines["crc"])


EXAMPLE = re.compile(
    r"```hex (c>s|s>c)(?: inline_bytes=(\d+))?\n(.*?)```\n\n```json\n(.*?)\n```", re.S
)
WORKED = EXAMPLE.findall(SPEC)


def test_no_example_escapes_its_test() -> None:
    assert len(WORKED) == SPEC.count("```hex") == SPEC.count("```json") == 13


@pytest.mark.parametrize(("_", "inline", "dump", "said"), WORKED)
def test_a_worked_example_is_a_frame_byte_for_byte(
    _: str, inline: str, dump: str, said: str
) -> None:
    data = bytes.fromhex("".join(line.split("|")[0] for line in dump.splitlines()))
    limits = replace(CLIENT_LINK, **({"inline_bytes": int(inline)} if inline else {}))
    message: Any = json.loads(said)
    (frame,) = cut(data)
    assert len(data) == HEADER_BYTES + int.from_bytes(data[:4], "little")
    assert tagged(decode(frame, limits)) == message
    assert b"".join(encode(untagged(message), limits)) == data


def test_the_example_of_a_login_proves_what_it_says() -> None:
    (block,) = re.findall(r"```proof\n(.*?)```", SPEC, re.S)
    said = dict(line.split(maxsplit=1) for line in block.splitlines())
    frames = {
        message["kind"]: (message, bytes.fromhex("".join(re.findall(r"^[^|\n]+", dump, re.M))))
        for _, _, dump, text in WORKED[7:9]
        for message in [json.loads(text)]
    }
    (hello, hello_frame), (welcome, welcome_frame) = frames["HELLO"], frames["WELCOME"]
    key = hmac_key(said["token"])
    transcript = Transcript(
        preface=PREFACE,
        hello=hello_frame,
        welcome=welcome_frame,
        client_nonce=bytes.fromhex(hello["auth"]["nonce"]["$bytes"]),
        server_nonce=bytes.fromhex(welcome["auth"]["nonce"]["$bytes"]),
    )
    assert hello["auth"]["id"] == key_id_of(said["token"])
    assert key == bytes.fromhex(said["key"])
    proofs = [json.loads(text)["payload"]["proof"]["$bytes"] for *_, text in WORKED[9:11]]
    assert proofs == [transcript.client_proof(key).hex(), transcript.server_proof(key).hex()]
    assert proofs == [said["client"], said["server"]]
