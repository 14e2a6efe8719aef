"""What would disturb a drill: pipeline executions left over from before, and pipeline workers that it didn't start.

Leftovers of the demo itself are cancelled, by name; all else is refused, by name, with what to do about it.
"""

from __future__ import annotations

import asyncio
import uuid

from nexum_engine.client import DEFAULT_ADDRESS, NexumClient
from nexum_engine.errors import Conflict, NexumError
from nexum_engine.records import Execution, NodeStatus
from nexum_engine.workflow import Workflow
from support.console import say

_KEY_PREFIX = "crash-demo:"
_ABANDONED_AFTER = 3.0  # seconds in a row without a worker: another demo's next one may be on its way
_ABANDONED_WITHIN = 10.0  # seconds; a dead worker's task is free by then, also after a restart of the server
_POLL_COUNTS_FOR = 3.0  # seconds that the server remembers the poll of a worker that is gone, and one more
_LOOK_INTERVAL = 0.1  # seconds
_ALL = 1000  # as many as the server lists


class Disturbed(NexumError):
    """Something that isn't the demo's own would take part in it."""


def new_key() -> str:
    """An idempotency key that tells the demo's executions from all others."""
    return f"{_KEY_PREFIX}{uuid.uuid4().hex}"


async def clear_leftovers(client: NexumClient, workflow: Workflow, *, server_is_new: bool) -> None:
    """Cancel what an earlier demo left RUNNING. Raises Disturbed for what is not its own or still at work."""
    running = [
        execution
        for execution in await client.list_executions(workflow_id=workflow.workflow_id, status="RUNNING", limit=_ALL)
        if execution.version_hash == workflow.version_hash
    ]
    foreign = [one.execution_id for one in running if not one.idempotency_key.startswith(_KEY_PREFIX)]
    if foreign:
        raise Disturbed(
            f"{', '.join(foreign)} of {workflow.workflow_id} is RUNNING, and this demo's workers would take its steps: "
            f"let it finish, or cancel it with: {_command(client, 'cancel', foreign[0])}"
        )
    for execution in running:
        if not server_is_new:  # then nobody can be at work on it
            await _wait_until_abandoned(client, execution)
        try:
            await client.cancel_execution(execution.execution_id)
            say(f"[demo] Cancelled {execution.execution_id}, which an earlier crash_demo left RUNNING")
        except Conflict:
            continue  # it has just ended by itself


async def _wait_until_abandoned(client: NexumClient, execution: Execution) -> None:
    loop = asyncio.get_running_loop()
    give_up = loop.time() + _ABANDONED_WITHIN
    seen_at_work = loop.time()
    ended_at: float | None = None
    say(f"[demo] {execution.execution_id} is RUNNING, from another crash_demo: looking whether anybody works on it")
    while True:
        observed = await client.get_execution(execution.execution_id, with_attempts=True)
        held = [node for node in observed.execution.nodes if node.status is NodeStatus.RUNNING]
        if observed.execution.status.ended:
            # Its worker may still be there, and would take the next pipeline's first step.
            ended_at = ended_at or loop.time()
            if not observed.has_poller or loop.time() - ended_at > _POLL_COUNTS_FOR:
                return
        elif not held and not observed.has_poller:
            if loop.time() - seen_at_work > _ABANDONED_AFTER:
                return
        else:
            seen_at_work = loop.time()
            if seen_at_work > give_up:
                at_work = f"{held[0].attempts[-1].worker_id} works on it" if held else "a worker waits for its steps"
                raise Disturbed(
                    f"{execution.execution_id} belongs to another crash_demo, and {at_work}: let that one finish, or "
                    f"end it and {_command(client, 'cancel', execution.execution_id)}"
                )
        await asyncio.sleep(_LOOK_INTERVAL)


async def refuse_foreign_workers(client: NexumClient, execution_id: str) -> None:
    """Raise Disturbed if a worker serves this new execution, before the demo has started one."""
    loop = asyncio.get_running_loop()
    give_up = loop.time() + _POLL_COUNTS_FOR
    while True:
        observed = await client.get_execution(execution_id, with_attempts=True)
        if observed.has_poller is None:
            raise Disturbed(f"the server on {client.address} has no GetExecution, so it can't show who ran which step")
        for node in observed.execution.nodes:
            for attempt in node.attempts:
                raise foreign_worker(attempt.worker_id, node.node_id)
        if not observed.has_poller:
            return
        if loop.time() > give_up:
            raise Disturbed(
                f"a pipeline worker that this demo did not start polls {client.address}: stop it first (Ctrl+C in its "
                "terminal)"
            )
        await asyncio.sleep(_LOOK_INTERVAL)


def foreign_worker(worker_id: str, step: str) -> Disturbed:
    """The refusal of a worker that took a step."""
    return Disturbed(
        f"pipeline worker {worker_id}, which this demo did not start, took {step}: its steps would be in the way. Stop "
        "it first (Ctrl+C in its terminal; its process id is in its name)"
    )


def _command(client: NexumClient, command: str, execution_id: str) -> str:
    where = "" if client.address == DEFAULT_ADDRESS else f" --nexum {client.address}"
    return f"python -m nexum_engine {command} {execution_id}{where}"
