"""The revision of a model's files, read beside the loading of the model."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from tensorwire_server.models.manifest import revision_of

log = logging.getLogger(__name__)


class Hashing:
    """Hashes a folder on a thread: hashing and importing torch hardly hinder each other."""

    def __init__(self, source: str) -> None:
        self._folder = Path(source)
        self._revision: str | None = None
        self._thread = threading.Thread(target=self._run, name="hashing", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        if not self._folder.is_dir():
            return  # a torch-free engine, or a hub's name, whose files are elsewhere
        try:
            self._revision = revision_of(self._folder)
        except OSError as error:
            log.warning("revision_unknown folder=%s reason=%s", self._folder, error)

    def revision(self) -> str | None:
        """Wait for the end and return the revision; None if the source is no readable folder."""
        self._thread.join()
        return self._revision
