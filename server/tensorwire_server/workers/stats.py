"""Counts of this process that must return to where they were."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path


def process_stats() -> dict[str, int]:
    """Return open file descriptors, threads, asyncio tasks and resident memory."""
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "pid": os.getpid(),
        "fds": len(os.listdir("/proc/self/fd")) - 1,  # the listing has one of its own
        "threads": threading.active_count(),
        "asyncio_tasks": len(asyncio.all_tasks()),
        "rss_bytes": resident_pages * os.sysconf("SC_PAGE_SIZE"),
    }
