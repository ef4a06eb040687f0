"""Names for the pages of a text, so that equal beginnings are found.

A page's name is the SHA-256 of the name of the page before it and of its own tokens; the first one
follows the name of model and tenant. So two pages have the same name only if everything up to their
end is the same, and nobody can make up a text that finds another tenant's pages.
"""

from __future__ import annotations

import hashlib
from array import array
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_sha256: Final = hashlib.sha256  # a name that compiled code need not look up


def root_digest(model: str, tenant: str) -> bytes:
    """Return what the names of a tenant's first pages follow."""
    digest = _sha256()
    for part in (model, tenant):
        text = part.encode()
        digest.update(len(text).to_bytes(4, "little"))
        digest.update(text)
    return digest.digest()


def extend_digests(
    digests: list[bytes], root: bytes, tokens: Sequence[int], num_tokens: int, page_tokens: int
) -> None:
    """Name the full pages among the first `num_tokens` that have no name in `digests` yet."""
    before = digests[-1] if digests else root
    first, end = len(digests) * page_tokens, num_tokens - num_tokens % page_tokens
    if end <= first:
        return
    packed = _pack(tokens[first:end])  # once for all pages
    page_bytes = len(packed) * page_tokens // (end - first)
    for start in range(0, len(packed), page_bytes):
        before = _sha256(before + packed[start : start + page_bytes]).digest()
        digests.append(before)


def page_digest(before: bytes, tokens: Sequence[int]) -> bytes:
    """Name a page, or a part of one, behind the page of that name."""
    return _sha256(before + _pack(tokens)).digest()


def _pack(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()
