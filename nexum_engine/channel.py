"""The channel of a client to the server at one address."""

from __future__ import annotations

import asyncio
import gc
import logging
import traceback
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet, ref

import grpc

from nexum_engine.forks import in_forked_process, never_free
from nexum_engine.in_process import InProcessChannel, LocalServer, server_at
from nexum_engine.security import Security, is_ip_address
from nexum_engine.wire.addressee import Metadata
from nexum_engine.wire.multiplexed import MultiplexedChannel
from nexum_engine.wire.nexum_pb2_grpc import NexumServiceStub

if TYPE_CHECKING:
    # Import this class for type checks only: it exists only in the type stubs.
    from nexum_engine.wire.nexum_pb2_grpc import NexumServiceAsyncStub

_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Reconnect before a restarted server stops waiting for its workers and owners.
    ("grpc.max_reconnect_backoff_ms", 200),
    # Despite its name, this option limits the time of one attempt to connect. A busy or distant machine needs seconds.
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Ping the server, to notice a dead connection: a firewall may have forgotten it, or a laptop may have got another
    # address. Without pings, the system sends a call's request again for 15 minutes before it closes the connection.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),  # no limit: by default, an idle connection gets only two pings
    # Ignore http_proxy: it is for the web, not for a server on this machine.
    ("grpc.enable_http_proxy", 0),
)


class Channel:
    """The channels of a client to one server: one for each event loop, and new ones in a forked process.

    A server in this process is called without gRPC. gRPC channels with different purposes share no connection. With the
    purpose "calls", calls share one stream.
    """

    def __init__(
        self, target: str, metadata: Metadata, security: Security | None = None, *, purpose: str = "calls"
    ) -> None:
        self.target = target
        self._security = security or Security()
        self.metadata = metadata
        self._purpose = purpose
        self._by_loop: dict[asyncio.AbstractEventLoop, tuple[LocalServer | None, Any, NexumServiceAsyncStub]] = {}
        _all.add(self)

    @property
    def stub(self) -> NexumServiceAsyncStub:
        """The stub of the running event loop's channel. The stub sends the metadata with every call."""
        loop = asyncio.get_running_loop()
        server, opened = server_at(self.target), self._by_loop.get(loop)
        # Open another channel if a server of this process has ended, or begun to listen, since this one was opened.
        if opened is None or opened[0] is not server:
            closed = [known for known in list(self._by_loop) if known.is_closed()]
            loops = [ref(known) for known in closed]
            for known in closed:
                self._by_loop.pop(known, None)
            if closed:
                del closed, known
                close_what_is_unused(loops)
            opened = self._by_loop[loop] = server, *self._open(server)
        return opened[2]

    def _open(self, server: LocalServer | None) -> tuple[Any, NexumServiceAsyncStub]:
        channel: Any
        if server is not None:
            channel = InProcessChannel(server)
        elif _is_forked or (self._purpose == "heartbeat" and self._is_plain):
            from nexum_engine.wire.pure_python import PurePythonChannel

            channel = PurePythonChannel(self.target, self._security.context())
        else:
            logging.getLogger("asyncio").addFilter(_is_worth_a_line)  # a second call adds nothing
            options = (*_OPTIONS, ("grpc.primary_user_agent", f"nexum-{self._purpose}"))
            if self._security.tls:
                channel = grpc.aio.secure_channel(self.target, self._security.credentials(), options)
            else:
                channel = grpc.aio.insecure_channel(self.target, options)
            if self._purpose == "calls":
                channel = MultiplexedChannel(channel)
        stub = NexumServiceStub(channel)
        if metadata := (*self.metadata, *self._security.metadata()):
            for name, call in vars(stub).items():
                setattr(stub, name, partial(call, metadata=metadata))
        return channel, cast("NexumServiceAsyncStub", stub)

    @property
    def _is_plain(self) -> bool:
        """Whether the server is named by its IP address, and without TLS.

        Otherwise, gRPC in C and gRPC in Python may disagree about names such as localhost, or about certificates.
        """
        return not self._security.tls and is_ip_address(self.target.rpartition(":")[0])

    async def close(self) -> None:
        """Close the channel of the running event loop, and the channels of event loops that are closed."""
        loop = asyncio.get_running_loop()
        for known in list(self._by_loop):
            if known is loop or known.is_closed():
                _, channel, _ = self._by_loop.pop(known)
                if known is loop:
                    await channel.close()

    def forget(self) -> None:
        """Drop the channels in a forked process, without closing them: they belong to the parent process."""
        # The core of grpcio would wait for threads that this process doesn't have, or crash.
        never_free(self._by_loop)
        self._by_loop = {}


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Return False for an error that grpcio makes while it cleans up, and that has no effect.

    All event loops of a process read one socket of grpcio. When one thread frees the process's last channel, grpcio
    closes this socket, even if the event loop of another thread is about to read it ("Bad file descriptor"). And an
    event of a closed channel may come when its event loop is closed ("Event loop is closed").
    """
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, (OSError, RuntimeError)) or not any(
        frame.name.endswith("PollerCompletionQueue._handle_events")
        for frame in traceback.extract_tb(error.__traceback__)
    )


def close_what_is_unused(loops: Iterable[ref[asyncio.AbstractEventLoop]] = ()) -> None:
    """Close the channels of closed event loops by freeing them.

    While such a channel is open, gRPC keeps all event loops in memory. Only a garbage collection frees the channels:
    `asyncio.run` cancels tasks at its end, and their exceptions form reference cycles with the channels. Collect young
    objects first, which takes little time. If one of `loops` is still in memory, collect all objects.
    """
    gc.collect(1)
    if any(loop() is not None for loop in loops):
        gc.collect()


_all: WeakSet[Channel] = WeakSet()
_is_forked = False


def is_forked() -> bool:
    """Return whether this process was forked. grpcio doesn't work in a forked process."""
    return _is_forked


@in_forked_process
def _forget_channels() -> None:
    global _is_forked
    _is_forked = True
    for channel in list(_all):
        channel.forget()
