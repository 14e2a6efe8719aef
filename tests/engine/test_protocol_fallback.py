"""The client and worker with only the published contract: a proxy at the server refuses all other calls."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from harness import ROOT, running
from published_protocol import PUBLISHED_RPCS, published
from server_thread import ServerThread

from nexum_engine.client import NexumClient
from nexum_engine.errors import ExecutionNotFound, ServerError
from nexum_engine.records import ExecutionStatus
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.worker import Binding, TaskContext, Worker
from nexum_engine.workflow import workflow

CHAIN = workflow("chain").effect("a").effect("b").build()
SOON = 20.0  # seconds


class Proxy:
    """A proxy that passes on the calls of the published contract, and answers all others with UNIMPLEMENTED."""

    def __init__(self, behind: str) -> None:
        self.calls: Counter[str] = Counter()
        self._guard = threading.Lock()
        self._channel = grpc.insecure_channel(behind)
        self._server = grpc.server(ThreadPoolExecutor(16))
        handlers = {name: self._handler(name, *types) for name, types in PUBLISHED_RPCS.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("nexum.NexumService", handlers),))
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{self.port}"
        self._server.start()

    def _handler(self, name: str, request_type: str, response_type: str) -> grpc.RpcMethodHandler[Any, Any]:
        ask, answer = getattr(pb, request_type), getattr(pb, response_type)
        forward: Callable[..., Message] = self._channel.unary_unary(
            f"/nexum.NexumService/{name}",
            request_serializer=ask.SerializeToString,
            response_deserializer=answer.FromString,
        )

        def handle(request: Message, context: grpc.ServicerContext) -> Message:
            with self._guard:
                self.calls[name] += 1
            try:
                return published(forward(published(request), timeout=10))
            except grpc.RpcError as error:
                context.abort(error.code(), error.details() or "")

        return grpc.unary_unary_rpc_method_handler(
            handle, request_deserializer=ask.FromString, response_serializer=answer.SerializeToString
        )

    def close(self) -> None:
        self._server.stop(None).wait()
        self._channel.close()


@contextmanager
def proxied(address: str) -> Iterator[Proxy]:
    proxy = Proxy(address)
    try:
        yield proxy
    finally:
        proxy.close()


@pytest.fixture
def old(server: ServerThread) -> Iterator[Proxy]:
    with proxied(server.address) as proxy:
        yield proxy


def test_proxy_speaks_only_the_published_contract(old: Proxy) -> None:
    """Check the proxy on which the tests below depend."""
    start = published(pb.StartRequest(workflow_id="w", idempotency_key="k", wait_ms=5))
    assert start == pb.StartRequest(workflow_id="w")
    with grpc.insecure_channel(old.address) as channel:
        for name in ("GetExecution", "WorkerStream", "Calls"):
            call: Any = channel.unary_unary(f"/nexum.NexumService/{name}")
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", timeout=SOON)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_our_client_and_worker_run_a_workflow_on_published_server(
    old: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    seen: list[tuple[str, Any, int]] = []

    async def handle(task: TaskContext) -> str:
        seen.append((task.node_id, dict(task.deps), task.attempt))
        return f"from {task.node_id}"

    async with NexumClient(old.address) as client, NexumClient(old.address) as for_worker:
        stop = asyncio.Event()
        worker = asyncio.create_task(
            Worker(for_worker, [Binding(CHAIN, {"a": handle, "b": handle})], concurrency=2).run(stop)
        )
        await client.register_workflow(CHAIN)
        started = await client.start_execution(CHAIN, {"q": 1}, idempotency_key="k", wait=0.2)
        observed = await client.get_execution(started.execution_id, wait=SOON)
        assert observed.execution.status is ExecutionStatus.COMPLETED
        assert observed.execution.outputs() == {"a": '"from a"', "b": '"from b"'}
        assert observed.has_poller is None
        stop.set()
        await asyncio.wait_for(worker, SOON)
        listed = await client.list_executions()
    assert [one.execution_id for one in listed] == [started.execution_id]
    assert seen == [("a", {}, 1), ("b", {"a": "from a"}, 1)]
    assert old.calls["GetStatus"] > 0
    assert caplog.text.count("has no GetExecution") == 1
    assert caplog.text.count("is a published Nexum server: run only one worker process") == 1


async def test_parallel_calls_fall_back_and_log_one_line(old: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    async with NexumClient(old.address) as client:
        await client.register_workflow(CHAIN)
        ids = [(await client.start_execution(CHAIN, {})).execution_id for _ in range(10)]
        observed = await asyncio.gather(*(client.get_execution(one) for one in ids))
        assert [one.execution.status for one in observed] == [ExecutionStatus.RUNNING] * 10
        with pytest.raises(ExecutionNotFound):
            await client.get_execution("exec-nowhere")
    assert caplog.text.count("has no GetExecution") == 1


async def test_what_published_server_lacks_is_named(old: Proxy) -> None:
    async with NexumClient(old.address) as client:
        await client.register_workflow(CHAIN)
        started = await client.start_execution(CHAIN, {}, attributes={"customer": "c-17"})
        assert [one.execution_id for one in await client.list_executions(group_sessions=True)] == [started.execution_id]
        for filters in ({"attributes": {"customer": "c-17"}}, {"since_ms": 1}, {"until_ms": 2**50}):
            with pytest.raises(ServerError, match="is a published one: it can't select by time or attributes"):
                await client.list_executions(**filters)
        with pytest.raises(ServerError, match="is a published one, or an older one: it can't retry executions"):
            await client.retry_execution(started.execution_id)
        with pytest.raises(ServerError, match="is a published one, or an older one: it can't list tools"):
            await client.tools()


async def test_fallback_waits_no_longer_than_requested(old: Proxy) -> None:
    async with NexumClient(old.address) as client:
        await client.register_workflow(CHAIN)
        started = await client.start_execution(CHAIN, {})
        await client.get_execution(started.execution_id)
        before = asyncio.get_running_loop().time()
        assert (await client.get_execution(started.execution_id, wait=0.5)).execution.status is ExecutionStatus.RUNNING
        assert 0.5 <= asyncio.get_running_loop().time() - before < 3


async def test_failed_execution_on_published_server_has_no_reason(server: ServerThread, old: Proxy) -> None:
    async with NexumClient(old.address) as client, NexumClient(server.address) as worker:
        await client.register_workflow(CHAIN)
        started = await client.start_execution(CHAIN, {})
        task = await client.poll_task("w", [CHAIN.version_hash], wait=1)
        assert task is not None
        await worker.fail_task(task.task_id, "no", final=True)
        failed = (await client.get_execution(started.execution_id, wait=1)).execution
        assert (failed.status, failed.error) == (
            ExecutionStatus.FAILED,
            "the server keeps no reason: see the worker's output",
        )
        cancelled = (await client.start_execution(CHAIN, {})).execution_id
        await client.cancel_execution(cancelled)
        assert (await client.get_execution(cancelled, wait=1)).execution.status is ExecutionStatus.CANCELLED


def test_worker_process_drains_on_published_server(old: Proxy, tmp_path: Path) -> None:
    with running([str(ROOT / "worker.py"), "--nexum", old.address], cwd=tmp_path) as worker:
        worker.wait_for("is a published Nexum server: run only one worker process")
        worker.interrupt()
        assert worker.wait(SOON) == 0
