"""The mapping between the engine's errors and gRPC's status codes, in both directions."""

from __future__ import annotations

from typing import Any

import grpc

from nexum_engine import errors

ANSWERED = "nexum-error"
"""The key of the trailing metadata in which a server sends the name of an engine error.

UNAVAILABLE without this key means that the requested server was not reached.
"""

RETRY_AFTER = "grpc-retry-pushback-ms"
"""The key of the trailing metadata in which a server says when to retry. gRPC's own retries obey it, too."""

TOO_MANY_RPCS = "Concurrent RPC limit exceeded!"
"""The details of grpcio's error RESOURCE_EXHAUSTED for an RPC that exceeds the server's limit of concurrent RPCs.

The error has no trailing metadata.
"""

CUT_OFF = "Internal error from Core"
"""The details of grpcio's error if a stream ends while a request is being sent. The real status is lost."""

OVERLOADED_RETRY_AFTER = 1.0
"""After how many seconds to retry if an overloaded server doesn't say when."""

MAX_RETRY_AFTER_MS = 60_000  # a client waits no longer, whatever a server says

STATUS_OF_ERROR: dict[type[errors.NexumError], grpc.StatusCode] = {
    # List a subclass before its base class: the first class that matches counts.
    errors.TooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.IdempotencyConflict: grpc.StatusCode.ALREADY_EXISTS,
    errors.Conflict: grpc.StatusCode.FAILED_PRECONDITION,
    errors.StoreUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.TokenRefused: grpc.StatusCode.UNAUTHENTICATED,
    errors.RoleRefused: grpc.StatusCode.PERMISSION_DENIED,
}

_ERROR_OF_STATUS: dict[grpc.StatusCode, type[errors.NexumError]] = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.TooLarge,
    grpc.StatusCode.OUT_OF_RANGE: errors.TooLarge,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.IdempotencyConflict,
    grpc.StatusCode.FAILED_PRECONDITION: errors.Conflict,
    grpc.StatusCode.UNAVAILABLE: errors.ServerUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.ServerUnavailable,
    grpc.StatusCode.CANCELLED: errors.ServerUnavailable,
    grpc.StatusCode.UNIMPLEMENTED: errors.NotANexumServer,
    grpc.StatusCode.UNKNOWN: errors.NotANexumServer,
    grpc.StatusCode.UNAUTHENTICATED: errors.TokenRefused,
    grpc.StatusCode.PERMISSION_DENIED: errors.RoleRefused,
}

CODE_OF_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def status_of(error: errors.NexumError) -> grpc.StatusCode | None:
    """Return the status that a server sends for `error`, or None for an internal error."""
    return next((status for kind, status in STATUS_OF_ERROR.items() if isinstance(error, kind)), None)


def error_of(rpc_error: grpc.RpcError, address: str) -> errors.NexumError:
    """Return the error that a client raises for a failed call to `address`."""
    code: grpc.StatusCode = rpc_error.code()
    details = rpc_error.details() or code.name
    kind = _ERROR_OF_STATUS.get(code, errors.ServerFault)
    metadata: Any = rpc_error.trailing_metadata()  # pairs of key and value, in a type of grpc
    known = dict(metadata or ())
    answered = known.get(ANSWERED)
    is_overloaded = answered == errors.Overloaded.__name__ or details == TOO_MANY_RPCS
    if (code is grpc.StatusCode.UNAVAILABLE and answered) or is_overloaded:
        after = OVERLOADED_RETRY_AFTER if is_overloaded else 0.0
        sent = str(known.get(RETRY_AFTER, ""))
        if sent.isascii() and sent.isdecimal():
            after = min(int(sent), MAX_RETRY_AFTER_MS) / 1000
        return errors.ServerNotReady(f"the Nexum server on {address} can't do this now: {details}", after)
    if details == CUT_OFF:
        return errors.ServerUnavailable(f"the connection to the Nexum server on {address} broke")
    if kind is errors.ServerUnavailable:
        details = " ".join(details.split())  # on Windows, the system's messages end with a line break
        return errors.ServerUnavailable(f"no Nexum server answers on {address}: {errors.START_A_SERVER} ({details})")
    if kind is errors.NotANexumServer:
        return errors.NotANexumServer(f"the server on {address} does not speak this Nexum contract ({details})")
    if issubclass(kind, errors.AccessDenied):
        return kind(f"the server on {address} refuses the call: {details}")
    if code is grpc.StatusCode.OUT_OF_RANGE:  # from a published server, for a message above 4 MiB
        return errors.TooLarge(
            f"the server on {address} refuses a message of this size: send less, or use this project's own server, "
            f"python -m nexum_engine ({details})"
        )
    return kind(details)


def trailing_metadata(error: str, retry_after_ms: int) -> tuple[tuple[str, str], ...]:
    """Return the trailing metadata of a call that a server answers with an error."""
    pairs = (ANSWERED, error), (RETRY_AFTER, str(retry_after_ms or ""))
    return tuple((key, value) for key, value in pairs if value)


def rpc_error(code: grpc.StatusCode, details: str, trailing: Any = None) -> grpc.aio.AioRpcError:
    """Return the error of a failed call, as `grpc.aio` raises it."""
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, nothing, nothing if trailing is None else trailing, details)
