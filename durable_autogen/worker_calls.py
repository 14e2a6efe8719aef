"""How a tool that runs in a worker tells the session that records its call where its result is recorded."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Protocol, runtime_checkable

from durable_autogen.record.events import WorkerResult

call_scope: ContextVar[str] = ContextVar("call_scope", default="")
"""The recorded call that a tool runs for: it tells two equal calls apart that are meant to run twice."""


class CallNotes:
    """What a tool leaves beside its result."""

    def __init__(self) -> None:
        self.worker: WorkerResult | None = None
        self.stop: Exception | None = None
        """Why the run has to end: the tool could not print its progress."""


call_notes: ContextVar[CallNotes | None] = ContextVar("call_notes", default=None)
"""Where a tool leaves what belongs beside its result on record."""


@runtime_checkable
class HearsOfReplays(Protocol):
    """A tool that is told when a result of its own is replayed."""

    def replayed(self, text: str, worker: WorkerResult) -> str:
        """Take the recorded result; return the line that tells of it."""
        ...
