"""The connection of a client: it finds the client's server and makes the client's calls."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeVar

import grpc

from nexum_engine.channel import Channel
from nexum_engine.errors import (
    AccessDenied,
    InvalidRequest,
    NexumError,
    NotANexumServer,
    RoleRefused,
    ServerError,
    ServerNotReady,
    ServerUnavailable,
)
from nexum_engine.event_loop import running_loop
from nexum_engine.location import absolute, default_database_url, own_database, read_address
from nexum_engine.security import Security, tls_obstacle
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.addressee import Metadata, metadata_for, metadata_for_url
from nexum_engine.wire.status import TOO_MANY_RPCS, error_of

if TYPE_CHECKING:
    # Import this class for type checks only: it exists only in the type stubs.
    from nexum_engine.wire.nexum_pb2_grpc import NexumServiceAsyncStub

DEFAULT_ADDRESS = "localhost:50051"
FIRST_ANSWER = 2.0  # seconds within which a Nexum server must give its first answer
OTHER_ANSWERS = 0.3  # seconds to wait for the other servers after the first one has answered
CALL_DEADLINE = 10.0  # seconds for a call, in addition to the wait that the call requests
RECONNECT_DELAY = 0.1  # seconds between two attempts to reach a server or to open a database
MAX_PAUSE = 20.0  # the longest pause between calls to an overloaded server, in seconds, without the random factor
OUTAGE_PATIENCE = 300.0  # seconds to retry a call while no server answers
MAX_SERVER_WAIT = 25.0  # the longest wait, in seconds, that a call requests; the server allows more

Request = TypeVar("Request")
Answer = TypeVar("Answer")

# A function that picks one RPC of a stub. `call` passes the stub of the present server at each attempt.
Method: TypeAlias = "Callable[[NexumServiceAsyncStub], grpc.aio.UnaryUnaryMultiCallable[Request, Answer]]"


@dataclass(frozen=True)
class ServerInfo:
    """A server's answer to GetServerInfo."""

    database: str
    """The absolute path of the server's database."""
    embedded: bool
    """Whether a program started the server for its own runs."""
    database_id: str = ""
    """The same for all servers on one database. Empty if the server is of an older version."""


class Route(NamedTuple):
    """The address of the present server, and what a channel to that server sends."""

    target: str
    """HOST:PORT."""
    metadata: Metadata
    security: Security | None
    """The TLS settings and the token, if the server is named by HOST:PORT. Otherwise None."""


class FoundAddress(str):
    """The address of a server that this process has found. No person has named it, so it gets no token."""


