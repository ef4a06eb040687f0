"""The README's Python runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .serving import RunningServer

pytestmark = pytest.mark.slow

README = Path(__file__).parents[2] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_readme_has_an_example_for_each_client() -> None:
    assert ["AsyncClient" in example for example in EXAMPLES] == [False, True]


@pytest.mark.parametrize("example", EXAMPLES, ids=["sync", "async"])
def test_an_example_of_the_readme_runs(real_models: RunningServer, example: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", example],
        env=os.environ | {"TENSORWIRE_ADDRESS": real_models.address},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 3
