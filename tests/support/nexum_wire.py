"""A plain gRPC stub with default options, and short functions for its calls."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.nexum_pb2_grpc import NexumServiceStub

DEADLINE = 20.0  # seconds
UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


@contextmanager
def connected(address: str, options: Sequence[tuple[str, Any]] = ()) -> Iterator[NexumServiceStub]:
    """Connect a stub. Without `options` it receives up to 4 MB, as published clients do."""
    # Don't share the connection with other channels, so that the server sees it close.
    with grpc.insecure_channel(address, options=[*options, ("grpc.use_local_subchannel_pool", 1)]) as channel:
        grpc.channel_ready_future(channel).result(timeout=DEADLINE)
        yield NexumServiceStub(channel)


def ir(nodes: Mapping[str, Sequence[str]]) -> str:
    return json.dumps({"nodes": {name: {"type": "EFFECT", "dependencies": list(d)} for name, d in nodes.items()}})


def register(
    stub: NexumServiceStub, nodes: Mapping[str, Sequence[str]], workflow_id: str = "w", version: str = "v1"
) -> str:
    request = pb.WorkflowIR(workflow_id=workflow_id, version_hash=version, ir_json=ir(nodes))
    return str(stub.RegisterWorkflow(request, timeout=DEADLINE).compatibility)


def start(
    stub: NexumServiceStub, input_json: str = "{}", workflow_id: str = "w", version: str = "v1", **more: Any
) -> str:
    request = pb.StartRequest(workflow_id=workflow_id, version_hash=version, input_json=input_json, **more)
    return str(stub.StartExecution(request, timeout=DEADLINE).execution_id)


def poll(stub: NexumServiceStub, worker_id: str = "worker", version: str = "v1", **more: Any) -> pb.PollResponse:
    return stub.PollTask(pb.PollRequest(worker_id=worker_id, version_hash=version, **more), timeout=DEADLINE + 30)


def say_large(stub: NexumServiceStub) -> None:
    """Poll once as a worker that can receive large tasks. From then on, the server accepts large inputs."""
    assert not poll(stub, "large", max_task_bytes=2**40).has_task


def complete(stub: NexumServiceStub, task: pb.PollResponse, output_json: str = "1") -> None:
    stub.CompleteTask(pb.CompleteRequest(task_id=task.task_id, output_json=output_json), timeout=DEADLINE)


def status(stub: NexumServiceStub, execution_id: str) -> tuple[str, dict[str, Any]]:
    answer = stub.GetStatus(pb.StatusRequest(execution_id=execution_id), timeout=DEADLINE)
    return answer.status, json.loads(answer.completed_nodes_json)


def record(stub: NexumServiceStub, execution_id: str, **more: Any) -> pb.GetExecutionResponse:
    request = pb.GetExecutionRequest(execution_id=execution_id, with_attempts=True, **more)
    return stub.GetExecution(request, timeout=DEADLINE + 30)


def cancelled(stub: NexumServiceStub) -> str:
    """Start an execution, cancel it, and return its id for `until_polled`. No poll gets a task of this execution."""
    execution_id = start(stub)
    stub.CancelExecution(pb.CancelRequest(execution_id=execution_id), timeout=DEADLINE)
    return execution_id


def until_polled(stub: NexumServiceStub, execution_id: str) -> None:
    """Return when a worker polls this server for the execution's version, or has polled in the last 2 s."""
    deadline = time.monotonic() + DEADLINE
    while not record(stub, execution_id).has_poller:
        assert time.monotonic() < deadline, "no worker polls"
        time.sleep(0.01)


def output(stub: NexumServiceStub, execution_id: str, node_id: str, length: int = 0) -> str:
    """Read a node's output in parts. If `node_id` is empty, read the execution's input instead."""
    data = b""
    while True:
        request = pb.GetOutputRequest(execution_id=execution_id, node_id=node_id, offset=len(data), length=length)
        answer = stub.GetOutput(request, timeout=DEADLINE)
        data += answer.data
        if len(data) == answer.total_bytes:
            return data.decode()
        assert answer.data


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """Return the status and the details of a call that must be refused."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    code: grpc.StatusCode = caught.value.code()
    return code, str(caught.value.details())


class Stream:
    """A worker's stream on its own connection, which a test can break as a killed process does."""

    def __init__(self, address: str, worker_id: str) -> None:
        self._worker_id = worker_id
        self._beats: queue.SimpleQueue[pb.WorkerBeat | None] = queue.SimpleQueue()
        self._connection = connected(address)
        self.stub = self._connection.__enter__()
        self._call = self.stub.WorkerStream(iter(self._beats.get, None))

    def beat(self, *task_ids: str, draining: bool = False) -> pb.WorkerBeatAck:
        """Send a heartbeat, and return its answer."""
        self._beats.put(pb.WorkerBeat(worker_id=self._worker_id, task_ids=task_ids, draining=draining))
        answer: pb.WorkerBeatAck = next(iter(self._call))
        return answer

    def dies(self) -> None:
        self._call.cancel()
        self._beats.put(None)
        self._connection.__exit__(None, None, None)
