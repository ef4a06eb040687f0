"""The version of the installed distribution."""

from __future__ import annotations


def version() -> str:
    """Return the distribution's version, or "unknown" when it runs without being installed."""
    # Finding it scans the installed packages: nothing an import should wait for.
    from importlib import metadata

    try:
        return metadata.version("tensorwire")
    except metadata.PackageNotFoundError:
        return "unknown"
