"""Every error that the engine raises, in one tree.

    NexumError
    |-- InvalidRequest (ValueError)       what was sent can't be right: mend it, don't repeat it
    |   `-- TooLarge                      it is right, but over a size limit
    |-- NotFound (LookupError)            no such execution, task or workflow
    |   |-- ExecutionNotFound
    |   |-- TaskNotFound
    |   `-- WorkflowNotFound
    |-- Conflict                          it contradicts what is recorded
    |   |-- IdempotencyConflict           the key was used with another input
    |   |-- VersionConflict               the version hash was registered with another definition
    |   `-- StaleTask                     the attempt is over: a newer one was handed out, or it was reported otherwise
    |-- StoreError                        the database
    |   |-- StoreUnavailable              the outcome of a transaction is unknown: ask again
    |   |-- StoreLocked                   another server has the file
    |   `-- StoreRefused                  the file or URL is not one that this version can open
    |-- ServerError                       the server, seen from a client
    |   |-- ServerUnavailable (ConnectionError)   nothing answers there
    |   |   `-- ServerNotReady                      it answers that it can't now: ask again
    |   |-- NotANexumServer               something else answers there
    |   `-- ServerFault                   the server had a fault of its own, which its log names
    |-- WaitTimeout (TimeoutError)        the execution goes on, the caller stopped waiting
    `-- FinalError                        raised by a worker's handler: repeating it can't help

A message names the thing, the cause and the next step. It is written for the person (or the model) who reads it, and
carries no internals, because the server sends it to its clients.
"""

from __future__ import annotations


class NexumError(Exception):
    """Base of every error of this package."""


class InvalidRequest(NexumError, ValueError):
    """The request can't be right, however often it is sent."""


class TooLarge(InvalidRequest):
    """The request or the answer is over a documented size limit."""


class NotFound(NexumError, LookupError):
    """The thing that was named is not recorded here."""


class ExecutionNotFound(NotFound):
    """No execution has this id."""

    def __init__(self, execution_id: str) -> None:
        super().__init__(f"no execution {execution_id!r} in this server's database")
        self.execution_id = execution_id


class TaskNotFound(NotFound):
    """No attempt was ever handed out under this task id."""

    def __init__(self, task_id: str) -> None:
        super().__init__(f"no task {task_id!r} was handed out by this server")
        self.task_id = task_id


class WorkflowNotFound(NotFound):
    """The workflow, or this version of it, was never registered."""

    def __init__(self, workflow_id: str, version_hash: str) -> None:
        super().__init__(
            f"workflow {workflow_id!r} is not registered in version {version_hash!r}: call RegisterWorkflow first"
        )
        self.workflow_id = workflow_id
        self.version_hash = version_hash


class Conflict(NexumError):
    """The request contradicts what is recorded."""


class IdempotencyConflict(Conflict):
    """The idempotency key belongs to an execution with another input."""


class VersionConflict(Conflict):
    """The version hash is registered with another definition."""


class StaleTask(Conflict):
    """The attempt may not report (any more, or not this)."""


class StoreError(NexumError):
    """The database can't do what was asked."""


class StoreUnavailable(StoreError):
    """Whether the transaction was stored is unknown: ask again, nothing that was acknowledged is lost."""


class StoreLocked(StoreError):
    """Another process holds the database file."""


class StoreRefused(StoreError):
    """The URL or the file is not one that this version can open; it was not touched."""


class ServerError(NexumError):
    """The server could not be used."""


class ServerUnavailable(ServerError, ConnectionError):
    """No server answers at the address."""


class ServerNotReady(ServerUnavailable):
    """A server answers, and says that it can't do this now: ask again."""


class NotANexumServer(ServerError):
    """Something answers at the address, and it doesn't speak Nexum."""


class ServerFault(ServerError):
    """The server failed inside; its log has the details under the id in the message."""


class WaitTimeout(NexumError, TimeoutError):
    """The wait is over, the execution is not: a later call with the same key attaches to it."""


class FinalError(NexumError):
    """A handler's failure that repeating can't mend (bad arguments, a refused address): it is not retried."""
