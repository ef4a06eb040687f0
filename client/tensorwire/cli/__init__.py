"""The `tensorwire` command: `tensorwire.cli:main` is its console script."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        from tensorwire.cli.app import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich", "click"):
            raise
        print(
            "error: the command line needs typer and rich: pip install 'tensorwire[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
    sys.exit(run())
