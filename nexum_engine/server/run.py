"""The server's life cycle: open the store, bind the port, serve, and stop with a grace period."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from functools import partial
from typing import TypeVar

import grpc
from grpc_health.v1.health import aio as health_checks
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from nexum_engine import DEFAULT_LISTEN
from nexum_engine.clock import SystemClock, wait_until_set
from nexum_engine.errors import InvalidRequest, ServerError, StoreLocked, StoreUnavailable
from nexum_engine.in_process import listed
from nexum_engine.location import address_file, read_process, remove_address, write_address
from nexum_engine.security import is_ip_address, is_loopback
from nexum_engine.server.access import TokenCheck, Tokens
from nexum_engine.server.bounds import (
    DEFAULT_LIMITS,
    MAX_REQUEST_BYTES,
    MAX_RPCS,
    SERVICE_NAME,
    Limits,
    Reading,
    add_servicer,
)
from nexum_engine.server.direct import DirectServer
from nexum_engine.server.servicer import NexumServicer
from nexum_engine.server.tls import ServerTls
from nexum_engine.store import open_store

STOP_GRACE = 3.0  # seconds in which calls under way can still end
_RETRY = 0.1  # seconds between two attempts to open the database, or to listen on the port

logger = logging.getLogger(__name__)
T = TypeVar("T")

_OPTIONS = (
    # Don't share the port: a second server on the same port would get half of the calls.
    ("grpc.so_reuseport", 0),
    # Let gRPC receive more than the engine's own limit: the engine then refuses a slightly too large payload with a
    # clearer error than gRPC's.
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES + 1024 * 1024),
    # If calls arrive faster than they are read, let all of them wait: by default, gRPC cancels some.
    ("grpc.server.max_pending_requests", MAX_RPCS),
    ("grpc.server.max_pending_requests_hard_limit", MAX_RPCS),
    # Don't let gRPC widen its flow-control windows: with small windows, it buffers little of a request that is not
    # read yet.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.max_send_message_length", -1),
    # Allow the pings of clients on idle connections (channel.py). By default, gRPC ends a connection with more than two
    # pings in five minutes.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Return False for the traceback that gRPC logs when a client disconnects before it has read its answer."""
    return "ExecuteBatchError" not in record.getMessage()


