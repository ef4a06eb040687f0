"""The identity of a model's files: what `name@revision` means."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# What a model is loaded from; cards, pictures and licences do not change what it answers.
SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")
# Where `compress` says what it did (dates, speeds): nothing that a model is loaded from.
REPORT_FOLDER = "compression"
MIN_DIGITS = 8  # fewer could name another model's files by chance


def manifest_of(folder: Path) -> str:
    """Return one line for each file: its path in the folder, bytes, and SHA-256."""
    files = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix in SUFFIXES
        and path.is_file()
        and path.relative_to(folder).parts[0] != REPORT_FOLDER
    )
    return "".join(_line(folder, name) for name in files)


def _line(folder: Path, name: str) -> str:
    file = folder / name
    return f"{name} {file.stat().st_size} {sha256_of(file)}\n"


def revision_of(folder: Path) -> str:
    """Return the SHA-256 of the manifest, 64 hex digits; reads every file once."""
    return hashlib.sha256(manifest_of(folder).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
