"""What the transitions answer. It may be acted on only after the commit, which the store sees to."""

from __future__ import annotations

from dataclasses import dataclass, field

from nexum_engine.records import Execution, ExecutionStatus, Task


@dataclass(frozen=True)
class ReadyTask:
    """A task that became due: what wakes a waiting poll."""

    version_hash: str
    task_bytes: int


@dataclass(frozen=True)
class Changed:
    """What a report or a sweep changed beyond its own row."""

    ready: tuple[ReadyTask, ...] = ()
    ended: tuple[Execution, ...] = ()
    retry_ms: int | None = None
    """When a failed node becomes a task again."""


@dataclass(frozen=True)
class Started:
    """The outcome of `start_execution`."""

    execution_id: str
    status: ExecutionStatus
    existing: bool
    ready: int = 0
    """How many tasks it began with."""
    task: Task | None = None
    """The task of the owner that started it."""
    changed: Changed = Changed()
    """What the result changed that came with the start."""


@dataclass(frozen=True)
class Claim:
    """The outcome of `claim`: a task, or the size of one that was too large for the worker."""

    task: Task | None = None
    oversized: ReadyTask | None = None


@dataclass(frozen=True)
class Swept:
    """The outcome of `sweep`."""

    changed: Changed
    next_ms: int | None
    """When the next lease runs out or the next retry is due."""


@dataclass
class Changes:
    """A `Changed` in the making."""

    ready: list[ReadyTask] = field(default_factory=list)
    ended: list[Execution] = field(default_factory=list)
    retry_ms: int | None = None

    def freeze(self) -> Changed:
        return Changed(tuple(self.ready), tuple(self.ended), self.retry_ms)
