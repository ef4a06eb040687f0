"""The options of a torch-free engine: `oracle:step_ms=5,context=4096`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def parse_options(source: str, defaults: Mapping[str, float]) -> dict[str, float]:
    """Return the options that `source` names, over `defaults`.

    Raises:
        ValueError: an unknown option, or a value that is no number of at least 0.
    """
    engine, _, text = source.partition(":")
    options = dict(defaults)
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in defaults:
            raise ValueError(f"{engine} has no option {name!r}; it has {', '.join(defaults)}")
        try:
            options[name] = float(value)
        except ValueError:
            options[name] = -1.0
        if not options[name] >= 0:
            raise ValueError(f"{engine}: {name} must be a number of at least 0, not {value!r}")
    return options
