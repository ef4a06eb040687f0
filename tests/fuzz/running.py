"""One execution: all doors, and what is broken kept where it can be looked at."""

from __future__ import annotations

import hashlib
import traceback
from typing import TYPE_CHECKING

from .targets import check_case
from .trial import Finding, Trial, check_cuts, check_memory

if TYPE_CHECKING:
    from pathlib import Path

    from .cases import Case
    from .tally import Tally

_CUTS_EVERY = 8  # executions
_MEMORY_EVERY = 64  # executions: watching allocations takes several times as long
_LONG_HEADERS = b"\xdc\xdd\xde\xdf"  # of arrays and maps in MessagePack
_TRIES = 3  # a slow call has to be slow each time: the machine may be busy


class Runner:
    """Runs cases, counts, and keeps one input for each place that breaks."""

    def __init__(self, tally: Tally, folder: Path | None, *, is_timed: bool = True) -> None:
        self._tally, self._folder, self._is_timed = tally, folder, is_timed
        self.findings: dict[str, str] = {}  # where it broke: in a sentence

    def run(self, case: Case) -> None:
        """Run a case; what it breaks is in `findings`."""
        try:
            self._try(case)
        except Finding as finding:
            self._keep(case, finding)

    def _try(self, case: Case) -> None:
        for i in range(_TRIES):
            try:
                Trial(case, self._tally, is_timed=self._is_timed).run()
            except Finding as finding:
                if not finding.is_slow or i == _TRIES - 1:
                    raise
            else:
                break
        check_case(case)
        if self._tally.executions % _CUTS_EVERY == 0:
            check_cuts(case)
        if self._tally.executions % _MEMORY_EVERY == 0 or _promises_much(case):
            check_memory(case)

    def _keep(self, case: Case, finding: Finding) -> None:
        where = _place(finding)
        if where in self.findings:
            return
        self.findings[where] = str(finding)
        if self._folder is not None:
            data = case.to_bytes()
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{hashlib.sha256(where.encode()).hexdigest()[:12]}.case"
            path.write_bytes(data)
            self.findings[where] += f"\n    make fuzz FUZZ_ARGS='--reproduce {path}'"


def _promises_much(case: Case) -> bool:
    """Say if there may be many containers that announce more than comes."""
    return any(len(s.data) - len(s.data.translate(None, _LONG_HEADERS)) > 50 for s in case.steps)


def _place(finding: Finding) -> str:
    """Return where it broke, so that the same fault is reported once."""
    cause = finding.__cause__
    if cause is None:
        return str(finding).translate({ord(digit): None for digit in "0123456789"})
    frame = traceback.extract_tb(cause.__traceback__)[-1]
    return f"{type(cause).__name__} {frame.filename}:{frame.lineno}"
