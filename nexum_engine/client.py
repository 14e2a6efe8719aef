"""The client of a Nexum server: typed calls with deadlines and, if requested, retries."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc
from pydantic import BaseModel, ValidationError

from nexum_engine import jsontext, published
from nexum_engine.channel import Channel
from nexum_engine.connection import (
    MAX_SERVER_WAIT,
    RECONNECT_DELAY,
    Connection,
    Method,
    ServerInfo,
    explained,
    server_info_of,
)
from nexum_engine.errors import (
    Conflict,
    ExecutionNotFound,
    InvalidRequest,
    NotANexumServer,
    NotFound,
    ServerError,
    ServerUnavailable,
    StaleTask,
    TaskNotFound,
    WorkflowNotFound,
    first_problem,
)
from nexum_engine.event_loop import running_loop, to_its_end
from nexum_engine.records import (
    Attempt,
    Compatibility,
    DeclaredTool,
    Execution,
    ExecutionStatus,
    Node,
    NodeStatus,
    Outcome,
    PendingApproval,
    Pruned,
    SessionSummary,
    Task,
    UnknownNode,
)
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.request import request_of
from nexum_engine.wire.status import CUT_OFF
from nexum_engine.workflow import Workflow

_FAST_POLL, _SLOW_POLL, _FAST_FOR = 0.05, 0.2, 2.0  # seconds, for servers without GetExecution, and for ending ones
PAGE = 100  # executions that `all_executions` reads at a time

logger = logging.getLogger(__name__)
Request = TypeVar("Request")
Answer = TypeVar("Answer")
Record = TypeVar("Record", UnknownNode, DeclaredTool, SessionSummary)


@dataclass(frozen=True)
class Started:
    """The answer to `start_execution`."""

    execution_id: str
    existing: bool
    """Whether an earlier call started this execution, with the same idempotency key."""
    status: ExecutionStatus
    ended: Execution | None
    """The execution, if it ended within `wait` seconds."""
    task: Task | None = None
    """The owner's task, if the caller named an owner and the execution has not ended."""
    unknown: bool = False
    """Whether the effect of the owner's node is unknown. Then the execution waits for a person, without a task."""
    retry_after: float = 0.0
    """If a limit holds the owner's node back, there is no task: start again after so many seconds. Otherwise 0."""
    heartbeat_now: bool = False
    """Whether the task's lease is short, because the owner's heartbeats don't reach the server that has answered."""


@dataclass(frozen=True)
class Observed:
    """The present state of an execution."""

    execution: Execution
    has_poller: bool | None
    """Whether a worker polls for the execution's version. None if the server can't tell."""