class Connection:
    """A connection to the server at `address`. Without `address`, it searches in the order that NexumClient describes.

    If there are several addresses, the connection tries them in a random order. It uses the first server that answers,
    until that server is lost. Because the order is random, processes that start together spread over the servers. If a
    server dies, its clients spread over the other servers.
    """

    def __init__(self, address: str | None) -> None:
        self._channels: list[Channel] = []
        self._security: Security | None = None
        self._is_lost = False
        self._database: Path | None = None
        self._url = default_database_url()  # read now, because the program may change DATABASE_URL
        self.targets: list[str] = []
        """HOST:PORT of each named server, in the order in which they are tried. Empty if no server is named so."""
        self._database_ids: dict[str, str] = {}
        """The last known `database_id` of each named server."""
        self._is_searching = address is None
        self.address = DEFAULT_ADDRESS if address is None else address
        """HOST:PORT of the server, or the path of its database."""
        if address is None:
            self._database = own_database()
        elif not isinstance(address, str):
            raise InvalidRequest(f"{address!r} is not a server's address: give a text, HOST:PORT or a database's path")
        elif ("/" in address or "\\" in address) and "://" not in address:
            self._database = absolute(address)
            self._follow()
        else:
            self.targets = _targets_in(address)
            is_found = isinstance(address, FoundAddress)
            self._security = security = Security() if is_found else Security.from_environment()
            for target in self.targets:
                security.check(target)
            random.shuffle(self.targets)
            self._connect(self.targets[0], ())
            self._is_lost = self.has_choice  # before the first call, look for a server that answers

    async def close(self) -> None:
        """Close the channels of the running event loop."""
        for channel in self._channels:
            await channel.close()

    @property
    def has_choice(self) -> bool:
        """Whether several servers are named. If one of them refuses the client, another one may accept it."""
        return len(self.targets) > 1

    def _latest(self) -> Channel:
        """Return the channel to the present server. Raises ServerUnavailable if the database has no running server."""
        if not self._channels:
            raise ServerUnavailable(
                f"no running Nexum server has {self._database} open: start one with "
                f"python -m nexum_engine --database-url sqlite:///{self._database}"
            )
        return self._channels[-1]

    def _connect(self, target: str, metadata: Metadata) -> None:
        # Put the channel to the present server at the end of the list. Keep the other channels open: closing a channel
        # would cancel its calls.
        wanted = target, metadata
        known = next((channel for channel in self._channels if (channel.target, channel.metadata) == wanted), None)
        others = [channel for channel in self._channels if channel is not known]
        self._channels = [*others, known or Channel(target, metadata, self._security)]

    def _follow(self) -> None:
        """Connect to the present address of the database's server."""
        assert self._database is not None
        target = read_address(self._database)
        if target is not None:
            self._connect(target, metadata_for(self._database))

    def route(self) -> Route:
        """Return the server's present HOST:PORT, the metadata for each call, and the security settings.

        With this route, another thread can open its own channel. Call `reach` once before `route`. Raises
        ServerUnavailable.
        """
        if self._database is not None and (target := read_address(self._database)) is not None:
            # Don't take the metadata of the latest channel: the server may have started after the last `reach`.
            return Route(target, metadata_for(self._database), self._security)
        channel = self._latest()
        return Route(channel.target, channel.metadata, self._security)

    async def reach(self) -> None:
        """If the server's address may change, look it up again.

        Raises ServerUnavailable, NotANexumServer, AccessDenied, and InvalidRequest if the named servers have different
        databases.
        """
        if self._is_searching:
            await self._search()
        elif self._database is not None:
            self._follow()
        elif self.has_choice:
            await self._choose()

    async def _choose(self) -> None:
        """Connect to the first named server that answers, beginning with the present one.

        Raises InvalidRequest if the servers have different databases. In the other database, a call that was made
        already would be unknown, and would be made again.
        """
        present = self.targets.index(self._latest().target)
        order = (*self.targets[present:], *self.targets[:present])
        asking = {target: asyncio.create_task(self._first_answer(target, ())) for target in order}
        try:
            failures = []
            for target in order:
                answer = await asking[target]
                if not isinstance(answer, ServerError):
                    await asyncio.wait(asking.values(), timeout=OTHER_ANSWERS)
                    self._compare_databases({name: one.result() for name, one in asking.items() if one.done()})
                    self._connect(target, ())
                    self.address, self._is_lost = target, False
                    return
                failures.append(answer)
        finally:
            for one in asking.values():
                one.cancel()
            await asyncio.gather(*asking.values(), return_exceptions=True)
        lasting = [error for error in failures if isinstance(error, (AccessDenied, NotANexumServer))]
        if len(lasting) == len(failures):
            raise lasting[0]
        raise ServerUnavailable("; ".join(dict.fromkeys(map(str, failures))))

    def _compare_databases(self, answers: Mapping[str, ServerInfo | ServerError | None]) -> None:
        """Raise InvalidRequest if the named servers have different databases, now or when they last answered."""
        for target, answer in answers.items():
            if isinstance(answer, ServerInfo) and answer.database_id:
                self._database_ids[target] = answer.database_id
        one_of_each = {database_id: target for target, database_id in self._database_ids.items()}
        if len(one_of_each) > 1:
            raise InvalidRequest(
                f"the servers on {' and '.join(one_of_each.values())} have different databases: name only servers of "
                "one database. If the database was replaced, start this program again"
            )

    async def _search(self) -> None:
        """Connect to this folder's own server, else to the server on the default port."""
        database = self._database
        own = read_address(database) if database is not None else None
        if database is not None and own is not None:
            metadata = metadata_for(database)
            # The server at `own` may have been killed, and another server may now listen on its port. That server
            # refuses the call. A published server doesn't, but has no ServerInfo.
            if isinstance(await self._first_answer(own, metadata), ServerInfo):
                self.address, self._is_searching = str(database), False
                self._connect(own, metadata)
                return
        metadata = metadata_for_url(self._url) if database is None else metadata_for(database, embedded_only=True)
        answer = await self._first_answer(DEFAULT_ADDRESS, metadata)
        # Don't raise AccessDenied, which ends a worker: this folder's server may start later, on another port.
        if isinstance(answer, AccessDenied):
            raise ServerNotReady(
                f"a server that needs a token listens on {DEFAULT_ADDRESS} (name it with NEXUM_ADDRESS or --nexum)"
            )
        if isinstance(answer, NotANexumServer):
            raise ServerUnavailable(
                f"no running Nexum server has {database} open, and another program listens on {DEFAULT_ADDRESS}: "
                "start a server on a free port, with python -m nexum_engine --else-free-port"
            )
        if isinstance(answer, ServerError):
            raise answer
        self._database, self._is_searching = None, False
        self._connect(DEFAULT_ADDRESS, metadata)

    async def _first_answer(self, target: str, metadata: Metadata) -> ServerInfo | ServerError | None:
        """Return the info of the server at `target`, None if the server has no GetServerInfo, or a ServerError."""
        channel = Channel(target, metadata, self._security, purpose="search")
        stub = channel.stub
        try:
            try:
                return server_info_of(await stub.GetServerInfo(pb.EmptyRequest(), timeout=FIRST_ANSWER))
            except grpc.RpcError as rpc_error:
                if rpc_error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                    raise
            # Try ListExecutions: a published server has no GetServerInfo.
            await stub.ListExecutions(pb.ListRequest(limit=1), timeout=FIRST_ANSWER)
        except grpc.RpcError as rpc_error:
            error = await explained(rpc_error, target, self._security)
            return error if isinstance(error, ServerError) else None
        finally:
            await channel.close()
        return None

    async def call(
        self, method: Method[Request, Answer], request: Request, *, wait: float = 0.0, patience: float = 0.0
    ) -> Answer:
        """Make one call. While no server answers, retry for `patience` seconds. Raises the engine's errors.

        `wait` is how many seconds the server may hold the call. The client gives up CALL_DEADLINE seconds later.
        """
        loop = running_loop()
        give_up = loop.time() + patience
        timeout = CALL_DEADLINE + min(max(wait, 0.0), MAX_SERVER_WAIT)
        refusals = 0
        while True:
            try:
                if self._is_lost or not self._channels:
                    await self.reach()
                channel = self._latest()
                answer = await method(channel.stub)(request, timeout=timeout)
            except grpc.RpcError as rpc_error:
                address = channel.target if self.targets else self.address
                error = await explained(rpc_error, address, self._security)
                # A server that refuses the client has not carried out the call. So another server may be tried.
                is_refused = self.has_choice and isinstance(error, AccessDenied) and not isinstance(error, RoleRefused)
                may_retry = is_refused or isinstance(error, ServerUnavailable)
                # Don't search for another server if this one is only busy: the search would cost the busy server more
                # calls. But a server at its limit of RPCs has no stream for this client. Another server may have one.
                is_busy = isinstance(error, ServerNotReady) and rpc_error.details() != TOO_MANY_RPCS
                self._is_lost = may_retry and not is_busy
                if not is_refused and (not may_retry or loop.time() >= give_up):
                    raise error from rpc_error
            except ServerUnavailable as unavailable:
                self._is_lost, error = True, unavailable
                if loop.time() >= give_up:
                    raise
            else:
                self._is_lost = False
                return answer
            await asyncio.sleep(min(pause_after(error, refusals), max(give_up - loop.time(), RECONNECT_DELAY)))
            refusals += isinstance(error, ServerNotReady)


