"""Effects that must happen only once, in real workers: SIGKILLs between effect and report, and bad handlers."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import ExitStack, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from engine_server import engine_server, hangs, raises
from harness import ROOT, Process, nexum_server, published_server, running
from processes import wait_until
from programs.paying_worker import WORKFLOWS, payments
from server_thread import ServerThread

from nexum_engine.client import NexumClient
from nexum_engine.errors import Conflict, InvalidRequest, ServerError, UnknownEffect
from nexum_engine.owner import Owner
from nexum_engine.records import Execution, ExecutionStatus, Outcome, Task
from nexum_engine.store import leases, tasks
from nexum_engine.worker import Binding, Handler, TaskContext, Worker
from nexum_engine.workflow import Workflow, workflow

SOON = 20.0  # seconds
PAY = workflow("pay").effect("pay", once=True).build()
QUICK = workflow("quick").effect("pay", once=True, timeout_seconds=0.2).build()
QUICK_RECONCILED = workflow("quick-r").effect("pay", once=True, reconcile=True, timeout_seconds=0.2).build()


@pytest.fixture
async def client(server: ServerThread) -> AsyncIterator[NexumClient]:
    async with NexumClient(server.address) as connected:
        yield connected


@asynccontextmanager
async def working(
    client: NexumClient, handlers: Mapping[Workflow, Handler]
) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Run a worker; yield a function that stops it."""
    stop = asyncio.Event()
    run = asyncio.create_task(
        Worker(client, [Binding(built, {"pay": pay}) for built, pay in handlers.items()]).run(stop)
    )

    async def end() -> None:
        stop.set()
        await asyncio.wait_for(run, SOON)

    try:
        yield end
        await end()
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)


async def begin(client: NexumClient, built: Workflow) -> str:
    await client.register_workflow(built)
    return (await client.start_execution(built, {})).execution_id


async def observed(client: NexumClient, execution_id: str, wait: float = 0.0) -> Execution:
    return (await client.get_execution(execution_id, wait=wait, with_attempts=True)).execution


async def until(happened: Callable[[], bool]) -> None:
    deadline = asyncio.get_running_loop().time() + SOON
    while not happened():
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.01)


async def until_unknown(client: NexumClient, execution_ids: Collection[str]) -> dict[str, str]:
    """Wait until the effects of these executions are unknown, and no others. Return the reasons by workflow."""
    deadline = asyncio.get_running_loop().time() + SOON
    while True:
        found = await client.unknown(patience=SOON)
        if {one.execution_id for one in found} == {*execution_ids}:
            return {one.workflow_id: one.error for one in found}
        assert asyncio.get_running_loop().time() < deadline, found
        await asyncio.sleep(0.02)


# ---- SIGKILL between the effect and its report -----------------------------------------------------------------------


@pytest.mark.both_stores
@pytest.mark.parametrize("killed", ["worker", "worker and server"])
async def test_kill_between_effect_and_report(tmp_path: Path, database_url: str, killed: str) -> None:
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    program = str(ROOT / "tests" / "programs" / "paying_worker.py")
    with ExitStack() as stack:

        def new_worker(address: str) -> Process:
            worker = stack.enter_context(running([program, address, str(ledger), str(gate)], cwd=tmp_path, forked=True))
            worker.wait_for("connected to")
            return worker

        server = stack.enter_context(nexum_server(tmp_path, database_url=database_url))
        worker = new_worker(server.address)
        async with NexumClient(server.address) as client:
            ids = {built.workflow_id: await begin(client, built) for built in WORKFLOWS}
            wait_until(lambda: len(payments(ledger)) == len(WORKFLOWS), "each workflow pays once")
            if killed == "worker and server":
                server.process.kill()  # first, or it may notice that the worker has gone
            worker.kill()
            if killed == "worker and server":
                server = stack.enter_context(nexum_server(tmp_path, database_url=database_url, port=server.port))
            gate.touch()
            new_worker(server.address)

            for name, paid in {"repeated": '"paid"', "reconciled": '"found in the ledger"'}.items():
                execution = (await client.get_execution(ids[name], wait=SOON, patience=SOON)).execution
                assert execution.outputs() == {"pay": paid}
            reasons = await until_unknown(client, {ids["once"], ids["unsure"]})
            lost = "disconnected" if killed == "worker" else "the server was restarted"
            assert lost in reasons["once"]
            assert reasons["unsure"] == "the ledger is locked"
            assert Counter(payments(ledger)) == {"repeated": 2, "reconciled": 1, "once": 1, "unsure": 1}

            await client.resolve(ids["once"], "pay", resolved_by="Ann", output="paid, says the ledger")
            await client.resolve(ids["unsure"], "pay", resolved_by="Ann", not_done=True)
            for name, paid in {"once": '"paid, says the ledger"', "unsure": '"paid"'}.items():
                execution = await observed(client, ids[name], SOON)
                assert execution.outputs() == {"pay": paid}
                made = execution.nodes[0].attempts
                (decision,) = [after for before, after in pairwise(made) if before.outcome is Outcome.UNKNOWN]
                assert decision.worker_id == "Ann"
            assert Counter(payments(ledger)) == {"repeated": 2, "reconciled": 1, "once": 1, "unsure": 2}


