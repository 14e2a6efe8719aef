"""Durable sessions on a server that requires an access token."""

from __future__ import annotations

from pathlib import Path

import pytest
from certificates import ADMIN, TOKENS, USE, private_file
from server_thread import server_thread

from durable_autogen import DurableSession
from nexum_engine.client import NexumClient
from nexum_engine.records import ExecutionStatus
from nexum_engine.server import Tokens


@pytest.mark.parametrize(("token", "left"), [(USE, [ExecutionStatus.RUNNING]), (ADMIN, [ExecutionStatus.CANCELLED])])
async def test_session_that_waited_in_vain_ends_with_any_token(
    token: str, left: list[ExecutionStatus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXUM_TOKEN", token)
    tokens = Tokens(Path(private_file(tmp_path / "tokens", TOKENS)))
    with server_thread(tmp_path, tokens=tokens) as server:
        async with DurableSession("s", nexum=server.address) as session:
            with pytest.raises(TimeoutError):
                await session.wait_for_event("reply", timeout=0.01)
        async with NexumClient(server.address) as client:
            waits = await client.list_executions(workflow_id="agent-sent-event")
    assert [one.status for one in waits] == left
