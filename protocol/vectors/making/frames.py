"""The golden frames: what each must decode to, or how it must be refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vectors.making.answers import batches, of_a_stream
from vectors.making.greetings import greetings, of_the_connection
from vectors.making.headers import headers
from vectors.making.limits import at_each_bound, segment_bounds
from vectors.making.metas import readable
from vectors.making.requests import requests
from vectors.making.tensors import tensors
from vectors.making.worker_link import worker_link

if TYPE_CHECKING:
    from vectors.making.building import Vector


def frame_vectors() -> list[Vector]:
    """Return all golden frames, in the order of the file."""
    groups = [
        greetings(), of_the_connection(), requests(), of_a_stream(), batches(), worker_link(),
        tensors(), readable(), headers(), at_each_bound(), segment_bounds(),
    ]  # fmt: skip
    vectors = [vector for group in groups for vector in group]
    names = [vector["name"] for vector in vectors]
    assert len(set(names)) == len(names), sorted(n for n in set(names) if names.count(n) > 1)
    return vectors
