"""Rebuild the vectors beside this file: `python protocol/vectors/generate.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vectors.making.bodies import body_scripts
from vectors.making.frames import frame_vectors
from vectors.making.scripts import script_vectors

if TYPE_CHECKING:
    from collections.abc import Iterable

FOLDER = Path(__file__).parent


def lines(vectors: Iterable[dict[str, Any]]) -> str:
    """Return vectors as JSON lines, the same bytes on every machine."""
    return "".join(json.dumps(v, ensure_ascii=True, allow_nan=False) + "\n" for v in vectors)


def files() -> dict[str, str]:
    """Return what each file must hold, by name."""
    scripts = [*script_vectors(), *(script.vector() for script in body_scripts())]
    return {"frames.jsonl": lines(frame_vectors()), "scripts.jsonl": lines(scripts)}


if __name__ == "__main__":
    for name, text in files().items():
        (FOLDER / name).write_text(text, encoding="ascii")
        print(f"{name}: {text.count(chr(10))} vectors, {len(text)} bytes")
