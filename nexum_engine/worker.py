"""The worker runtime. It takes tasks, runs their handlers, reports results and sends heartbeats.

async def greet(task: TaskContext) -> Greeting: ...

worker = Worker(client, [Binding(GREETING, {"greet": greet})], concurrency=4)
await worker.run(stop)
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from pydantic import ValidationError

from nexum_engine import jsontext
from nexum_engine.client import NexumClient
from nexum_engine.clock import wait_until_set
from nexum_engine.connection import pause_after
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
    UnknownEffect,
    first_problem,
)
from nexum_engine.event_loop import running_loop
from nexum_engine.heartbeat import Heartbeat, new_worker_id
from nexum_engine.records import DeclaredTool, NodeType, Task
from nexum_engine.workflow import NodeDefinition, Workflow

POLL_WAIT = 20.0  # seconds that one poll may wait for a task
REPORT_PATIENCE = 300.0  # seconds to retry the report of a result while no server answers
STOP_PATIENCE = 3.0  # seconds that a stopping worker waits for the server's answer
FAULT_DELAY = 5.0  # seconds until the next poll of a server that had an internal error
SHORT_POLL_INTERVAL = 0.1  # seconds between polls of a server without long polls
PUBLISHED_RETRIES = 3  # how often a published Nexum server (one that isn't this project's) retries a failed task
MAX_REASON_CHARACTERS = 100_000  # a failure's message is cut to this length; the server stores even less
MAX_LOGGED_CHARACTERS = 500
MAX_PROGRESS_BYTES = 4096
"""The size limit of a task's progress, as JSON text."""

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class TaskContext:
    """The argument of a handler: one attempt at a node."""

    input: Any
    """The execution's input."""
    deps: Mapping[str, Any]
    """The recorded output of each direct dependency, by node id."""
    execution_id: str
    node_id: str
    attempt: int
    """The number of the attempt, from 1."""
    idempotency_key: str
    """The key is the same at every attempt. An outside service that honors the key does the work only once."""
    progress: Any = None
    """The last value that an earlier attempt passed to `heartbeat`."""
    item: Any = None
    """The item, if the task is for one item of a MAP node."""
    index: int | None = None
    """The number of the item, from 0. None if the task is not for an item of a MAP node."""
    total: int = 0
    """How many items the MAP node has."""
    must_reconcile: bool = False
    """Whether the node has `reconcile`, and the effect of an earlier attempt is unknown.

    The handler must first find out whether the effect has happened. If so, the handler returns the result. If not, it
    does the work. If it can't tell, it raises UnknownEffect.
    """
    heartbeat: Callable[[Any], None] = field(default=lambda _: None, repr=False, compare=False)
    """Send the task's progress, a small JSON value. The command `show` prints it. The next attempt gets it, too.

    Works in any thread. Raises InvalidRequest if the value isn't JSON, or is larger than MAX_PROGRESS_BYTES.
    """


Handler = Callable[[TaskContext], Awaitable[Any]]
"""A function that does a node's work and returns a pydantic model or a JSON value.

If the function raises an exception, the node is retried later. After FinalError, the node fails at once. After an
UnknownEffect of an EFFECT node, a worker or a person must first find out whether the effect has happened.

The handler of a ROUTER node returns the name of the target. The handler of a SUBWORKFLOW node returns the input of the
execution to start."""


@dataclass(frozen=True)
class MapHandler:
    """The two handlers of a MAP node."""

    items: Handler
    """Returns the list of items."""
    each: Handler
    """Does the work of one item, `task.item`, and returns its result."""


@dataclass(frozen=True)
class Binding:
    """A workflow and the handler of each node that has a task. The handler of a MAP node is a MapHandler."""

    workflow: Workflow
    handlers: Mapping[str, Handler | MapHandler]


