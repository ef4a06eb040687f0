"""What a peer with limits of its own is sent: nothing that it would cut the connection for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tensorwire_protocol.codec import PLAIN
from tensorwire_protocol.codec.typed import TYPED
from tensorwire_protocol.connection import Connection
from tensorwire_protocol.errors import OutputTooLarge, TooLarge
from tensorwire_protocol.limits import CLIENT_LINK, WORKER_LINK, Limits
from tensorwire_protocol.messages import EncodedTerminal, Request, Result
from tensorwire_protocol.roles import Role

from .samples import request
from .test_transfers import exchange


def ends(
    *, client: Limits | None = None, server: Limits | None = None, codec: Any = PLAIN
) -> tuple[Connection, Connection]:
    """Return two ends that have greeted each other, one stream open."""
    asking = Connection(Role.CLIENT, limits=client, codec=codec)
    answering = Connection(Role.SERVER, limits=server, codec=codec)
    asking.send(request(1))
    exchange(asking, answering)
    return asking, answering


@pytest.mark.parametrize("codec", [PLAIN, TYPED], ids=["plain", "typed"])
@pytest.mark.parametrize(("inline", "in_frame"), [(15, False), (16, True), (1 << 20, True)])
def test_a_small_array_leaves_inline_only_for_a_peer_that_takes_it(
    inline: int, in_frame: bool, codec: Any
) -> None:
    client, server = ends(client=Limits(inline_bytes=inline), codec=codec)
    server.send(Result(stream=1, outputs={"x": np.zeros(16, np.uint8)}))
    sent = b"".join(server.take_output())
    assert (sent[6] == 0) == in_frame  # no segments
    (answer,) = client.feed(sent)
    assert isinstance(answer, Result)
    assert client.error is None


def test_no_array_is_inline_only_because_a_peer_would_take_it() -> None:
    client, server = ends(client=Limits(inline_bytes=1 << 20))
    server.send(Result(stream=1, outputs={"x": np.zeros(CLIENT_LINK.inline_bytes + 1, np.uint8)}))
    assert b"".join(server.take_output())[6] == 1
    assert client.error is None


@pytest.mark.parametrize(
    ("narrow", "outputs", "extra", "sentence"),
    [
        ({"inline_bytes": 15}, {"x": np.zeros(16, np.uint8)}, {}, "inline tensor may have 15"),
        ({"key_bytes": 24}, {"x" * 25: 1}, {}, "24 bytes"),
        ({"meta_depth": 3}, {"x": [[1]]}, {}, "deep"),
        ({"container_items": 40}, {}, {"x": [1] * 41}, "within the limits"),
        ({}, {}, {"x": [1] * 4097}, "within the limits"),
        ({"segments": 2}, {name: np.arange(3000) for name in "abc"}, {}, "3 arrays .* accepts 2"),
    ],
)
def test_an_answer_written_for_others_is_refused_where_a_peer_would_not_read_it(
    narrow: dict[str, int], outputs: dict[str, Any], extra: dict[str, Any], sentence: str
) -> None:
    client, server = ends(client=Limits(**narrow), codec=TYPED)
    result = Result(stream=1, outputs=outputs, extra=extra)
    encoded = EncodedTerminal(stream=1, kind=result.KIND, buffers=PLAIN.encode(result, WORKER_LINK))
    with pytest.raises(OutputTooLarge, match=sentence):
        server.send(encoded)
    assert server.is_open(1)
    assert not server.pending_bytes
    assert client.error is None


@pytest.mark.parametrize("is_kept", [False, True])
def test_an_answer_with_segments_is_looked_into_as_it_was_made_and_as_it_is_kept(
    is_kept: bool,
) -> None:
    client, server = ends(client=Limits(key_bytes=24), codec=TYPED)
    result = Result(stream=1, outputs={"x": np.arange(2000), "y": np.arange(300)})
    buffers = PLAIN.encode(result, WORKER_LINK)
    encoded = EncodedTerminal(stream=1, kind=result.KIND, buffers=buffers)
    server.send(EncodedTerminal.of(b"".join(buffers), 1) if is_kept else encoded)
    (answer,) = client.feed(b"".join(server.take_output()))
    assert isinstance(answer, Result)
    np.testing.assert_array_equal(answer.outputs["y"], np.arange(300))


@pytest.mark.parametrize("codec", [PLAIN, TYPED], ids=["plain", "typed"])
@pytest.mark.parametrize("num_items", [4095, 4096])
def test_what_is_just_within_the_usual_limits_is_sent(num_items: int, codec: Any) -> None:
    client, server = ends(codec=codec)
    server.send(Result(stream=1, extra={"x": [1] * num_items}))
    (answer,) = client.feed(b"".join(server.take_output()))
    assert isinstance(answer, Result)
    assert len(answer.extra["x"]) == num_items


def test_a_request_that_a_narrow_server_would_refuse_is_not_sent() -> None:
    client, _ = ends(server=Limits(key_bytes=24))
    with pytest.raises(TooLarge, match="key"):
        client.send(Request(stream=2, op="infer", key=bytes(16), inputs={"x" * 25: 1}))
    assert client.open_streams() == [1]
    client.send(Request(stream=2, op="infer", key=bytes(16), inputs={"x" * 24: 1}))
