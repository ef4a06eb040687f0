"""Which device a model runs on, and in which number format."""

from __future__ import annotations

from pathlib import Path

import torch

from tensorwire_server.engine.errors import ModelLoadError

DEVICES = ("auto", "cpu", "cuda")
# Limit and use, for control groups of both versions.
_GROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


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


def has_one_dnn(device: torch.device, dtype: torch.dtype) -> bool:
    """Say if oneDNN multiplies such numbers in this place."""
    found: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return found and device.type == "cpu" and dtype == torch.float32


def free_bytes(device: torch.device) -> int:
    """Return the memory of a device that nobody uses now, within this process's control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [_meminfo_bytes("MemAvailable"), _group_bytes()]
    return min(limit for limit in limits if limit is not None)


def _meminfo_bytes(name: str) -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/meminfo does not say {name}")


def _group_bytes() -> int | None:
    """Return what the control group leaves, as containers have it; None without a limit."""
    for limit, used in _GROUP_FILES:
        try:
            limit_bytes = Path(limit).read_text(encoding="ascii").strip()
            if limit_bytes.isdigit():  # else "max"
                return max(0, int(limit_bytes) - int(Path(used).read_text(encoding="ascii")))
        except OSError:
            continue
    return None