def _check_handlers(binding: Binding) -> None:
    """Raise InvalidRequest unless each node that has a task has a handler of the right kind."""
    workflow, handlers = binding.workflow, binding.handlers
    names = {node.node_id for node in workflow.nodes if node.node_type.has_task}
    if names != set(handlers):
        raise InvalidRequest(
            f"workflow {workflow.workflow_id!r} has the nodes {sorted(names)}, but handlers for {sorted(handlers)}: "
            "give one handler for each node"
        )
    for node in workflow.nodes:
        is_map = isinstance(handlers.get(node.node_id), MapHandler)
        if is_map != (node.node_type is NodeType.MAP):
            raise InvalidRequest(
                f"the handler of node {node.node_id!r} of workflow {workflow.workflow_id!r} must be a "
                f"{'function' if is_map else 'MapHandler'}: the node's type is {node.node_type.value}"
            )


class _Work:
    """A node's work in this process, from the receipt of the task until the server acknowledges the report."""

    def __init__(self, task: Task, requested: float) -> None:
        self.task = task
        """The attempt at the node: the newest one, if this process has received several."""
        self.requested = requested
        """The monotonic time at which the worker began to ask for the task."""
        self.handler: asyncio.Task[Any] | None = None
        """The running handler."""
        self.once = False
        """Whether the work has begun, and its effect must happen only once."""
        self.acknowledged = False
        """Whether the server has accepted or refused the report."""
        self.reporting: asyncio.Task[None] | None = None
        """The report, after the handler has ended."""


class _Wait:
    """The present task's wait for an answer of the server. A stopping worker limits the wait."""

    def __init__(self) -> None:
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None
        self.is_given_up = False
        """Whether the limit was reached, and the task was cancelled for that reason."""

    def limit(self, seconds: float) -> None:
        """Cancel the task in `seconds`, unless the wait ends before."""
        self._timer = asyncio.get_running_loop().call_later(seconds, self._give_up)

    def _give_up(self) -> None:
        assert self._task is not None
        self.is_given_up = True
        self._task.cancel()

    def end(self) -> None:
        """End the wait. The task is no longer cancelled."""
        if self._timer is not None:
            self._timer.cancel()