# ---- Handlers --------------------------------------------------------------------------------------------------------


async def test_handler_that_does_not_know_leaves_the_node_to_a_person(client: NexumClient) -> None:
    async def pay(task: TaskContext) -> None:
        raise UnknownEffect("no answer from the bank")

    async with working(client, {PAY: pay}):
        execution_id = await begin(client, PAY)
        assert await until_unknown(client, {execution_id}) == {"pay": "no answer from the bank"}
        await client.resolve(execution_id, "pay", failed="by hand")
        assert (await observed(client, execution_id, SOON)).error == "pay: by hand"


async def test_failure_is_final_by_default(client: NexumClient) -> None:
    async def pay(task: TaskContext) -> None:
        raise RuntimeError("refused")

    async with working(client, {PAY: pay}):
        execution = await observed(client, await begin(client, PAY), SOON)
    assert execution.status is ExecutionStatus.FAILED
    assert execution.error == "pay: RuntimeError: refused (attempt 1 of 1)"


async def test_time_limit_leaves_the_effect_unknown_and_reconcile_decides(client: NexumClient) -> None:
    begun: list[bool] = []

    async def pay(task: TaskContext) -> str:
        begun.append(task.must_reconcile)
        if not task.must_reconcile:
            await asyncio.sleep(3600)
        return "paid"

    async with working(client, {QUICK: pay, QUICK_RECONCILED: pay}):
        execution = await observed(client, await begin(client, QUICK_RECONCILED), SOON)
        assert execution.outputs() == {"pay": '"paid"'}
        reasons = await until_unknown(client, {await begin(client, QUICK)})
        assert reasons == {"quick": "the attempt took longer than its time limit of 0.2 s"}
    assert begun == [False, True, False]


async def test_report_that_gets_no_answer_is_sent_until_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If the worker dropped the task, its heartbeats wouldn't name it, and the server would hand it out again."""
    monkeypatch.setattr("nexum_engine.worker.FAULT_DELAY", 0.5)
    paid: list[int] = []

    async def pay(task: TaskContext) -> str:
        paid.append(task.attempt)
        return "paid"

    async with engine_server(tmp_path, lease=0.3) as faulty, NexumClient(faulty.address) as client:
        faulty.watch(tasks.complete_task, raises, raises)
        async with working(client, {PAY: pay}):
            execution = await observed(client, await begin(client, PAY), SOON)
    assert faulty.calls[tasks.complete_task] == 3
    assert (paid, [one.outcome for one in execution.nodes[0].attempts]) == ([1], [Outcome.COMPLETED])
    assert caplog.text.count("is not stored, retrying") == 2


async def test_task_that_arrives_late_does_not_begin_beside_another_worker(tmp_path: Path) -> None:
    paid: list[int] = []
    is_late, other_has_paid = asyncio.Event(), asyncio.Event()

    class Late(NexumClient):
        async def poll_task(self, *args: Any, **options: Any) -> Task | None:
            task = await super().poll_task(*args, **options)
            if task is not None:
                is_late.set()  # hold the answer back: the worker's heartbeats continue, but don't name the task
                await other_has_paid.wait()
            return task

    async def pay(task: TaskContext) -> str:
        paid.append(task.attempt)
        return "paid"

    async with (
        engine_server(tmp_path, lease=0.3) as engine,
        Late(engine.address) as late,
        NexumClient(engine.address) as client,
        working(late, {PAY: pay}) as end,
    ):
        execution_id = await begin(client, PAY)
        await asyncio.wait_for(is_late.wait(), SOON)
        async with working(client, {PAY: pay}):
            execution = await observed(client, execution_id, SOON)
        other_has_paid.set()
        await end()
    *late_ones, last = execution.nodes[0].attempts
    assert {one.outcome for one in late_ones} == {Outcome.LOST}
    assert (last.outcome, paid) == (Outcome.COMPLETED, [last.attempt])


