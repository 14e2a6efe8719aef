"""The server's TLS: its certificate and key, and the CA of the certificates that clients must show."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import Any

import grpc

from nexum_engine.errors import InvalidRequest
from nexum_engine.security import load_authorities, load_key_pair, read_file, stamp_of

logger = logging.getLogger(__name__)


class ServerTls:
    """The TLS files of a server. They are read again when they change. Raises InvalidRequest if they can't be used.

    With `client_ca`, a client must show a certificate that this CA has issued. If changed files are wrong, new
    connections get the former files, and the log says so.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None = None) -> None:
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        self._files = [path for path in (certificate, key, client_ca) if path is not None]
        self._stamps = [stamp_of(path) for path in self._files]
        self._first = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """Return the settings for a port of a gRPC server."""
        return grpc.dynamic_ssl_server_credentials(
            self._first, self._changed, require_client_authentication=self._client_ca is not None
        )

    def _read(self) -> grpc.ServerCertificateConfiguration:
        certificate = read_file(self._certificate, "the certificate")
        key = read_file(self._key, "the key", secret=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        load_key_pair(context, self._certificate, self._key, "the certificate")
        roots = None
        if self._client_ca is not None:
            roots = read_file(self._client_ca, "the client CA")
            load_authorities(context, roots, "--tls-client-ca")
        return grpc.ssl_server_certificate_configuration([(key, certificate)], roots)

    def _changed(self) -> Any:  # Any, because grpc's type stubs don't allow None
        """Return the files if they have changed, else None.

        gRPC calls this method for each new connection, in a thread of its own.
        """
        stamps = [stamp_of(path) for path in self._files]
        if stamps == self._stamps:
            return None
        self._stamps = stamps
        try:
            return self._read()
        except InvalidRequest as error:
            logger.error("the former certificate stays in use, because the changed files are wrong: %s", error)
            return None
