"""The RPCs of the server. Each RPC decodes its request, calls the store or the polls, and encodes the answer."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from nexum_engine import jsontext
from nexum_engine.clock import Clock
from nexum_engine.errors import InvalidRequest
from nexum_engine.location import place_of, place_of_url
from nexum_engine.records import Compatibility, Execution, NodeType, Task
from nexum_engine.server.access import Tokens, guarded
from nexum_engine.server.bounds import DEFAULT_LIMITS, SMALL_BYTES, Answers, Limits, rpcs_of
from nexum_engine.server.calls import CallStreams
from nexum_engine.server.liveness import Liveness
from nexum_engine.server.polls import Polls
from nexum_engine.server.queue import Queue
from nexum_engine.server.refusal import Context, cut
from nexum_engine.server.retention import Retention
from nexum_engine.server.waiters import Waiters
from nexum_engine.store import Store, executions, listing, reading, retry, tasks, waits
from nexum_engine.store.results import ReadyTask, StoredStart
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.addressee import refusal
from nexum_engine.wire.frames import OPENED
from nexum_engine.wire.nexum_pb2_grpc import NexumServiceServicer
from nexum_engine.workflow import check_id

MAX_WAIT_MS = 30_000
"""The longest time that a call may wait for a task or for the end of an execution."""
ANSWER_BYTES = 4 * 1024 * 1024
"""The largest answer that a gRPC client with default settings can receive."""
DEFAULT_CLIENT_BYTES = ANSWER_BYTES - 4096
"""The largest payload that such a client can receive. The rest is for the message's other fields."""
DEFAULT_LIST_LIMIT = 20
MAX_LIST_LIMIT = 1000
MAX_POLLED_VERSIONS = 100
"""The largest number of versions that one poll may name."""
SUMMARY_BYTES, ITEM_BYTES = 8000, 500
"""Estimates of the size of a long item: in a list of executions, and in any other list, without its texts."""
MAX_ITEMS_AT_ONCE = 1000
"""The number of nodes and attempts above which an answer is built in a thread, not on the event loop."""
PROGRESS_INTERVAL = 0.5  # seconds between two messages about a backup


