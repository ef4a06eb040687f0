"""The identity of a model's files."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from tensorwire_server.models.manifest import manifest_of, revision_of

if TYPE_CHECKING:
    from pathlib import Path


def write_model(folder: Path) -> Path:
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "1_Pooling" / "config.json").write_bytes(b"[]")
    (folder / "README.md").write_bytes(b"about")
    return folder


def test_a_manifest_names_every_file_that_counts_with_bytes_and_hash(tmp_path: Path) -> None:
    inner, outer = (hashlib.sha256(content).hexdigest() for content in (b"[]", b"{}"))
    assert manifest_of(write_model(tmp_path)) == (
        f"1_Pooling/config.json 2 {inner}\nconfig.json 2 {outer}\n"
    )


def test_a_revision_follows_the_content_and_the_names_of_files_only(tmp_path: Path) -> None:
    first, second = write_model(tmp_path / "a"), write_model(tmp_path / "b")
    (second / "README.md").write_bytes(b"other words")
    assert revision_of(first) == revision_of(second)
    (second / "config.json").write_bytes(b"{ }")
    assert revision_of(first) != revision_of(second)
    (second / "config.json").rename(second / "other.json")
    (second / "other.json").write_bytes(b"{}")
    assert revision_of(first) != revision_of(second)
