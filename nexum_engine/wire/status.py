"""The mapping between the engine's errors and gRPC's status codes, in both directions."""

from __future__ import annotations

from typing import Any

import grpc

from nexum_engine import errors

ANSWERED = "nexum-error"
"""The key of the trailing metadata in which a server sends the name of an engine error.

UNAVAILABLE without this key means that the requested server was not reached.
"""

STATUS_OF_ERROR: dict[type[errors.NexumError], grpc.StatusCode] = {
    # List a subclass before its base class: the first class that matches counts.
    errors.TooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.IdempotencyConflict: grpc.StatusCode.ALREADY_EXISTS,
    errors.Conflict: grpc.StatusCode.FAILED_PRECONDITION,
    errors.StoreUnavailable: grpc.StatusCode.UNAVAILABLE,
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
}

CUT_OFF = "Internal error from Core"
"""The details of grpcio's error if a stream ends while a request is being sent. The real status is lost."""

CODE_OF_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def status_of(error: errors.NexumError) -> grpc.StatusCode | None:
    """Return the status that a server sends for `error`, or None for an internal error."""
    return next((status for kind, status in STATUS_OF_ERROR.items() if isinstance(error, kind)), None)


def error_of(rpc_error: grpc.RpcError, address: str) -> errors.NexumError:
    """Return the error that a client raises for a failed call to `address`."""
    code: grpc.StatusCode = rpc_error.code()
    details = rpc_error.details() or code.name
    kind = _ERROR_OF_STATUS.get(code, errors.ServerFault)
    metadata: Any = rpc_error.trailing_metadata()  # (key, value) pairs, in a type that grpc defines
    answered = dict(metadata or ()).get(ANSWERED)
    if (code is grpc.StatusCode.UNAVAILABLE and answered) or answered == errors.Overloaded.__name__:
        return errors.ServerNotReady(f"the Nexum server on {address} can't do this now: {details}")
    if kind is errors.ServerUnavailable:
        return errors.ServerUnavailable(f"no Nexum server answers on {address}: {errors.START_A_SERVER} ({details})")
    if kind is errors.NotANexumServer:
        return errors.NotANexumServer(f"the server on {address} does not speak this Nexum contract ({details})")
    if code is grpc.StatusCode.OUT_OF_RANGE:  # from a published server, for a message above 4 MiB
        return errors.TooLarge(
            f"the server on {address} refuses a message of this size: send less, or use this project's own server, "
            f"python -m nexum_engine ({details})"
        )
    return kind(details)


def rpc_error(code: grpc.StatusCode, details: str, trailing: Any = None) -> grpc.aio.AioRpcError:
    """Return the error of a failed call, as `grpc.aio` raises it."""
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, nothing, nothing if trailing is None else trailing, details)