class NexumClient:
    """A client of one server. Use it as an async context manager, or call `close`.

    `address` is HOST:PORT, a list of them separated by commas, or the path of a database. Of several servers, the
    client uses one that answers, until that server is lost. For a server that is named by HOST:PORT, TLS and the token
    come from the environment: NEXUM_TLS_CA, NEXUM_TLS_CERT, NEXUM_TLS_KEY, and NEXUM_TOKEN_FILE or NEXUM_TOKEN.

    With a path, the client uses the server that has the database open, also after that server restarts on another port.
    Without `address`, the client uses NEXUM_ADDRESS, else the server that has this folder's database open, else the
    server on localhost:50051, unless that is an embedded server of another folder. The client keeps the first server
    that it finds.

    While no server answers, a method retries for `patience` seconds, and then raises ServerUnavailable. Every method
    can raise NotANexumServer, AccessDenied, ServerFault, and the errors that the server answers with.
    """

    def __init__(self, address: str | None = None) -> None:
        self.connection = Connection(address or os.environ.get("NEXUM_ADDRESS") or None)
        """Finds the server, and makes the calls."""
        self._call = self.connection.call
        self._has_get_execution = True

    @property
    def address(self) -> str:
        """HOST:PORT of the server, or the path of its database."""
        return self.connection.address

    @property
    def servers(self) -> str:
        """What a command's option --nexum needs to find this client's servers, also after the present one has ended."""
        return ",".join(sorted(self.connection.targets)) or self.address

    async def __aenter__(self) -> NexumClient:
        running_loop()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections of the running event loop."""
        await to_its_end(self.connection.close())

    async def server_info(self, *, patience: float = 0.0) -> ServerInfo | None:
        """Return the server's database, and whether the server is embedded. None for a published server."""
        try:
            answer = await self._call(lambda stub: stub.GetServerInfo, pb.EmptyRequest(), patience=patience)
        except NotANexumServer:
            await self.ping()
            return None
        return server_info_of(answer)

    # ---- Workflows and executions ------------------------------------------------------------------------------------

    async def ping(self, *, patience: float = 0.0) -> None:
        """Check that a Nexum server answers."""
        await self._call(lambda stub: stub.ListExecutions, pb.ListRequest(limit=1), patience=patience)

    async def register_workflow(self, workflow: Workflow, *, patience: float = 0.0) -> Compatibility:
        """Register the workflow's version. Raises Conflict if its hash is registered with another definition."""
        request = request_of(
            pb.WorkflowIR,
            workflow_id=workflow.workflow_id,
            version_hash=workflow.version_hash,
            ir_json=workflow.ir_json,
        )
        answer = await self._call(lambda stub: stub.RegisterWorkflow, request, patience=patience)
        return Compatibility(answer.compatibility)

    async def start_execution(
        self,
        workflow: Workflow,
        input: BaseModel | Mapping[str, Any],
        *,
        idempotency_key: str = "",
        register: bool = False,
        wait: float = 0.0,
        patience: float = 0.0,
        owner: str = "",
        held_task_id: str = "",
        output_json: str = "",
        attributes: Mapping[str, str] | None = None,
    ) -> Started:
        """Start an execution, or find the execution that has the idempotency key.

        With `register`, register the workflow's version first if the server doesn't know it. With `wait`, return when
        the execution ends, or after `wait` seconds, but at most 25. `owner` is the id of a connected worker: the caller
        gets the execution's only node, and no poll gets it. With `held_task_id`, the server refuses the start
        (Conflict) if another owner has taken over that task. With `output_json`, the execution ends at once with that
        result, and the answer has no task. A server that doesn't know `output_json` answers with the task. `attributes`
        are names and values by which `list_executions` finds the execution.

        If a limit holds an owned node back, the call waits for up to `wait` seconds, and the answer may then have
        `retry_after` instead of a task. If the effect of an owned node is unknown, the execution waits for a person:
        the answer has no task, and `unknown` is true. If the key's execution is FAILED or CANCELLED, a new execution is
        started. But if the ended execution has a node whose effect must happen only once, the answer is the ended one.

        Without a key, the call is never retried. If only the answer was lost, a retry would start a second execution.
        Raises WorkflowNotFound, IdempotencyConflict, InvalidRequest. Raises Conflict while another owner holds the
        execution.
        """
        if workflow.input is not None and not isinstance(input, workflow.input):
            try:
                input = workflow.input.model_validate(input)
            except ValidationError as error:
                why = first_problem(error)
                raise InvalidRequest(f"the input does not match {workflow.input.__name__}: {why}") from error
        input_json = jsontext.dump(input, "input")
        jsontext.check_size(output_json, "the result")
        request = request_of(
            pb.StartRequest,
            workflow_id=workflow.workflow_id,
            version_hash=workflow.version_hash,
            input_json=input_json,
            idempotency_key=idempotency_key,
            wait_ms=_milliseconds(wait),
            owner=owner,
            held_task_id=held_task_id,
            output_json=output_json,
            attributes=attributes,
        )
        start = partial(
            self._call,
            lambda stub: stub.StartExecution,
            request,
            wait=wait,
            patience=patience if idempotency_key else 0.0,
        )
        try:
            answer = await start()
        except NotFound as error:
            if not register:
                raise WorkflowNotFound(workflow.workflow_id, workflow.version_hash) from error
            await self.register_workflow(workflow, patience=patience)
            answer = await start()
        ended = await self._whole(answer.ended, patience) if answer.HasField("ended") else None
        status = ExecutionStatus(answer.status or "RUNNING")
        task = _task(answer.task, [workflow.version_hash])
        return Started(
            answer.execution_id,
            answer.existing,
            status,
            ended,
            task,
            answer.unknown,
            answer.retry_after_ms / 1000,
            answer.heartbeat_now,
        )

    async def get_execution(
        self, execution_id: str, *, wait: float = 0.0, with_attempts: bool = False, patience: float = 0.0
    ) -> Observed:
        """Return the state of an execution when it ends, or after `wait` seconds. Raises ExecutionNotFound."""
        _check_wait(wait)
        loop = running_loop()
        end = loop.time() + wait
        with _about_execution(execution_id):
            while True:
                observed = await self._observe(execution_id, min(wait, MAX_SERVER_WAIT), with_attempts, patience)
                wait = end - loop.time()
                if wait <= 0 or observed.execution.status.ended:
                    return observed
                await asyncio.sleep(_FAST_POLL)  # a server that ends answers at once

    async def _observe(self, execution_id: str, wait: float, with_attempts: bool, patience: float) -> Observed:
        if self._has_get_execution:
            request = request_of(
                pb.GetExecutionRequest,
                execution_id=execution_id,
                wait_ms=_milliseconds(wait),
                with_attempts=with_attempts,
            )
            try:
                answer = await self._call(lambda stub: stub.GetExecution, request, wait=wait, patience=patience)
                return Observed(await self._whole(answer, patience), answer.has_poller)
            except NotANexumServer:
                self._fall_back()
        return await self._poll_status(execution_id, wait=wait, patience=patience)

    async def _whole(self, answer: pb.GetExecutionResponse, patience: float) -> Execution:
        """Return the execution that `answer` describes. Read the input and the outputs that `answer` leaves out."""
        found = _execution(answer, answer.created_ms, input_bytes=answer.input_bytes)
        if not found.input_bytes and not any(node.output_bytes for node in found.nodes):
            return found
        if found.input_bytes:
            text = await self._payload(found.execution_id, "", found.input_bytes, patience)
            found = replace(found, input_json=text, input_bytes=0)
        nodes = []
        for node in found.nodes:
            if node.output_bytes:
                text = await self._payload(found.execution_id, node.node_id, node.output_bytes, patience)
                node = replace(node, output_json=text, output_bytes=0)
            nodes.append(node)
        return replace(found, nodes=tuple(nodes))

    async def _payload(self, execution_id: str, node_id: str, size: int, patience: float) -> str:
        """Read a node's output in parts. If `node_id` is empty, read the execution's input instead."""
        data = bytearray()
        while len(data) < size:
            request = request_of(pb.GetOutputRequest, execution_id=execution_id, node_id=node_id, offset=len(data))
            part = (await self._call(lambda stub: stub.GetOutput, request, patience=patience)).data
            if not part:
                raise ServerError(f"the server on {self.address} sent {len(data):,} of {size:,} bytes of an output")
            data += part
        return data.decode("utf-8", "surrogatepass")

    def _fall_back(self) -> None:
        # Log the warning only once: several calls in parallel may find that GetExecution is missing.
        if self._has_get_execution:
            published.logger.warning(
                "the server on %s has no GetExecution: it shows results, but no attempts, times or reasons of failures",
                self.address,
            )
        self._has_get_execution = False

    async def _poll_status(self, execution_id: str, *, wait: float, patience: float) -> Observed:
        """Poll with GetStatus until the execution ends or `wait` seconds are over. Poll less often after 2 s."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        request = request_of(pb.StatusRequest, execution_id=execution_id)
        while True:
            answer = await self._call(lambda stub: stub.GetStatus, request, patience=patience)
            waited = loop.time() - start
            if answer.status != ExecutionStatus.RUNNING or waited >= wait:
                return Observed(published.execution(execution_id, answer), None)
            await asyncio.sleep(_FAST_POLL if waited < _FAST_FOR else _SLOW_POLL)

    async def get_status(self, execution_id: str, *, patience: float = 0.0) -> ExecutionStatus:
        """Return the status of an execution, without its outputs. Raises ExecutionNotFound."""
        request = request_of(pb.StatusRequest, execution_id=execution_id)
        with _about_execution(execution_id):
            answer = await self._call(lambda stub: stub.GetStatus, request, patience=patience)
        return ExecutionStatus(answer.status)

    async def list_executions(
        self,
        *,
        workflow_id: str = "",
        status: str = "",
        limit: int = 0,
        key_prefix: str = "",
        before: str = "",
        with_nodes: bool = False,
        parent: str = "",
        since_ms: int = 0,
        until_ms: int = 0,
        attributes: Mapping[str, str] | None = None,
        group_sessions: bool = False,
        patience: float = 0.0,
    ) -> list[Execution]:
        """Return the newest executions, at most `limit` (default 20). `with_nodes` includes inputs and nodes.

        `key_prefix` selects executions by the beginning of their idempotency key. `before` is an execution's id, and
        selects older executions. A page with nodes may be shorter than `limit`: only an empty page is the end of the
        list. `since_ms` and `until_ms` select executions by their start, in milliseconds since 1970. `attributes`
        selects executions that have all these attributes. With `group_sessions`, a durable session is one item, its
        latest run. `parent` is an execution's id, and selects the executions that its nodes started.
        Raises ExecutionNotFound for an unknown `before`. Raises ServerError if the server is a published one and the
        call selects by time or attributes: published servers can't do so.
        """
        request = request_of(
            pb.ListRequest,
            workflow_id=workflow_id,
            status=status,
            limit=limit,
            idempotency_key_prefix=key_prefix,
            before_execution_id=before,
            with_nodes=with_nodes,
            parent_execution_id=parent,
            since_ms=since_ms,
            until_ms=until_ms,
            attributes=attributes,
            group_sessions=group_sessions,
        )
        with _about_execution(before):
            answer = await self._call(lambda stub: stub.ListExecutions, request, patience=patience)
        if (since_ms or until_ms or attributes) and any(not one.created_ms for one in answer.executions):
            raise ServerError(f"the server on {self.address} is a published one: it can't select by time or attributes")
        return [
            _execution(
                one,
                one.created_ms or published.milliseconds(one.created_at),
                session=_record(SessionSummary, one.session) if one.HasField("session") else None,
            )
            for one in answer.executions
        ]

    async def all_executions(self, **query: Any) -> AsyncGenerator[Execution, None]:
        """Yield all executions that `list_executions` finds with this query, the newest first."""
        before = ""
        while page := await self.list_executions(**query, before=before, limit=PAGE):
            for execution in page:
                yield execution
            before = page[-1].execution_id

    async def cancel_execution(self, execution_id: str, *, by: str = "") -> None:
        """Cancel a running execution. Raises ExecutionNotFound, or Conflict if it has completed or failed.

        `by` is recorded as the name of the person who cancels. A server with tokens records the token's name instead.
        """
        # Check the status here, too: a published server cancels ended executions, and accepts unknown ids.
        status = await self.get_status(execution_id)
        if status in (ExecutionStatus.COMPLETED, ExecutionStatus.FAILED):
            raise Conflict(f"execution {execution_id} is {status.value} and can't be cancelled any more")
        request = request_of(pb.CancelRequest, execution_id=execution_id, cancelled_by=by)
        with _about_execution(execution_id):
            await self._call(lambda stub: stub.CancelExecution, request)

    async def retry_execution(self, execution_id: str) -> None:
        """Continue a FAILED execution at its failed node. Recorded results are kept.

        Raises ExecutionNotFound, and Conflict if the execution can't be retried: it has not failed, its key has a newer
        execution, or it is owned.
        """
        request = request_of(pb.RetryRequest, execution_id=execution_id)
        with _about_execution(execution_id):
            await self._of_this_project("retry executions", lambda stub: stub.RetryExecution, request)

    # ---- Nodes that wait ---------------------------------------------------------------------------------------------

    async def pending_approvals(self, *, patience: float = 0.0) -> list[PendingApproval]:
        """Return the HUMAN_APPROVAL nodes that wait for a person, the longest waiting first."""
        answer = await self._call(lambda stub: stub.GetPendingApprovals, pb.EmptyRequest(), patience=patience)
        return [
            PendingApproval(
                item.execution_id,
                item.node_id,
                item.workflow_id,
                published.milliseconds(item.started_at),
                item.input_json,
            )
            for item in answer.items
        ]

    async def approve(
        self,
        execution_id: str,
        node_id: str,
        *,
        approver: str = "",
        comment: str = "",
        answer: object = None,
        patience: float = 0.0,
    ) -> None:
        """Complete a HUMAN_APPROVAL node. Raises NotFound, or Conflict if the node does not wait for a decision.

        If `answer` is not None, this JSON value becomes the field `answer` of the node's output.
        """
        request = request_of(
            pb.ApproveRequest,
            execution_id=execution_id,
            node_id=node_id,
            approver=approver,
            comment=comment,
            answer_json="" if answer is None else jsontext.dump(answer, "the answer"),
        )
        await self._call(lambda stub: stub.ApproveTask, request, patience=patience)

    async def reject(
        self, execution_id: str, node_id: str, *, approver: str = "", reason: str = "", patience: float = 0.0
    ) -> None:
        """Fail a HUMAN_APPROVAL node and its execution. Raises NotFound, or Conflict like `approve`."""
        request = request_of(
            pb.RejectRequest, execution_id=execution_id, node_id=node_id, approver=approver, reason=reason
        )
        await self._call(lambda stub: stub.RejectTask, request, patience=patience)

    async def unknown(self, *, patience: float = 0.0) -> list[UnknownNode]:
        """Return the EFFECT nodes that wait for a person because their effect is unknown, the longest waiting first."""
        answer = await self._of_this_project(
            "list unknown effects", lambda stub: stub.GetUnknown, pb.EmptyRequest(), patience
        )
        return [_record(UnknownNode, item) for item in answer.items]

    async def tools(self, *, patience: float = 0.0) -> list[DeclaredTool]:
        """Return the tools, sorted by name, of the workers and owners that are connected to this server now."""
        answer = await self._of_this_project("list tools", lambda stub: stub.GetTools, pb.EmptyRequest(), patience)
        return [_record(DeclaredTool, tool) for tool in answer.tools]

    async def resolve(
        self,
        execution_id: str,
        node_id: str,
        *,
        resolved_by: str = "",
        output: object = None,
        not_done: bool = False,
        failed: str | None = None,
        attempt: int = 0,
        patience: float = 0.0,
    ) -> None:
        """Decide about a node whose effect is unknown.

        With `not_done`, the effect has not happened, and the node is handed out again. With `failed`, the node and its
        execution fail for this reason. Otherwise the effect has happened, and the node completes with the JSON value
        `output`. `attempt` is the attempt that the decision is about (`UnknownNode.attempt`); it may be 0 if it is the
        node's first attempt in doubt.

        Raises NotFound, Conflict if the node does not wait for such a decision or if another attempt is in doubt, and
        InvalidRequest for an empty reason.
        """
        request = request_of(
            pb.ResolveRequest, execution_id=execution_id, node_id=node_id, resolved_by=resolved_by, attempt=attempt
        )
        if [output is not None, not_done, failed is not None].count(True) > 1:
            raise InvalidRequest("a node is resolved in one way: give only one of output, not_done and failed")
        if not_done:
            request.not_done = True
        elif failed is not None:
            request.MergeFrom(request_of(pb.ResolveRequest, failed=failed))
        else:
            request.output_json = jsontext.dump(output, "the result")
        await self._of_this_project("resolve unknown effects", lambda stub: stub.ResolveNode, request, patience)

    async def _of_this_project(
        self, what: str, method: Method[Request, Answer], request: Request, patience: float = 0.0
    ) -> Answer:
        """Make a call that a published server doesn't know. Raises ServerError, which says `what` it can't do."""
        try:
            return await self._call(method, request, patience=patience)
        except NotANexumServer as error:
            await self.ping()
            raise ServerError(
                f"the server on {self.address} is a published one, or an older one: it can't {what}"
            ) from error

    async def send_event(
        self, execution_id: str, name: str, payload: object = None, *, idempotency_key: str = "", patience: float = 0.0
    ) -> None:
        """Send an event to an execution. The event completes an EVENT node that waits for it, or that will wait later.

        With `idempotency_key`, a second event with this key changes nothing. Without it, the call is never retried.
        Raises NotFound for an unknown execution or event, IdempotencyConflict, and Conflict if the execution has ended.
        """
        request = request_of(
            pb.SendEventRequest,
            execution_id=execution_id,
            name=name,
            payload_json=jsontext.dump(payload, "the payload"),
            idempotency_key=idempotency_key,
        )
        await self._call(lambda stub: stub.SendEvent, request, patience=patience if idempotency_key else 0.0)

    # ---- Maintenance -------------------------------------------------------------------------------------------------

    async def prune(
        self, older_than: float, *, session: str = "", dry_run: bool = False, after: int = 0, compact: bool = False
    ) -> Pruned:
        """Delete executions that ended at least `older_than` seconds ago. One call does only a part of the work.

        Repeat the call, with `after` from the last answer, until an answer's `after` is None. With `session`, only that
        session's executions are deleted: all or none. With `compact`, the last part releases all free space of the file
        to the disk. Raises NotFound for an unknown session, and InvalidRequest.
        """
        request = request_of(
            pb.PruneRequest,
            older_than_ms=round(older_than * 1000),
            session=session,
            dry_run=dry_run,
            after=after,
            compact=compact,
        )
        answer = await self._call(lambda stub: stub.Prune, request, wait=MAX_SERVER_WAIT if compact else 0.0)
        return Pruned(
            executions=answer.executions,
            sessions=answer.sessions,
            kept=answer.kept,
            after=answer.after if answer.more else None,
            total_bytes=answer.total_bytes,
            free_bytes=answer.free_bytes,
            released_bytes=answer.released_bytes,
        )

    async def backup(self, file: Path, *, overwrite: bool = False) -> AsyncGenerator[tuple[int, int], None]:
        """Write a copy of the server's database to `file`, an absolute path on the server's machine.

        While the server copies, yields pairs: the bytes copied so far, and the bytes of the whole database. The file is
        complete when the iteration ends. Close the generator to stop the backup. Raises Conflict if the file exists and
        `overwrite` is false, and InvalidRequest if the file can't be written.
        """
        await self.connection.reach()
        # Open a separate channel: a backup has many answers, and a call on the shared stream has only one.
        route = self.connection.route()
        channel = Channel(*route, purpose="backup")
        try:
            stream, step = await self._begin_backup(
                channel, request_of(pb.BackupRequest, file=str(file), overwrite=overwrite)
            )
            try:
                while isinstance(step, pb.BackupProgress):
                    yield step.copied_bytes, step.total_bytes
                    if step.done:
                        return
                    step = await stream.read()
            finally:
                stream.cancel()
            raise ServerUnavailable(f"the Nexum server on {self.address} ended the backup: make it again")
        except grpc.RpcError as rpc_error:
            raise await explained(rpc_error, route.target, route.security) from rpc_error
        finally:
            await channel.close()

    async def _begin_backup(self, channel: Channel, request: pb.BackupRequest) -> tuple[Any, Any]:
        """Return the stream of a backup, and the first answer."""
        while True:
            stream = channel.stub.Backup()
            try:
                with contextlib.suppress(asyncio.InvalidStateError):  # the stream is over: let `read` raise the reason
                    await stream.write(request)
                return stream, await stream.read()
            except BaseException as error:
                stream.cancel()
                if not isinstance(error, grpc.RpcError) or error.details() != CUT_OFF:
                    raise
                # The server refused the stream while the request was being sent. The next stream may get the reason.
                await asyncio.sleep(RECONNECT_DELAY)

    # ---- Tasks, for the worker runtime -------------------------------------------------------------------------------

    async def poll_task(self, worker_id: str, version_hashes: Sequence[str], *, wait: float) -> Task | None:
        """Take a task of one of the versions. Return None if no task is ready within `wait` seconds."""
        request = request_of(
            pb.PollRequest,
            worker_id=worker_id,
            version_hash=version_hashes[0],
            more_version_hashes=version_hashes[1:],
            wait_ms=_milliseconds(wait),
            max_task_bytes=2**40,
        )
        answer = await self._call(lambda stub: stub.PollTask, request, wait=wait)
        return _task(answer, version_hashes)

    async def complete_task(self, task_id: str, output_json: str, *, patience: float = 0.0) -> None:
        """Report a task's result. Raises StaleTask, TaskNotFound, TooLarge, InvalidRequest."""
        jsontext.check_size(output_json, "the result")
        request = request_of(pb.CompleteRequest, task_id=task_id, output_json=output_json)
        await self._report(task_id, lambda stub: stub.CompleteTask, request, patience)

    async def fail_task(
        self, task_id: str, error: str, *, final: bool = False, unknown: bool = False, patience: float = 0.0
    ) -> None:
        """Report a task's failure. A `final` failure is not retried. Raises StaleTask.

        With `unknown`, the effect of the EFFECT node may have happened. If the node has `reconcile`, a worker's next
        attempt finds out whether the effect has happened. Otherwise, or if that attempt can't tell either, the node
        waits for a person.
        """
        # An error may name a file whose name isn't UTF-8: Python keeps such bytes as lone surrogates.
        message = error.encode("utf-8", "replace").decode()
        # Set `final` as well, for older servers: they ignore `unknown`, and would hand the task out again.
        request = request_of(
            pb.FailRequest, task_id=task_id, error_message=message, final=final or unknown, unknown=unknown
        )
        await self._report(task_id, lambda stub: stub.FailTask, request, patience)

    async def _report(
        self, task_id: str, method: Method[Request, pb.AckResponse], request: Request, patience: float
    ) -> None:
        try:
            await self._call(method, request, patience=patience)
        except NotFound as error:
            raise TaskNotFound(task_id) from error
        except Conflict as error:
            raise StaleTask(str(error)) from error


