"""Lets the raw ping-pong in C do jobs as every side does them.

Usage: python -m wire.raw BINARY HOST:PORT
"""

from __future__ import annotations

import subprocess
import sys

from wire.load import Figures, Job, do_jobs


def main() -> None:
    """Do jobs until stdin ends."""
    binary, address = sys.argv[1:]
    port = address.rsplit(":", 1)[1]

    def do(job: Job) -> Figures:
        command = [binary, "ping", port, str(job.size_bytes), str(job.seconds)]
        count, seconds, p50_us, p99_us = subprocess.check_output(command, text=True).split()
        return Figures(
            units=int(count),
            seconds=float(seconds),
            p50_us=float(p50_us),
            p99_us=float(p99_us),
            cpu_us={},
        )

    do_jobs(do)


if __name__ == "__main__":
    main()
