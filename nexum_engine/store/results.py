"""The results of transitions. The store returns them only after the commit."""

from __future__ import annotations

from dataclasses import dataclass, field

from nexum_engine.records import Execution, ExecutionStatus, Task


@dataclass(frozen=True)
class ReadyTask:
    """A task that became due, by version and size: it wakes a waiting poll."""

    version_hash: str
    task_bytes: int


@dataclass(frozen=True)
class Changed:
    """The effects of a report or a sweep on other nodes and executions."""

    ready: tuple[ReadyTask, ...] = ()
    ended: tuple[Execution, ...] = ()
    retry_ms: int | None = None
    """When a failed node becomes due again."""


@dataclass(frozen=True)
class Started:
    """The result of `start_execution`."""

    execution_id: str
    status: ExecutionStatus
    existing: bool
    ready: int = 0
    """How many tasks the execution began with."""
    task: Task | None = None
    """The task for the owner, if one started the execution."""
    changed: Changed = Changed()
    """The effects of an output that came with the start."""


@dataclass(frozen=True)
class Claim:
    """The result of `claim`: a task, or the size of a task that was too large for the worker."""

    task: Task | None = None
    oversized: ReadyTask | None = None


@dataclass(frozen=True)
class Swept:
    """The result of `sweep`."""

    changed: Changed
    next_ms: int | None
    """When the next lease runs out or the next retry is due."""


@dataclass
class Changes:
    """A mutable `Changed`, while a transition runs."""

    ready: list[ReadyTask] = field(default_factory=list)
    ended: list[Execution] = field(default_factory=list)
    retry_ms: int | None = None

    def freeze(self) -> Changed:
        return Changed(tuple(self.ready), tuple(self.ended), self.retry_ms)
