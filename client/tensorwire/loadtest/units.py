"""Numbers with units, as they are written on the command line: `500ms`, `30s`, `1%`."""

from __future__ import annotations

import math
import re
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING

from tensorwire_protocol.errors import BadParams

if TYPE_CHECKING:
    from collections.abc import Iterator

# Exact: 700 times 1e-3 is more than 0.7, and one request more would be due before it.
_SECONDS = {
    "us": Fraction(1, 10**6),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "": Fraction(1),
}
_DURATION = re.compile(r"([0-9]*\.?[0-9]+)(us|ms|s|m|)")


def parse_seconds(text: str) -> float:
    """Return the seconds that `500ms`, `30s`, `2m` or a bare number of seconds mean.

    Raises:
        BadParams: it is no duration.
    """
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise BadParams(f"{text!r} is no duration: write 500ms, 30s or 2m")
    return float(Fraction(found[1]) * _SECONDS[found[2]])


def parse_share(text: str) -> float:
    """Return the share from 0 to 1 that `5%` or `0.05` means.

    Raises:
        BadParams: it is no share.
    """
    number = text.strip()
    share = (
        parse_number(number.removesuffix("%")) / 100
        if number.endswith("%")
        else parse_number(number)
    )
    if not 0 <= share <= 1:
        raise BadParams(f"{text!r} is no share: write 5% or 0.05")
    return share


def parse_number(text: str) -> float:
    """Return a finite number of at least 0.

    Raises:
        BadParams: it is none.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise BadParams(f"{text!r} is not a number of at least 0")
    return number


def parse_count(text: str, *, least: int = 0) -> int:
    """Return a whole number of at least `least`.

    Raises:
        BadParams: it is none.
    """
    number = text.strip()
    if not (number.isascii() and number.isdigit() and int(number) >= least):
        raise BadParams(f"{text!r} is not a whole number of at least {least}")
    return int(number)


@contextmanager
def naming(option: str) -> Iterator[None]:
    """Say in what is wrong which option it was."""
    try:
        yield
    except BadParams as error:
        raise BadParams(f"{option}: {error.message}") from error


def parse_named(text: str, known: tuple[str, ...]) -> dict[str, str]:
    """Return what `a=1,b=2` says, by name.

    Raises:
        BadParams: a name is not among `known`, or has no value.
    """
    values: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        name, separator, value = part.partition("=")
        if name.strip() not in known or not separator:
            raise BadParams(f"{part!r} is none of {', '.join(f'{name}=…' for name in known)}")
        values[name.strip()] = value
    return values
