"""Dropping paragraphs that say again what an earlier one said.

The standard library repeats itself: licence headers, C and Python twins, topics that quote whole
others. Left in, repeats would be learnt by heart, and would leak across the held-out split.
"""

from __future__ import annotations

import re

SHINGLE_WORDS = 8
MIN_PARAGRAPH_CHARS = 40  # shorter ones ("Returns:") repeat in honest text

_WORD = re.compile(r"\w+")
_PARAGRAPHS = re.compile(r"\n{2,}")


class NearDuplicates:
    """Remembers all text it was shown, as runs of eight words."""

    def __init__(self) -> None:
        self._shingles: set[str] = set()
        self._texts: set[str] = set()

    def keep_new(self, text: str) -> str:
        """Return `text` less the paragraphs of which half or more was seen; remember the rest."""
        normal = " ".join(_WORD.findall(text.lower()))
        if normal in self._texts:
            return ""
        self._texts.add(normal)
        return "\n\n".join(part for part in _PARAGRAPHS.split(text) if self._is_new(part))

    def _is_new(self, paragraph: str) -> bool:
        if len(paragraph) < MIN_PARAGRAPH_CHARS:
            return True
        words = _WORD.findall(paragraph.lower())
        num_shingles = max(1, len(words) - SHINGLE_WORDS + 1)
        shingles = {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(num_shingles)}
        is_new = 2 * len(shingles & self._shingles) < len(shingles)
        self._shingles |= shingles
        return is_new
