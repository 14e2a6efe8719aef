"""The client of a Nexum server: typed calls, deadlines on all of them, and patience while a server comes back."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import grpc
from pydantic import BaseModel, ValidationError

from nexum_engine import jsontext
from nexum_engine.errors import (
    Conflict,
    ExecutionNotFound,
    InvalidRequest,
    NotANexumServer,
    NotFound,
    ServerUnavailable,
    StaleTask,
    TaskNotFound,
    WorkflowNotFound,
)
from nexum_engine.model import (
    Attempt,
    Compatibility,
    Execution,
    ExecutionStatus,
    Node,
    NodeStatus,
    Outcome,
    Task,
)
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.nexum_pb2_grpc import NexumServiceStub
from nexum_engine.wire.status import error_of
from nexum_engine.workflow import Workflow

if TYPE_CHECKING:
    from typing import TypeAlias

    # Only the type stubs tell the two kinds of channel apart.
    from nexum_engine.wire.nexum_pb2_grpc import NexumServiceAsyncStub

    WorkerStreamCall: TypeAlias = grpc.aio.StreamStreamCall[pb.WorkerBeat, pb.WorkerBeatAck]

DEFAULT_ADDRESS = "localhost:50051"
CALL_DEADLINE = 10.0  # seconds, beside what a call is asked to wait
RECONNECT_DELAY = 0.1  # seconds
MAX_SERVER_WAIT = 25.0  # seconds, below the server's own cap
_FAST_POLL, _SLOW_POLL, _FAST_FOR = 0.05, 0.2, 2.0  # seconds, for servers without GetExecution

_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # Despite its name, how long an attempt to connect may take: a busy machine or a far one needs more than a moment.
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # http_proxy is for the web, not for a server on this machine.
    ("grpc.enable_http_proxy", 0),
)

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Started:
    """The answer to `start_execution`."""

    execution_id: str
    existing: bool
    """The idempotency key had this execution already."""
    status: ExecutionStatus
    ended: Execution | None
    """The execution, if it ended within the wait."""
    task: Task | None = None
    """The caller's own task, if it asked to be the owner and the execution has not ended."""


@dataclass(frozen=True)
class Observed:
    """An execution as the server has it now."""

    execution: Execution
    has_poller: bool | None
    """Whether a worker polls for its version; None where the server can't tell."""


