"""The worker runtime: takes tasks, runs handlers, reports, and shows the server that it is alive.

async def greet(task: TaskContext) -> Greeting: ...

worker = Worker(client, [Binding(GREETING, {"greet": greet})], concurrency=4)
await worker.run(stop)
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from nexum_engine import jsontext
from nexum_engine.client import RECONNECT_DELAY, NexumClient
from nexum_engine.errors import (
    FinalError,
    InvalidRequest,
    NexumError,
    NotFound,
    ServerFault,
    ServerNotReady,
    ServerUnavailable,
    StaleTask,
    TaskNotFound,
)
from nexum_engine.heartbeat import Heartbeat, new_worker_id
from nexum_engine.records import Task
from nexum_engine.workflow import NodeDefinition, Workflow

POLL_WAIT = 20.0  # seconds that one poll may wait for a task
REPORT_PATIENCE = 300.0  # seconds to try to report a result while no server answers
STOP_PATIENCE = 3.0  # seconds that a worker which was told to stop waits for a server
FAULT_DELAY = 5.0  # seconds until a server that had a fault is asked for a task again
SHORT_POLL_INTERVAL = 0.1  # seconds between polls of a server that doesn't hold them
MAX_REASON_CHARACTERS = 100_000  # of a failure, as it is sent; the server keeps fewer and says so
MAX_LOGGED_CHARACTERS = 500

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class TaskContext:
    """What a handler gets."""

    input: Any
    """The execution's input."""
    deps: Mapping[str, Any]
    """The recorded output of each node that this one depends on directly."""
    execution_id: str
    node_id: str
    attempt: int
    """From 1."""
    idempotency_key: str
    """The same at every attempt: pass it to a target that honours it, and it sees the effect once."""


Handler = Callable[[TaskContext], Awaitable[Any]]
"""Returns a pydantic model or a JSON value. An exception fails the attempt, which is then retried; FinalError isn't."""


@dataclass(frozen=True)
class Binding:
    """A workflow and the handler of each of its nodes."""

    workflow: Workflow
    handlers: Mapping[str, Handler]


