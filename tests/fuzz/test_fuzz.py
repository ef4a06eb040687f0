"""The fuzzer: it reaches what it must, finds what is broken, and a moment of it runs here."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest
from tensorwire_protocol.codec import decode
from tensorwire_protocol.frames import FIRST_OPTIONAL_KIND
from tensorwire_protocol.limits import WORKER_LINK
from tensorwire_protocol.messages import Kind, Request, changed
from tensorwire_protocol.roles import Role

from .__main__ import run_family
from .cases import Case, Step, What
from .conversations import converse, make_end
from .mutations import clone, mutate
from .packing import edited, pack, unpack
from .running import Runner
from .tally import Tally
from .targets import check_codecs, check_frames
from .trial import Finding, Trial, check_memory

if TYPE_CHECKING:
    from pathlib import Path

    from tensorwire_protocol.frames import Frame
    from tensorwire_protocol.limits import Limits
    from tensorwire_protocol.messages import Message

_FAMILIES = 400


@pytest.mark.timeout(600)  # a dozen seconds of work, on however busy a machine
def test_a_short_run_reaches_every_kind_and_role_and_breaks_nothing(tmp_path: Path) -> None:
    tally, rng = Tally(), Random(1)
    runner = Runner(tally, tmp_path, is_timed=False)
    for number in range(2 * _FAMILIES):
        # What is rare may be missing in one run of chance: the next change to it moves them all.
        if number >= _FAMILIES and not tally.not_reached():
            break
        run_family(runner, rng)
    assert runner.findings == {}
    assert tally.not_reached() == []


@pytest.mark.parametrize("role", Role)
def test_valid_conversations_do_no_wrong(role: Role) -> None:
    rng = Random(2)
    for _ in range(40):
        case = converse(rng, role)
        trial = Trial(case, Tally(), is_timed=False)
        trial.run()
        if not case.is_tight:
            assert trial.connection.error is None
        assert trial.messages


def test_any_bytes_are_a_case_and_come_back() -> None:
    rng = Random(3)
    for _ in range(200):
        case = Case.from_bytes(rng.randbytes(rng.randrange(80)))
        assert Case.from_bytes(case.to_bytes()) == case
        case = converse(rng)
        assert Case.from_bytes(case.to_bytes()) == case


def test_mutations_change_a_case_and_not_its_parent() -> None:
    rng = Random(4)
    changed = 0
    for _ in range(100):
        parent = converse(rng)
        before = parent.to_bytes()
        child = clone(parent)
        mutate(child, rng)
        assert parent.to_bytes() == before
        changed += child.to_bytes() != before
    assert changed > 80


def test_a_tree_packs_as_it_was_until_it_is_edited() -> None:
    meta = bytes.fromhex("93a16182a178c0a17801cb3fe0000000000000")
    assert pack(unpack(meta)) == meta
    assert len({edited(meta, Random(seed)) for seed in range(50)}) > 25


def test_a_connection_that_goes_on_after_its_last_word_is_found() -> None:
    case = Case(
        Role.SERVER, "none", False, False, "plain", 0, [Step(What.BYTES, b"GET / HTTP/1.1")]
    )
    trial = Trial(case, Tally())
    trial.run()
    trial.output += b"x"
    with pytest.raises(Finding, match="other than one line"):
        trial._check_end()


def test_an_exception_that_leaves_the_connection_is_found() -> None:
    case = converse(Random(5), Role.SERVER)
    trial = Trial(case, Tally())
    trial.connection.streams.last = "x"  # type: ignore[assignment]  # what a bug might leave
    case.steps.append(Step(What.BYTES, _request_frame()))
    with pytest.raises(Finding, match="TypeError left the connection"):
        trial.run()


def _request_frame() -> bytes:
    client = make_end(Case(Role.CLIENT, "none", False, False, "plain", 0), Role.CLIENT).connection
    client.take_output()
    client.send(Request(stream=9999, op="health", key=bytes(16)))
    return b"".join(client.take_output())


def _broken(frame: Frame, limits: Limits) -> Message:
    if frame.kind == Kind.REQ:
        raise KeyError("op")
    return decode(frame, limits)


def _other(frame: Frame, limits: Limits) -> Message:
    message = decode(frame, limits)
    if isinstance(message, Request):
        return changed(message, priority=message.priority + 1)
    return message


def _loose(frame: Frame, limits: Limits) -> Message:
    message = decode(frame, limits)
    if isinstance(message, Request):
        return changed(message, priority=1.0)
    return message


@pytest.mark.parametrize(
    ("codecs", "found"),
    [
        ({"broken": _broken}, "KeyError left the codec broken"),
        ({"plain": decode, "other": _other}, "read a frame differently"),
        ({"loose": _loose}, "priority of a decoded REQ"),
    ],
)
def test_a_codec_that_breaks_differs_or_takes_the_wrong_type_is_found(
    codecs: dict[str, object], found: str
) -> None:
    (frame,) = check_frames(_request_frame(), WORKER_LINK, 0)
    assert frame.kind < FIRST_OPTIONAL_KIND
    with pytest.raises(Finding, match=found):
        check_codecs(frame, WORKER_LINK, codecs)  # type: ignore[arg-type]


def test_what_is_found_is_kept_once_and_can_be_run_again(tmp_path: Path) -> None:
    class Broken(Runner):
        def _try(self, case: Case) -> None:
            raise Finding("no 7 is right")

    runner = Broken(Tally(), tmp_path)
    case = converse(Random(6))
    runner.run(case)
    runner.run(converse(Random(7)))
    (kept,) = tmp_path.iterdir()
    assert Case.from_bytes(kept.read_bytes()) == case
    assert f"make fuzz FUZZ_ARGS='--reproduce {kept}'" in runner.findings["no  is right"]


def test_a_valid_conversation_stays_within_its_memory() -> None:
    check_memory(converse(Random(8), Role.SERVER))
