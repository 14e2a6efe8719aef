"""The tokens that clients must send, the calls that each token allows, and the refusal of all other calls."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from nexum_engine.errors import AccessDenied, InvalidRequest, RoleRefused, TokenRefused
from nexum_engine.security import AUTHORIZATION, TOKEN, TOKEN_FILE, read_file, stamp_of
from nexum_engine.server.bounds import MAX_SHOWN_METHOD, Received, Rpc
from nexum_engine.server.refusal import Context, abort

USE, ADMINISTER = "use", "administer"
ADMINISTRATION = frozenset(
    {"ApproveTask", "RejectTask", "ResolveNode", "CancelExecution", "RetryExecution", "Prune", "Backup"}
)
"""The RPCs that need a token with the role `administer`. RetryExecution needs it, because it can undo a rejection."""
OPEN_TO_ALL = frozenset({"/grpc.health.v1.Health/Check"})
MIN_TOKEN_CHARACTERS = 32
MAX_NAME_CHARACTERS = 100
LOOK_INTERVAL = 1.0  # seconds between two looks at the file
LOG_INTERVAL = 10.0  # seconds between two log lines about refused calls
_UNKNOWN = f"the server doesn't know its token: set {TOKEN_FILE} or {TOKEN} to one that it knows"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """The holder of a token."""

    name: str
    role: str


class Tokens:
    """The tokens of a file. The file is read again when it changes. Raises InvalidRequest if the file is wrong.

    Each line has a name, a role and a token. Several lines may have the same name, so that a new token can replace an
    old one. If a changed file is wrong, the former tokens stay valid, and the log says so.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = stamp_of(path)
        self._holders = _read(path)
        self._running: dict[asyncio.Task[Any], bytes] = {}
        """The calls that are under way, with the digests of their tokens."""

    @contextmanager
    def watched(self, metadata: Iterable[Any]) -> Iterator[None]:
        """Inside a `with` block, cancel the current call if its token is removed: the block raises TokenRefused."""
        call = asyncio.current_task()
        assert call is not None
        self._running[call] = _digest(_token_in(metadata))
        try:
            yield
        except asyncio.CancelledError:
            if call in self._running:
                raise  # the client has cancelled the call
            raise TokenRefused(_UNKNOWN) from None
        finally:
            self._running.pop(call, None)

    def check(self, metadata: Iterable[Any], method: str) -> None:
        """Raise TokenRefused without a valid token, and RoleRefused if its holder may not call `method`."""
        holder = self.holder(metadata)
        if method in ADMINISTRATION and holder.role != ADMINISTER:
            raise RoleRefused(
                f"token {holder.name!r} may not call {method}: this needs a token with the role {ADMINISTER!r}"
            )

    def holder(self, metadata: Iterable[Any]) -> Holder:
        """Return the holder of the token in a call's metadata. Raises TokenRefused without a valid token."""
        token = _token_in(metadata)
        if not token:
            raise TokenRefused(f"it has no token: set {TOKEN_FILE} or {TOKEN}")
        digest, found = _digest(token), None
        # Compare with every token, so that the time of a call tells the caller nothing about the tokens.
        for known, holder in self._holders.items():
            if hmac.compare_digest(known, digest):
                found = holder
        if found is None:
            raise TokenRefused(_UNKNOWN)
        return found

    async def follow(self) -> None:
        """Read the file again whenever it has changed, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_INTERVAL)
            self._look()

    def _look(self) -> None:
        stamp = stamp_of(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._holders = _read(self._path)
        except InvalidRequest as error:
            logger.error("the former tokens stay valid, because the changed file is wrong: %s", error)
            return
        # Cancel the calls whose token was removed: otherwise, a waiting poll could still get a task.
        for call in [call for call, digest in self._running.items() if digest not in self._holders]:
            del self._running[call]
            call.cancel()


def _token_in(metadata: Iterable[Any]) -> str:
    """Return the token in a call's metadata, or an empty text."""
    value = dict(metadata).get(AUTHORIZATION, "")
    scheme, _, token = value.partition(" ") if isinstance(value, str) else ("", "", "")
    return token if scheme.lower() == "bearer" else ""


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _read(path: Path) -> Mapping[bytes, Holder]:
    """Return the holders in a token file, by the digests of their tokens. No error message contains a token."""
    text = read_file(path, "the token file", secret=True).decode("utf-8", "replace")
    holders: dict[bytes, Holder] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        where = f"line {number} of the token file {path}"
        if len(words) != 3:
            raise InvalidRequest(f"{where} has {len(words)} words: give a name, a role and a token")
        name, role, token = words
        if not name.isprintable() or len(name) > MAX_NAME_CHARACTERS:
            raise InvalidRequest(f"{where}: the name must have at most {MAX_NAME_CHARACTERS} printable characters")
        if role not in (USE, ADMINISTER):
            raise InvalidRequest(f"{where}: the role must be {USE} or {ADMINISTER}")
        if len(token) < MIN_TOKEN_CHARACTERS or not token.isascii() or not token.isprintable():
            raise InvalidRequest(
                f"{where}: the token must have at least {MIN_TOKEN_CHARACTERS} ASCII characters; make one with: "
                'python -c "import secrets; print(secrets.token_urlsafe(32))"'
            )
        if _digest(token) in holders:
            raise InvalidRequest(f"{where}: an earlier line has the same token")
        holders[_digest(token)] = Holder(name, role)
    if not holders:
        raise InvalidRequest(f"the token file {path} has no tokens: give a line with a name, a role and a token")
    return holders