@contextlib.contextmanager
def _about_execution(execution_id: str) -> Iterator[None]:
    """Inside a `with` block, raise ExecutionNotFound if the server answers that it doesn't know the execution."""
    try:
        yield
    except NotFound as error:
        raise ExecutionNotFound(execution_id) from error


def _milliseconds(wait: float) -> int:
    """Convert a wait in seconds to the milliseconds to request. Raises InvalidRequest."""
    _check_wait(wait)
    return round(min(max(wait, 0.0), MAX_SERVER_WAIT) * 1000)


def _check_wait(wait: float) -> None:
    try:
        is_number = not math.isnan(wait)
    except TypeError:
        is_number = False
    if not is_number:
        raise InvalidRequest(f"wait is {wait!r}: give a number of seconds")


def _task(answer: pb.PollResponse, version_hashes: Sequence[str]) -> Task | None:
    if not answer.has_task:
        return None
    return Task(
        task_id=answer.task_id,
        execution_id=answer.execution_id,
        node_id=answer.node_id,
        node_type=answer.node_type,
        # A published server sends no version and no attempt number. A poll of such a server names only one version.
        version_hash=answer.version_hash or version_hashes[0],
        attempt=answer.attempt or 1,
        idempotency_key=answer.idempotency_key,
        input_json=answer.input_json,
        progress_json=answer.progress_json,
        map_index=answer.map_index,
        map_total=answer.map_total,
        map_item_json=answer.map_item_json,
        must_reconcile=answer.must_reconcile,
    )


