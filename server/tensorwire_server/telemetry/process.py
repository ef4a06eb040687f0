"""What this process holds of the machine."""

from __future__ import annotations

import os
import threading


def process_stats() -> dict[str, int]:
    """Return resident memory, open descriptors and threads; Linux only."""
    with open("/proc/self/statm") as statm:
        resident_pages = int(statm.read().split()[1])
    return {
        "rss_bytes": resident_pages * os.sysconf("SC_PAGE_SIZE"),
        # One of them is the listing itself.
        "fds": len(os.listdir("/proc/self/fd")) - 1,
        "threads": threading.active_count(),
    }
