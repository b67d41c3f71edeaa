"""The certificate and the key of TLS: files that are read again when they change, as when a certificate is renewed."""

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from service.access.watched_files import CHECK_S, WatchedFiles
from service.errors import CommandError

logger = logging.getLogger(__name__)


class Certificate:
    """A certificate with its key, and what speaks TLS with them.

    Attributes:
        context: of Python's own TLS.
        pem: the key and the certificate, for others'.
    """

    def __init__(self, certificate: Path, key: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Read both.

        Args:
            certificate: PEM file with the certificate and those up to an authority.
            key: PEM file with its private key, not encrypted.
            clock: monotonic, in seconds.

        Raises:
            CommandError: one cannot be read, or they do not belong together.
        """
        self._certificate, self._key = certificate, key
        self._files = WatchedFiles((certificate, key), clock)
        self.context = new_context()
        try:
            self._load(self.context)
            self.pem = self._read()
        except OSError as error:  # what ssl raises is one, too
            raise CommandError(f"{certificate}, {key}: {_reason(error)}") from error

    def refresh(self) -> None:
        """Serve new connections with the files as they are now; where they cannot be used, as before."""
        if not self._files.have_changed():
            return
        try:
            self._load(new_context())  # first: a certificate without its key would spoil the one in use
            self._load(self.context)
            self.pem = self._read()
        except OSError as error:
            logger.error("the certificate stays as it was: %s: %s", self._certificate, _reason(error))
        else:
            logger.info("read the certificate anew from %s", self._certificate)

    @asynccontextmanager
    async def kept_fresh(self) -> AsyncIterator[None]:
        """Refresh as long as the block lasts."""
        refreshing = asyncio.create_task(self._refresh_regularly())
        try:
            yield
        finally:
            refreshing.cancel()

    async def _refresh_regularly(self) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            self.refresh()

    def _read(self) -> tuple[bytes, bytes]:
        return self._key.read_bytes(), self._certificate.read_bytes()

    def _load(self, context: ssl.SSLContext) -> None:
        context.load_cert_chain(self._certificate, self._key, _no_password)


def new_context() -> ssl.SSLContext:
    """Make a server's side of TLS 1.2 or newer."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def _no_password() -> str:
    """Keep OpenSSL from asking the terminal for one."""
    return ""


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return "they are no certificate and its key, in PEM and without a password"
    return error.strerror or str(error)
