"""The worker runtime: takes tasks, runs handlers, reports, and shows the server that it is alive.

async def greet(task: TaskContext) -> Greeting: ...

worker = Worker(client, [Binding(GREETING, {"greet": greet})], concurrency=4)
await worker.run(stop)
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from pydantic import BaseModel, ValidationError

from nexum_engine import jsontext
from nexum_engine.client import NexumClient
from nexum_engine.errors import (
    FinalError,
    InvalidRequest,
    NexumError,
    ServerUnavailable,
    StaleTask,
    TaskNotFound,
)
from nexum_engine.model import Task
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.workflow import NodeDefinition, Workflow

POLL_WAIT = 20.0  # seconds that one poll may wait for a task
REPORT_PATIENCE = 300.0  # seconds to try to report a result while no server answers
FIRST_BEAT_INTERVAL = 10.0  # seconds, until the server names its lease
SHORT_POLL_INTERVAL = 0.1  # seconds between polls of a server that doesn't hold them
RECONNECT_DELAY = 0.1  # seconds
SAY_WAITING_EVERY = 10.0  # seconds
MAX_REASON_CHARACTERS = 100_000  # of a failure, as it is sent; the server keeps fewer and says so
MAX_LOGGED_CHARACTERS = 500

logger = logging.getLogger(__name__)


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
    polls again. `worker_id` defaults to one that names host and process.
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
        self.worker_id = worker_id or f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._client = client
        self._bindings = {binding.workflow.version_hash: binding for binding in bindings}
        self._concurrency = concurrency
        self._describe = describe or (lambda task: task.node_id)
        self._after_report = after_report
        self._held: set[str] = set()
        self._connected = asyncio.Event()
        self._beat_now = asyncio.Event()
        self._beat_interval = FIRST_BEAT_INTERVAL
        self._streams = True
        self._draining = False
        self._closing = False

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set and what was taken is reported. Raises what a broken server or contract raises."""
        stream = asyncio.create_task(self._stay_connected(), name="worker stream")
        slots = [asyncio.create_task(self._slot(), name=f"slot {n + 1}") for n in range(self._concurrency)]
        stopping = asyncio.ensure_future(stop.wait())
        try:
            watched: set[asyncio.Future[Any]] = {stream, stopping, *slots}
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            for running in (stream, *slots):
                if running.done():
                    running.result()
            await self._drain(slots)
        finally:
            self._closing = True
            self._beat_now.set()
            for task in (stream, stopping, *slots):
                task.cancel()
            await asyncio.gather(stream, stopping, *slots, return_exceptions=True)

    async def _drain(self, slots: Sequence[asyncio.Task[None]]) -> None:
        self._draining = True
        if self._held:
            logger.info("stopping: finishing %d task(s) first (Ctrl+C again to leave them)", len(self._held))
        self._beat_now.set()
        # A slot that waits for the server has nothing to finish.
        self._connected.set()
        await asyncio.gather(*slots, return_exceptions=True)

    # ---- The connection ----------------------------------------------------------------------------------------------

    async def _stay_connected(self) -> None:
        """Register, open the stream, keep it, and begin again when it breaks."""
        was_connected = False
        said_at: float | None = None
        loop = asyncio.get_running_loop()
        while True:
            try:
                for binding in self._bindings.values():
                    await self._client.register_workflow(binding.workflow)
                if not self._streams:
                    self._connected.set()
                    await asyncio.Event().wait()
                async for ack in self._client.worker_stream(self._beats()):
                    if not self._connected.is_set():
                        logger.info(
                            "%s %s as worker %s",
                            "connected again to" if was_connected else "connected to",
                            self._client.address,
                            self.worker_id,
                        )
                    self._beat_interval = ack.lease_ms / 3000
                    was_connected, said_at = True, None
                    self._connected.set()
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    logger.warning(
                        "the server on %s has no WorkerStream: it counts a silent worker as lost after its own limit",
                        self._client.address,
                    )
                    self._streams = False
                    continue
            except ServerUnavailable:
                pass  # said below, and tried again
            self._connected.clear()
            if said_at is None or loop.time() - said_at >= SAY_WAITING_EVERY:
                said_at = loop.time()
                logger.warning(
                    "%s on %s: waiting for one (start it with: python -m nexum_engine)",
                    "the Nexum server is gone" if was_connected else "no Nexum server",
                    self._client.address,
                )
            await asyncio.sleep(RECONNECT_DELAY)

    async def _beats(self) -> AsyncIterator[pb.WorkerBeat]:
        while not self._closing:
            self._beat_now.clear()
            yield pb.WorkerBeat(worker_id=self.worker_id, task_ids=sorted(self._held), draining=self._draining)
            try:
                await asyncio.wait_for(self._beat_now.wait(), self._beat_interval)
            except (asyncio.TimeoutError, TimeoutError):
                continue

    # ---- One slot ----------------------------------------------------------------------------------------------------

    async def _slot(self) -> None:
        versions = list(self._bindings)
        turn = 0
        while True:
            if not self._draining:  # then it has nothing to wait for, and the server may never come back
                await self._connected.wait()
            if self._draining:
                return
            # A server without streams has never heard of several versions in one poll, either.
            asked = versions if self._streams else [versions[turn % len(versions)]]
            turn += 1
            try:
                task = await self._client.poll_task(self.worker_id, asked, wait=POLL_WAIT)
            except ServerUnavailable:
                await asyncio.sleep(RECONNECT_DELAY)
                continue
            if task is None and not self._streams:
                await asyncio.sleep(SHORT_POLL_INTERVAL)
            while task is not None:
                task = await self._hold(task)

    async def _hold(self, task: Task) -> Task | None:
        """Run a task; the next one, if the report brought one back."""
        self._held.add(task.task_id)
        try:
            return await self._run_task(task)
        finally:
            self._held.discard(task.task_id)

    async def _run_task(self, task: Task) -> Task | None:
        binding = self._bindings[task.version_hash]
        node = next(node for node in binding.workflow.nodes if node.node_id == task.node_id)
        loop = asyncio.get_running_loop()
        start = loop.time()
        context = _context(task)
        name = self._describe(context)
        what = f"{name}, execution {task.execution_id}, attempt {task.attempt}"
        logger.info("started  %s", what)
        try:
            output = await self._output(binding.handlers[task.node_id], context, node)
        except Exception as error:  # noqa: BLE001 - reported to the server
            final = isinstance(error, (FinalError, InvalidRequest))
            reason = _reason(error)
            outcome = f"failed, for good: {reason}" if final else f"failed: {reason}"
            return await self._report(task, what, start, self._failure(task, reason, final=final), outcome)
        return await self._report(task, what, start, self._success(task, output), "finished")

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
        # Who wants to act between a report and the next task gets the chance.
        more = not self._draining and self._after_report is None
        then_take = (self.worker_id, list(self._bindings)) if more else None
        try:
            return await self._client.complete_task(task.task_id, output, then_take=then_take, patience=REPORT_PATIENCE)
        except InvalidRequest as error:
            await self._failure(task, f"the server refused the result: {error}", final=True)
            raise

    async def _failure(self, task: Task, reason: str, *, final: bool) -> None:
        await self._client.fail_task(task.task_id, reason, final=final, patience=REPORT_PATIENCE)

    async def _report(
        self, task: Task, what: str, start: float, report: Awaitable[Task | None], outcome: str
    ) -> Task | None:
        following, acknowledged = None, False
        try:
            # A report that was begun is finished, also when the worker is cancelled meanwhile.
            following = await asyncio.shield(asyncio.ensure_future(report))
            acknowledged = True
        except (StaleTask, TaskNotFound, InvalidRequest) as error:
            outcome = f"refused by the server: {error}"
        except NexumError as error:
            outcome = f"not reported, it will run again: {error}"
        seconds = asyncio.get_running_loop().time() - start
        level = logging.INFO if outcome == "finished" else logging.WARNING
        verb, _, reason = outcome.partition(", " if "for good" in outcome else ": ")
        in_one_line = " ".join(reason[:MAX_LOGGED_CHARACTERS].split())
        logger.log(level, "%-8s %s, %.2f s%s", verb, what, seconds, f": {in_one_line}" if in_one_line else "")
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
