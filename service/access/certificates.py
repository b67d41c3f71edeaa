"""The certificate and the key of TLS, read again when their files change, as on a renewal."""

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from service.access.watched_files import CHECK_S, ReloadedFiles

logger = logging.getLogger(__name__)


class Certificate:
    """A certificate with its key, for the server's side of TLS.

    Attributes:
        context: SSL context for Python's own TLS.
        pem: the key and the certificate, for other implementations of TLS.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        """Read the certificate and the key.

        Args:
            certificate: PEM file with the certificate and the chain up to an authority.
            key: PEM file with the private key, not encrypted.

        Raises:
            CommandError: a file cannot be read, or the key is not the certificate's.
        """
        self._certificate, self._key = certificate, key
        self.context = new_context()
        self._files = ReloadedFiles((certificate, key), self._load, "certificate", logger)

    def refresh(self) -> None:
        """Use changed files for new connections; while they cannot be used, keep the previous certificate."""
        self._files.refresh()

    @asynccontextmanager
    async def refreshed(self) -> AsyncIterator[None]:
        """Refresh the certificate regularly while the block runs."""
        refreshing = asyncio.create_task(self._refresh_regularly())
        try:
            yield
        finally:
            refreshing.cancel()

    async def _refresh_regularly(self) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            self.refresh()

    def _load(self) -> str:
        pem = self._key.read_bytes(), self._certificate.read_bytes()
        try:
            # The new one is a trial: a certificate without its key would break the context in use.
            for context in (new_context(), self.context):
                context.load_cert_chain(self._certificate, self._key, _no_password)
        except ssl.SSLError as error:
            message = "must be a certificate and its private key, in PEM and without a password"
            raise ValueError(message) from error
        self.pem = pem
        return f"reloaded the certificate from {self._certificate}"


def new_context() -> ssl.SSLContext:
    """Create an SSL context for a server of TLS 1.2 or newer."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def _no_password() -> str:
    """Return no password, which keeps OpenSSL from asking for one on the terminal."""
    return ""
