"""The client's retries, and the limit of a call's wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from engine_server import EngineServer, engine_server, is_full

from nexum_engine.client import NexumClient
from nexum_engine.errors import ServerNotReady
from nexum_engine.records import ExecutionStatus
from nexum_engine.store import executions
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


async def test_client_caps_the_wait_that_it_requests(server: EngineServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nexum_engine.client.MAX_SERVER_WAIT", 0.1)
    async with NexumClient(server.address) as client:
        await client.register_workflow(ONE)
        started = await client.start_execution(ONE, {})
        observed = await asyncio.wait_for(client.get_execution(started.execution_id, wait=2 * SOON), SOON)
    assert observed.execution.status is ExecutionStatus.RUNNING
