from __future__ import annotations

import pytest
from tensorwire.loadtest.verifying import Faults, find_faults

WHOLE = [5, 9, 2, 7, 4, 1, 8, 3]


@pytest.mark.parametrize(
    ("got", "faults"),
    [
        ([5, 9, 2, 7, 4, 1, 8, 3], Faults()),
        ([5, 9, 2, 4, 1, 8, 3], Faults(lost=1)),
        ([5, 9, 2, 7, 4], Faults(lost=3)),
        ([], Faults(lost=8)),
        ([5, 9, 2, 2, 7, 4, 1, 8, 3], Faults(repeated=1)),
        ([5, 9, 2, 7, 2, 7, 4, 1, 8, 3], Faults(repeated=2)),
        ([5, 9, 7, 2, 4, 1, 8, 3], Faults(swapped=1)),
        ([5, 9, 2, 7, 4, 1, 8, 3, 6], Faults(foreign=1)),
        ([5, 9, 6, 7, 4, 1, 8, 3], Faults(lost=1, foreign=1)),
    ],
)
def test_each_fault_is_called_by_its_name(got: list[int], faults: Faults) -> None:
    assert find_faults(WHOLE, got) == faults


def test_a_repeated_token_among_equal_ones_is_found() -> None:
    assert find_faults([1, 1, 2], [1, 1, 1, 2]) == Faults(repeated=1)