class Worker:
    """A worker. It runs tasks of its workflows until it is stopped, and then finishes the tasks that it holds.

    `tools` are the tools that the handlers run: `nexum tools` lists them while the worker is connected. `describe`
    returns a task's name for the log. The worker calls `after_report` after each acknowledged report, before
    it takes the next task. `worker_id` must be unique; the default names host and process.
    """

    def __init__(
        self,
        client: NexumClient,
        bindings: Sequence[Binding],
        *,
        tools: Iterable[DeclaredTool] = (),
        concurrency: int = 4,
        worker_id: str | None = None,
        describe: Callable[[TaskContext], str] | None = None,
        after_report: Callable[[Task], None] | None = None,
    ) -> None:
        if concurrency < 1:
            raise InvalidRequest(f"concurrency is {concurrency}: give 1 or more")
        for binding in bindings:
            _check_handlers(binding)
        self.worker_id = worker_id or new_worker_id()
        self._client = client
        self._bindings = {binding.workflow.version_hash: binding for binding in bindings}
        self._work = {
            (binding.workflow.version_hash, node.node_id): (binding.handlers[node.node_id], node)
            for binding in bindings
            for node in binding.workflow.nodes
            if node.node_type.has_task
        }
        self._concurrency = concurrency
        self._describe = describe or (lambda task: task.node_id)
        self._after_report = after_report
        self._heartbeat = Heartbeat(
            client.connection,
            self.worker_id,
            prepare=self._register,
            on_connected=self._log_connected,
            on_lost=self._log_lost,
            on_tasks_lost=self._tasks_lost,
            on_blocked=self._log_blocked,
        )
        self._heartbeat.declare(tools)
        self._is_refusal_logged = False
        """Whether the log says that the server refuses polls. Reset at each connection."""
        self._streams = True
        self._polling = asyncio.Lock()
        """The lock for polls of a published server. Such a server may give one task to two simultaneous polls."""
        self._turn = 0
        self._at_work: dict[tuple[str, str, int | None], _Work] = {}
        """The work in this process, by execution id, node id and item number."""
        self._handlers: dict[asyncio.Task[Any], str] = {}
        """The running handlers, each with the name of its Nexum task for the log."""
        self._loop: tuple[asyncio.AbstractEventLoop, int] | None = None
        """The event loop and the id of its thread."""
        self._told_to_stop = asyncio.Event()
        self._waits: set[_Wait] = set()
        self._looks: set[asyncio.Task[None]] = set()
        """The looks at executions whose tasks the server has taken away."""
        self._closing = False

    async def run(self, stop: asyncio.Event) -> None:
        """Run tasks until `stop` is set. Then finish and report the tasks that the worker holds.

        After `stop`, a result is dropped if no server accepts it within a few seconds. A worker then runs the task
        again. Raises an error if the server can't work with this worker.
        """
        self._loop = running_loop(), threading.get_ident()
        connection = asyncio.create_task(self._stay_connected(), name="worker's heartbeat")
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
            self._tell_to_stop()
            ending = (connection, stopping, *slots, *self._looks)
            for task in ending:
                task.cancel()
            await asyncio.gather(*ending, return_exceptions=True)
            # Finish the reports that have begun, even if the worker was cancelled.
            reports = [work.reporting for work in self._at_work.values() if work.reporting is not None]
            await asyncio.gather(*reports, return_exceptions=True)

    async def _drain(self, slots: Sequence[asyncio.Task[None]]) -> None:
        held = len(self._at_work)
        if held:
            logger.info("stopping: finishing %d task(s) first (Ctrl+C again to abandon them)", held)
        self._tell_to_stop()
        self._heartbeat.draining = True
        self._heartbeat.beat()
        # Wake the slots that wait for a connection, so that these slots end. They run no task.
        self._heartbeat.connected.set()
        await asyncio.wait(slots)
        for slot in slots:
            slot.result()

    def _tell_to_stop(self) -> None:
        """Let the slots take no further task, and limit the waits for the server's answers."""
        if not self._told_to_stop.is_set():
            self._told_to_stop.set()
            for wait in self._waits:
                wait.limit(STOP_PATIENCE)

    # ---- The connection ----------------------------------------------------------------------------------------------

    async def _stay_connected(self) -> None:
        await self._heartbeat.run()
        logger.warning(
            "connected to %s, which is a published Nexum server: run only one worker process, as two may get the same "
            "task",
            self._client.address,
        )
        self._streams = False
        self._heartbeat.connected.set()
        await asyncio.Event().wait()

    async def _register(self) -> None:
        for binding in self._bindings.values():
            await self._client.register_workflow(binding.workflow)

    def _log_connected(self) -> None:
        again = "reconnected to" if self._heartbeat.connected_once else "connected to"
        self._is_refusal_logged = False
        logger.info("%s %s as worker %s", again, self._place(), self.worker_id)

    def _place(self) -> str:
        """Return the server's address or, if the client found the server by its database, that database."""
        address = self._client.address
        return f"the server of {address}" if "/" in address or "\\" in address else address

    def _log_lost(self, error: NexumError) -> None:
        if isinstance(error, ServerUnavailable) and not isinstance(error, ServerNotReady):
            gone = "lost the Nexum server" if self._heartbeat.connected_once else "no Nexum server"
            logger.warning(
                "%s on %s: waiting for one (start it with: python -m nexum_engine)", gone, self._client.address
            )
        else:
            logger.warning("not connected to %s, retrying: %s", self._place(), error)

    def _tasks_lost(self, task_ids: frozenset[str]) -> None:
        for work in self._at_work.values():
            if work.handler is not None and work.task.task_id in task_ids:
                look = asyncio.create_task(self._stop_if_ended(work), name="look at a lost task")
                self._looks.add(look)
                look.add_done_callback(self._looks.discard)

    async def _stop_if_ended(self, work: _Work) -> None:
        """Cancel the handler of a task whose execution has ended. Nobody waits for its result any more.

        Somebody has cancelled the execution, or another of its tasks has failed. The execution of an item's task is
        that of the MAP node.
        """
        with suppress(NexumError):  # the server takes the task away again in its answer to the next heartbeat
            execution = (await self._client.get_execution(work.task.execution_id)).execution
            if execution.status.ended and work.handler is not None:
                work.handler.cancel(f"the execution is {execution.status.value}")

    def _log_blocked(self, seconds: float) -> None:
        # The heartbeat's thread calls this while the event loop is blocked.
        assert self._loop is not None
        loop, thread = self._loop
        frame = sys._current_frames().get(thread)
        where = f" (at {frame.f_code.co_filename}, line {frame.f_lineno})" if frame is not None else ""
        current = asyncio.current_task(loop)
        name = self._handlers.get(current) if current is not None else None
        names = [name] if name is not None else sorted({*self._handlers.values()})
        logger.warning(
            "the event loop has been blocked for %.1f s by %s%s: the worker's other tasks wait; run blocking code in a "
            "thread, with asyncio.to_thread",
            seconds,
            " or ".join(names) or "code outside the handlers",
            where,
        )

    # ---- One slot ----------------------------------------------------------------------------------------------------

    async def _slot(self) -> None:
        work: _Work | None = None
        refusals = 0
        while await self._may_poll():
            next_work = None
            try:
                # Poll while the report of `work` is under way, so that one message has both.
                next_work = await self._next_work()
                refusals = 0
            except ServerUnavailable as unavailable:
                # The lost answer may have contained a task. Send heartbeats now: they don't name that task, so the
                # server soon hands out the task again.
                self._heartbeat.beat()
                if isinstance(unavailable, ServerNotReady) and not self._is_refusal_logged:
                    self._is_refusal_logged = True
                    logger.warning("no task from %s, retrying: %s", self._client.address, unavailable)
                await wait_until_set(self._told_to_stop, pause_after(unavailable, refusals))
                refusals += isinstance(unavailable, ServerNotReady)
            except ServerFault as error:
                logger.warning("no task from %s, retrying: %s", self._client.address, error)
                await wait_until_set(self._told_to_stop, FAULT_DELAY)
            await self._reported(work)
            work = next_work
            if work is not None:
                await self._hold(work)
            # With `after_report`, or with a published server, poll only after the answer to the report.
            if self._after_report is not None or not self._streams:
                await self._reported(work)
        await self._reported(work)

    async def _may_poll(self) -> bool:
        """Wait until the worker is connected or told to stop. Return whether it takes tasks."""
        if not self._told_to_stop.is_set():  # when stopping, don't wait: the server may never come back
            await self._heartbeat.connected.wait()
        return not self._told_to_stop.is_set()

    async def _next_work(self) -> _Work | None:
        requested = time.monotonic()
        task = await self._answer(self._poll())
        if task is None:
            return None
        # Heartbeats name the task from now on, even while the slot waits for the answer to its previous report.
        self._heartbeat.hold(task.task_id)
        return _Work(task, requested)

    async def _poll(self) -> Task | None:
        versions = list(self._bindings)
        if self._streams:
            return await self._client.poll_task(self.worker_id, versions, wait=POLL_WAIT)
        async with self._polling:
            for _ in versions:
                if self._told_to_stop.is_set():  # the stop may have come while this slot waited for its turn
                    return None
                # Ask for one version in each poll: a published server accepts only one.
                self._turn = (self._turn + 1) % len(versions)
                task = await self._client.poll_task(self.worker_id, [versions[self._turn]], wait=0.0)
                if task is not None:
                    return task
            await asyncio.sleep(SHORT_POLL_INTERVAL)
            return None

    async def _answer(self, call: Awaitable[T]) -> T:
        """Return the answer to `call`. A stopping worker waits STOP_PATIENCE seconds, then raises ServerUnavailable."""
        # Await the call in the present task. Another task would need three more turns of the event loop.
        wait = _Wait()
        self._waits.add(wait)
        if self._told_to_stop.is_set():
            wait.limit(STOP_PATIENCE)
        try:
            return await call
        except asyncio.CancelledError:
            if not wait.is_given_up:
                raise
            # `run` may have cancelled this task, too. The task still ends soon, because the worker is stopping.
            raise ServerUnavailable(
                f"the worker is stopping, and {self._client.address} did not answer within {STOP_PATIENCE:g} s"
            ) from None
        finally:
            wait.end()
            self._waits.discard(wait)

    async def _hold(self, work: _Work) -> None:
        """Run the task and begin its report, unless its node already runs here."""
        running = self._at_work.get(_node_of(work.task))
        if running is not None:
            self._adopt(running, work)
            return
        self._at_work[_node_of(work.task)] = work
        try:
            if await self._may_begin(work):
                work.reporting = asyncio.create_task(await self._run_task(work), name="report")
        finally:
            if work.reporting is None:
                self._release(work)

    def _release(self, work: _Work) -> None:
        del self._at_work[_node_of(work.task)]
        # If the report got no answer, and the effect must happen only once, keep the task in the heartbeats. Otherwise
        # the server would conclude that the task never began, and hand it out again.
        if work.acknowledged or not work.once:
            self._heartbeat.release(work.task.task_id)

    @staticmethod
    async def _reported(work: _Work | None) -> None:
        """Wait until the report of the work, if any, has ended."""
        if work is not None and work.reporting is not None:
            # Shield the report: `run` cancels the slots, but finishes the reports that have begun.
            await asyncio.shield(work.reporting)

    def _adopt(self, running: _Work, work: _Work) -> None:
        """Let the running work report as the new attempt, because the old attempt counts as lost on the server."""
        old, new = running.task, work.task
        logger.info("execution %s was handed out again: it still runs here", old.execution_id)
        if new.attempt > old.attempt:
            running.task, running.requested = new, work.requested
        if old.task_id != new.task_id:
            self._heartbeat.release(old.task_id if running.task is new else new.task_id)

    async def _may_begin(self, work: _Work) -> bool:
        """Return whether the task is still this worker's."""
        while self._streams:
            task = work.task
            _, node = self._work.get((task.version_hash, task.node_id), (None, None))
            runs_once = node is not None and node.once
            try:
                may_begin = await self._answer(self._heartbeat.may_begin(task.task_id, work.requested, ask=runs_once))
            except ServerUnavailable:
                return False
            if work.task is task:  # otherwise ask about the newer attempt
                if not may_begin:
                    logger.info("execution %s was handed out again before it began here", task.execution_id)
                return may_begin
        return True

    async def _run_task(self, work: _Work) -> Coroutine[Any, Any, None]:
        """Run the task's handler. Return the call that reports its result."""
        task = work.task
        start = time.monotonic()
        context = _context(task, partial(self._send_progress, work))
        name = self._describe(context)
        attempt = f", attempt {task.attempt}" if self._streams else ""  # a published server sends no attempt number
        what = f"{name}, execution {task.execution_id}{attempt}"
        logger.info("started  %s", what)
        try:
            handler, node = self._work_of(task)
            work.once = node.once
            result = await self._result(handler, context, node, work, name)
            output = _output(result, node, task)
        except Exception as error:  # noqa: BLE001 - reported to the server
            unknown = isinstance(error, UnknownEffect)
            final = unknown or isinstance(error, (FinalError, InvalidRequest))
            reason = _reason(error)
            report = partial(self._failure, reason=reason, final=final, unknown=unknown)
            outcome = "unknown" if unknown else "failed, no retry" if final else "failed"
            return self._report(work, what, start, report, outcome, reason)
        return self._report(work, what, start, partial(self._success, output=output), "finished")

    def _work_of(self, task: Task) -> tuple[Handler, NodeDefinition]:
        """Return the task's handler and node. Raises NotFound if this worker has no handler for the node.

        This worker can get a task of an unknown workflow, if another client has registered that workflow under the same
        version hash.
        """
        handler, node = self._work.get((task.version_hash, task.node_id), (None, None))
        if isinstance(handler, MapHandler):
            handler = handler.items if _index_of(task) is None else handler.each
        if handler is not None and node is not None:
            return handler, node
        raise NotFound(
            f"worker {self.worker_id} has no handler for node {task.node_id!r} of version {task.version_hash!r}"
        )

    def _send_progress(self, work: _Work, progress: Any) -> None:
        text = jsontext.dump(progress, "the progress")
        jsontext.check_size(text, "the progress", max_bytes=MAX_PROGRESS_BYTES)
        self._heartbeat.send_progress(work.task.task_id, text)

    async def _result(
        self, handler: Handler, context: TaskContext, node: NodeDefinition, work: _Work, name: str
    ) -> Any:
        """Run `handler` within the node's time limit, and return its result."""

        async def contained() -> Any:
            try:
                return await handler(context)
            except (Exception, asyncio.CancelledError):
                raise
            except BaseException as error:
                # Raise an ordinary exception: SystemExit and the like would end the event loop, with every other task.
                raise RuntimeError(f"the handler raised {type(error).__name__}: {error}") from error

        running = work.handler = asyncio.create_task(contained())
        self._handlers[running] = name
        try:
            if node.timeout_seconds is not None:
                await asyncio.wait({running}, timeout=node.timeout_seconds)
                if not running.done():
                    error_type = UnknownEffect if node.once else TimeoutError
                    raise error_type(f"the attempt took longer than its time limit of {node.timeout_seconds:g} s")
            return await running
        except asyncio.CancelledError as error:
            if self._closing:
                raise
            raise RuntimeError(str(error) or "the handler cancelled itself") from error
        finally:
            running.cancel()
            work.handler = None
            del self._handlers[running]

    async def _success(self, task: Task, output: str) -> None:
        try:
            await self._client.complete_task(task.task_id, output, patience=REPORT_PATIENCE)
        except InvalidRequest as error:
            await self._failure(task, f"the server refused the result: {error}", final=True)
            raise
        except TaskNotFound as error:
            # For a SUBWORKFLOW node, this error may mean that the workflow to start is not registered. That may change
            # soon, so the failure is not final.
            if task.node_type != NodeType.SUBWORKFLOW:
                raise
            await self._failure(task, f"the server refused the result: {error.__cause__}", final=False)
            raise
        except ServerFault:
            # Check whether the result is recorded: if the answer to an earlier report was lost, a published server
            # answers this report with INTERNAL.
            if self._streams or not await self._is_recorded(task):
                raise

    async def _is_recorded(self, task: Task) -> bool:
        observed = await self._client.get_execution(task.execution_id)
        return task.node_id in observed.execution.outputs()

    async def _failure(self, task: Task, reason: str, *, final: bool, unknown: bool = False) -> None:
        fail = partial(
            self._client.fail_task, task.task_id, reason, final=final, unknown=unknown, patience=REPORT_PATIENCE
        )
        await fail()
        if final and not self._streams:
            # Use up the task's retries: a published server doesn't know `final`.
            for _ in range(PUBLISHED_RETRIES):
                if (await self._client.get_status(task.execution_id, patience=REPORT_PATIENCE)).ended:
                    break
                await fail()

    async def _report(
        self,
        work: _Work,
        what: str,
        start: float,
        report: Callable[[Task], Coroutine[Any, Any, None]],
        outcome: str,
        reason: str = "",
    ) -> None:
        """Report an attempt, log its end in one line, and release the task."""
        task = work.task
        is_stored = False
        try:
            try:
                await self._answer(self._report_newest(work, what, report))
                is_stored = work.acknowledged = True
            except (StaleTask, TaskNotFound, InvalidRequest) as error:
                work.acknowledged = True
                reason = f"refused by the server: {error}"
            except NexumError as error:
                reason = f"not reported{'' if work.once else ', so the task will be run again'}: {error}"
            seconds = time.monotonic() - start
            level = logging.INFO if outcome == "finished" and is_stored else logging.WARNING
            in_one_line = " ".join(reason[:MAX_LOGGED_CHARACTERS].split())
            logger.log(level, "%-8s %s, %.2f s%s", outcome, what, seconds, f": {in_one_line}" if in_one_line else "")
            if is_stored and self._after_report is not None:
                self._after_report(task)
        finally:
            self._release(work)

    async def _report_newest(self, work: _Work, what: str, report: Callable[[Task], Coroutine[Any, Any, None]]) -> None:
        """Report the newest attempt at the node, even if the server hands it out during the report."""
        while True:
            newest = work.task
            try:
                return await report(newest)
            except StaleTask:
                if work.task is newest:
                    raise
            except (ServerUnavailable, ServerFault) as error:
                if not work.once:
                    raise
                # Retry: without the report, nobody could tell whether the effect has happened.
                logger.warning("the report of %s is not stored, retrying: %s", what, error)
                await asyncio.sleep(FAULT_DELAY)