async def test_stopping_worker_goes_on_naming_a_task_whose_result_it_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("nexum_engine.worker.STOP_PATIENCE", 0.1)
    both_begun, go_on, paid = asyncio.Event(), asyncio.Event(), []

    async def pay(task: TaskContext) -> str:
        paid.append(task.execution_id)
        if len(paid) == 2:
            both_begun.set()
            await go_on.wait()  # meanwhile, the worker's heartbeats continue
        return "paid"

    async with engine_server(tmp_path, lease=0.3) as faulty, NexumClient(faulty.address) as client:
        faulty.watch(tasks.complete_task, *[hangs] * 10)
        async with working(client, {PAY: pay}) as end:
            started = {await begin(client, PAY), await begin(client, PAY)}
            await asyncio.wait_for(both_begun.wait(), SOON)
            ending = asyncio.ensure_future(end())
            await until(lambda: "not reported: the worker is stopping" in caplog.text)
            faulty.watch(leases.renew)
            await until(lambda: faulty.calls[leases.renew] > 5)
            assert {(await observed(client, one)).nodes[0].attempts[-1].attempt for one in started} == {1}
            go_on.set()
            await ending
        await until_unknown(client, started)
    assert len(paid) == 2


# ---- Clients and servers ---------------------------------------------------------------------------------------------


async def test_owner_waits_for_a_person(client: NexumClient) -> None:
    async with Owner(client) as owner:
        started = await owner.start(PAY, {}, idempotency_key="k")
        assert started.task is not None
        await owner.fail(started.task, "no answer", unknown=True)
        again = await owner.start(PAY, {}, idempotency_key="k")
        assert (again.unknown, again.task, again.status) == (True, None, ExecutionStatus.RUNNING)
        with pytest.raises(Conflict, match="waits for a person"):
            await owner.record(PAY, {}, {"paid": True}, idempotency_key="k")
        await client.resolve(again.execution_id, "pay", not_done=True)
        again = await owner.start(PAY, {}, idempotency_key="k")
        assert again.task is not None
        await owner.complete(again.task, {"paid": True})
        assert (await owner.start(PAY, {}, idempotency_key="k")).status is ExecutionStatus.COMPLETED


async def test_large_result_of_a_resolution_is_stored(client: NexumClient) -> None:
    async with Owner(client) as owner:
        started = await owner.start(PAY, {"large": "x" * 100_000}, idempotency_key="k")
        assert started.task is not None
        await owner.fail(started.task, "no answer", unknown=True)
    (one,) = await client.unknown()
    assert one.input_json == ""  # too long for a list
    await client.resolve(started.execution_id, "pay", output="y" * 1_000_000)
    assert len((await observed(client, started.execution_id)).outputs()["pay"]) == 1_000_002


async def test_resolution_with_two_decisions_is_refused(client: NexumClient) -> None:
    for options in ({"not_done": True, "failed": "no"}, {"output": 1, "not_done": True}, {"output": 1, "failed": "no"}):
        with pytest.raises(InvalidRequest, match="give only one"):
            await client.resolve("exec-1", "pay", **options)


async def test_empty_reason_does_not_complete_the_node(client: NexumClient) -> None:
    async with Owner(client) as owner:
        started = await owner.start(PAY, {}, idempotency_key="k")
        assert started.task is not None
        await owner.fail(started.task, "no answer", unknown=True)
    with pytest.raises(InvalidRequest, match="failed needs a reason"):
        await client.resolve(started.execution_id, "pay", failed="")
    assert (await observed(client, started.execution_id)).status is ExecutionStatus.RUNNING


async def test_published_server_says_that_it_knows_no_unknown_effects(tmp_path: Path) -> None:
    with published_server(tmp_path) as address:
        async with NexumClient(address) as client:
            with pytest.raises(ServerError, match="can't list unknown effects"):
                await client.unknown()
            with pytest.raises(ServerError, match="can't resolve unknown effects"):
                await client.resolve("exec-1", "pay", not_done=True)


async def test_unknown_effect_is_not_repeated_by_a_published_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tried: list[str] = []

    async def pay(task: TaskContext) -> None:
        tried.append(task.execution_id)
        raise UnknownEffect("no answer from the bank")

    with published_server(tmp_path) as address:
        async with NexumClient(address) as client, working(client, {PAY: pay}):
            execution_id = await begin(client, PAY)
            assert (await client.get_execution(execution_id, wait=SOON)).execution.status is ExecutionStatus.FAILED
    assert len(tried) == 1
