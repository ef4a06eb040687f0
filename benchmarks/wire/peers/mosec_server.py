"""The same echo in one mosec worker, behind its front written in Rust. Usage: PORT"""

from __future__ import annotations

import sys
from typing import Any

from mosec import Server, Worker  # type: ignore[import-not-found,unused-ignore]
from mosec.mixin import MsgpackMixin  # type: ignore[import-not-found,unused-ignore]


class Echo(MsgpackMixin, Worker):  # type: ignore[misc,unused-ignore]
    """Gets its input decoded, has its output encoded."""

    def forward(self, data: Any) -> Any:
        """Return the message."""
        return data


if __name__ == "__main__":
    # mosec reads its settings from the command line.
    address = ["--address", "127.0.0.1", "--port", sys.argv[1]]
    sys.argv = ["mosec", *address, "--log-level", "error", "--timeout", "30000"]
    server = Server()
    server.append_worker(Echo, num=1)
    server.run()
