"""TLS on the port: version 1.3 and nothing older."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorwire_server.config import TlsConfig

HANDSHAKE_S = 5.0  # as long as a greeting may take
SHUTDOWN_S = 5.0


class TlsError(ValueError):
    """The certificate or key cannot be used; the message is one sentence for a person."""


def load_tls(config: TlsConfig) -> ssl.SSLContext | None:
    """Return the server's TLS context, or None where TLS is not configured.

    Raises:
        TlsError: the files cannot be read, or do not belong together.
    """
    if config.cert is None or config.key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        # An empty password, or OpenSSL would ask for one on the terminal.
        context.load_cert_chain(config.cert, config.key, password="")
    except ssl.SSLError as error:
        raise TlsError(
            f"tls.cert {config.cert!r} and tls.key {config.key!r} are no PEM certificate and its"
            f" unencrypted key ({error.reason or 'unreadable'})"
        ) from error
    except OSError as error:
        raise TlsError(
            f"tls.cert {config.cert!r} or tls.key {config.key!r} cannot be read: {error.strerror}"
        ) from error
    return context
