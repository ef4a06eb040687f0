"""What this process holds of the machine."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path


def process_stats() -> dict[str, int]:
    """Return process id, open descriptors, threads, tasks and resident memory; Linux only."""
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "pid": os.getpid(),
        "fds": len(os.listdir("/proc/self/fd")) - 1,  # the listing has one of its own
        "threads": threading.active_count(),
        "asyncio_tasks": len(asyncio.all_tasks()),
        "rss_bytes": resident_pages * os.sysconf("SC_PAGE_SIZE"),
    }
