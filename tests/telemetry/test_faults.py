from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tensorwire_server.telemetry.faults import log_fault

if TYPE_CHECKING:
    import pytest


def test_the_id_that_a_peer_is_told_finds_the_details_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = logging.getLogger("test")
    log_id = log_fault(log, "step_failed", ValueError("secret path"), model="m")
    assert f"step_failed log_id={log_id} model=m" in caplog.text
    assert "ValueError: secret path" in caplog.text