class NexumClient:
    """Calls one server. Use as an async context manager, or call `close`.

    `patience` in a method is for how long, in seconds, it tries again while no server answers; then it raises
    ServerUnavailable. Every method can raise NotANexumServer, ServerFault, and the server's own refusals.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        host, colon, port = address.rpartition(":")
        if not colon or not host or not port.isdecimal() or not 0 < int(port) <= 65535:
            raise InvalidRequest(f"{address!r} is not the address of a server: give HOST:PORT, like {DEFAULT_ADDRESS}")
        self.address = address
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._stub = cast("NexumServiceAsyncStub", NexumServiceStub(self._channel))
        self._has_get_execution = True

    async def __aenter__(self) -> NexumClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def _call(self, send: Callable[[float], Awaitable[T]], *, wait: float = 0.0, patience: float = 0.0) -> T:
        loop = asyncio.get_running_loop()
        give_up = loop.time() + patience
        while True:
            try:
                return await send(CALL_DEADLINE + wait)
            except grpc.RpcError as rpc_error:
                error = error_of(rpc_error, self.address)
                if not isinstance(error, ServerUnavailable) or loop.time() >= give_up:
                    raise error from rpc_error
            await asyncio.sleep(RECONNECT_DELAY)

    # ---- Workflows and executions ------------------------------------------------------------------------------------

    async def ping(self, *, patience: float = 0.0) -> None:
        """Return if a Nexum server answers."""
        await self._call(lambda t: self._stub.ListExecutions(pb.ListRequest(limit=1), timeout=t), patience=patience)

    async def register_workflow(self, workflow: Workflow, *, patience: float = 0.0) -> Compatibility:
        """Make the workflow's version known to the server. Raises Conflict if its hash has another definition there."""
        request = pb.WorkflowIR(
            workflow_id=workflow.workflow_id, version_hash=workflow.version_hash, ir_json=workflow.ir_json
        )
        answer = await self._call(lambda t: self._stub.RegisterWorkflow(request, timeout=t), patience=patience)
        return Compatibility(answer.compatibility)

    async def start_execution(
        self,
        workflow: Workflow,
        input: BaseModel | Mapping[str, Any],
        *,
        idempotency_key: str = "",
        wait: float = 0.0,
        patience: float = 0.0,
        owner: str = "",
        held_task_id: str = "",
        output_json: str = "",
    ) -> Started:
        """Start an execution, or find the one that the key has; with `wait`, answer when it ends, or after so long.

        With `owner`, the id of a connected worker, the execution's only node is handed to the caller and to no poll;
        with `held_task_id` it is refused as Conflict after another owner took that task over. With `output_json`, the
        execution ends at once with this result: the answer has no task, unless the server doesn't know of that.

        Without a key the call is not repeated, whatever the patience: a lost answer would start it twice.
        Raises WorkflowNotFound, IdempotencyConflict, InvalidRequest, and Conflict while another owner has it.
        """
        if workflow.input is not None and not isinstance(input, workflow.input):
            try:
                input = workflow.input.model_validate(input)
            except ValidationError as error:
                raise InvalidRequest(f"the input is no {workflow.input.__name__}: {error}") from error
        input_json = (
            jsontext.dump_model(input, "input") if isinstance(input, BaseModel) else jsontext.dump(input, "input")
        )
        jsontext.check_size(output_json, "the result")
        request = pb.StartRequest(
            workflow_id=workflow.workflow_id,
            version_hash=workflow.version_hash,
            input_json=input_json,
            idempotency_key=idempotency_key,
            wait_ms=round(wait * 1000),
            owner=owner,
            held_task_id=held_task_id,
            output_json=output_json,
        )
        try:
            answer = await self._call(
                lambda t: self._stub.StartExecution(request, timeout=t),
                wait=wait,
                patience=patience if idempotency_key else 0.0,
            )
        except NotFound as error:
            raise WorkflowNotFound(workflow.workflow_id, workflow.version_hash) from error
        ended = _execution(answer.ended) if answer.HasField("ended") else None
        status = ExecutionStatus(answer.status or "RUNNING")
        task = _task(answer.task, [workflow.version_hash])
        return Started(answer.execution_id, answer.existing, status, ended, task)

    async def get_execution(
        self, execution_id: str, *, wait: float = 0.0, with_attempts: bool = False, patience: float = 0.0
    ) -> Observed:
        """The execution as it is, or as soon as it ended within `wait` seconds. Raises ExecutionNotFound."""
        wait = min(wait, MAX_SERVER_WAIT)
        try:
            if self._has_get_execution:
                request = pb.GetExecutionRequest(
                    execution_id=execution_id, wait_ms=round(wait * 1000), with_attempts=with_attempts
                )
                try:
                    answer = await self._call(
                        lambda t: self._stub.GetExecution(request, timeout=t), wait=wait, patience=patience
                    )
                    return Observed(_execution(answer), answer.has_poller)
                except NotANexumServer:
                    self._fall_back()
            return await self._get_status(execution_id, wait=wait, patience=patience)
        except NotFound as error:
            raise ExecutionNotFound(execution_id) from error

    def _fall_back(self) -> None:
        # Calls in flight find out together, and one line is enough.
        if self._has_get_execution:
            logger.warning("the server on %s has no GetExecution: asking with GetStatus, again and again", self.address)
        self._has_get_execution = False

    async def _get_status(self, execution_id: str, *, wait: float, patience: float) -> Observed:
        """The published way: GetStatus, often at first and then less so."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        request = pb.StatusRequest(execution_id=execution_id)
        while True:
            answer = await self._call(lambda t: self._stub.GetStatus(request, timeout=t), patience=patience)
            waited = loop.time() - start
            if answer.status != ExecutionStatus.RUNNING or waited >= wait:
                return Observed(_execution_of_status(execution_id, answer), None)
            await asyncio.sleep(_FAST_POLL if waited < _FAST_FOR else _SLOW_POLL)

    async def list_executions(
        self,
        *,
        workflow_id: str = "",
        status: str = "",
        limit: int = 0,
        key_prefix: str = "",
        before: str = "",
        with_nodes: bool = False,
        patience: float = 0.0,
    ) -> list[Execution]:
        """The newest executions, without inputs and nodes unless asked; 20 of them unless `limit` says otherwise.

        `key_prefix` is what their idempotency keys begin with (it needs `workflow_id`), `before` the execution that
        they are older than (raises ExecutionNotFound). A page with nodes may be shorter than `limit`; only an empty one
        is the end.
        """
        request = pb.ListRequest(
            workflow_id=workflow_id,
            status=status,
            limit=limit,
            idempotency_key_prefix=key_prefix,
            before_execution_id=before,
            with_nodes=with_nodes,
        )
        try:
            answer = await self._call(lambda t: self._stub.ListExecutions(request, timeout=t), patience=patience)
        except NotFound as error:
            raise ExecutionNotFound(before) from error
        return [
            Execution(
                execution_id=summary.execution_id,
                workflow_id=summary.workflow_id,
                version_hash=summary.version_hash,
                status=ExecutionStatus(summary.status),
                input_json=summary.input_json,
                idempotency_key=summary.idempotency_key,
                created_ms=summary.created_ms,
                ended_ms=summary.ended_ms or None,
                error=summary.error,
                nodes=_nodes(summary.nodes),
            )
            for summary in answer.executions
        ]

    async def cancel_execution(self, execution_id: str) -> None:
        """End a running execution. Raises ExecutionNotFound, Conflict if it ended otherwise."""
        try:
            await self._call(
                lambda t: self._stub.CancelExecution(pb.CancelRequest(execution_id=execution_id), timeout=t)
            )
        except NotFound as error:
            raise ExecutionNotFound(execution_id) from error

    # ---- Tasks, for the worker runtime -------------------------------------------------------------------------------

    async def poll_task(
        self, worker_id: str, version_hashes: Sequence[str], *, wait: float, slot: str = ""
    ) -> Task | None:
        """Take a task of one of the versions, waiting for one up to `wait` seconds.

        A worker that names its `slot` is handed the same task again if the answer that had it was lost. Name a slot
        only when every task received on it has been reported.
        """
        request = _poll_request(worker_id, version_hashes, wait, slot)
        answer = await self._call(lambda t: self._stub.PollTask(request, timeout=t), wait=wait)
        return _task(answer, version_hashes)

    async def complete_task(
        self,
        task_id: str,
        output_json: str,
        *,
        then_take: tuple[str, Sequence[str], str] | None = None,
        patience: float = 0.0,
    ) -> Task | None:
        """Report a result. With `then_take`, a worker id, versions and a slot, also take a task of these if one is due.

        Raises StaleTask, TaskNotFound, TooLarge, InvalidRequest.
        """
        jsontext.check_size(output_json, "the result")
        request = pb.CompleteRequest(
            task_id=task_id,
            output_json=output_json,
            next=None if then_take is None else _poll_request(then_take[0], then_take[1], 0.0, then_take[2]),
        )
        answer = await self._report(task_id, lambda t: self._stub.CompleteTask(request, timeout=t), patience)
        return None if then_take is None else _task(answer.next, then_take[1])

    async def fail_task(self, task_id: str, error: str, *, final: bool, patience: float = 0.0) -> None:
        """Report a failure; a `final` one is not retried. Raises StaleTask."""
        request = pb.FailRequest(task_id=task_id, error_message=error, final=final)
        await self._report(task_id, lambda t: self._stub.FailTask(request, timeout=t), patience)

    async def _report(
        self, task_id: str, send: Callable[[float], Awaitable[pb.AckResponse]], patience: float
    ) -> pb.AckResponse:
        try:
            return await self._call(send, patience=patience)
        except NotFound as error:
            raise TaskNotFound(task_id) from error
        except Conflict as error:
            raise StaleTask(str(error)) from error

    def worker_stream(self) -> WorkerStreamCall:
        """Open a worker's stream: each beat that is written is answered. Both raise grpc.RpcError when it breaks."""
        return self._stub.WorkerStream()


