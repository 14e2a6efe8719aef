"""Effects that must happen only once, and their records.

Each effect is an owned execution of the workflow `tool-effect`. Its key names the session and the call. If the run dies
while the tool runs, the server knows that the effect may have happened, and doesn't hand it out again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from durable_autogen.record.events import Event, Frozen, Kind
from durable_autogen.record.journal import TAKE_OVER_PATIENCE, Journal
from nexum_engine import jsontext
from nexum_engine.approvals import key_of
from nexum_engine.client import NexumClient, Started
from nexum_engine.connection import OUTAGE_PATIENCE
from nexum_engine.errors import Conflict, IdempotencyConflict, NexumError, TaskNotFound
from nexum_engine.records import Execution, ExecutionStatus, NodeStatus, Outcome, Task
from nexum_engine.workflow import RetryPolicy, Workflow, workflow


class EffectInput(Frozen):
    """The input of an effect's execution: the call that makes it."""

    session: str
    agent: str
    tool: str
    arguments: dict[str, Any]
    """The arguments that the tool runs with, with the defaults filled in."""
    call: str
    """The call's scope (see events.py)."""
    digest: str
    """The call's digest: of the arguments that the model gave, without defaults and before a person's edit."""

    def __str__(self) -> str:
        return f"{self.tool}({jsontext.dump(self.arguments, 'the arguments')})"

    @property
    def key(self) -> str:
        """The idempotency key of the effect's execution."""
        return key_of(self.session, EFFECT, self.call)


EFFECT = "effect"
"""The name of the only node of an effect's execution."""
# The run reports every failure of the tool as final. Only an effect that has not begun is retried (see `release`).
_RETRY = RetryPolicy(max_attempts=1000)
TOOL_EFFECT = workflow("tool-effect", input=EffectInput).effect(EFFECT, once=True, retry=_RETRY).build()
TOOL_EFFECT_RECONCILED = (
    workflow("tool-effect", input=EffectInput).effect(EFFECT, once=True, reconcile=True, retry=_RETRY).build()
)


Effect = tuple[EffectInput, Execution]
"""An effect's input and execution."""


def effects_prefix(session: str) -> str:
    """Return the key prefix of a session's effects."""
    return f"{session}:{EFFECT}/"


def reuse_prefix(session: str, digest: str = "") -> str:
    """Return the key prefix of the results that a fork may reuse; with the `digest` of a call, only of equal calls."""
    return f"{session}:reuse/{digest}"


async def read_effects(client: NexumClient, key_prefix: str, status: str = "") -> list[Effect]:
    """Return the effects whose keys begin with `key_prefix`, oldest first; with `status`, only those of this status."""
    found = [
        (EffectInput.model_validate_json(one.input_json), one)
        async for one in client.all_executions(
            workflow_id=TOOL_EFFECT.workflow_id,
            key_prefix=key_prefix,
            status=status,
            with_nodes=True,
            patience=OUTAGE_PATIENCE,
        )
    ]
    return found[::-1]


async def with_attempts(client: NexumClient, execution: Execution) -> Execution:
    """Return the present state of an execution, with its attempts, which lists leave out."""
    return (await client.get_execution(execution.execution_id, with_attempts=True, patience=OUTAGE_PATIENCE)).execution


def has_not_happened(execution: Execution) -> bool:
    """Return whether an effect has certainly not happened: a person has said so, or it was given up before it began."""
    (node,) = execution.nodes
    return node.status is NodeStatus.READY and all(one.outcome is Outcome.FAILED for one in node.attempts[-1:])


async def cancel_effects_to_be_made(journal: Journal) -> None:
    """Cancel the effects that have not happened: the run has ended without making their calls."""
    running = await read_effects(journal.client, effects_prefix(journal.session), ExecutionStatus.RUNNING.value)
    for _, execution in running:
        if has_not_happened(await with_attempts(journal.client, execution)):
            with contextlib.suppress(Conflict):  # it ended in the meantime
                await journal.client.cancel_execution(execution.execution_id, by=f"session {journal.session}")


async def warn_of_effects(journal: Journal, dropped: Iterable[Event]) -> None:
    """Log a warning if dropped events have calls whose effect must happen only once."""
    calls = {journal.recorded.scope_of(event.address) for event in dropped if event.kind is Kind.TOOL}
    found = await read_effects(journal.client, effects_prefix(journal.session)) if calls else []
    if effects := [str(input) for input, _ in found if input.call in calls]:
        journal.log.warning(
            "the dropped events have %d call(s) whose effect must happen only once, and this program may make such "
            "calls again: %s",
            *(len(effects), ", ".join(effects)),
        )


class Effects:
    """The effects of one run. Its methods raise SessionBusy if another process owns the run, or has taken it over."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    async def start(self, workflow: Workflow, input: BaseModel, key: str) -> Started | None:
        """Start an effect's execution for this run. If it exists already, take it over, or find its result.

        Returns None if the key's effect has another input. Raises SessionBusy if another process owns the run. If the
        caller is cancelled, an effect that was started for it is released (see `release`).
        """

        async def start(*args: Any, **options: Any) -> Started | None:
            try:
                return await self._journal.owner.start(*args, **options)
            except IdempotencyConflict:
                return None

        starting = asyncio.create_task(self._journal.under_this_run(start, workflow, input, idempotency_key=key))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            self._journal.finish_later(self._release_started(starting))
            raise

    def release(self, task: Task) -> None:
        """Record, in the background, that an effect has not begun, although this run has its task.

        If the effect's call is made again, the effect begins then, and no person has to find out whether it happened.
        """
        self._journal.finish_later(self._release(task))

    async def _release_started(self, starting: asyncio.Task[Started | None]) -> None:
        with contextlib.suppress(NexumError):  # the server has started nothing, or another process owns the run
            started = await starting
            if started is not None and started.task is not None:
                await self._release(started.task)

    async def _release(self, task: Task) -> None:
        if task.must_reconcile:
            return  # an earlier attempt may have had its effect: the end of the run must not cancel it
        # If the server doesn't answer, it notices later that the task is lost, and a person decides.
        with contextlib.suppress(NexumError):
            await self._journal.owner.release(
                task, "the call was given up before the tool began", patience=TAKE_OVER_PATIENCE
            )
            self._journal.may_leave_open = True

    async def record(self, input: EffectInput, output: Any, key: str) -> None:
        """Record an effect together with its result. Raises SessionBusy if another process owns the run."""
        await self._journal.under_this_run(self._journal.owner.record, TOOL_EFFECT, input, output, idempotency_key=key)

    async def complete(self, task: Task, output: Mapping[str, Any]) -> None:
        """Record the result of an effect. Raises SessionBusy if another process has taken it over."""
        with self._journal.held("its effect"), contextlib.suppress(TaskNotFound):  # the server's database was replaced
            await self._journal.owner.complete(task, output)

    async def fail(self, task: Task, error: str, *, unknown: bool) -> None:
        """Record that an effect failed, or that it is unknown whether it happened."""
        with self._journal.held("its effect"), contextlib.suppress(TaskNotFound):
            await self._journal.owner.fail(task, error, unknown=unknown)
