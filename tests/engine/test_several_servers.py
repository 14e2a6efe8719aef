"""Clients and workers with the addresses of several servers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from certificates import FORMER, USE, private_file
from harness import Server, free_port, nexum_server
from server_thread import folders_of_one_database, server_thread

from nexum_engine.client import NexumClient
from nexum_engine.errors import InvalidRequest, ServerUnavailable, TokenRefused
from nexum_engine.owner import Owner
from nexum_engine.server.access import Tokens
from nexum_engine.worker import Binding, TaskContext, Worker
from nexum_engine.workflow import workflow

ONE = workflow("one").effect("a").build()

# ---- Several servers -------------------------------------------------------------------------------------------------


def on_two_servers(stack: ExitStack, tmp_path: Path) -> list[Server]:
    return [stack.enter_context(nexum_server(folder)) for folder in folders_of_one_database(tmp_path)]


async def test_clients_use_all_servers_and_stay_with_one(tmp_path: Path) -> None:
    first_folder, second_folder = folders_of_one_database(tmp_path)
    with server_thread(first_folder) as one, server_thread(second_folder) as two:
        servers = (one, two)
        address = ", ".join([*(server.address for server in servers), "127.0.0.1:1"])
        used = set()
        for _ in range(20):
            async with NexumClient(address) as client:
                await client.ping()  # the client never chooses the third address, where no server answers
                first = client.address
                await client.ping()
                assert client.address == first
                used.add(first)
        assert used == {server.address for server in servers}


@pytest.mark.sqlite
async def test_calls_and_worker_continue_with_another_server(tmp_path: Path) -> None:
    async def work(task: TaskContext) -> str:
        return task.idempotency_key and "done"

    with ExitStack() as stack:
        servers = {server.address: server for server in on_two_servers(stack, tmp_path)}
        address = ",".join(servers)
        async with NexumClient(address) as client, NexumClient(address) as other:
            stop = asyncio.Event()
            worker = Worker(client, [Binding(ONE, {"a": work})])
            working = asyncio.create_task(worker.run(stop))
            await worker._heartbeat.connected.wait()
            # The owner and the worker must lose the same server. Each client chooses its server at random. So open new
            # clients for the owner until one has chosen the worker's server.
            while other.address != client.address:
                other = await stack_client(address)
            await other.register_workflow(ONE)
            first = servers.pop(client.address)
            idle = Owner(other)
            async with idle:
                first.process.kill()
                # The owner makes no call: its heartbeat finds the other server.
                await asyncio.wait_for(until(lambda: idle._heartbeat.is_holding and other.address in servers), 20)
                await other.register_workflow(ONE, patience=20)
                started = await other.start_execution(ONE, {}, idempotency_key="k", patience=20)
                observed = await other.get_execution(started.execution_id, wait=20, patience=20)
                assert observed.execution.outputs() == {"a": '"done"'}
            stop.set()
            await working


async def test_servers_of_different_databases_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with server_thread(tmp_path / "one") as one, server_thread(tmp_path / "two") as two:
        async with NexumClient(f"{one.address},{two.address}") as client:
            with pytest.raises(InvalidRequest, match="have different databases: name only servers of one database"):
                await client.ping()


async def test_another_database_is_refused_when_its_server_replaces_a_lost_one(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    port = free_port()
    with server_thread(tmp_path / "one") as one:
        client = NexumClient(f"{one.address},127.0.0.1:{port}")
        await client.register_workflow(ONE)
    with server_thread(tmp_path / "two", listen=f"127.0.0.1:{port}"):
        async with client:
            with pytest.raises(InvalidRequest, match="have different databases"):
                await client.start_execution(ONE, {}, idempotency_key="k", patience=20)


async def test_worker_ends_if_the_servers_have_different_databases(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with server_thread(tmp_path / "one") as one, server_thread(tmp_path / "two") as two:
        async with NexumClient(f"{one.address},{two.address}") as client:
            worker = Worker(client, [Binding(ONE, {"a": lambda _: asyncio.sleep(0)})])
            with pytest.raises(InvalidRequest, match="have different databases"):
                await asyncio.wait_for(worker.run(asyncio.Event()), 20)


async def stack_client(address: str) -> NexumClient:
    client = NexumClient(address)
    await client.ping()
    return client


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def test_server_that_refuses_the_client_is_left_for_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nexum_engine.server.access.LOOK_INTERVAL", 0.02)
    monkeypatch.setenv("NEXUM_TOKEN", USE)
    with ExitStack() as stack:
        servers = []
        for folder, token in zip(folders_of_one_database(tmp_path), (FORMER, USE), strict=True):
            tokens = private_file(folder / "tokens", f"ci use {token}\n")
            servers.append(stack.enter_context(server_thread(folder, tokens=Tokens(Path(tokens)))))
        async with NexumClient(",".join(server.address for server in servers)) as client:
            async with Owner(client):
                await client.ping()
            assert client.address == servers[1].address
            # Swap the servers' tokens: the server that the client uses begins to refuse the client.
            private_file(tmp_path / "one" / "tokens", f"ci use {USE}\n")
            private_file(tmp_path / "two" / "tokens", f"ci use {FORMER}\n")
            while client.address != servers[0].address:
                # If server two reads its file first, both servers refuse until server one has read its own.
                with suppress(TokenRefused):
                    await client.ping()
        servers.reverse()
        async with NexumClient(f"{servers[0].address},{servers[0].address}") as client:
            with pytest.raises(TokenRefused):
                await client.ping(patience=60)
        async with NexumClient(f"{servers[0].address},127.0.0.1:1") as client:
            with pytest.raises(ServerUnavailable) as caught:
                await client.ping()
        assert "the server doesn't know its token" in str(caught.value)
        assert "no Nexum server answers on 127.0.0.1:1" in str(caught.value)
