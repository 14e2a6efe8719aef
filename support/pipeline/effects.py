"""Log the effects of the pipeline's steps in a file outside Nexum's database, one line for each effect.

A step's line is written after its work is done and before its result is reported. The file is evidence in addition to
the server's record: a step that ran twice has two lines with equal idempotency keys.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from nexum_engine.worker import TaskContext


def now_ms() -> int:
    """Return the time in milliseconds since 1970."""
    return round(time.time() * 1000)


class Effect(BaseModel):
    """One line of the effect log: the effect of one attempt at a step."""

    model_config = ConfigDict(frozen=True)

    execution_id: str
    step: str
    attempt: int
    idempotency_key: str
    pid: int
    worker_id: str
    begun_ms: int
    at_ms: int


class EffectLog:
    """The file that holds the effects."""

    def __init__(self, path: Path, worker_id: str = "") -> None:
        self.path = path
        self._worker_id = worker_id

    def append(self, task: TaskContext, begun_ms: int) -> None:
        """Write the line of a task to the end of the file, and return when it is written."""
        effect = Effect(
            execution_id=task.execution_id,
            step=task.node_id,
            attempt=task.attempt,
            idempotency_key=task.idempotency_key,
            pid=os.getpid(),
            worker_id=self._worker_id,
            begun_ms=begun_ms,
            at_ms=now_ms(),
        )
        with self.path.open("a", encoding="utf-8") as file:
            file.write(effect.model_dump_json() + "\n")

    def of(self, execution_id: str) -> list[Effect]:
        """Return the effects of an execution, in the order in which they happened."""
        if not self.path.exists():
            return []
        effects: list[Effect] = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                effects.append(Effect.model_validate_json(line))
            except ValidationError:
                continue  # an incomplete line, whose writer was killed: it doesn't count as an effect
        return [effect for effect in effects if effect.execution_id == execution_id]
