import logging
import ssl
from pathlib import Path

import pytest
import trustme

from service.access.certificates import Certificate
from service.access.watched_files import CHECK_S
from service.errors import CommandError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Files:
    """A certificate and its key, issued by an authority of the test's."""

    def __init__(self, folder: Path) -> None:
        self.authority, self.certificate, self.key = trustme.CA(), folder / "tls.crt", folder / "tls.key"
        self.issue("first.example")

    def issue(self, name: str, *, is_whole: bool = True) -> None:
        issued = self.authority.issue_cert(name)
        self.certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        if is_whole:
            issued.private_key_pem.write_to_path(self.key)

    def is_trusted(self, served: Certificate, name: str) -> bool:
        """Tell whether a client that wants to speak to `name` accepts the certificate: a handshake in memory."""
        trusting = ssl.create_default_context()
        self.authority.configure_trust(trusting)
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = trusting.wrap_bio(to_client, to_server, server_hostname=name)
        server = served.context.wrap_bio(to_server, to_client, server_side=True)
        for _ in range(4):
            for side in (client, server):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue
                except ssl.SSLCertVerificationError:
                    return False
        return client.version() in ("TLSv1.2", "TLSv1.3")


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_clients_that_trust_the_authority_accept_the_certificate(files: Files) -> None:
    served = Certificate(files.certificate, files.key)
    assert files.is_trusted(served, "first.example")
    assert not files.is_trusted(served, "second.example")


def test_a_certificate_that_is_renewed_is_served_from_then_on(files: Files) -> None:
    clock = Clock()
    served = Certificate(files.certificate, files.key, clock)
    files.issue("second.example")
    served.refresh()
    assert files.is_trusted(served, "first.example"), "it is not looked at every moment"
    clock.now += CHECK_S
    served.refresh()
    assert files.is_trusted(served, "second.example")


def test_a_certificate_whose_key_is_still_to_come_changes_nothing(
    files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    served = Certificate(files.certificate, files.key, clock)
    files.issue("second.example", is_whole=False)
    clock.now += CHECK_S
    served.refresh()
    assert files.is_trusted(served, "first.example")
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    files.issue("third.example")
    clock.now += CHECK_S
    served.refresh()
    assert files.is_trusted(served, "third.example")


def test_files_that_are_no_certificate_keep_a_server_from_starting(files: Files, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="No such file"):
        Certificate(files.certificate, tmp_path / "none.key")
    with pytest.raises(CommandError, match="must be a certificate and its private key"):
        Certificate(files.key, files.certificate)
    files.key.write_text(
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIIBvTBXBgkqhkiG9w0BBQ0wSjAp\n-----END ENCRYPTED PRIVATE KEY-----\n"
    )
    with pytest.raises(CommandError, match="without a password"):
        Certificate(files.certificate, files.key)


def test_the_files_are_there_for_other_protocols(files: Files) -> None:
    key, certificate = Certificate(files.certificate, files.key).pem
    assert b"PRIVATE KEY" in key
    assert certificate.startswith(b"-----BEGIN CERTIFICATE")
