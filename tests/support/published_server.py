"""A stand-in for a published Nexum server: its protocol, and the behavior that its clients notice.

    published_server.py [--listen HOST:PORT] [--take-back-after SECONDS]

It answers a poll in two steps, so that two polls at the same moment get the same task. It keeps an output above 100 kB
in a file of its folder, and returns a pointer to the file. It sorts the keys of stored JSON, gives no reason for a
failure, and answers a second report with INTERNAL. It takes a silent worker's task back, and counts this as a retry. It
refuses messages above 4 MiB. It also cancels ended executions, and reports success if an execution to cancel is
unknown. Its data is in memory.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import grpc
from google.protobuf.message import Message
from published_protocol import PUBLISHED_RPCS, published

from nexum_engine.wire import nexum_pb2 as pb

STEP = 0.01  # seconds between the two steps of a poll: it chooses a task, and then takes the task
MAX_STORED_BYTES = 100 * 1024
MAX_MESSAGE_BYTES = 4 * 1024 * 1024
MAX_RETRIES = 3
BLOBS = Path(".nexum/blobs")
CLAIM_CHECK = "__nexum_claim_check__"


@dataclass
class Task:
    task_id: str
    execution_id: str
    node_id: str
    version_hash: str
    status: str = "READY"
    due: float = 0.0
    taken: float = 0.0
    retries: int = 0


@dataclass
class Execution:
    workflow_id: str
    version_hash: str
    input: Any
    created_at: str
    status: str = "RUNNING"
    outputs: dict[str, Any] = field(default_factory=dict)


class Refused(Exception):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code


class PublishedServer:
    def __init__(self, take_back_after: float) -> None:
        self._lock = threading.Lock()
        self._nodes: dict[tuple[str, str], dict[str, Any]] = {}
        self._executions: dict[str, Execution] = {}
        self._tasks: dict[str, Task] = {}
        threading.Thread(target=self._take_back, args=(take_back_after,), daemon=True).start()

    def _take_back(self, after: float) -> None:
        while True:
            time.sleep(after / 2)
            with self._lock:
                for task in self._tasks.values():
                    if task.status == "RUNNING" and time.monotonic() - task.taken > after:
                        self._make_ready(task, 0.0)

    def _make_ready(self, task: Task, delay: float) -> None:
        task.status, task.retries, task.due = "READY", task.retries + 1, time.monotonic() + delay

    def _execution(self, execution_id: str) -> Execution:
        if execution_id not in self._executions:
            raise Refused(grpc.StatusCode.NOT_FOUND, "Execution not found: no rows returned")
        return self._executions[execution_id]

    def _task(self, task_id: str) -> Task:
        if task_id not in self._tasks:
            raise Refused(grpc.StatusCode.NOT_FOUND, "Task not found: no rows returned")
        return self._tasks[task_id]

    def _schedule(self, execution_id: str) -> None:
        execution = self._executions[execution_id]
        scheduled = {task.node_id for task in self._tasks.values() if task.execution_id == execution_id}
        for node_id, node in self._nodes[execution.workflow_id, execution.version_hash].items():
            if node_id not in scheduled and set(node["dependencies"]) <= execution.outputs.keys():
                task = Task(f"task-{uuid.uuid4()}", execution_id, node_id, execution.version_hash)
                self._tasks[task.task_id] = task

    # ---- The calls ---------------------------------------------------------------------------------------------------

    def RegisterWorkflow(self, request: pb.WorkflowIR) -> pb.AckResponse:
        self._nodes[request.workflow_id, request.version_hash] = json.loads(request.ir_json)["nodes"]
        return pb.AckResponse(ok=True, compatibility="NEW", message="New workflow registered.")

    def StartExecution(self, request: pb.StartRequest) -> pb.StartResponse:
        with self._lock:
            if (request.workflow_id, request.version_hash) not in self._nodes:
                raise Refused(grpc.StatusCode.NOT_FOUND, "Workflow not registered")
            execution_id = f"exec-{uuid.uuid4()}"
            created = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
            self._executions[execution_id] = Execution(
                request.workflow_id, request.version_hash, json.loads(request.input_json), created
            )
            self._schedule(execution_id)
        return pb.StartResponse(execution_id=execution_id)

    def PollTask(self, request: pb.PollRequest) -> pb.PollResponse:
        with self._lock:
            ready = [
                task
                for task in self._tasks.values()
                if task.version_hash == request.version_hash and task.status == "READY" and task.due <= time.monotonic()
            ]
        if not ready:
            return pb.PollResponse()
        time.sleep(STEP)
        task = ready[0]
        with self._lock:
            task.status, task.taken = "RUNNING", time.monotonic()
            execution = self._executions[task.execution_id]
            node = self._nodes[execution.workflow_id, execution.version_hash][task.node_id]
            document = {"input": execution.input, "deps": {one: _read(execution, one) for one in node["dependencies"]}}
        return pb.PollResponse(
            has_task=True,
            task_id=task.task_id,
            execution_id=task.execution_id,
            node_id=task.node_id,
            input_json=json.dumps(document, sort_keys=True),
            idempotency_key=f"{task.execution_id}:{task.node_id}:{task.version_hash}",
            node_type=node["type"],
        )

    def CompleteTask(self, request: pb.CompleteRequest) -> pb.AckResponse:
        with self._lock:
            task = self._task(request.task_id)
            execution = self._executions[task.execution_id]
            task.status = "DONE"
            if task.node_id in execution.outputs:
                raise Refused(grpc.StatusCode.INTERNAL, "UNIQUE constraint failed: events.sequence_id")
            execution.outputs[task.node_id] = _stored(task, request.output_json)
            self._schedule(task.execution_id)
            if execution.outputs.keys() == self._nodes[execution.workflow_id, execution.version_hash].keys():
                execution.status = "COMPLETED"
        return pb.AckResponse(ok=True)

    def FailTask(self, request: pb.FailRequest) -> pb.AckResponse:
        with self._lock:
            task = self._task(request.task_id)
            if task.retries < MAX_RETRIES:
                self._make_ready(task, 2.0**task.retries)
            else:
                task.status = self._executions[task.execution_id].status = "FAILED"
        return pb.AckResponse(ok=True)

    def GetStatus(self, request: pb.StatusRequest) -> pb.StatusResponse:
        execution = self._execution(request.execution_id)
        outputs = json.dumps(execution.outputs, sort_keys=True, ensure_ascii=False)
        return pb.StatusResponse(status=execution.status, completed_nodes_json=outputs)

    def ListExecutions(self, request: pb.ListRequest) -> pb.ListResponse:
        found = [
            pb.ExecutionSummary(
                execution_id=execution_id,
                workflow_id=one.workflow_id,
                version_hash=one.version_hash,
                status=one.status,
                created_at=one.created_at,
            )
            for execution_id, one in reversed(self._executions.items())
            if request.workflow_id in ("", one.workflow_id) and request.status in ("", one.status)
        ]
        return pb.ListResponse(executions=found[: request.limit or 20])

    def CancelExecution(self, request: pb.CancelRequest) -> pb.AckResponse:
        with self._lock:
            if request.execution_id in self._executions:
                self._executions[request.execution_id].status = "CANCELLED"
            for task in self._tasks.values():
                if task.execution_id == request.execution_id and task.status in ("READY", "RUNNING"):
                    task.status = "CANCELLED"
        return pb.AckResponse(ok=True, message="Execution cancelled")


def _stored(task: Task, output_json: str) -> Any:
    """Return an output in the form in which it is stored: an output above 100 kB is a pointer to a file."""
    if len(output_json.encode()) <= MAX_STORED_BYTES:
        return json.loads(output_json)
    BLOBS.mkdir(parents=True, exist_ok=True)
    name = f"{task.execution_id}-{task.node_id}"
    path = BLOBS / f"{name}.json"
    path.write_text(output_json, encoding="utf-8")
    return {CLAIM_CHECK: True, "blob_id": name, "size": len(output_json.encode()), "path": str(path)}


def _read(execution: Execution, node_id: str) -> Any:
    output = execution.outputs[node_id]
    is_pointer = isinstance(output, dict) and CLAIM_CHECK in output
    return json.loads(Path(output["path"]).read_text(encoding="utf-8")) if is_pointer else output


def _handler(call: Callable[[Any], Message], request_type: str, response_type: str) -> grpc.RpcMethodHandler[Any, Any]:
    def handle(request: Message, context: grpc.ServicerContext) -> Message:
        try:
            if request.ByteSize() > MAX_MESSAGE_BYTES:
                raise Refused(grpc.StatusCode.OUT_OF_RANGE, "Error, decoded message length too large")
            return published(call(published(request)))
        except Refused as error:
            _abort(context, error)

    return grpc.unary_unary_rpc_method_handler(
        handle,
        request_deserializer=getattr(pb, request_type).FromString,
        response_serializer=getattr(pb, response_type).SerializeToString,
    )


def _abort(context: grpc.ServicerContext, error: Refused) -> NoReturn:
    context.abort(error.code, str(error))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", default="[::1]:0")
    parser.add_argument("--take-back-after", type=float, default=60.0)
    args = parser.parse_args()
    service = PublishedServer(args.take_back_after)
    handlers = {
        name: _handler(getattr(service, name), *types)
        for name, types in PUBLISHED_RPCS.items()
        if hasattr(service, name)
    }
    server = grpc.server(ThreadPoolExecutor(32), options=[("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("nexum.NexumService", handlers),))
    port = server.add_insecure_port(args.listen)
    server.start()
    print(f"Published Nexum on {args.listen.rpartition(':')[0]}:{port}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