def _time(ms: int) -> str:
    """Format a time in UTC, as the published Nexum server does."""
    return datetime.fromtimestamp(ms / 1000, tz=timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


class NexumServicer(NexumServiceServicer):
    """The gRPC service of proto/nexum.proto. Its data is in a store."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        lease_ms: int,
        *,
        url: str = "",
        embedded: bool = False,
        tokens: Tokens | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self._store = store
        self._tokens = tokens
        self._embedded = embedded
        self._place = place_of_url(url) if store.file is None else place_of(store.file)
        self._answers = Answers()
        self._queue = Queue(store, limits.queue)
        self._retention = Retention(store)
        self.polls = Polls(store, clock, lease_ms)
        self.waiters = Waiters()
        self.liveness = Liveness(store, self.polls, self.waiters, clock, lease_ms)
        store.on_unknown = [self.polls.look_again, self.waiters.look_again]
        rpcs = rpcs_of(self, self.refuse_call_for_another_database, store.catch_up)
        self.rpcs = rpcs if tokens is None else guarded(rpcs, tokens)
        """The unary RPCs by name. Each one first checks the caller's token, its database, and the request's size."""
        self._streams = CallStreams(self.rpcs, limits.calls)

    async def start(self, dead_process: str = "", keep_ms: int | None = None) -> None:
        """Begin the work that no call asks for. Executions that ended more than `keep_ms` ago are deleted.

        The workers and owners in `dead_process` get no time to reconnect.
        """
        await self.liveness.start(dead_process)
        await self._queue.count()
        if keep_ms is not None:
            self._retention.start(keep_ms)

    async def stop(self) -> None:
        """Answer the waiting calls, begin no further calls on streams, and end the work that no call asks for.

        A stream ends when its calls have been answered.
        """
        self.waiters.stop()
        await self._retention.stop()
        await self.polls.stop()
        await self.liveness.stop()
        self._streams.stop()

    async def refuse_call_for_another_database(self, context: Context) -> None:
        """Answer UNAVAILABLE to a call for another database, so that the client looks for another server."""
        metadata, database = context.invocation_metadata() or (), self._store.opened_as
        if (why := refusal(metadata, database, self._place, embedded=self._embedded)) is not None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, cut(why))

    def _who(self, context: Context, named: str) -> str:
        """Return who makes the call: the holder of its token or, if the server has none, the name in the request."""
        if self._tokens is None:
            return named
        return self._tokens.holder(context.invocation_metadata() or ()).name

    async def GetServerInfo(self, request: pb.EmptyRequest, context: Context) -> pb.ServerInfo:
        store = self._store
        return pb.ServerInfo(database=store.opened_as, embedded=self._embedded, database_id=store.database_id)

    async def RegisterWorkflow(self, request: pb.WorkflowIR, context: Context) -> pb.AckResponse:
        result = await self._store.run(
            executions.register_workflow, request.workflow_id, request.version_hash, request.ir_json
        )
        message = {
            Compatibility.NEW: "the workflow's first version",
            Compatibility.IDENTICAL: "nothing changed",
            Compatibility.SAFE: "nodes were added; running executions stay with their version",
            Compatibility.BREAKING: "nodes changed; running executions wait for workers of their own version",
        }[result]
        return pb.AckResponse(ok=True, compatibility=result.value, message=message)

    async def StartExecution(self, request: pb.StartRequest, context: Context) -> pb.StartResponse:
        wait = _wait_seconds(request.wait_ms)
        check_id(request.version_hash, "version_hash")
        if request.owner:
            return await self._start_owned(request, context)
        if request.output_json:
            raise InvalidRequest("output_json needs an owner: give owner, or leave the result to a worker")
        input_json = request.input_json  # each access makes a copy
        task = ReadyTask(request.version_hash, jsontext.size_of(input_json))
        # If the queue is full, a start succeeds only if its key already has an execution. Until the start is submitted,
        # await nothing but `full_at`, which rarely has to wait: a start should be submitted even if its caller is
        # cancelled at once.
        full_at = await self._queue.full_at()
        self._queue.add()
        starting = self._store.run(
            executions.start_execution,
            request.workflow_id,
            request.version_hash,
            input_json,
            request.idempotency_key,
            attributes=dict(request.attributes),
            any_worker_bytes=DEFAULT_CLIENT_BYTES,
            full_at=full_at,
        )
        starting.when_stored(self._started)
        # Announce the task right after the start is submitted: a waiting worker's claim then shares the transaction.
        self.polls.task_ready(task)
        started = await starting
        # If the input is large, don't wait for the execution's end: the request would stay in memory until then.
        ended = None
        if wait and len(input_json) <= SMALL_BYTES:
            ended = started.ended or await self._end_of(started.execution_id, wait)
        return pb.StartResponse(
            execution_id=started.execution_id,
            existing=started.existing,
            status=started.status.value,
            ended=None if ended is None else _execution_message(await self._whole(ended, context), has_poller=True),
        )

    async def _start_owned(self, request: pb.StartRequest, context: Context) -> pb.StartResponse:
        input_json = request.input_json  # each access makes a copy
        await self._answers.reserve(context, len(input_json))
        # If the input is large, don't wait for the limits: the request would stay in memory until then.
        wait = 0.0 if len(input_json) > SMALL_BYTES else _wait_seconds(request.wait_ms)
        started, retry_after_ms = await self.polls.under_limits(
            request.version_hash, partial(self._submit_owned, request, input_json), wait
        )
        ended = None if request.output_json else started.ended
        return pb.StartResponse(
            execution_id=started.execution_id,
            existing=started.existing,
            status=started.status.value,
            ended=None if ended is None else _execution_message(await self._whole(ended, context), has_poller=False),
            task=None if started.task is None else _task_message(started.task),
            unknown=started.unknown,
            retry_after_ms=retry_after_ms,
            heartbeat_now=started.task is not None and not self.liveness.is_connected(request.owner),
        )

    async def _submit_owned(self, request: pb.StartRequest, input_json: str) -> StoredStart:
        starting = self._store.run(
            tasks.start_owned,
            request.workflow_id,
            request.version_hash,
            input_json,
            request.idempotency_key,
            request.owner,
            self.liveness.lease_of_owner(request.owner),
            request.held_task_id,
            request.output_json,
            dict(request.attributes),
        )
        # The sweep and the waiters must hear of the start even if the caller is cancelled.
        starting.when_stored(self._started_owned)
        return await starting

    def _started_owned(self, started: StoredStart) -> None:
        if started.lease_ends_ms is not None:
            self.liveness.due_at(started.lease_ends_ms)
        self.liveness.apply(started.changed)

    def _started(self, started: StoredStart) -> None:
        if started.existing:
            return
        self.waiters.execution_started(started.execution_id)
        # Leave out the first task: `StartExecution` has announced it.
        self.liveness.apply(replace(started.changed, ready=started.changed.ready[1:]))

    async def PollTask(self, request: pb.PollRequest, context: Context) -> pb.PollResponse:
        worker_id, versions, max_bytes = _checked_poll(request)
        wait_ms = round(_wait_seconds(request.wait_ms) * 1000)
        task = await self.polls.next_task(worker_id, versions, max_bytes, wait_ms)
        return await self._hand_out(task, context)

    async def _hand_out(self, task: Task | None, context: Context) -> pb.PollResponse:
        if task is None:
            return pb.PollResponse(has_task=False)
        self.liveness.task_handed_out(task.timeout_ms)
        try:
            await self._answers.reserve(context, task.input_bytes)
            if not task.input_json:
                task = await self._store.run(tasks.with_payload, task)
        except BaseException:
            self.polls.release(task)
            raise
        if context.cancelled():
            self.polls.release(task)
        return _task_message(task)

    async def CompleteTask(self, request: pb.CompleteRequest, context: Context) -> pb.AckResponse:
        # The published TypeScript SDK sends no output for a handler that returns nothing.
        output_json = request.output_json or "null"
        await self.liveness.carry_out(tasks.complete_task, request.task_id, output_json)
        return pb.AckResponse(ok=True)

    async def FailTask(self, request: pb.FailRequest, context: Context) -> pb.AckResponse:
        await self.liveness.carry_out(
            tasks.fail_task, request.task_id, request.error_message, request.final, request.unknown
        )
        return pb.AckResponse(ok=True)

    async def GetStatus(self, request: pb.StatusRequest, context: Context) -> pb.StatusResponse:
        check_id(request.execution_id, "execution_id")
        execution = await self._get(request.execution_id, context)
        outputs = execution.outputs() | {
            node.node_id: json.dumps({"__nexum_claim_check__": True, "size": node.output_bytes, "rpc": "GetOutput"})
            for node in execution.nodes
            if node.output_bytes
        }
        text = ",".join(f"{json.dumps(node, ensure_ascii=False)}:{output}" for node, output in outputs.items())
        return pb.StatusResponse(
            status=execution.status.value, completed_nodes_json=f"{{{text}}}", error=execution.error
        )

    async def GetOutput(self, request: pb.GetOutputRequest, context: Context) -> pb.GetOutputResponse:
        check_id(request.execution_id, "execution_id")
        if request.offset < 0 or request.length < 0:
            raise InvalidRequest("offset and length can't be negative")
        length = min(request.length or DEFAULT_CLIENT_BYTES, DEFAULT_CLIENT_BYTES)
        await self._answers.reserve(context, length)
        data, total = await self._store.run(
            reading.payload_part, request.execution_id, request.node_id, request.offset, length
        )
        return pb.GetOutputResponse(data=data, total_bytes=total)

    async def GetExecution(self, request: pb.GetExecutionRequest, context: Context) -> pb.GetExecutionResponse:
        check_id(request.execution_id, "execution_id")
        execution = await self._end_of(request.execution_id, _wait_seconds(request.wait_ms))
        if execution is None or request.with_attempts:
            execution = await self._get(request.execution_id, context, request.with_attempts)
        else:
            execution = await self._whole(execution, context)
        # Use a thread for an execution with many nodes and attempts, so that it doesn't block the event loop.
        has_poller = self.polls.has_poller(execution.version_hash)
        if sum(1 + len(node.attempts) for node in execution.nodes) > MAX_ITEMS_AT_ONCE:
            return await asyncio.to_thread(_execution_message, execution, has_poller)
        return _execution_message(execution, has_poller)

    async def _get(self, execution_id: str, context: Context, with_attempts: bool = False) -> Execution:
        """Return an execution. Reserve a share of the answers' budget before large payloads are read."""
        execution = await self._store.run(
            reading.get_execution, execution_id, with_attempts, max_bytes=reading.MAX_INLINE_BYTES
        )
        return await self._whole(execution, context, with_attempts)

    async def _whole(self, execution: Execution, context: Context, with_attempts: bool = False) -> Execution:
        """Return the execution with its payloads. Read them from the store if `execution` is without them.

        If a client with gRPC's default settings could not receive the answer, the largest payloads are left out.
        """
        if execution.nodes:
            await self._answers.reserve(context, _size_of(execution))
            return execution
        execution_id = execution.execution_id
        size = await self._store.run(reading.payload_bytes, execution_id, with_attempts)
        await self._answers.reserve(context, min(size, ANSWER_BYTES))
        return await self._store.run(reading.get_execution, execution_id, with_attempts, max_answer_bytes=ANSWER_BYTES)

    async def _end_of(self, execution_id: str, wait: float) -> Execution | None:
        """Return the execution if it ends within `wait` seconds. Return None if the caller must query the store."""
        if not wait:
            return None
        with self.waiters.watch(execution_id, wait) as ended:
            if not self.waiters.is_running(execution_id):
                execution = await self._store.run(
                    reading.get_execution, execution_id, max_bytes=reading.MAX_INLINE_BYTES
                )
                if execution.status.ended:
                    return execution
            return await ended

    async def ListExecutions(self, request: pb.ListRequest, context: Context) -> pb.ListResponse:
        limit = min(request.limit, MAX_LIST_LIMIT) if request.limit > 0 else DEFAULT_LIST_LIMIT
        await self._answers.reserve(context, listing.MAX_LIST_BYTES if request.with_nodes else limit * SUMMARY_BYTES)
        found = await self._store.run(
            listing.list_executions,
            request.workflow_id,
            request.status,
            limit,
            before=request.before_execution_id,
            with_nodes=request.with_nodes,
            key_prefix=request.idempotency_key_prefix,
            since_ms=request.since_ms,
            until_ms=request.until_ms,
            attributes=dict(request.attributes),
            group_sessions=request.group_sessions,
            parent=request.parent_execution_id,
        )
        return pb.ListResponse(
            executions=[
                pb.ExecutionSummary(
                    **_fields(execution),
                    created_at=_time(execution.created_ms),
                    session=None if execution.session is None else pb.SessionSummary(**asdict(execution.session)),
                )
                for execution in found
            ]
        )

    async def CancelExecution(self, request: pb.CancelRequest, context: Context) -> pb.AckResponse:
        check_id(request.execution_id, "execution_id")
        by = self._who(context, request.cancelled_by)
        await self.liveness.carry_out(executions.cancel_execution, request.execution_id, by)
        return pb.AckResponse(ok=True, message="Execution cancelled")

    async def RetryExecution(self, request: pb.RetryRequest, context: Context) -> pb.AckResponse:
        check_id(request.execution_id, "execution_id")
        await self.liveness.carry_out(retry.retry_execution, request.execution_id)
        return pb.AckResponse(ok=True, message="the execution continues at its failed node")

    async def ListWorkflowVersions(self, request: pb.ListVersionsRequest, context: Context) -> pb.ListVersionsResponse:
        await self._answers.reserve(context, executions.MAX_VERSIONS * ITEM_BYTES)
        versions = await self._store.run(executions.workflow_versions, request.workflow_id)
        return pb.ListVersionsResponse(
            versions=[
                pb.VersionInfo(
                    workflow_id=version.workflow_id,
                    version_hash=version.version_hash,
                    compatibility=version.compatibility.value,
                    registered_at=_time(version.registered_ms),
                    active_executions=version.active_executions,
                )
                for version in versions
            ]
        )

    async def ApproveTask(self, request: pb.ApproveRequest, context: Context) -> pb.AckResponse:
        by = self._who(context, request.approver)
        await self.liveness.carry_out(
            waits.approve, request.execution_id, request.node_id, by, request.comment, request.answer_json
        )
        return pb.AckResponse(ok=True, message="Approved")

    async def RejectTask(self, request: pb.RejectRequest, context: Context) -> pb.AckResponse:
        by = self._who(context, request.approver)
        await self.liveness.carry_out(waits.reject, request.execution_id, request.node_id, by, request.reason)
        return pb.AckResponse(ok=True, message="Rejected")

    async def GetPendingApprovals(self, request: pb.EmptyRequest, context: Context) -> pb.PendingApprovalsResponse:
        await self._answers.reserve(context, waits.MAX_WAITING * ITEM_BYTES + waits.MAX_SHOWN_INPUTS)
        return pb.PendingApprovalsResponse(
            items=[
                pb.PendingApprovalItem(
                    execution_id=pending.execution_id,
                    node_id=pending.node_id,
                    workflow_id=pending.workflow_id,
                    started_at=_time(pending.since_ms),
                    input_json=pending.input_json,
                )
                for pending in await self._store.run(waits.pending_approvals)
            ]
        )

    async def GetUnknown(self, request: pb.EmptyRequest, context: Context) -> pb.UnknownResponse:
        size = waits.MAX_WAITING * (ITEM_BYTES + tasks.MAX_ERROR_CHARACTERS) + waits.MAX_SHOWN_INPUTS
        await self._answers.reserve(context, size)
        found = await self._store.run(waits.unknown_nodes)
        return pb.UnknownResponse(items=[pb.UnknownItem(**asdict(one)) for one in found])

    async def GetTools(self, request: pb.EmptyRequest, context: Context) -> pb.ToolsResponse:
        return pb.ToolsResponse(tools=[pb.DeclaredTool(**asdict(one)) for one in self.liveness.tools()])

    async def ResolveNode(self, request: pb.ResolveRequest, context: Context) -> pb.AckResponse:
        decision = request.WhichOneof("decision")
        if decision is None or (decision == "not_done" and not request.not_done):
            raise InvalidRequest("the request has no decision: give output_json, not_done or failed")
        await self.liveness.carry_out(
            waits.resolve,
            request.execution_id,
            request.node_id,
            self._who(context, request.resolved_by),
            output_json=request.output_json if decision == "output_json" else None,
            not_done=request.not_done,
            failed=request.failed,
            attempt=request.attempt,
        )
        return pb.AckResponse(ok=True)

    async def SendEvent(self, request: pb.SendEventRequest, context: Context) -> pb.AckResponse:
        await self.liveness.carry_out(
            waits.send_event, request.execution_id, request.name, request.payload_json, request.idempotency_key
        )
        return pb.AckResponse(ok=True)

    async def WorkerStream(
        self, request_iterator: AsyncIterator[pb.WorkerBeat], context: Context
    ) -> AsyncGenerator[pb.WorkerBeatAck, None]:
        await self.refuse_call_for_another_database(context)
        # Close the generator when the call ends: its clean-up must not wait for the garbage collector.
        async with aclosing(self.liveness.beats(request_iterator)) as acks:
            async for ack in acks:
                yield ack

    async def Calls(
        self, request_iterator: AsyncIterator[pb.CallFrames], context: Context
    ) -> AsyncGenerator[pb.CallFrames, None]:
        await context.send_initial_metadata((OPENED,))
        async with aclosing(self._streams.serve(request_iterator, context.invocation_metadata())) as answers:
            async for frames in answers:
                yield frames

    async def Prune(self, request: pb.PruneRequest, context: Context) -> pb.PruneResponse:
        pruned = await self._retention.prune(
            request.older_than_ms,
            session=request.session,
            after=request.after,
            dry_run=request.dry_run,
            compact=request.compact,
        )
        return pb.PruneResponse(
            executions=pruned.executions,
            sessions=pruned.sessions,
            kept=pruned.kept,
            more=pruned.after is not None,
            after=pruned.after or 0,
            total_bytes=pruned.total_bytes,
            free_bytes=pruned.free_bytes,
            released_bytes=pruned.released_bytes,
        )

    async def Backup(
        self, request_iterator: AsyncIterator[pb.BackupRequest], context: Context
    ) -> AsyncGenerator[pb.BackupProgress, None]:
        await self.refuse_call_for_another_database(context)
        async for request in request_iterator:
            async with aclosing(self._backup(request)) as steps:
                async for step in steps:
                    yield step
            return

    async def _backup(self, request: pb.BackupRequest) -> AsyncGenerator[pb.BackupProgress, None]:
        """Make a backup. If the generator is closed before its end, the backup is stopped."""
        if not os.path.isabs(request.file):
            raise InvalidRequest(f"{request.file!r} is not an absolute path")
        copied, total = 0, 0

        def note(copied_bytes: int, total_bytes: int) -> None:
            nonlocal copied, total
            copied, total = copied_bytes, total_bytes

        making = asyncio.ensure_future(
            self._store.backup(Path(request.file), overwrite=request.overwrite, progress=note)
        )
        try:
            while not making.done():
                await asyncio.wait({making}, timeout=PROGRESS_INTERVAL)
                if not making.done():
                    yield pb.BackupProgress(copied_bytes=copied, total_bytes=total)
            size = making.result()
            yield pb.BackupProgress(copied_bytes=size, total_bytes=size, done=True)
        finally:
            making.cancel()


def _wait_seconds(wait_ms: int) -> float:
    if wait_ms < 0:
        raise InvalidRequest("wait_ms can't be negative")
    return min(wait_ms, MAX_WAIT_MS) / 1000


def _checked_poll(request: pb.PollRequest) -> tuple[str, tuple[str, ...], int]:
    """Return a poll's worker id, its versions, and the size in bytes of the largest task that it can receive."""
    check_id(request.worker_id, "worker_id")
    if len(request.more_version_hashes) >= MAX_POLLED_VERSIONS:
        raise InvalidRequest(
            f"the poll names {1 + len(request.more_version_hashes):,} versions; the limit is {MAX_POLLED_VERSIONS}"
        )
    versions = tuple(dict.fromkeys((request.version_hash, *request.more_version_hashes)))
    for version_hash in versions:
        check_id(version_hash, "version_hash")
    if request.max_task_bytes < 0:
        raise InvalidRequest("max_task_bytes can't be negative")
    return request.worker_id, versions, request.max_task_bytes or DEFAULT_CLIENT_BYTES


def _task_message(task: Task) -> pb.PollResponse:
    return pb.PollResponse(
        has_task=True,
        task_id=task.task_id,
        execution_id=task.execution_id,
        node_id=task.node_id,
        input_json=task.input_json,
        idempotency_key=task.idempotency_key,
        node_type=task.node_type,
        attempt=task.attempt,
        version_hash=task.version_hash,
        progress_json=task.progress_json,
        must_reconcile=task.must_reconcile,
        is_map_subtask=task.node_type == NodeType.MAP_SUBTASK,
        map_index=task.map_index,
        map_total=task.map_total,
        map_item_json=task.map_item_json,
    )


def _size_of(execution: Execution) -> int:
    parts = [execution.input_json, *(node.output_json or "" for node in execution.nodes)]
    parts += [attempt.error for node in execution.nodes for attempt in node.attempts]
    return sum(map(len, parts))


def _execution_message(execution: Execution, has_poller: bool) -> pb.GetExecutionResponse:
    return pb.GetExecutionResponse(**_fields(execution), has_poller=has_poller, input_bytes=execution.input_bytes)


def _fields(execution: Execution) -> dict[str, Any]:
    """Return the fields that GetExecutionResponse and ExecutionSummary have in common."""
    return {
        "execution_id": execution.execution_id,
        "workflow_id": execution.workflow_id,
        "version_hash": execution.version_hash,
        "status": execution.status.value,
        "input_json": execution.input_json,
        "idempotency_key": execution.idempotency_key,
        "created_ms": execution.created_ms,
        "ended_ms": execution.ended_ms or 0,
        "error": execution.error,
        "nodes": _node_messages(execution),
        "parent_execution_id": execution.parent_execution_id,
        "parent_node_id": execution.parent_node_id,
        "child_index": execution.child_index,
        "attributes": execution.attributes,
    }


def _node_messages(execution: Execution) -> list[pb.NodeRecord]:
    return [
        pb.NodeRecord(
            node_id=node.node_id,
            node_type=node.node_type,
            status=node.status.value,
            output_json=node.output_json or "",
            error=node.error,
            progress_json=node.progress_json,
            due_ms=node.due_ms or 0,
            output_bytes=node.output_bytes,
            once=node.once,
            attempts=[
                pb.AttemptRecord(
                    attempt=attempt.attempt,
                    worker_id=attempt.worker_id,
                    started_ms=attempt.started_ms,
                    ended_ms=attempt.ended_ms or 0,
                    outcome=attempt.outcome.value,
                    error=attempt.error,
                )
                for attempt in node.attempts
            ],
        )
        for node in execution.nodes
    ]
