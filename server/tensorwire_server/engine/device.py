"""Which device a model runs on, and in which number format."""

from __future__ import annotations

import torch

from tensorwire_server.engine.errors import ModelLoadError

DEVICES = ("auto", "cpu", "cuda")


def pick_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        ModelLoadError: the name is unknown, or there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in DEVICES or (index and not (kind == "cuda" and index.isdecimal())):
        raise ModelLoadError(f"device {name!r} is unknown; known are {', '.join(DEVICES)}")
    if kind == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= found:
            raise ModelLoadError(f"device {name!r} was asked for, but torch finds {found} here")
    return torch.device(name)


def pick_dtype(device: torch.device, stored: torch.dtype | None) -> torch.dtype:
    """Return the number format to compute in, given the one the model is stored in."""
    # Measured on AVX2: bf16 and fp16 matmul run in a reference loop, 150x slower than float32.
    if device.type == "cpu" or stored is None:
        return torch.float32
    return stored
