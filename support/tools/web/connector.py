"""Connect to checked addresses only, with one deadline.

The host is resolved once, and the connection goes to a checked address. So a name can't resolve to a public address for
the check and to a private address for the connection. TLS names and Host headers stay unchanged.
"""

from __future__ import annotations

import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from ipaddress import ip_address
from typing import Any, TypeAlias

import httpcore2

from nexum_engine.errors import FinalError
from support.tools.web import WebError
from support.tools.web.addresses import Address, literal_address
from support.tools.web.hosts import AllowedHosts

Resolver: TypeAlias = Callable[[str], Sequence[Address]]
AddressPolicy: TypeAlias = Callable[[Address], bool]


def system_resolver(host: str) -> list[Address]:
    """Return the addresses to which the system resolves the host."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    # Remove duplicates with a dict, which keeps the order: the system lists the best address first.
    return list(dict.fromkeys(ip_address(sockaddr[0]) for *_, sockaddr in found))


class FetchDeadline:
    """The time by which a fetch must end."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds until the deadline. After the deadline, raise the HTTP client's ReadTimeout."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise httpcore2.ReadTimeout("deadline")
        return left


class CheckedBackend(httpcore2.NetworkBackend):
    """A network backend that checks a host, resolves it, checks every address, and connects to one of them."""

    def __init__(self, hosts: AllowedHosts, resolver: Resolver, policy: AddressPolicy, deadline: FetchDeadline) -> None:
        self._hosts = hosts
        self._resolver = resolver
        self._policy = policy
        self._deadline = deadline
        self._sockets = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        addresses = self._checked_addresses(host)
        failure: Exception | None = None
        for tried, address in enumerate(addresses):
            # Divide the time that is left among the addresses: a dead first address must not use all the time.
            share = self._deadline.left() / (len(addresses) - tried)
            try:
                stream = self._sockets.connect_tcp(str(address), port, share, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
            else:
                return _DeadlineStream(stream, self._deadline)
        assert failure is not None
        raise failure

    def _checked_addresses(self, host: str) -> Sequence[Address]:
        self._hosts.check(host)
        literal = literal_address(host)
        addresses = [literal] if literal is not None else self._resolved(host)
        if not addresses:
            raise WebError(f"the host {host} has no address")
        # Every address must be public: a name with public and internal addresses may be an attack.
        if not all(self._policy(address) for address in addresses):
            raise FinalError(f"{host} is not a public address; only pages on the public internet can be visited")
        return addresses

    def _resolved(self, host: str) -> Sequence[Address]:
        answers: queue.SimpleQueue[Sequence[Address] | Exception] = queue.SimpleQueue()

        def resolve() -> None:
            try:
                answers.put(self._resolver(host))
            except Exception as error:  # noqa: BLE001  (the waiting thread raises it)
                answers.put(error)

        # Resolve in a thread that can be abandoned: the system's resolver has no timeout.
        threading.Thread(target=resolve, name=f"resolve {host}", daemon=True).start()
        try:
            answer = answers.get(timeout=self._deadline.left())
        except queue.Empty:
            raise httpcore2.ConnectTimeout("deadline") from None
        if isinstance(answer, UnicodeError):  # for example, a label of more than 63 characters
            raise FinalError(f"the host {host} is not a valid name") from answer
        if isinstance(answer, OSError):
            raise WebError(f"the host {host} was not found ({answer.strerror or answer})") from answer
        if isinstance(answer, Exception):
            raise answer
        return answer


class _DeadlineStream(httpcore2.NetworkStream):
    """A stream with one deadline for all reads and writes, instead of a timeout for each."""

    def __init__(self, stream: httpcore2.NetworkStream, deadline: FetchDeadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.left())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        try:
            stream = self._stream.start_tls(ssl_context, server_hostname, self._deadline.left())
        except httpcore2.ConnectError as error:
            if isinstance(error.__cause__, ssl.SSLCertVerificationError):
                raise FinalError(f"its certificate is not valid ({error.__cause__.verify_message})") from error
            raise
        return _DeadlineStream(stream, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
