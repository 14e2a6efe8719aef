"""The refusal of a call: which gRPC status and details the client gets."""

from __future__ import annotations

import logging
import uuid
from typing import Any, NoReturn

import grpc

from nexum_engine.errors import NexumError, Overloaded
from nexum_engine.wire.status import status_of, trailing_metadata

MAX_MESSAGE_CHARACTERS = 600  # in an error message, which is sent in a header of 8 KB, at up to 9 bytes a character

logger = logging.getLogger(__name__)
Context = grpc.aio.ServicerContext[Any, Any]


class Refused(Exception):
    """A call was answered with a status other than OK."""

    def __init__(self, code: grpc.StatusCode, details: str, error: str, retry_after_ms: int = 0) -> None:
        super().__init__(details)
        self.retry_after_ms = retry_after_ms
        self.code = code
        self.details = details
        self.error = error
        """The name of the engine's error, or ""."""


async def abort(context: Context, error: Exception) -> NoReturn:
    """Answer a call with the gRPC status of an error. The details of an internal error are only logged."""
    if isinstance(error, (grpc.aio.AbortError, Refused)):
        raise error  # the call is answered already
    status = status_of(error) if isinstance(error, NexumError) else None
    if status is not None:
        after_ms = round(error.retry_after * 1000) if isinstance(error, Overloaded) else 0
        await context.abort(status, cut(str(error)), trailing_metadata(type(error).__name__, after_ms))
    fault = uuid.uuid4().hex[:8]
    logger.error("fault %s", fault, exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, f"the server had an internal error; see its log under {fault}")


def cut(message: str) -> str:
    """Cut a message that is sent in a header, because headers have a size limit."""
    return message if len(message) <= MAX_MESSAGE_CHARACTERS else f"{message[:MAX_MESSAGE_CHARACTERS]} [cut]"
