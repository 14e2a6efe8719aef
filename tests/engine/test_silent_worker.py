"""A worker whose event loop is blocked, or whose process is stopped, runs no task twice."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness import Server, nexum_server
from nexum_wire import complete, connected, poll
from processes import attempts, counting_worker, effects, recorded, send, submitter, wait_until

from nexum_engine.client import NexumClient
from nexum_engine.owner import Owner
from nexum_engine.records import ExecutionStatus, Outcome, Task
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.worker import Binding, TaskContext, Worker
from nexum_engine.workflow import workflow
from workflow import TOOL_CALL, ToolCallInput

LEASE = 1.5  # seconds
PAST_THE_LEASE = 2.5  # seconds
SOON = 20.0  # seconds
ONE = workflow("one").effect("a").build()

stops = pytest.mark.skipif(sys.platform == "win32", reason="SIGSTOP")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with nexum_server(tmp_path, lease=LEASE) as running:
        yield running


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a process for the length of a `with`."""
    send(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        send(pid, signal.SIGCONT)


def outcomes(folder: Path, server: Server) -> list[list[str]]:
    return [[one["outcome"] for one in attempts(execution)] for execution in recorded(folder, server.address)]


def assert_ran_once(log: Path, count: int) -> None:
    keys = [effect.key for effect in effects(log)]
    assert len(keys) == len(set(keys)) == count


def call_block_loop(log: Path, count: int) -> list[dict[str, Any]]:
    """Return `count` calls. The first call blocks the event loop for longer than the lease."""
    return [
        {"log": str(log), "seconds": 0.0 if number else PAST_THE_LEASE, "number": number} for number in range(count)
    ]


def test_blocked_worker_keeps_its_tasks_and_names_the_tool_once(tmp_path: Path, server: Server) -> None:
    log = tmp_path / "log"
    with counting_worker(tmp_path, server.address) as worker:
        with submitter(tmp_path, server.address, "block_loop", *call_block_loop(log, 8)) as caller:
            assert caller.wait(60) == 0, caller.output
        worker.interrupt()
        worker.wait()
    assert_ran_once(log, 8)
    (line,) = [line for line in worker.lines if "the event loop has been blocked" in line]
    assert " s by block_loop (at " in line
    assert "counting_worker.py, line " in line


def test_task_that_blocked_worker_read_late_is_left_to_the_worker_that_has_it(tmp_path: Path, server: Server) -> None:
    log = tmp_path / "log"
    with counting_worker(tmp_path, server.address) as one, counting_worker(tmp_path, server.address) as other:
        for number in range(2):
            calls = call_block_loop(log, 10)
            with submitter(tmp_path, server.address, "block_loop", *calls, session=f"s{number}") as caller:
                assert caller.wait(60) == 0, caller.output
        for worker in (one, other):
            worker.interrupt()
            worker.wait()
    assert_ran_once(log, 20)
    blocked = [line for line in (*one.lines, *other.lines) if "the event loop has been blocked" in line]
    assert len(blocked) >= 2, "no loop was blocked"


@stops
@pytest.mark.parametrize("reports", ["before its heartbeat", "after its heartbeat"])
def test_stopped_worker_continues_its_task(tmp_path: Path, server: Server, reports: str) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    calls = {"log": str(log), "gate": str(gate)}
    with (
        counting_worker(tmp_path, server.address) as worker,
        submitter(tmp_path, server.address, "effect_then_gate", calls) as caller,
    ):
        wait_until(lambda: len(effects(log)) == 1, "the effect")
        with stopped(worker.popen.pid):
            wait_until(lambda: outcomes(tmp_path, server) == [["EXPIRED"]], "the lease runs out")
            if reports == "before its heartbeat":
                gate.touch()
        if reports == "after its heartbeat":
            wait_until(lambda: outcomes(tmp_path, server) == [["RUNNING"]], "the attempt is resumed")
            gate.touch()
        assert caller.wait(60) == 0, caller.output
    assert_ran_once(log, 1)
    assert outcomes(tmp_path, server) == [["COMPLETED"]]


@stops
async def test_stopped_worker_runs_task_once_that_came_while_it_was_stopped(tmp_path: Path, server: Server) -> None:
    log = tmp_path / "log"
    with counting_worker(tmp_path, server.address) as worker:
        async with NexumClient(server.address) as client:
            # Run one task first: after it, all slots of the worker poll.
            assert (await client.start_execution(TOOL_CALL, count_effect(log, 0), wait=SOON)).ended is not None
            with stopped(worker.popen.pid):
                ids = [
                    (await client.start_execution(TOOL_CALL, count_effect(log, number))).execution_id
                    for number in range(8)
                ]
                await asyncio.to_thread(wait_until, lambda: "EXPIRED" in str(outcomes(tmp_path, server)), "an expiry")
            for one in ids:
                assert (await client.get_execution(one, wait=SOON)).execution.status is ExecutionStatus.COMPLETED
    assert_ran_once(log, 9)


def count_effect(log: Path, number: int) -> ToolCallInput:
    return ToolCallInput(tool_name="count_effect", tool_args={"log": str(log), "number": number})


@stops
def test_another_worker_takes_over_the_task_of_a_stopped_one(tmp_path: Path, server: Server) -> None:
    """The effect happens twice, as promise G4 allows: the lease has run out, and another worker polls."""
    log, gate = tmp_path / "log", tmp_path / "gate"
    with counting_worker(tmp_path, server.address) as one, counting_worker(tmp_path, server.address) as other:
        with submitter(tmp_path, server.address, "effect_then_gate", {"log": str(log), "gate": str(gate)}) as caller:
            wait_until(lambda: len(effects(log)) == 1, "the effect")
            with stopped(effects(log)[0].pid):
                wait_until(lambda: len(effects(log)) == 2, "the other worker's effect")
                gate.touch()
                assert caller.wait(60) == 0, caller.output
        late = one if effects(log)[0].pid == one.popen.pid else other
        assert "reports too late: the execution is COMPLETED" in late.wait_for("refused by the server")
    assert outcomes(tmp_path, server) == [["EXPIRED", "COMPLETED"]]


# ---- In one process --------------------------------------------------------------------------------------------------


class Twice(NexumClient):
    """A client whose polls return each task twice, the second time with another id and as attempt `attempt`."""

    def __init__(self, address: str, attempt: int) -> None:
        super().__init__(address)
        self._attempt = attempt
        self._again: Task | None = None
        self.returned = asyncio.Event()

    async def poll_task(self, *args: Any, **_: Any) -> Task | None:
        task, self._again = self._again, None
        if task is not None:
            self.returned.set()
            return replace(task, task_id=f"{task.task_id}-again", attempt=self._attempt)
        task = await super().poll_task(*args, wait=0.05)
        self._again = self._again or task
        return task

    async def complete_task(self, task_id: str, *args: Any, **options: Any) -> None:
        await super().complete_task(task_id.removesuffix("-again"), *args, **options)


@pytest.mark.parametrize("attempt", [1, 2])
async def test_task_that_worker_still_runs_is_not_begun_again(
    server: Server, attempt: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    begun: list[str] = []

    client = Twice(server.address, attempt)
    async with client:

        async def handler(task: TaskContext) -> str:
            begun.append(task.execution_id)
            await client.returned.wait()
            return "done"

        await client.register_workflow(ONE)
        started = await client.start_execution(ONE, {})
        stop = asyncio.Event()
        worker = asyncio.create_task(Worker(client, [Binding(ONE, {"a": handler})], concurrency=2).run(stop))
        execution = (await client.get_execution(started.execution_id, wait=SOON)).execution
        assert execution.outputs() == {"a": '"done"'}
        stop.set()
        await asyncio.wait_for(worker, SOON)
    assert client.returned.is_set()
    assert begun == [started.execution_id]
    assert "was handed out again: it still runs here" in caplog.text


async def test_task_that_was_read_late_is_not_begun_if_another_worker_has_it(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    begun: list[str] = []
    read = asyncio.Event()

    async def handler(task: TaskContext) -> str:
        begun.append(task.execution_id)
        return "done"

    with connected(server.address) as stub, ThreadPoolExecutor(1) as threads:

        class Late(NexumClient):
            taken: pb.PollResponse | None = None

            async def poll_task(self, *args: Any, **options: Any) -> Task | None:
                task = await super().poll_task(*args, **options)
                if task is not None and self.taken is None:
                    # Block the event loop until another worker has the task.
                    taking = threads.submit(poll, stub, "other", ONE.version_hash, wait_ms=20_000)
                    self.taken = taking.result(SOON)
                    read.set()
                return task

        late = Late(server.address)
        async with late:
            await late.register_workflow(ONE)
            started = await late.start_execution(ONE, {})
            stop = asyncio.Event()
            worker = asyncio.create_task(Worker(late, [Binding(ONE, {"a": handler})], concurrency=1).run(stop))
            await asyncio.wait_for(read.wait(), SOON)
            later = await late.start_execution(ONE, {}, wait=SOON)
            assert late.taken is not None
            assert late.taken.execution_id == started.execution_id
            complete(stub, late.taken)
            stop.set()
            await asyncio.wait_for(worker, SOON)
    assert begun == [later.execution_id]
    assert f"execution {started.execution_id} was handed out again before it began here" in caplog.text


async def test_owner_with_blocked_event_loop_keeps_its_task(server: Server) -> None:
    async with NexumClient(server.address) as client, Owner(client) as owner:
        owned = await owner.start(ONE, {}, idempotency_key="k")
        assert owned.task is not None
        time.sleep(PAST_THE_LEASE)  # noqa: ASYNC251 - the fault under test
        assert owner._heartbeat.is_holding
        execution = (await client.get_execution(owned.execution_id, with_attempts=True)).execution
        assert [one.outcome for one in execution.nodes[0].attempts] == [Outcome.RUNNING]


@pytest.mark.sqlite  # the client finds the server by its file
async def test_blocked_event_loop_does_not_delay_reconnection(tmp_path: Path, server: Server) -> None:
    async with NexumClient(str(tmp_path / "nexum.db")) as client, Owner(client) as owner:
        owned = await owner.start(ONE, {}, idempotency_key="k")
        server.process.kill()
        with nexum_server(tmp_path) as again:
            assert again.address != server.address
            time.sleep(PAST_THE_LEASE)  # noqa: ASYNC251 - the fault under test
            assert owner._heartbeat.is_holding
            observed = await client.get_execution(owned.execution_id, with_attempts=True, patience=SOON)
            assert [one.outcome for one in observed.execution.nodes[0].attempts] == [Outcome.RUNNING]