def pause_after(error: Exception, refusals: int) -> float:
    """Return the seconds to wait after a failed call. Wait longer after each refusal of an overloaded server.

    The time is random, so that the clients of an overloaded server don't all come back at the same moment.
    """
    after = error.retry_after if isinstance(error, ServerNotReady) else 0.0
    return random.uniform(0.5, 1.5) * min(after * 2**refusals, MAX_PAUSE) if after else RECONNECT_DELAY


async def explained(rpc_error: grpc.RpcError, address: str, security: Security | None) -> NexumError:
    """Return the error of a failed call to `address`. If `security` is given, find out whether TLS is the reason."""
    error = error_of(rpc_error, address)
    if security is not None and type(error) is ServerUnavailable and rpc_error.code() is grpc.StatusCode.UNAVAILABLE:
        return await tls_obstacle(address, security) or error
    return error


def _targets_in(address: str) -> list[str]:
    """Return the servers in a list that is separated by commas. Raises InvalidRequest."""
    targets = [one.strip() for one in address.split(",")]
    for target in targets:
        host, colon, port = target.rpartition(":")
        if not colon or not _is_host(host) or not _is_port(port):
            raise InvalidRequest(
                f"{target!r} is not the address of a server: give HOST:PORT, such as {DEFAULT_ADDRESS}, or several, "
                "separated by commas"
            )
    return list(dict.fromkeys(targets))


def server_info_of(answer: pb.ServerInfo) -> ServerInfo:
    """Return a server's answer to GetServerInfo as a ServerInfo."""
    return ServerInfo(answer.database, answer.embedded, answer.database_id)


def _is_host(text: str) -> bool:
    try:
        is_ipv6 = text.startswith("[") and text.endswith("]")
        return text.encode("idna") != b"" and "/" not in text and (is_ipv6 or ":" not in text)
    except UnicodeError:  # a part of the name is empty or has more than 63 characters
        return False


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 5 and 0 < int(text) <= 65535
