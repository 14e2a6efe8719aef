"""`nexum tools`: what connected workers and owners declare of their tools."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from processes import Command
from server_thread import ServerThread, server_thread

from nexum_engine.client import NexumClient
from nexum_engine.owner import Owner
from nexum_engine.records import DeclaredTool
from nexum_engine.server.liveness import MAX_TOOL_BYTES, MAX_TOOLS
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.nexum_pb2_grpc import NexumServiceStub
from nexum_engine.worker import Binding, TaskContext, Worker
from nexum_engine.workflow import workflow

SEARCH = DeclaredTool("search", "search(query: str)", "{}")
CHARGE = DeclaredTool("charge", "charge(cents: int)", '{"time_limit": 30.0, "effect": "once"}')
OTHER_CHARGE = DeclaredTool("charge", "", '{"approval": "always"}', session="order-4711")
TASK = workflow("task").effect("do").build()


async def do(task: TaskContext) -> object:
    return None


async def listed(client: NexumClient, are_there: Callable[[list[DeclaredTool]], bool]) -> list[DeclaredTool]:
    """Return the list as soon as `are_there` accepts it. If it never does, the test's time limit ends the wait."""
    while not are_there(tools := await client.tools()):  # noqa: ASYNC110 - the server sets no event
        await asyncio.sleep(0.02)
    return tools


async def test_tools_are_listed_while_their_workers_are_connected(
    tmp_path: Path, server: ServerThread, nexum: Command
) -> None:
    stop = asyncio.Event()
    async with NexumClient(server.address) as client, Owner(client) as owner:
        assert await client.tools() == []
        workers = [
            asyncio.create_task(Worker(client, [Binding(TASK, {"do": do})], tools=[SEARCH, CHARGE]).run(stop))
            for _ in range(2)
        ]
        owner.declare([OTHER_CHARGE])
        await listed(client, lambda tools: [one.senders for one in tools] == [1, 2, 2])
        command = await asyncio.to_thread(nexum, "tools", "--nexum", server.address)
        as_json = await asyncio.to_thread(nexum, "tools", "--json", "--nexum", server.address)
        stop.set()
        await asyncio.gather(*workers)
        (left,) = await listed(client, lambda tools: len(tools) == 1)
    assert command == (
        0,
        "charge\n"
        "    approval=always\n"
        "    declared by session order-4711\n"
        "charge(cents: int)\n"
        "    time_limit=30, effect=once\n"
        "    declared by 2 worker(s)\n"
        "search(query: str)\n"
        "    no policy\n"
        "    declared by 2 worker(s)",
    )
    assert [one["name"] for one in json.loads(as_json[1])] == ["charge", "charge", "search"]
    assert (left.session, left.policy_json) == ("order-4711", OTHER_CHARGE.policy_json)


async def test_tools_are_declared_on_each_connection_and_wrong_or_too_many_are_ignored(server: ServerThread) -> None:
    many = [DeclaredTool(f"tool-{number:03}", "", "{}") for number in range(MAX_TOOLS + 7)]
    refused = [
        DeclaredTool("long", "x" * MAX_TOOL_BYTES, "{}"),
        *(DeclaredTool("wrong", "", text) for text in ("", "[]", "{")),
    ]
    async with NexumClient(server.address) as client:
        for _ in range(2):
            async with Owner(client) as owner:
                owner.declare([*refused, *many])
                tools = await listed(client, lambda tools: len(tools) == MAX_TOOLS)
            assert [one.name for one in tools] == [one.name for one in many[:MAX_TOOLS]]
            await listed(client, lambda tools: not tools)


async def test_older_stream_of_a_worker_may_declare_tools_after_the_newer_one_has_ended(server: ServerThread) -> None:
    beat = pb.WorkerBeat(worker_id="w", tools=[pb.DeclaredTool(name="search", policy_json="{}")])
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = NexumServiceStub(channel)
        older, newer = stub.WorkerStream(), stub.WorkerStream()
        for stream in (older, newer):
            await stream.write(beat)
            assert (await stream.read()).lease_ms
        await newer.done_writing()
        assert await newer.read() is grpc.aio.EOF
        await older.write(beat)
        assert (await older.read()).lease_ms


@pytest.mark.sqlite
def test_without_a_server_no_tool_is_listed(tmp_path: Path, nexum: Command) -> None:
    with server_thread(tmp_path):
        pass
    url = f"sqlite:///{tmp_path / 'nexum.db'}"
    assert nexum("tools", "--database-url", url) == (0, "no connected worker or run has declared a tool")