def _poll_request(worker_id: str, version_hashes: Sequence[str], wait: float, slot: str) -> pb.PollRequest:
    return pb.PollRequest(
        worker_id=worker_id,
        version_hash=version_hashes[0],
        more_version_hashes=version_hashes[1:],
        wait_ms=round(wait * 1000),
        max_task_bytes=2**40,
        slot=slot,
    )


def _task(answer: pb.PollResponse, version_hashes: Sequence[str]) -> Task | None:
    if not answer.has_task:
        return None
    return Task(
        task_id=answer.task_id,
        execution_id=answer.execution_id,
        node_id=answer.node_id,
        node_type=answer.node_type,
        # A published server says neither; it was asked for one version.
        version_hash=answer.version_hash or version_hashes[0],
        attempt=answer.attempt or 1,
        idempotency_key=answer.idempotency_key,
        input_json=answer.input_json,
    )


def _execution(answer: pb.GetExecutionResponse) -> Execution:
    return Execution(
        execution_id=answer.execution_id,
        workflow_id=answer.workflow_id,
        version_hash=answer.version_hash,
        status=ExecutionStatus(answer.status),
        input_json=answer.input_json,
        idempotency_key=answer.idempotency_key,
        created_ms=answer.created_ms,
        ended_ms=answer.ended_ms or None,
        error=answer.error,
        nodes=_nodes(answer.nodes),
    )


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
        )
        for node in records
    )


def _execution_of_status(execution_id: str, answer: pb.StatusResponse) -> Execution:
    outputs: dict[str, Any] = json.loads(answer.completed_nodes_json or "{}")
    return Execution(
        execution_id=execution_id,
        workflow_id="",
        version_hash="",
        status=ExecutionStatus(answer.status),
        input_json="",
        idempotency_key="",
        created_ms=0,
        ended_ms=None,
        error="the server did not say why" if answer.status == ExecutionStatus.FAILED else "",
        nodes=tuple(
            Node(node_id, "", NodeStatus.COMPLETED, json.dumps(output, ensure_ascii=False), "")
            for node_id, output in outputs.items()
        ),
    )
