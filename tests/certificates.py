"""Self-signed certificates for one test run."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Certificate:
    """PEM files."""

    cert: Path
    key: Path


def make_certificate(folder: Path, names: str = "DNS:localhost,IP:127.0.0.1") -> Certificate:
    """Make a certificate for some names, with its key."""
    made = Certificate(folder / "cert.pem", folder / "key.pem")
    words = ["openssl", "req", "-x509", "-nodes", "-days", "2", "-newkey", "ec"]
    words += ["-pkeyopt", "ec_paramgen_curve:P-256"]
    words += ["-subj", "/CN=tensorwire-test", "-addext", f"subjectAltName={names}"]
    subprocess.run(
        [*words, "-keyout", str(made.key), "-out", str(made.cert)],
        check=True,
        capture_output=True,
        timeout=30,
    )
    return made
