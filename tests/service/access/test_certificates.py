import logging
import ssl
from pathlib import Path

import pytest
import trustme

from service.access.certificates import Certificate
from service.errors import CommandError


class Files:
    """The files of a certificate and its key, issued by the test's own authority."""

    def __init__(self, folder: Path) -> None:
        self.authority, self.certificate, self.key = trustme.CA(), folder / "tls.crt", folder / "tls.key"
        self.issue("first.example")

    def issue(self, name: str, *, is_whole: bool = True) -> None:
        issued = self.authority.issue_cert(name)
        self.certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        if is_whole:
            issued.private_key_pem.write_to_path(self.key)

    def is_trusted(self, served: Certificate, name: str) -> bool:
        """Return whether a client that connects to `name` accepts the certificate, by a handshake in memory."""
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


def test_a_renewed_certificate_is_served_once_it_is_checked(files: Files) -> None:
    served = Certificate(files.certificate, files.key)
    files.issue("second.example")
    assert files.is_trusted(served, "first.example")
    served.refresh()
    assert files.is_trusted(served, "second.example")


def test_a_new_certificate_is_not_used_before_its_key_has_arrived(
    files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    served = Certificate(files.certificate, files.key)
    files.issue("second.example", is_whole=False)
    served.refresh()
    assert files.is_trusted(served, "first.example")
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    files.issue("third.example")
    served.refresh()
    assert files.is_trusted(served, "third.example")


def test_missing_and_invalid_certificate_files_keep_a_server_from_starting(files: Files, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="No such file"):
        Certificate(files.certificate, tmp_path / "none.key")
    with pytest.raises(CommandError, match="must be a certificate and its private key"):
        Certificate(files.key, files.certificate)
    files.key.write_text(
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIIBvTBXBgkqhkiG9w0BBQ0wSjAp\n-----END ENCRYPTED PRIVATE KEY-----\n"
    )
    with pytest.raises(CommandError, match="without a password"):
        Certificate(files.certificate, files.key)


def test_the_key_and_the_certificate_are_available_as_pem(files: Files) -> None:
    key, certificate = Certificate(files.certificate, files.key).pem
    assert b"PRIVATE KEY" in key
    assert certificate.startswith(b"-----BEGIN CERTIFICATE")
