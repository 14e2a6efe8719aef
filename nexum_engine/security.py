"""What a client needs to reach a server over a network: TLS, a client certificate and a token.

The settings apply to servers that are named by HOST:PORT. A client that searches for a server on this machine uses
plaintext and sends no token: any program could listen there.
"""

from __future__ import annotations

import asyncio
import contextvars
import ipaddress
import os
import re
import ssl
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from nexum_engine.errors import AccessDenied, InvalidRequest

TLS_CA, TLS_CERT, TLS_KEY = "NEXUM_TLS_CA", "NEXUM_TLS_CERT", "NEXUM_TLS_KEY"
TOKEN, TOKEN_FILE = "NEXUM_TOKEN", "NEXUM_TOKEN_FILE"
SYSTEM_CA = "system"
AUTHORIZATION = "authorization"
"""The metadata in which a client sends its token, as `Bearer TOKEN`."""
HANDSHAKE_TIMEOUT = 2.0  # seconds
_TOKEN = re.compile(r"[!-~]{1,1000}")
_OPEN_BITS = stat.S_IWGRP | stat.S_IXGRP | stat.S_IRWXO
_EXPIRED, _NOT_YET_VALID, _OTHER_NAME, _OTHER_ADDRESS = 10, 9, 62, 64  # OpenSSL's numbers for failed verifications


def read_file(path: Path, what: str, *, secret: bool = False) -> bytes:
    """Read a file with certificates; with `secret`, a file with a key or tokens. Raises InvalidRequest.

    A secret file is refused if other users may read it, or its group may change it. On Windows, this isn't checked.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if secret and sys.platform != "win32" and stat.S_IMODE(mode) & _OPEN_BITS:
                raise InvalidRequest(
                    f"{what} {path} is open to other users (mode {stat.S_IMODE(mode):04o}): run chmod 600 {path}"
                )
            return file.read()
    except OSError as error:
        raise InvalidRequest(f"{what} {path} can't be read: {error.strerror or error}") from error


def stamp_of(path: Path) -> tuple[int, ...] | None:
    """Return a value that changes when the file, its mode or its owner changes. Return None if there is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode, found.st_uid, found.st_gid


def is_loopback(host: str) -> bool:
    """Return whether `host`, which is a name or an IP address, is this machine."""
    return ipaddress.ip_address(host.strip("[]")).is_loopback if is_ip_address(host) else host == "localhost"


def is_ip_address(host: str) -> bool:
    """Return whether `host` is an IP address, and not a name."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Security:
    """The TLS settings and the token of a client. The default is plaintext without a token."""

    tls: bool = False
    ca: bytes | None = field(default=None, repr=False)
    """Certificates of the authorities that the client trusts, in PEM. If None, the client trusts gRPC's defaults."""
    certificate: tuple[bytes, bytes] | None = field(default=None, repr=False)
    """The client's certificate chain and its key, in PEM."""
    certificate_files: tuple[Path, Path] | None = None
    """The files of the certificate and of its key."""
    token: str = field(default="", repr=False)

    @classmethod
    def from_environment(cls) -> Security:
        """Read NEXUM_TLS_CA, NEXUM_TLS_CERT, NEXUM_TLS_KEY, and NEXUM_TOKEN or NEXUM_TOKEN_FILE.

        Raises InvalidRequest for a file that can't be used.
        """
        ca, certificate, key = (os.environ.get(name, "") for name in (TLS_CA, TLS_CERT, TLS_KEY))
        token = _token()
        if bool(certificate) != bool(key):
            raise InvalidRequest(f"{TLS_CERT} and {TLS_KEY} belong together: set both or neither")
        if not ca:
            if certificate:
                raise InvalidRequest(f"{TLS_CERT} needs TLS: set {TLS_CA} to the file with the server's CA certificate")
            return cls(token=token)
        roots = None if ca == SYSTEM_CA else read_file(Path(ca), TLS_CA)
        pair = None
        if certificate:
            pair = read_file(Path(certificate), TLS_CERT), read_file(Path(key), TLS_KEY, secret=True)
        security = cls(True, roots, pair, (Path(certificate), Path(key)) if certificate else None, token)
        security.context()
        return security

    def context(self) -> ssl.SSLContext | None:
        """Return the TLS settings for Python's module `ssl`, or None for plaintext. Raises InvalidRequest."""
        if not self.tls:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.set_alpn_protocols(["h2"])
        if self.ca is None:
            context.load_default_certs()
        else:
            load_authorities(context, self.ca, TLS_CA)
        if self.certificate_files is not None:
            load_key_pair(context, *self.certificate_files, TLS_CERT)
        return context

    def check(self, target: str) -> None:
        """Raise InvalidRequest if the token would be sent in plaintext to another machine."""
        if self.token and not self.tls and not is_loopback(target.rpartition(":")[0]):
            raise InvalidRequest(
                f"the token would be sent to {target} in plaintext: set {TLS_CA} to the file with the server's CA "
                f"certificate (or to {SYSTEM_CA!r}), or unset {TOKEN} and {TOKEN_FILE}"
            )

    def credentials(self) -> grpc.ChannelCredentials:
        """Return the settings for a gRPC channel with TLS."""
        chain, key = self.certificate or (None, None)
        return grpc.ssl_channel_credentials(self.ca, key, chain)

    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """Return the metadata with the token."""
        return ((AUTHORIZATION, f"Bearer {self.token}"),) if self.token else ()


