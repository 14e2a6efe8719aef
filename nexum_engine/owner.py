"""Owned executions: the process that starts an owned execution also does its work. No worker gets its task.

    async with Owner(client) as owner:
        owned = await owner.start(WORKFLOW, {"n": 1}, idempotency_key="n-1")
        if owned.task is not None:                      # otherwise, owned.ended has the result
            await owner.complete(owned.task, {"done": True})

If an owner dies, the next owner that starts the same key takes over its execution.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from nexum_engine import jsontext
from nexum_engine.client import NexumClient, Started
from nexum_engine.connection import MAX_SERVER_WAIT, OUTAGE_PATIENCE
from nexum_engine.errors import Conflict, NexumError, NoOwnedExecutions, ServerError, ServerNotReady, ServerUnavailable
from nexum_engine.event_loop import running_loop
from nexum_engine.heartbeat import Heartbeat, new_worker_id
from nexum_engine.records import DeclaredTool, Task
from nexum_engine.workflow import Workflow

CONNECT_TIMEOUT = 30.0  # seconds
GIVE_UP_PATIENCE = 5.0  # seconds for the server to free a call's slot after the caller was cancelled
HELD_FOR = 0.5
"""For how many seconds after an accepted start the owner counts as holding its tasks.

The server may let another owner take over one second after it has lost the connection, or half a second after a restart
of the server. The first owner may notice much later that its connection is lost, for instance if only its own half is
still open. So an answered heartbeat proves nothing.
"""

logger = logging.getLogger(__name__)


class Owner:
    """An owner of executions. It is connected inside an `async with` block.

    Raises ServerError if the server doesn't support owners. `on_lost` is called with the error when the connection is
    lost, and every 10 s until the owner has reconnected.
    """

    def __init__(self, client: NexumClient, *, on_lost: Callable[[NexumError], None] | None = None) -> None:
        self.owner_id = new_worker_id()
        self._client = client
        self._lost: NexumError | None = None
        self._on_lost = on_lost
        self._heartbeat = Heartbeat(client.connection, self.owner_id, on_lost=self._note_lost)
        self._beating: asyncio.Task[None] | None = None
        self._held_until = 0.0

    async def __aenter__(self) -> Owner:
        running_loop()
        self._beating = asyncio.create_task(self._heartbeat.run(), name="owner's heartbeat")
        connecting = asyncio.ensure_future(self._heartbeat.connected.wait())
        try:
            await asyncio.wait({self._beating, connecting}, timeout=CONNECT_TIMEOUT, return_when="FIRST_COMPLETED")
            if self._beating.done():
                self._beating.result()
                raise NoOwnedExecutions(self._client.address)
            if not connecting.done():  # if the server has ended since, the heartbeat connects to the next one
                raise ServerError(
                    f"no Nexum server on {self._client.address} accepted the connection of an owner within "
                    f"{CONNECT_TIMEOUT:g} s{'' if self._lost is None else f': {self._lost}'}"
                )
        except BaseException:
            await self.__aexit__()
            raise
        finally:
            connecting.cancel()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)

    def _note_lost(self, error: NexumError) -> None:
        self._lost = error
        if self._on_lost is not None and self._heartbeat.connected_once:
            self._on_lost(error)
        elif isinstance(error, ServerNotReady) or not isinstance(error, ServerUnavailable):
            # If no server answers, the caller reports that itself. Log every other error here.
            logger.warning("reconnecting: %s", error)

    @property
    def is_holding(self) -> bool:
        """Whether it is certain that this owner still holds its tasks. If False, another owner may have taken over."""
        return time.monotonic() < self._held_until

    def declare(self, tools: Iterable[DeclaredTool]) -> None:
        """Tell the server about tools of this process: `nexum tools` lists them while the owner is connected."""
        self._heartbeat.declare(tools)

    async def start(
        self,
        workflow: Workflow,
        input: BaseModel | Mapping[str, Any],
        *,
        idempotency_key: str,
        holding: Task | None = None,
    ) -> Started:
        """Start the execution of `idempotency_key` as its owner, take it over from a dead owner, or find its result.

        If a limit holds the execution's node back, wait until the server lets the node pass. If the effect of the node
        is unknown, the answer has `unknown` and no task: wait with `get_execution` until a person has resolved the
        node, and start again.

        Raises Conflict, with the owner's name, while another owner holds the execution. Raises Conflict if another
        owner has taken over the task `holding`.
        """
        return await self._start(workflow, input, idempotency_key, holding, "")

    async def take_slot(
        self, workflow: Workflow, input: BaseModel | Mapping[str, Any], *, key: str, holding: Task | None = None
    ) -> Task:
        """Wait until the limits of the workflow's only node let one more call pass. Return a task: the call's slot.

        To free the slot, complete the task. If this process dies, the server frees the slot. `key` names the call: if
        a process makes the call again after a crash, it takes over the slot. Raises what `start` raises.
        """
        number = 0
        while True:
            number += 1  # earlier attempts at the call have used the lower numbers
            numbered = f"{key}/{number}"
            try:
                started = await self.start(workflow, input, idempotency_key=numbered, holding=holding)
            except asyncio.CancelledError:
                giving_up = asyncio.ensure_future(self._give_up_slot(workflow, input, numbered))
                await asyncio.wait({giving_up}, timeout=GIVE_UP_PATIENCE)
                raise
            if started.task is not None:
                return started.task

    async def _give_up_slot(
        self, workflow: Workflow, input: BaseModel | Mapping[str, Any], idempotency_key: str
    ) -> None:
        # If the cancelled start got the slot, its execution has a task: complete the task. If the execution still
        # waits for the slot, cancel the execution.
        with contextlib.suppress(NexumError):
            started = await self._client.start_execution(
                workflow, input, idempotency_key=idempotency_key, owner=self.owner_id
            )
            if started.task is not None:
                await self._client.complete_task(started.task.task_id, "null")
            elif not started.status.ended:
                await self._client.cancel_execution(started.execution_id)

    async def record(
        self,
        workflow: Workflow,
        input: BaseModel | Mapping[str, Any],
        output: BaseModel | Mapping[str, Any],
        *,
        idempotency_key: str,
        holding: Task | None = None,
    ) -> None:
        """Start the execution of `idempotency_key` and record its result, in one round trip and one transaction.

        Raises Conflict as `start` does, and if the execution already has a result.
        """
        text = jsontext.dump(output, "the result")
        started = await self._start(workflow, input, idempotency_key, holding, text)
        if started.ended is not None:
            raise Conflict(f"{idempotency_key!r} already has a result (execution {started.execution_id})")
        if started.task is not None:
            # Record the result in a second call. An older version of this project's server ignores `output_json`, and
            # has only started the execution.
            with self._ending(started.task):
                await self._client.complete_task(started.task.task_id, text, patience=OUTAGE_PATIENCE)

    async def _start(
        self,
        workflow: Workflow,
        input: BaseModel | Mapping[str, Any],
        idempotency_key: str,
        holding: Task | None,
        output_json: str,
    ) -> Started:
        while True:
            sent = time.monotonic()
            started = await self._client.start_execution(
                workflow,
                input,
                idempotency_key=idempotency_key,
                register=True,
                owner=self.owner_id,
                held_task_id="" if holding is None else holding.task_id,
                output_json=output_json,
                # If a limit holds the node back, the server answers as soon as the limit lets the node pass.
                wait=MAX_SERVER_WAIT if any(node.is_limited for node in workflow.nodes) else 0.0,
                patience=OUTAGE_PATIENCE,
            )
            if not started.retry_after:
                break
            await asyncio.sleep(started.retry_after)
        if holding is not None or started.task is not None:
            self._held_until = sent + HELD_FOR
        if started.task is not None:
            self._heartbeat.hold(started.task.task_id)
            if started.heartbeat_now:
                self._heartbeat.beat()
        elif not started.status.ended and not started.unknown:
            # The server doesn't know the field `owner`, and has queued the node for workers. Cancel the execution.
            await self._client.cancel_execution(started.execution_id)
            raise NoOwnedExecutions(self._client.address)
        return started

    async def may_begin(self, task: Task) -> bool:
        """Ask the server whether `task` is still this owner's. Ask before an effect that must happen only once.

        If the process was suspended after it got the task, the server may have counted the attempt as lost.
        """
        return await self._heartbeat.may_begin(task.task_id, time.monotonic(), ask=True)

    async def complete(self, task: Task, output: BaseModel | Mapping[str, Any]) -> None:
        """Record the result of `task`. Raises StaleTask if another owner has taken over the execution."""
        text = jsontext.dump(output, "the result")
        with self._ending(task):
            await self._client.complete_task(task.task_id, text, patience=OUTAGE_PATIENCE)

    async def fail(self, task: Task, error: str, *, unknown: bool = False, patience: float = OUTAGE_PATIENCE) -> None:
        """Record that `task` failed. The next start with its idempotency key starts a new execution.

        With `unknown`, the effect of the task may have happened. The execution then waits for a person, and the next
        start finds this execution.
        """
        with self._ending(task):
            await self._client.fail_task(task.task_id, error, final=True, unknown=unknown, patience=patience)

    async def release(self, task: Task, reason: str, *, patience: float = OUTAGE_PATIENCE) -> None:
        """Record that the work of `task` has not begun. The next start with its idempotency key begins the work."""
        with self._ending(task):
            await self._client.fail_task(task.task_id, reason, patience=patience)

    @contextlib.contextmanager
    def _ending(self, task: Task) -> Iterator[None]:
        """Report the end of an attempt inside a `with` block. After it, the heartbeats no longer name the task."""
        try:
            yield
        finally:
            self._heartbeat.release(task.task_id)