class Worker:
    """Runs tasks of some workflows until it is told to stop, then finishes what it holds.

    `describe` names a task in the log; `after_report` is called when a report was acknowledged and before the slot
    polls again. `worker_id` defaults to one that names host and process; no two workers may share one.
    """

    def __init__(
        self,
        client: NexumClient,
        bindings: Sequence[Binding],
        *,
        concurrency: int = 4,
        worker_id: str | None = None,
        describe: Callable[[TaskContext], str] | None = None,
        after_report: Callable[[Task], None] | None = None,
    ) -> None:
        if concurrency < 1:
            raise InvalidRequest(f"concurrency is {concurrency}; a worker needs at least 1 slot")
        for binding in bindings:
            names = {node.node_id for node in binding.workflow.nodes}
            if names != set(binding.handlers):
                raise InvalidRequest(
                    f"workflow {binding.workflow.workflow_id!r} has the nodes {sorted(names)}, "
                    f"its handlers are for {sorted(binding.handlers)}"
                )
        self.worker_id = worker_id or new_worker_id()
        self._client = client
        self._bindings = {binding.workflow.version_hash: binding for binding in bindings}
        self._work = {
            (binding.workflow.version_hash, node.node_id): (binding.handlers[node.node_id], node)
            for binding in bindings
            for node in binding.workflow.nodes
        }
        self._concurrency = concurrency
        self._describe = describe or (lambda task: task.node_id)
        self._after_report = after_report
        self._heartbeat = Heartbeat(
            client,
            self.worker_id,
            prepare=self._register,
            on_connected=self._say_connected,
            on_lost=self._say_lost,
        )
        self._was_connected = False
        self._streams = True
        self._told_to_stop = asyncio.Event()
        self._stopped: asyncio.Task[bool] | None = None
        self._reports: set[asyncio.Task[Task | None]] = set()
        self._closing = False

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set and what was taken is reported. Raises what a broken server or contract raises.

        A result that no server takes within a few seconds after `stop` is left: its task is run again.
        """
        connection = asyncio.create_task(self._stay_connected(), name="worker's heartbeat")
        self._stopped = asyncio.create_task(self._told_to_stop.wait(), name="told to stop")
        slots = [asyncio.create_task(self._slot(), name=f"slot {n + 1}") for n in range(self._concurrency)]
        stopping = asyncio.ensure_future(stop.wait())
        try:
            watched: set[asyncio.Future[Any]] = {connection, stopping, *slots}
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            for running in (connection, *slots):
                if running.done():
                    running.result()
            await self._drain(slots)
        finally:
            self._closing = True
            self._told_to_stop.set()
            for task in (connection, stopping, *slots):
                task.cancel()
            await asyncio.gather(connection, stopping, *slots, return_exceptions=True)
            # A report that was begun is finished, also when the worker is cancelled meanwhile.
            await asyncio.gather(*self._reports, return_exceptions=True)

    async def _drain(self, slots: Sequence[asyncio.Task[None]]) -> None:
        held = len(self._heartbeat.held)
        if held:
            logger.info("stopping: finishing %d task(s) first (Ctrl+C again to leave them)", held)
        self._told_to_stop.set()
        self._heartbeat.draining = True
        self._heartbeat.beat()
        # A slot that waits for the server has nothing to finish.
        self._heartbeat.connected.set()
        await asyncio.wait(slots)
        for slot in slots:
            slot.result()

    # ---- The connection ----------------------------------------------------------------------------------------------

    async def _stay_connected(self) -> None:
        await self._heartbeat.run()
        logger.warning(
            "the server on %s has no WorkerStream: it counts a silent worker as lost after its own limit",
            self._client.address,
        )
        self._streams = False
        self._heartbeat.connected.set()
        await asyncio.Event().wait()

    async def _register(self) -> None:
        for binding in self._bindings.values():
            await self._client.register_workflow(binding.workflow)

    def _say_connected(self) -> None:
        again = "connected again to" if self._was_connected else "connected to"
        self._was_connected = True
        logger.info("%s %s as worker %s", again, self._client.address, self.worker_id)

    def _say_lost(self, error: NexumError) -> None:
        if isinstance(error, ServerUnavailable) and not isinstance(error, ServerNotReady):
            gone = "the Nexum server is gone" if self._was_connected else "no Nexum server"
            logger.warning(
                "%s on %s: waiting for one (start it with: python -m nexum_engine)", gone, self._client.address
            )
        else:
            logger.warning("not connected to %s, trying again: %s", self._client.address, error)

    # ---- One slot ----------------------------------------------------------------------------------------------------

    async def _slot(self) -> None:
        versions = list(self._bindings)
        turn = 0
        while True:
            if not self._told_to_stop.is_set():  # then it has nothing to wait for, and the server may never come back
                await self._heartbeat.connected.wait()
            if self._told_to_stop.is_set():
                return
            # A server without streams has never heard of several versions in one poll, either.
            asked = versions if self._streams else [versions[turn % len(versions)]]
            turn += 1
            try:
                task = await self._answer(self._client.poll_task(self.worker_id, asked, wait=POLL_WAIT))
            except ServerUnavailable:
                # A task may have been in an answer that was lost.
                self._heartbeat.beat()
                await asyncio.sleep(RECONNECT_DELAY)
                continue
            except ServerFault as error:
                logger.warning("no task from %s, asking again: %s", self._client.address, error)
                await asyncio.sleep(FAULT_DELAY)
                continue
            if task is None and not self._streams:
                await asyncio.sleep(SHORT_POLL_INTERVAL)
            while task is not None:
                task = await self._hold(task)

    async def _answer(self, call: Awaitable[T]) -> T:
        """What the server answers. Once the worker is told to stop, it has a few seconds: then ServerUnavailable."""
        calling = asyncio.ensure_future(call)
        assert self._stopped is not None
        try:
            await asyncio.wait({calling, self._stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not calling.done():
                await asyncio.wait({calling}, timeout=STOP_PATIENCE)
            if not calling.done():
                raise ServerUnavailable(
                    f"no answer from {self._client.address} within {STOP_PATIENCE:g} s, and the worker was told to stop"
                )
            return calling.result()
        finally:
            calling.cancel()

    async def _hold(self, task: Task) -> Task | None:
        """Run a task; the next one, if the report brought one back."""
        self._heartbeat.held.add(task.task_id)
        try:
            return await self._run_task(task)
        finally:
            self._heartbeat.held.discard(task.task_id)

    async def _run_task(self, task: Task) -> Task | None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        context = _context(task)
        name = self._describe(context)
        what = f"{name}, execution {task.execution_id}, attempt {task.attempt}"
        logger.info("started  %s", what)
        try:
            handler, node = self._work_of(task)
            output = await self._output(handler, context, node)
        except Exception as error:  # noqa: BLE001 - reported to the server
            final = isinstance(error, (FinalError, InvalidRequest))
            reason = _reason(error)
            report = self._failure(task, reason, final=final)
            outcome = "failed, for good" if final else "failed"
            return await self._report(task, what, start, report, outcome, reason)
        return await self._report(task, what, start, self._success(task, output), "finished")

    def _work_of(self, task: Task) -> tuple[Handler, NodeDefinition]:
        """Raises NotFound for a node that isn't bound: two workflows can have one version hash, if it isn't ours."""
        work = self._work.get((task.version_hash, task.node_id))
        if work is not None:
            return work
        raise NotFound(
            f"worker {self.worker_id} has no handler for node {task.node_id!r} of version {task.version_hash!r}"
        )

    async def _output(self, handler: Handler, context: TaskContext, node: NodeDefinition) -> str:
        """The handler's result as JSON text, checked against the node's output model."""

        async def contained() -> Any:
            try:
                return await handler(context)
            except (Exception, asyncio.CancelledError):
                raise
            except BaseException as error:
                # SystemExit and its like would end the event loop, and every other task with it.
                raise RuntimeError(f"the handler raised {type(error).__name__}: {error}") from error

        try:
            result = await asyncio.ensure_future(contained())
        except asyncio.CancelledError as error:
            if self._closing:
                raise
            raise RuntimeError("the handler cancelled itself") from error
        if node.output is not None and not isinstance(result, node.output):
            try:
                result = node.output.model_validate(result)
            except ValidationError as error:
                raise FinalError(f"node {node.node_id!r} returned no {node.output.__name__}: {error}") from error
        text = jsontext.dump(result.model_dump(mode="json") if isinstance(result, BaseModel) else result, "the result")
        jsontext.check_size(text, "the result")
        return text

    async def _success(self, task: Task, output: str) -> Task | None:
        try:
            return await self._complete(task, output)
        except InvalidRequest as error:
            await self._failure(task, f"the server refused the result: {error}", final=True)
            raise

    async def _complete(self, task: Task, output: str) -> Task | None:
        # Who wants to act between a report and the next task gets the chance.
        more = not self._told_to_stop.is_set() and self._after_report is None
        then_take = (self.worker_id, list(self._bindings)) if more else None
        complete = partial(self._client.complete_task, task.task_id, output, then_take=then_take)
        try:
            return await complete()
        except ServerUnavailable:
            # The next task may have been in an answer that was lost.
            self._heartbeat.beat()
            return await complete(patience=REPORT_PATIENCE)

    async def _failure(self, task: Task, reason: str, *, final: bool) -> None:
        await self._client.fail_task(task.task_id, reason, final=final, patience=REPORT_PATIENCE)

    async def _report(
        self,
        task: Task,
        what: str,
        start: float,
        report: Coroutine[Any, Any, Task | None],
        outcome: str,
        reason: str = "",
    ) -> Task | None:
        """Report, and say in one line how the attempt ended; the next task, if the report brought one back."""
        following, acknowledged = None, False
        reporting = asyncio.create_task(self._answer(report))
        self._reports.add(reporting)
        reporting.add_done_callback(self._reports.discard)
        try:
            following = await asyncio.shield(reporting)
            acknowledged = True
        except (StaleTask, TaskNotFound, InvalidRequest) as error:
            reason = f"refused by the server: {error}"
        except NexumError as error:
            reason = f"not reported, it will be run again: {error}"
        seconds = asyncio.get_running_loop().time() - start
        level = logging.INFO if outcome == "finished" and acknowledged else logging.WARNING
        in_one_line = " ".join(reason[:MAX_LOGGED_CHARACTERS].split())
        logger.log(level, "%-8s %s, %.2f s%s", outcome, what, seconds, f": {in_one_line}" if in_one_line else "")
        if acknowledged and self._after_report is not None:
            self._after_report(task)
        return following


def _reason(error: Exception) -> str:
    """What an attempt failed with, as text that can be sent whatever the exception is like."""
    try:
        text = str(error) if isinstance(error, NexumError) else f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - the exception is a handler's, and so is its __str__
        text = f"{type(error).__name__} (its message can't be shown)"
    return text[:MAX_REASON_CHARACTERS].encode("utf-8", "replace").decode("utf-8")


def _context(task: Task) -> TaskContext:
    # Several payloads in a frame, each of which was checked when it was stored; the frame nests deeper than they may.
    document = json.loads(task.input_json or "null")
    parts = document if isinstance(document, dict) else {}
    return TaskContext(
        input=parts.get("input"),
        deps=parts.get("deps") or {},
        execution_id=task.execution_id,
        node_id=task.node_id,
        attempt=task.attempt,
        idempotency_key=task.idempotency_key,
    )