def guarded(rpcs: Mapping[str, Rpc], tokens: Tokens) -> dict[str, Rpc]:
    """Wrap unary RPCs: each call first checks its token. A call on a stream has the token of the stream."""

    def guard(method: str, rpc: Rpc) -> Rpc:
        async def call(received: Received, context: Any) -> Any:
            metadata = context.invocation_metadata()
            try:
                tokens.check(metadata, method)
                with tokens.watched(metadata):
                    return await rpc(received, context)
            except AccessDenied as error:
                await abort(context, error)

        return call

    return {method: guard(method, rpc) for method, rpc in rpcs.items()}


class TokenCheck(grpc.aio.ServerInterceptor):
    """An interceptor that refuses a call without a valid token before the call's request is read.

    If a token is removed, a stream with this token is refused at its next message. `guarded` ends the unary calls.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._logged = float("-inf")

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Return the method's handler, or one that refuses the call."""
        metadata = handler_call_details.invocation_metadata
        method = handler_call_details.method.rpartition("/")[2]
        if handler_call_details.method in OPEN_TO_ALL:
            return await continuation(handler_call_details)
        try:
            self._tokens.check(metadata, method)
        except AccessDenied as error:
            return self._refusal(method, error)
        handler = await continuation(handler_call_details)
        if handler is None or not handler.request_streaming:
            return handler

        async def serve(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
            async def checked() -> AsyncIterator[Any]:
                async for request in requests:
                    self._tokens.check(metadata, method)
                    yield request

            async with aclosing(handler.stream_stream(checked(), context)) as answers:
                async for answer in answers:
                    yield answer

        return grpc.stream_stream_rpc_method_handler(serve, handler.request_deserializer, handler.response_serializer)

    def _refusal(self, method: str, error: AccessDenied) -> Any:
        async def refuse(_: Any, context: Context) -> AsyncIterator[Any]:
            now = time.monotonic()
            if now - self._logged >= LOG_INTERVAL:
                self._logged = now
                # The method can be any text. `ascii` escapes characters that control a terminal or begin a new line.
                shown = ascii(method[:MAX_SHOWN_METHOD])
                logger.warning("refused a call of %s from %s: %s", shown, context.peer(), error)
            yield await abort(context, error)  # `yield` makes this function a generator

        # Use a handler for streams: such a handler refuses calls of every kind, before it reads a request.
        return grpc.stream_stream_rpc_method_handler(refuse)
