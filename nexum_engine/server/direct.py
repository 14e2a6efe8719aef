"""The server's side of calls that come from this process, without gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from google.protobuf.message import Message

from nexum_engine.server.bounds import Received
from nexum_engine.server.calls import CallContext
from nexum_engine.server.refusal import Refused, abort
from nexum_engine.server.servicer import NexumServicer
from nexum_engine.wire.status import rpc_error, trailing_metadata


class DirectServer:
    """A LocalServer (see nexum_engine/in_process.py) that calls a servicer. Create it in the servicer's event loop."""

    def __init__(self, servicer: NexumServicer) -> None:
        self.loop = asyncio.get_running_loop()
        self._servicer = servicer

    async def call(self, method: str, request: bytes, metadata: Sequence[Any]) -> Message:
        with _context(metadata) as context:
            return await self._servicer.rpcs[method](Received(request), context)

    async def stream(
        self, method: str, requests: AsyncIterator[Message], metadata: Sequence[Any], answer: Callable[[Message], None]
    ) -> None:
        with _context(metadata) as context:
            try:
                async with aclosing(getattr(self._servicer, method)(requests, context)) as answers:
                    async for message in answers:
                        answer(message)
            except Exception as error:  # noqa: BLE001 - `abort` answers with a status
                await abort(context, error)


@contextmanager
def _context(metadata: Sequence[Any]) -> Iterator[Any]:
    """Yield the context of a call: a CallContext, in place of gRPC's. Raise a refusal as the error of a gRPC call."""
    context = CallContext(metadata)
    try:
        yield context
    except Refused as refused:
        trailing = trailing_metadata(refused.error, refused.retry_after_ms)
        raise rpc_error(refused.code, refused.details, trailing) from refused
    except asyncio.CancelledError:
        context.is_cancelled = True
        raise
    finally:
        context.end()
