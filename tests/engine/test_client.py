"""The client's retries, and its waits for the end of an execution."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from engine_server import EngineServer, engine_server, is_full
from harness import nexum_server
from server_thread import server_thread

from nexum_engine.client import NexumClient
from nexum_engine.embedded import EmbeddedNexum
from nexum_engine.errors import InvalidRequest, ServerNotReady, TooLarge
from nexum_engine.owner import Owner
from nexum_engine.records import ExecutionStatus
from nexum_engine.store import executions
from nexum_engine.worker import Worker
from nexum_engine.workflow import workflow

SOON = 10.0  # seconds
ONE = workflow("one").effect("a").build()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EngineServer]:
    async with engine_server(tmp_path) as running:
        yield running


async def test_start_is_retried_only_with_an_idempotency_key(server: EngineServer) -> None:
    async with NexumClient(server.address) as client:
        await client.register_workflow(ONE)
        server.watch(executions.start_execution, is_full, is_full)
        with pytest.raises(ServerNotReady):
            await client.start_execution(ONE, {}, patience=SOON)
        assert server.calls[executions.start_execution] == 1
        await client.start_execution(ONE, {}, idempotency_key="k", patience=SOON)
        assert server.calls[executions.start_execution] == 3


async def test_wait_is_longer_than_the_wait_of_one_request(
    server: EngineServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nexum_engine.client.MAX_SERVER_WAIT", 0.1)
    async with NexumClient(server.address) as client:
        await client.register_workflow(ONE)
        started = await client.start_execution(ONE, {})
        begun = time.monotonic()
        observed = await client.get_execution(started.execution_id, wait=0.35)
        assert time.monotonic() - begun >= 0.35
        assert observed.execution.status is ExecutionStatus.RUNNING
        waiting = asyncio.create_task(client.get_execution(started.execution_id, wait=math.inf))
        await asyncio.sleep(0.35)
        assert not waiting.done()
        await client.cancel_execution(started.execution_id)
        assert (await asyncio.wait_for(waiting, SOON)).execution.status is ExecutionStatus.CANCELLED


async def test_wait_continues_while_the_server_is_restarted(tmp_path: Path) -> None:
    with ExitStack() as first_server:
        address = first_server.enter_context(server_thread(tmp_path)).address
        async with NexumClient(address) as client:
            await client.register_workflow(ONE)
            started = await client.start_execution(ONE, {})
            waiting = asyncio.create_task(client.get_execution(started.execution_id, wait=SOON, patience=SOON))
            await asyncio.sleep(0.1)
            await asyncio.to_thread(first_server.close)  # the ending server answers that the execution is running
            with server_thread(tmp_path, listen=address):
                await asyncio.sleep(0.1)
                assert not waiting.done()
                await client.cancel_execution(started.execution_id)
                assert (await waiting).execution.status is ExecutionStatus.CANCELLED


@pytest.mark.parametrize("wait", [math.nan, "3", None])
async def test_wait_that_is_no_number_is_refused(server: EngineServer, wait: Any) -> None:
    async with NexumClient(server.address) as client:
        with pytest.raises(InvalidRequest, match=f"wait is {wait!r}: give a number of seconds"):
            await client.get_execution("x", wait=wait)


async def test_negative_wait_does_not_wait(server: EngineServer) -> None:
    async with NexumClient(server.address) as client:
        await client.register_workflow(ONE)
        started = await client.start_execution(ONE, {})
        observed = await client.get_execution(started.execution_id, wait=-math.inf)
    assert observed.execution.status is ExecutionStatus.RUNNING


async def test_text_with_a_lone_surrogate_is_refused_before_the_call(server: EngineServer) -> None:
    lone = "a\ud800"
    async with NexumClient(server.address) as client:
        await client.register_workflow(ONE)
        calls: list[Awaitable[object]] = [
            client.start_execution(ONE, {}, idempotency_key=lone),
            client.start_execution(ONE, {}, attributes={"city": lone}),
            client.get_execution(lone),
            client.list_executions(key_prefix=lone),
            client.cancel_execution(lone),
            client.approve("exec-1", "a", comment=lone),
            client.resolve("exec-1", "a", failed=lone),
            client.send_event("exec-1", lone),
            client.prune(1, session=lone),
        ]
        for call in calls:
            with pytest.raises(InvalidRequest, match=r"the text 'a\\ud800' can't be sent: it is not text in UTF-8"):
                await call
    with pytest.raises(InvalidRequest, match="surrogates not allowed"):
        workflow("w").effect(lone).build()


async def test_value_of_a_wrong_type_is_refused_before_the_call(server: EngineServer) -> None:
    async with NexumClient(server.address) as client:
        untyped: Any = client
        wrong: dict[str, Awaitable[object]] = {
            "idempotency_key can't be 3: ": untyped.start_execution(ONE, {}, idempotency_key=3),
            "attributes can't be {'n': 3}: ": untyped.start_execution(ONE, {}, attributes={"n": 3}),
            "attributes can't be ['n']: ": untyped.start_execution(ONE, {}, attributes=["n"]),
            "execution_id can't be 7: ": untyped.get_execution(7),
            "limit can't be 'all': ": untyped.list_executions(limit="all"),
            "limit can't be 1099511627776: ": untyped.list_executions(limit=2**40),
        }
        for problem, call in wrong.items():
            with pytest.raises(InvalidRequest, match=f"^{re.escape(problem)}"):
                await call


def test_address_that_is_not_a_text_is_refused(tmp_path: Path) -> None:
    address: Any = tmp_path / "nexum.db"
    with pytest.raises(InvalidRequest, match="is not a server's address: give a text"):
        NexumClient(address)


async def test_client_reads_large_payloads_in_parts(tmp_path: Path) -> None:
    texts = {"a": "é" * 2_200_000, "b": "short"}
    large = workflow("large").effect("a", depends_on=()).effect("b", depends_on=()).build()
    with nexum_server(tmp_path) as server:
        async with NexumClient(server.address) as client:
            await client.register_workflow(large)
            with pytest.raises(TooLarge, match="start a worker with a larger limit"):
                await client.start_execution(large, texts, idempotency_key="k")
            assert await client.poll_task("w", [large.version_hash], wait=0) is None
            started = await client.start_execution(large, texts, idempotency_key="k")
            for _ in texts:
                task = await client.poll_task("w", [large.version_hash], wait=SOON)
                assert task is not None
                await client.complete_task(task.task_id, json.dumps(texts[task.node_id], ensure_ascii=False))
            execution = (await client.get_execution(started.execution_id)).execution
    assert json.loads(execution.input_json) == texts
    assert {name: json.loads(output) for name, output in execution.outputs().items()} == texts
    assert {node.output_bytes for node in execution.nodes} == {execution.input_bytes} == {0}


def test_every_first_call_under_another_event_loop_says_that_it_needs_asyncio() -> None:
    client = NexumClient("127.0.0.1:1")
    first_calls: list[Coroutine[Any, Any, object]] = [
        client.ping(),
        client.__aenter__(),
        Owner(client).__aenter__(),
        EmbeddedNexum(None).__aenter__(),
        Worker(client, [], concurrency=1).run(asyncio.Event()),
    ]
    for call in first_calls:
        with pytest.raises(InvalidRequest, match="needs asyncio"):
            call.send(None)  # as trio does, without an event loop of asyncio
