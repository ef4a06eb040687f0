"""What a peer may do to this side for nothing, and how long its frames may take."""

from __future__ import annotations

import pytest
from tensorwire_protocol.conduct import CancelPace, Conduct, Silence, is_fault
from tensorwire_protocol.connection import FEATURE_CREDIT, Connection
from tensorwire_protocol.errors import ErrorCode, Flood, PeerSilent
from tensorwire_protocol.frames import FrameDecoder
from tensorwire_protocol.limits import Limits
from tensorwire_protocol.messages import Cancel, Credit, Failure, Goaway, Message, Pong
from tensorwire_protocol.roles import Role

from .samples import request, wire
from .test_connection import open_end, open_pair, output, sent

FEW = Limits(fault_burst=4, faults_per_s=2.0)


@pytest.mark.parametrize("code", ErrorCode)
def test_a_fault_is_an_error_that_the_asking_side_has_made(code: ErrorCode) -> None:
    blameless = {
        "BUSY", "DRAINING", "QUOTA", "MODEL_LOADING", "WORKER_LOST", "OUT_OF_MEMORY",
        "MODEL_ERROR", "NUMERIC", "INTERNAL", "DEADLINE", "CANCELLED",
        "HASH_MISMATCH", "MISSING_CHUNKS", "PATH_REFUSED", "STORAGE_FULL",
    }  # fmt: skip
    is_of_the_connection = int(code) >> 8 == 1
    assert is_fault(int(code)) == (code.name not in blameless and not is_of_the_connection)


def test_faults_come_back_with_time_up_to_the_burst() -> None:
    conduct = Conduct(FEW)
    for now in (100.0, 100.0, 100.0, 100.0, 100.5, 1000.0, 1000.0, 1000.0, 1000.0):
        conduct.note_fault(now)
    with pytest.raises(Flood, match="2 times a second"):
        conduct.note_fault(1000.4)


def test_pings_and_faults_have_allowances_of_their_own() -> None:
    conduct = Conduct(Limits(fault_burst=1, ping_burst=1))
    conduct.note_fault(0.0)
    conduct.note_ping(0.0)
    with pytest.raises(Flood):
        conduct.note_ping(0.0)


def test_only_the_frame_that_is_unfinished_now_is_timed() -> None:
    conduct = Conduct(Limits(frame_grace_s=10, frame_bytes_per_s=100))
    decoder = FrameDecoder(max_frame_bytes=1000)

    def receive(data: bytes, now: float) -> None:
        for byte in data:
            decoder.get_buffer()[0] = byte
            decoder.received(1)
            decoder.next_frame()
        conduct.note_unfinished(decoder, now)

    receive(wire(request(1))[:3], 0.0)
    receive(wire(request(1))[3:20], 9.0)  # still the first frame
    with pytest.raises(Flood, match="was not complete after 11 s"):
        conduct.check_unfinished(decoder, 11.0)
    receive(wire(request(1))[20:], 9.5)
    receive(wire(request(2))[:3], 9.6)
    conduct.check_unfinished(decoder, 19.6)
    with pytest.raises(Flood):
        conduct.check_unfinished(decoder, 19.9)


def test_a_client_s_errors_do_not_count_against_its_server() -> None:
    client = open_end(Role.CLIENT)
    for stream in range(1, 300):
        client.send(request(stream))
        client.feed(wire(Failure(stream=stream, code=int(ErrorCode.BAD_META), message="")))
    assert not client.is_closed


@pytest.mark.parametrize("message", [Cancel(stream=1), Pong(), Goaway()])
def test_what_makes_the_server_work_for_nothing_is_a_fault(message: Message) -> None:
    server = open_end(Role.SERVER, FEW)
    server.feed(wire(message) * 4)
    assert not server.is_closed
    server.feed(wire(message))
    assert isinstance(server.error, Flood)


def test_credit_for_streams_that_have_ended_is_a_fault_and_other_credit_is_not() -> None:
    features = (FEATURE_CREDIT,)
    server = Connection(Role.SERVER, limits=FEW, features=features)
    server.feed(output(Connection(Role.CLIENT, features=features)))
    server.feed(wire(request(1)) + wire(Credit(stream=1, amount=1)) * 20)
    server.feed(wire(Credit(stream=7, amount=1)) * 4)
    assert not server.is_closed
    server.feed(wire(Credit(stream=7, amount=1)))
    assert isinstance(server.error, Flood)


def test_a_refusal_that_is_one_too_many_closes_the_connection_behind_it() -> None:
    server = open_end(Role.SERVER, FEW)
    server.feed(b"".join(wire(request(i)) for i in range(1, 7)))
    for stream in range(1, 6):
        server.send(Failure(stream=stream, code=int(ErrorCode.BAD_PARAMS), message=""))
    *refusals, goaway, flood = sent(server)
    assert len(refusals) == 5
    assert isinstance(goaway, Goaway)
    assert (goaway.code, goaway.last_stream) == (ErrorCode.FLOOD, 6)
    assert isinstance(flood, Failure)
    assert (flood.stream, flood.code) == (0, ErrorCode.FLOOD)


# -- this side's own cancels ----------------------------------------------------------------------


def test_many_cancels_at_once_are_spread_and_all_arrive() -> None:
    client, server = open_pair(far=FEW)
    for stream in range(1, 21):
        client.send(request(stream))
    server.feed(output(client))
    for stream in range(1, 21):
        client.send(Cancel(stream=stream))
    heard = []
    for second in range(30):
        heard += server.feed(output(client), float(second))
        client.on_timer(float(second))
    assert [m.stream for m in heard if isinstance(m, Cancel)] == list(range(1, 21))
    assert not server.is_closed


def test_a_cancel_that_waited_too_long_is_not_sent() -> None:
    pace = CancelPace(FEW)
    assert [pace.may_go(Cancel(stream=i), 0.0) for i in range(4)] == [True, True, False, False]
    assert [cancel.stream for cancel in pace.take({3}, 5.0)] == [3]
    assert pace.take({2, 3}, 100.0) == []


def test_a_peer_that_allows_almost_nothing_is_sent_cancels_still() -> None:
    assert CancelPace(Limits(fault_burst=0)).may_go(Cancel(stream=1), 0.0)


def test_a_closed_connection_sends_no_late_cancels() -> None:
    client, _ = open_pair(far=FEW)
    for stream in range(1, 5):
        client.send(request(stream))
        client.send(Cancel(stream=stream))
    client.close()
    output(client)
    client.on_timer(50.0)
    assert output(client) == b""


def test_after_silence_a_ping_is_due_once_in_a_while_and_then_the_peer_is_given_up() -> None:
    silence = Silence(Limits(ping_after_s=20.0, dead_after_s=60.0))
    due = [now for now in range(100, 160) if silence.is_ping_due(now, silent_s=now - 100)]
    assert due == [120, 140]
    with pytest.raises(PeerSilent, match="60 s"):
        silence.is_ping_due(160, silent_s=60)
