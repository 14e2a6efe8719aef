"""The effects that the pipeline's steps have outside Nexum's database: one line of a file each.

A step writes its line when its work is done and before its result is reported. The file is the witness beside the
server's record: a step that ran again stands in it twice, with one idempotency key.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from nexum_engine.worker import TaskContext


class Effect(BaseModel):
    """One line."""

    model_config = ConfigDict(frozen=True)

    execution_id: str
    step: str
    attempt: int
    idempotency_key: str
    pid: int
    at_ms: int


class EffectLog:
    """Appends to the file and reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, task: TaskContext) -> None:
        """Write the task's line; it is in the file when this returns."""
        effect = Effect(
            execution_id=task.execution_id,
            step=task.node_id,
            attempt=task.attempt,
            idempotency_key=task.idempotency_key,
            pid=os.getpid(),
            at_ms=round(time.time() * 1000),
        )
        with self.path.open("a", encoding="utf-8") as file:
            file.write(effect.model_dump_json() + "\n")

    def of(self, execution_id: str) -> list[Effect]:
        """The effects of an execution, in the order in which they happened."""
        if not self.path.exists():
            return []
        effects: list[Effect] = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                effects.append(Effect.model_validate_json(line))
            except ValidationError:
                continue  # a writer was killed within its line: this effect didn't happen
        return [effect for effect in effects if effect.execution_id == execution_id]