def listen_address(listen: str, *, is_protected: bool) -> str:
    """Return `listen` as HOST:PORT with a numeric host. Raises InvalidRequest.

    If the server is not protected by TLS and tokens (`is_protected`), only loopback addresses are allowed.
    """
    host, colon, port = listen.rpartition(":")
    if not colon or not (port.isascii() and port.isdecimal()) or len(port) > 5 or int(port) > 65535 or not host:
        raise InvalidRequest(f"{listen!r} is not an address: give HOST:PORT, for instance {DEFAULT_LISTEN}")
    # Bind only 127.0.0.1 for "localhost". The name has two addresses, and grpc succeeds even if one of them is taken.
    host = "127.0.0.1" if host == "localhost" else host.strip("[]")
    if not is_protected and not is_loopback(host):
        raise InvalidRequest(
            f"refusing to listen on {listen}: without TLS and tokens, anyone who reaches the port could run and read "
            "everything; give --tls-cert, --tls-key and --tokens, or listen on 127.0.0.1"
        )
    if not is_ip_address(host):
        raise InvalidRequest(
            f"refusing to listen on {listen}: give an IP address of this machine, or 0.0.0.0 for all its addresses"
        )
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def run_server(
    listen: str,
    database_url: str,
    *,
    lease: float,
    keep: float | None = None,
    stop: asyncio.Event,
    patience: float = 0.0,
    else_free_port: bool = False,
    embedded: bool = False,
    tls: ServerTls | None = None,
    tokens: Tokens | None = None,
    limits: Limits = DEFAULT_LIMITS,
    on_ready: Callable[[str, str], None],
) -> None:
    """Serve until `stop` is set. `on_ready(address, database)` is called when the server accepts calls.

    If `stop` is set while another server still holds the port or the database, return without a call of `on_ready`.

    A silent worker keeps its tasks for `lease` seconds. Executions that ended more than `keep` seconds ago are deleted.
    If an ending server still holds the port or the database, the new server waits up to `patience` seconds for them.
    With `else_free_port`, it does not wait for a taken port, and takes a free one instead. An `embedded` server serves
    one folder's runs, and refuses every client that names another database. The clients in its own process call it
    without gRPC. Clients find a server with `tls` or `tokens` only by its address, and not by its database.

    Raises InvalidRequest for a bad address, StoreError for a database that can't be used, ServerError for a port that
    can't be used, and StoreUnavailable if the database fails while the server is running.
    """
    address = listen_address(listen, is_protected=tls is not None and tokens is not None)
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_worth_a_line)  # a second call adds nothing
    clock = SystemClock()
    store = await _retried(partial(open_store, database_url, clock), stop, patience)
    if store is None:
        return
    database = store.file if tls is None and tokens is None else None
    try:
        servicer = NexumServicer(
            store, clock, round(lease * 1000), url=database_url, embedded=embedded, tokens=tokens, limits=limits
        )
        health = health_checks.HealthServicer()
        bound = await _retried(partial(_bind, servicer, health, address, else_free_port, tls, tokens), stop, patience)
        if bound is None:
            return
        server, port = bound
        address = f"{address.rpartition(':')[0]}:{port}"
        # Only a killed server leaves the address file behind. The workers and owners of its process died with it.
        dead_process = "" if store.file is None else read_process(store.file)
        await servicer.start(dead_process, None if keep is None else round(keep * 1000))
        await server.start()
        following = None if tokens is None else asyncio.create_task(tokens.follow(), name="follow the token file")
        try:
            # Write the address to a file beside the database's file, where clients on this machine look for a server.
            if database is not None:
                try:
                    write_address(database, address)
                except OSError as error:
                    raise ServerError(f"can't write {address_file(database)}: {error.strerror or error}") from error
            for service in ("", SERVICE_NAME):
                await health.set(service, HealthCheckResponse.SERVING)
            store.failed.add_done_callback(lambda _: stop.set())
            with listed(address, DirectServer(servicer)) if embedded else nullcontext():
                on_ready(address, store.opened_as)
                await stop.wait()
        finally:
            # Remove the address file first, so that no new client connects to the ending server.
            if database is not None:
                remove_address(database, address)
            await health.enter_graceful_shutdown()
            # Answer the waiting calls before `server.stop`, which waits until all calls have ended.
            await servicer.stop()
            await server.stop(STOP_GRACE)
            if following is not None:
                following.cancel()
        if store.failed.done():
            raise StoreUnavailable(store.failed.result())
    finally:
        await store.close()


async def _retried(attempt: Callable[[], Awaitable[T]], stop: asyncio.Event, patience: float) -> T | None:
    """Make attempts for `patience` seconds, while another server holds what is needed. Return None if `stop` is set."""
    loop = asyncio.get_running_loop()
    begun, is_logged = loop.time(), False
    while True:
        try:
            return await attempt()
        except (StoreLocked, ServerError) as error:
            if loop.time() >= begun + patience:
                raise
            if not is_logged:
                logger.warning("waiting for up to %g s: %s", patience, error)
                is_logged = True
        if await wait_until_set(stop, _RETRY):
            return None


def _is_free(address: str) -> bool:
    """Return whether a server can listen on the address. Try a socket: gRPC prints an error for a taken address."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        socket.create_server((host.strip("[]"), int(port)), family=family).close()
    except OSError:
        return False
    return True


async def _bind(
    servicer: NexumServicer,
    health: health_checks.HealthServicer,
    address: str,
    else_free_port: bool,
    tls: ServerTls | None,
    tokens: Tokens | None,
) -> tuple[grpc.aio.Server, int]:
    """Return a server that can listen on the address, and its port. Raises ServerError if the port can't be used."""
    if else_free_port and not _is_free(address):
        # Don't wait for the port. An ending server releases its port before its database, and this server has already
        # opened the database. So no ending server holds the port.
        address = f"{address.rpartition(':')[0]}:0"
    server = grpc.aio.server(
        options=_OPTIONS,
        interceptors=[Reading()] if tokens is None else [TokenCheck(tokens), Reading()],
        maximum_concurrent_rpcs=MAX_RPCS,
    )
    add_servicer(servicer, server)
    add_HealthServicer_to_server(health, server)
    try:
        if tls is not None:
            return server, server.add_secure_port(address, tls.credentials())
        return server, server.add_insecure_port(address)
    except RuntimeError as error:
        await server.stop(None)
        raise ServerError(
            f"can't listen on {address}: the port is in use (by another Nexum server?) or not allowed; "
            "give another port with --listen"
        ) from error
