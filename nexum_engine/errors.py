"""Every error that the engine raises, in one tree.

    NexumError
    |-- InvalidRequest (ValueError)       the request is invalid: fix it, don't retry it
    |   `-- TooLarge                      the request is over a size limit
    |-- Overloaded                        too many calls, or too many tasks wait for workers: retry
    |-- NotFound (LookupError)            no such execution, task or workflow
    |   |-- ExecutionNotFound
    |   |-- TaskNotFound
    |   `-- WorkflowNotFound
    |-- Conflict                          the request contradicts what is recorded
    |   |-- IdempotencyConflict           the key was used with another input
    |   |-- VersionConflict               the version hash is registered with another definition
    |   `-- StaleTask                     the attempt is over: a newer attempt exists, or another result was reported
    |-- StoreError                        the database
    |   |-- StoreUnavailable              the outcome of a transaction is unknown: retry
    |   |-- StoreLocked                   another server has the file open
    |   `-- StoreRefused                  this version of the engine can't open the file or URL
    |-- ServerError                       the server, seen from a client
    |   |-- ServerUnavailable (ConnectionError)   no server answers
    |   |   `-- ServerNotReady                      a server answers, but can't do the call now: retry
    |   |-- NotANexumServer               a server of another kind answers
    |   |-- AccessDenied                  TLS or the token: a retry can't fix it
    |   |   |-- TokenRefused                      no token, or one that the server doesn't know
    |   |   `-- RoleRefused                       the token doesn't permit this call
    |   |-- NoOwnedExecutions             the server can't record runs
    |   `-- ServerFault                   the server had an internal error, which is in its log
    |-- WaitTimeout (TimeoutError)        the caller stopped waiting, the execution continues
    |-- FinalError                        raised by a worker's handler: a retry can't fix it
    `-- UnknownEffect                     raised by a worker's handler: its effect may or may not have happened

An error's message names the thing, the cause and the next step. The message is written for a person or a model. It
contains no internals, because the server sends the message to clients.
"""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

START_A_SERVER = "start one with python -m nexum_engine, or check the address"
"""The next step if no server answers."""


class NexumError(Exception):
    """The base class of every error of this package."""


class InvalidRequest(NexumError, ValueError):
    """The request is invalid; a retry can't fix it."""


class TooLarge(InvalidRequest):
    """The request or the answer is over a documented size limit."""


class Overloaded(NexumError):
    """The server's memory for calls is used up, or too many tasks wait for workers: retry after some time."""

    def __init__(self, message: str, retry_after: float = 0.1) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """How many seconds to wait before a retry. Each client varies the time at random, so that not all of them come
        back at once."""


class NotFound(NexumError, LookupError):
    """The server has no execution, task or workflow of this name."""


class ExecutionNotFound(NotFound):
    """No execution has this id."""

    def __init__(self, execution_id: str) -> None:
        super().__init__(f"no execution {execution_id!r} in this server's database")
        self.execution_id = execution_id


class TaskNotFound(NotFound):
    """No attempt has this task id."""

    def __init__(self, task_id: str) -> None:
        super().__init__(f"this server handed out no task {task_id!r}")
        self.task_id = task_id


class WorkflowNotFound(NotFound):
    """The requested version of the workflow is not registered, or no version of the workflow is registered."""

    def __init__(self, workflow_id: str, version_hash: str = "") -> None:
        version = f"version {version_hash!r} of " if version_hash else ""
        super().__init__(f"{version}workflow {workflow_id!r} is not registered: call RegisterWorkflow first")
        self.workflow_id = workflow_id
        self.version_hash = version_hash


class Conflict(NexumError):
    """The request contradicts what is recorded."""


class IdempotencyConflict(Conflict):
    """The idempotency key belongs to an execution with another input."""


class VersionConflict(Conflict):
    """The version hash is registered with another definition."""


class StaleTask(Conflict):
    """The report is refused: its attempt is over, or has already reported another result."""


class StoreError(NexumError):
    """The database can't do what was requested."""


class StoreUnavailable(StoreError):
    """The database may or may not have stored the change: retry the call. No acknowledged change is lost."""


class StoreLocked(StoreError):
    """Another process holds the database file."""


class StoreRefused(StoreError):
    """This version of the engine can't open the URL or the file. The file was left untouched."""


class ServerError(NexumError):
    """The server can't be used from this client."""


class ServerUnavailable(ServerError, ConnectionError):
    """No server answers at the address."""


class ServerNotReady(ServerUnavailable):
    """A server answers, but it can't do the call now, or wants a token first. The message says which. Retry later."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """How many seconds to wait before a retry; 0 if the server didn't say."""


class NotANexumServer(ServerError):
    """A server of another kind answers at the address."""


class AccessDenied(ServerError):
    """Client and server don't agree about TLS, or the server refuses the client: fix the settings, don't retry."""


class TokenRefused(AccessDenied):
    """The call has no token, or one that the server doesn't know."""


class RoleRefused(AccessDenied):
    """The token is valid, but it doesn't permit this call."""


class NoOwnedExecutions(ServerError):
    """The server doesn't support owned executions, so it can't record runs."""

    def __init__(self, address: str) -> None:
        super().__init__(
            f"{address} is a published Nexum server, which can't record runs: use this project's own server (python "
            "-m nexum_engine)"
        )


class ServerFault(ServerError):
    """The server had an internal error. The server's log has the details, under the id in this error's message."""


class WaitTimeout(NexumError, TimeoutError):
    """The wait is over, but the execution continues. A later call with the same key attaches to the execution."""


class FinalError(NexumError):
    """A failure that a retry can't fix (bad arguments, a refused address). A handler raises it to end the node."""


class UnknownEffect(NexumError):
    """An effect that may or may not have happened. A handler raises this error if it can't tell.

    If the EFFECT node has `reconcile`, the next attempt finds out whether the effect has happened. Otherwise, or if
    that attempt raises this error as well, the node waits for a person. A node of another type fails without a retry.
    """


def perhaps_sent(error: ServerUnavailable, key: str) -> ServerUnavailable:
    """Return the error of an event that was sent with a new idempotency key, and may have arrived."""
    return ServerUnavailable(
        f"{error}. To send the event again, give it the key {key} (--key): then it counts once, even if it has arrived"
    )


def first_problem(error: ValidationError, *place: str) -> str:
    """Return the first problem that pydantic has found in a value, with its place and what was given.

    For example: `charge.timeout: Input should be greater than 0 (given: -1)`. `place` is the path of the whole value,
    such as `charge`; the path of the problem begins with it.
    """
    first = error.errors(include_url=False)[0]
    names = [*place, *(str(part) for part in first["loc"] if str(part).isidentifier())]
    match first["type"]:
        case "extra_forbidden":
            message = "there is no such field"
        case "missing" | "missing_argument" | "value_error":
            message = first["msg"].removeprefix("Value error, ")
        case _:
            message = f"{first['msg']} (given: {reprlib.repr(first['input'])})"
    return f"{'.'.join(names)}: {message}" if names else message
