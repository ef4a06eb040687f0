"""On what was measured."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

_PACKAGES = ("tensorwire", "torch", "transformers", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    return {"python": platform.python_version()} | {
        package: metadata.version(package) for package in _PACKAGES
    }


def describe_machine() -> dict[str, str]:
    """Return what speed depends on."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory_bytes / 2**30:.1f} GiB",
    }
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
    return facts


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"  # on ARM it has no name there