def _execution(
    answer: pb.GetExecutionResponse | pb.ExecutionSummary,
    created_ms: int,
    *,
    input_bytes: int = 0,
    session: SessionSummary | None = None,
) -> Execution:
    return Execution(
        execution_id=answer.execution_id,
        workflow_id=answer.workflow_id,
        version_hash=answer.version_hash,
        status=ExecutionStatus(answer.status),
        input_json=answer.input_json,
        idempotency_key=answer.idempotency_key,
        created_ms=created_ms,
        ended_ms=answer.ended_ms or None,
        error=answer.error,
        nodes=_nodes(answer.nodes),
        parent_execution_id=answer.parent_execution_id,
        parent_node_id=answer.parent_node_id,
        child_index=answer.child_index if answer.HasField("child_index") else None,
        attributes=dict(sorted(answer.attributes.items())),
        input_bytes=input_bytes,
        session=session,
    )


def _record(kind: type[Record], message: Any) -> Record:
    """Return a record whose fields have the same names and types as those of the message."""
    return kind(**{field.name: getattr(message, field.name) for field in fields(kind)})


def _nodes(records: Iterable[pb.NodeRecord]) -> tuple[Node, ...]:
    return tuple(
        Node(
            node.node_id,
            node.node_type,
            NodeStatus(node.status),
            node.output_json or None,
            node.error,
            tuple(
                Attempt(a.attempt, a.worker_id, a.started_ms, a.ended_ms or None, Outcome(a.outcome), a.error)
                for a in node.attempts
            ),
            node.progress_json,
            node.due_ms or None,
            node.output_bytes,
            node.once,
        )
        for node in records
    )