def _output(result: Any, node: NodeDefinition, task: Task) -> str:
    """Check a handler's result against the node's output model. Return what to report, as JSON text."""
    if node.node_type is NodeType.ROUTER and isinstance(result, str):
        result = {"routed_to": result}
    # Don't check the result of a task that starts executions: the node's output comes from these executions.
    is_output = not node.node_type.starts_executions or _index_of(task) is not None
    if is_output and node.output is not None and not isinstance(result, node.output):
        try:
            result = node.output.model_validate(result)
        except ValidationError as error:
            raise FinalError(
                f"the result of node {node.node_id!r} does not match {node.output.__name__}: {first_problem(error)}"
            ) from error
    if node.node_type is NodeType.SUBWORKFLOW:
        result = {"subWorkflowId": node.sub_workflow_id, "childInput": result}
    text = jsontext.dump(result, "the result")
    jsontext.check_size(text, "the result")
    return text


def _reason(error: Exception) -> str:
    """Return the message of a handler's exception, as text that can be sent to the server. Never raises an error."""
    try:
        text = str(error) if isinstance(error, NexumError) else f"{type(error).__name__}: {error}"
    except BaseException:  # noqa: BLE001 - the exception is a handler's, and so is its __str__
        text = f"{type(error).__name__} (its message can't be shown)"
    return text[:MAX_REASON_CHARACTERS].encode("utf-8", "replace").decode("utf-8")


def _node_of(task: Task) -> tuple[str, str, int | None]:
    """Return the key that all attempts at the same node share."""
    return task.execution_id, task.node_id, _index_of(task)


def _index_of(task: Task) -> int | None:
    """Return the number of the item, or None if the task is not for an item of a MAP node."""
    return task.map_index if task.node_type == NodeType.MAP_SUBTASK else None


def _context(task: Task, heartbeat: Callable[[Any], None]) -> TaskContext:
    # Don't use jsontext.parse: this document may be nested more deeply than jsontext.parse allows. The server has
    # checked each payload in the document.
    document = json.loads(task.input_json or "null")
    parts = document if isinstance(document, dict) else {}
    return TaskContext(
        input=parts.get("input"),
        deps=parts.get("deps") or {},
        execution_id=task.execution_id,
        node_id=task.node_id,
        attempt=task.attempt,
        idempotency_key=task.idempotency_key,
        progress=json.loads(task.progress_json or "null"),
        item=json.loads(task.map_item_json or "null"),
        index=_index_of(task),
        total=task.map_total,
        must_reconcile=task.must_reconcile,
        heartbeat=heartbeat,
    )
