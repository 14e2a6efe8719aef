"""Limits with real servers, workers and owners. The counts come from the times that the database has recorded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import pytest
from engine_server import engine_server
from harness import ROOT, Process, connected_worker, nexum_server
from programs.limited_worker import limited
from server_thread import ServerThread

from nexum_engine.client import NexumClient
from nexum_engine.heartbeat import SECOND_BEAT_AFTER
from nexum_engine.owner import Owner
from nexum_engine.records import Attempt, ExecutionStatus, Outcome
from nexum_engine.server.liveness import RECONNECT_GRACE_MS
from nexum_engine.store import tasks
from nexum_engine.workflow import Rate, Workflow

PROGRAM = str(ROOT / "tests" / "programs" / "limited_worker.py")
SOON = 20.0  # seconds; a call that isn't woken waits for 25 s


def worker(folder: Path, address: str, *, slots: int = 6, **limits: Any) -> AbstractContextManager[Process]:
    given = json.dumps({"takes": 0.0, **limits})
    return connected_worker([PROGRAM, address, str(slots), given], folder)


async def start(client: NexumClient, built: Workflow, count: int) -> list[str]:
    await client.register_workflow(built)
    keys = [f"k{number}" for number in range(count)]
    return [(await client.start_execution(built, {}, idempotency_key=key)).execution_id for key in keys]


async def attempts_of(client: NexumClient, ids: Sequence[str]) -> list[Attempt]:
    """Wait until all executions have completed; return their attempts, in the order of the hand-outs."""
    found: list[Attempt] = []
    for execution_id in ids:
        while True:
            observed = await client.get_execution(execution_id, wait=SOON, with_attempts=True, patience=SOON)
            if observed.execution.status.ended:
                break
        assert observed.execution.status is ExecutionStatus.COMPLETED
        found += observed.execution.nodes[0].attempts
    return sorted(found, key=lambda one: one.started_ms)


def check_rate(attempts: Sequence[Attempt], rate: str) -> None:
    """Check that no series of hand-outs is faster than the rate. Its first `calls` hand-outs may come at once."""
    parsed = Rate.parse(rate)
    interval_ms = 1000 * parsed.seconds / parsed.calls
    for first, one in enumerate(attempts):
        for last, other in enumerate(attempts[first:], first):
            least = (last - first + 1 - parsed.calls) * interval_ms
            assert other.started_ms - one.started_ms >= least - 1, [
                a.started_ms - attempts[0].started_ms for a in attempts
            ]


def most_at_once(attempts: Sequence[Attempt]) -> int:
    """Return the largest number of attempts that ran at the same time."""
    return max(
        sum(one.started_ms <= at.started_ms < (one.ended_ms or one.started_ms) or one is at for one in attempts)
        for at in attempts
    )


async def test_rate_counts_over_a_killed_server(tmp_path: Path) -> None:
    rate = "4/s"
    with nexum_server(tmp_path) as server:
        async with NexumClient(server.address) as client:
            ids = await start(client, limited(rate, None), 12)
            with worker(tmp_path, server.address, rate=rate) as process:
                for _ in range(5):
                    process.wait_for("began")
                server.process.kill()
                with nexum_server(tmp_path, port=server.port):
                    attempts = await attempts_of(client, ids)
                    before = process.output.count("began")
    assert before == 5, "the server was killed after the last task"
    assert len(attempts) >= 12
    check_rate(attempts, rate)


async def test_rate_counts_over_two_servers(tmp_path: Path, postgres_url: str) -> None:
    rate = "4/s"
    with ExitStack() as stack:
        servers = [stack.enter_context(nexum_server(tmp_path, database_url=postgres_url)) for _ in range(2)]
        for one in servers:
            stack.enter_context(worker(tmp_path, one.address, slots=1, rate=rate, takes=0.3))
        async with NexumClient(servers[0].address) as client:
            attempts = await attempts_of(client, await start(client, limited(rate, None), 10))
    assert len({one.worker_id for one in attempts}) == 2
    check_rate(attempts, rate)


async def test_concurrency_counts_over_two_workers_of_which_one_is_killed(server: ServerThread, tmp_path: Path) -> None:
    limits: dict[str, Any] = {"concurrency": 2, "takes": 0.2}
    async with NexumClient(server.address) as client:
        with worker(tmp_path, server.address, **limits) as first:
            ids = await start(client, limited(None, 2), 8)
            first.wait_for("began")
            first.kill()
            with worker(tmp_path, server.address, **limits):
                attempts = await attempts_of(client, ids)
    lost = [one for one in attempts if one.outcome is Outcome.LOST]
    assert lost, "the worker was killed between two tasks"
    assert most_at_once(attempts) == 2
    # The attempts of the killed worker counted as running until its lease ended.
    assert all((one.ended_ms or 0) - one.started_ms >= 900 for one in lost)


# ---- Owners ----------------------------------------------------------------------------------------------------------


@pytest.fixture
async def owners(server: ServerThread) -> AsyncIterator[Callable[[], Owner]]:
    clients: list[NexumClient] = []

    def new() -> Owner:
        clients.append(NexumClient(server.address))
        return Owner(clients[-1])

    yield new
    for client in clients:
        await client.close()


async def until_running(client: NexumClient, count: int) -> None:
    """Wait until at least `count` executions are running."""
    while len(await client.list_executions(status="RUNNING")) < count:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def test_owners_get_their_slots_in_the_order_of_their_starts(
    owners: Callable[[], Owner], server: ServerThread
) -> None:
    built = limited(None, 1)
    async with owners() as one, owners() as other, NexumClient(server.address) as client:
        task, holder = await one.take_slot(built, {}, key="first"), one
        waiting = []
        for number, owner in enumerate([other, one, other]):
            waiting.append((owner, asyncio.create_task(owner.take_slot(built, {}, key=f"waiting-{number}"))))
            await until_running(client, 2 + number)
        for index, (owner, slot) in enumerate(waiting):
            assert not any(later.done() for _, later in waiting[index:])
            await holder.complete(task, {})
            task, holder = await asyncio.wait_for(slot, SOON), owner


async def test_owner_gets_the_slot_of_an_execution_that_another_version_started(tmp_path: Path) -> None:
    older, newer = limited(None, 1), limited("100/s", 1)
    async with engine_server(tmp_path) as server, NexumClient(server.address) as client, Owner(client) as owner:
        task = await owner.take_slot(older, {}, key="first")
        started = asyncio.create_task(owner.start(older, {}, idempotency_key="second"))
        await until_running(client, 2)
        started.cancel()
        server.watch(tasks.start_owned)
        waiting = asyncio.create_task(owner.start(newer, {}, idempotency_key="second"))
        while not server.calls[tasks.start_owned]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await owner.complete(task, {})
        got = (await asyncio.wait_for(waiting, SOON)).task
        assert got is not None
        assert got.version_hash == older.version_hash


async def test_slot_of_a_lost_owner_becomes_free(owners: Callable[[], Owner]) -> None:
    built = limited(None, 1)
    async with owners() as other:
        async with owners() as lost:
            await lost.take_slot(built, {}, key="one")
            waiting = asyncio.create_task(other.take_slot(built, {}, key="two"))
        assert not waiting.done()
        await asyncio.wait_for(waiting, SOON)


async def test_owner_keeps_its_slot_if_its_calls_and_its_heartbeats_reach_different_servers(
    tmp_path: Path, postgres_url: str
) -> None:
    """A load balancer may send the two connections of a client to different servers."""
    built = limited(None, 1)
    async with AsyncExitStack() as stack:
        servers = [stack.enter_context(nexum_server(tmp_path, database_url=postgres_url)) for _ in range(2)]
        for_calls, for_heartbeats = [await stack.enter_async_context(NexumClient(server.address)) for server in servers]
        owner = Owner(for_calls)
        owner._heartbeat._connection = for_heartbeats.connection
        await stack.enter_async_context(owner)
        await asyncio.sleep(SECOND_BEAT_AFTER + 0.1)  # no heartbeat is due now
        await owner.take_slot(built, {}, key="one")
        other = await stack.enter_async_context(Owner(for_calls))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(other.take_slot(built, {}, key="two"), 2 * RECONNECT_GRACE_MS / 1000)


async def test_key_of_a_lost_owner_is_taken_over(owners: Callable[[], Owner], server: ServerThread) -> None:
    built = limited(None, 1)
    async with owners() as lost:
        await lost.complete(await lost.take_slot(built, {}, key="one"), {})
        held = await lost.take_slot(built, {}, key="one")
    async with owners() as other, NexumClient(server.address) as client:
        blocking = await asyncio.wait_for(other.take_slot(built, {}, key="two"), SOON)  # the lease has ended
        await other.complete(blocking, {})
        again = await other.take_slot(built, {}, key="one")
        assert (again.execution_id, again.attempt) == (held.execution_id, 2)
        await other.complete(again, {})
        assert await client.list_executions(status="RUNNING") == []


async def test_cancelled_owner_leaves_no_execution(owners: Callable[[], Owner], server: ServerThread) -> None:
    built = limited(None, 1)
    async with owners() as one, owners() as other, NexumClient(server.address) as client:
        task = await one.take_slot(built, {}, key="one")
        waiting = asyncio.create_task(other.take_slot(built, {}, key="two"))
        await until_running(client, 2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert [one.execution_id for one in await client.list_executions(status="RUNNING")] == [task.execution_id]


async def test_owner_waits_for_a_rate(owners: Callable[[], Owner], server: ServerThread) -> None:
    rate = "2/0.5s"
    built = limited(rate, None)

    async def call(owner: Owner, key: str) -> str:
        task = await owner.take_slot(built, {}, key=key)
        await owner.complete(task, {})
        return task.execution_id

    async with owners() as one, owners() as other, NexumClient(server.address) as client:
        calls = [call(owner, f"{name}{n}") for n in range(3) for name, owner in (("a", one), ("b", other))]
        ids = await asyncio.wait_for(asyncio.gather(*calls), SOON)
        check_rate(await attempts_of(client, ids), rate)
