"""What can go wrong while a model is being loaded."""

from __future__ import annotations


class ModelLoadError(Exception):
    """The model cannot be served; the message is one sentence for the person who named it."""