def _token() -> str:
    token, file = os.environ.get(TOKEN, ""), os.environ.get(TOKEN_FILE, "")
    if token and file:
        raise InvalidRequest(f"{TOKEN} and {TOKEN_FILE} are both set: unset one of them")
    if file:
        token = read_file(Path(file), TOKEN_FILE, secret=True).decode("utf-8", "replace").strip()
    if (token or file) and not _TOKEN.fullmatch(token):
        raise InvalidRequest(f"{f'{TOKEN_FILE} {file}' if file else TOKEN} is not one token: no spaces, only ASCII")
    return token


def load_authorities(context: ssl.SSLContext, certificates: bytes, what: str) -> None:
    """Trust these certificates, in PEM format. Raises InvalidRequest if there are none."""
    try:
        context.load_verify_locations(cadata=certificates.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise InvalidRequest(f"{what} names a file without certificates in PEM format ({error})") from error


def load_key_pair(context: ssl.SSLContext, certificate: Path, key: Path, what: str) -> None:
    """Load a certificate and its key. Raises InvalidRequest if they can't be used."""

    def no_password() -> str:
        raise InvalidRequest(f"the key {key} is encrypted: give one without a password")

    try:
        context.load_cert_chain(certificate, key, no_password)
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).replace("_", " ").lower()
        raise InvalidRequest(
            f"{what} {certificate} and the key {key} are not a certificate and its key in PEM format ({reason})"
        ) from error


# ---- Why a TLS connection fails --------------------------------------------------------------------------------------


async def tls_obstacle(target: str, security: Security) -> AccessDenied | None:
    """Return why client and server don't agree about TLS, or None if the call failed for another reason.

    gRPC reports UNAVAILABLE for a TLS failure, and also for other reasons, such as a server that restarts.
    """
    # Connect without the caller's context variables: a durable session would take this connection for the program's.
    finding = contextvars.Context().run(asyncio.ensure_future, _tls_obstacle(target, security))
    try:
        await asyncio.wait({finding}, timeout=HANDSHAKE_TIMEOUT)
        return finding.result() if finding.done() else None
    finally:
        finding.cancel()


async def _tls_obstacle(target: str, security: Security) -> AccessDenied | None:
    context = security.context()
    if context is None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        failure = await _shake_hands(target, context)
        if failure is not None and not isinstance(failure, EOFError):
            return None
        return AccessDenied(
            f"the server on {target} speaks TLS: set {TLS_CA} to the file with its CA certificate (or to {SYSTEM_CA!r})"
        )
    failure = await _shake_hands(target, context)
    if isinstance(failure, ssl.SSLCertVerificationError):
        return AccessDenied(
            f"the certificate of the server on {target} was refused ({failure.verify_message.rstrip('.')}): "
            f"{_next_step(failure.verify_code)}"
        )
    if isinstance(failure, EOFError):
        # Try TLS 1.2, to tell two causes apart. If a gRPC server doesn't accept the client's certificate, it closes the
        # connection without a reason: in TLS 1.3 after the handshake, but in TLS 1.2 during the handshake. A proxy
        # whose server is down closes the connection after the handshake in both versions.
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        if isinstance(await _shake_hands(target, context), (ConnectionError, ssl.SSLError)):
            own = "refuses this client's certificate" if security.certificate else "wants a client certificate"
            return AccessDenied(
                f"the server on {target} {own}: set {TLS_CERT} and {TLS_KEY} to a certificate that its --tls-client-ca "
                "has issued"
            )
    if isinstance(failure, ssl.SSLError) and failure.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
        return AccessDenied(
            f"the server on {target} does not speak TLS: start it with --tls-cert and --tls-key, or unset {TLS_CA}"
        )
    return None


def _next_step(code: int) -> str:
    if code == _EXPIRED:
        return "renew it, and check the clocks of both machines"
    if code == _NOT_YET_VALID:
        return "check the clocks of both machines"
    if code in (_OTHER_NAME, _OTHER_ADDRESS):
        return "connect to a name that is in it, or issue it for this name"
    return f"{TLS_CA} must name the file with the certificate of the CA that issued it"


async def _shake_hands(target: str, context: ssl.SSLContext) -> OSError | EOFError | None:
    """Connect with TLS, and wait for the server's first byte. Return None if it came, otherwise the error.

    The error is EOFError if the server closed the connection after the handshake without sending a byte.
    """
    host, _, port = target.rpartition(":")
    try:
        reader, writer = await asyncio.open_connection(
            host.strip("[]"), int(port), ssl=context, server_hostname=host.strip("[]")
        )
        try:
            return None if await reader.read(1) else EOFError("the server closed the connection")
        finally:
            writer.transport.abort()
    except OSError as error:  # SSLError is one
        return error
