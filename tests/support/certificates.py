"""Certificates and token files for servers and clients that use TLS."""

from __future__ import annotations

from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import trustme

from nexum_engine.server import ServerTls

LONG_AGO = datetime(2020, 1, 1, tzinfo=timezone.utc)
USE, ADMIN, FORMER = ("use" + "u" * 40, "administer" + "a" * 40, "former" + "f" * 40)
"""Three tokens: one for each role in TOKENS, and one that isn't in TOKENS."""
TOKENS = f"# who role token\nci use {USE}\nann administer {ADMIN}\n"


@cache
def authority(name: str) -> trustme.CA:
    """Return a CA. The same name gives the same CA."""
    return trustme.CA(organization_name=name)


class Certificates:
    """A folder with certificate files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = self.ca_of("ours")
        self.other_ca = self.ca_of("other")

    def ca_of(self, name: str) -> str:
        path = self.folder / f"ca-{name}.pem"
        authority(name).cert_pem.write_to_path(path)
        return str(path)

    def issue(self, name: str, *hosts: str, by: str = "ours", expired: bool = False) -> tuple[str, str]:
        """Issue a certificate; return the files of the certificate and of its key."""
        issued = authority(by).issue_cert(*hosts, not_after=LONG_AGO if expired else None)
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        private_file(key, issued.private_key_pem.bytes().decode())
        return str(certificate), str(key)

    def server_tls(self, *, by: str = "ours", expired: bool = False, client_ca: str | None = None) -> ServerTls:
        """Issue a certificate for a server on this machine."""
        certificate, key = self.issue("server", "localhost", "127.0.0.1", by=by, expired=expired)
        return ServerTls(Path(certificate), Path(key), None if client_ca is None else Path(client_ca))


def private_file(path: Path, text: str) -> str:
    """Write a file that only its owner can read; return its path."""
    path.touch(0o600)
    path.chmod(0o600)
    path.write_text(text)
    return str(path)
