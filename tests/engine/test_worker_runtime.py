"""The worker runtime with bad handlers, servers that end, and signals at bad moments."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from engine_server import engine_server, raises
from google.protobuf.message import Message
from harness import ROOT, free_port, nexum_server, running
from lossy_client import LossyClient
from pydantic import BaseModel
from server_thread import server_thread

from nexum_engine.client import NexumClient
from nexum_engine.errors import Conflict, FinalError, InvalidRequest, ServerFault
from nexum_engine.records import Execution, ExecutionStatus, Outcome, Task
from nexum_engine.server import Limits
from nexum_engine.store import tasks
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.worker import STOP_PATIENCE, Binding, Handler, MapHandler, TaskContext, Worker, _Wait
from nexum_engine.workflow import RetryPolicy, Workflow, workflow

SOON = 15.0  # seconds
A_FEW_SECONDS = 5.0  # much less than the time of two regular heartbeats


class Number(BaseModel):
    value: float


ONE = workflow("one").effect("a").build()
TYPED = workflow("typed").effect("a", Number).build()
CHAIN = workflow("chain").effect("a").effect("b").build()


@pytest.fixture
async def client(address: str) -> AsyncIterator[NexumClient]:
    async with NexumClient(address) as connected:
        yield connected


class Running:
    """A worker that runs until it is stopped or its test ends."""

    def __init__(self, worker: Worker) -> None:
        self._stop = asyncio.Event()
        self.run = asyncio.create_task(worker.run(self._stop))

    async def stop(self) -> None:
        self._stop.set()
        await asyncio.wait_for(self.run, SOON)


@asynccontextmanager
async def working(
    address: str, handlers: Mapping[Workflow, Mapping[str, Handler]], **options: Any
) -> AsyncIterator[Running]:
    async with NexumClient(address) as connected:
        bindings = [Binding(built, work) for built, work in handlers.items()]
        running = Running(Worker(connected, bindings, **options))
        try:
            yield running
        finally:
            running.run.cancel()
            await asyncio.gather(running.run, return_exceptions=True)


async def begin(client: NexumClient, built: Workflow, input: Mapping[str, Any] | None = None) -> str:
    # Retry, because channels to one address share their state: another client's connection may just have failed.
    await client.register_workflow(built, patience=SOON)
    return (await client.start_execution(built, input or {})).execution_id


async def ended(client: NexumClient, execution_id: str) -> Execution:
    execution = (await client.get_execution(execution_id, wait=SOON, with_attempts=True)).execution
    assert execution.status.ended, f"{execution_id} is still {execution.status.value}"
    return execution


async def until(happened: Callable[[], bool]) -> None:
    """Wait until `happened` is true; fail the test if it never is."""
    deadline = asyncio.get_running_loop().time() + SOON
    while not happened():
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.01)


async def nobody_polls(client: NexumClient, execution_id: str) -> None:
    deadline = asyncio.get_running_loop().time() + SOON
    while (await client.get_execution(execution_id)).has_poller:
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.05)


# ---- Bad handlers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raised",
    [
        asyncio.CancelledError(),
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        BaseException("odd"),
        ValueError("no"),
    ],
    ids=lambda raised: type(raised).__name__,
)
async def test_handler_exception_fails_one_attempt_but_not_the_worker(
    address: str, client: NexumClient, raised: BaseException
) -> None:
    async def handler(task: TaskContext) -> str:
        if task.attempt == 1:
            raise raised
        return "at last"

    execution_id = await begin(client, ONE)
    async with working(address, {ONE: {"a": handler}}) as worker:
        execution = await ended(client, execution_id)
        assert not worker.run.done()
    first, second = execution.nodes[0].attempts
    assert (first.outcome, second.outcome) == (Outcome.FAILED, Outcome.COMPLETED)
    wanted = "cancelled itself" if isinstance(raised, asyncio.CancelledError) else type(raised).__name__
    assert wanted in first.error


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


class Exits(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class HugeError(Exception):
    def __str__(self) -> str:
        return "é" * 30_000_000


@pytest.mark.parametrize(
    "raised",
    [Unprintable(), Exits(), HugeError(), ValueError("\ud800 alone")],
    ids=["unprintable", "exits", "huge", "surrogate"],
)
async def test_exception_without_printable_message_fails_the_attempt(
    address: str, client: NexumClient, raised: Exception
) -> None:
    async def handler(task: TaskContext) -> str:
        if task.attempt == 1:
            raise raised
        return "at last"

    execution_id = await begin(client, ONE)
    async with working(address, {ONE: {"a": handler}}) as worker:
        execution = await ended(client, execution_id)
        assert not worker.run.done()
    assert [one.outcome for one in execution.nodes[0].attempts] == [Outcome.FAILED, Outcome.COMPLETED]
    assert type(raised).__name__ in execution.nodes[0].attempts[0].error


async def test_final_error_is_not_retried(address: str, client: NexumClient) -> None:
    async def handler(task: TaskContext) -> None:
        raise FinalError("no such tool: web_serch")

    execution_id = await begin(client, ONE)
    async with working(address, {ONE: {"a": handler}}):
        execution = await ended(client, execution_id)
    assert (execution.status, execution.error) == (ExecutionStatus.FAILED, "a: no such tool: web_serch")
    assert len(execution.nodes[0].attempts) == 1


@pytest.mark.parametrize(
    ("built", "result", "reason"),
    [
        (ONE, float("nan"), "can't be written as JSON"),
        (ONE, {"x": [float("inf")]}, "can't be written as JSON"),
        (ONE, object(), "can't be written as JSON"),
        (ONE, "\ud800", "can't be written as JSON"),
        (TYPED, Number(value=float("nan")), "can't be written as JSON"),
        (TYPED, {"value": "many"}, "does not match Number"),
        (ONE, "x" * (16 * 1024 * 1024), "the limit is 16,777,216 bytes"),
        (ONE, json.loads("[" * 500 + "]" * 500), "recursion limit"),
    ],
    ids=["nan", "infinity", "an object", "a lone surrogate", "nan in a model", "another type", "too large", "too deep"],
)
async def test_result_that_can_not_be_stored_is_a_final_failure(
    address: str, client: NexumClient, built: Workflow, result: Any, reason: str
) -> None:
    async def handler(task: TaskContext) -> Any:
        return result

    execution_id = await begin(client, built)
    async with working(address, {built: {"a": handler}}) as worker:
        execution = await ended(client, execution_id)
        assert not worker.run.done()
    assert execution.status is ExecutionStatus.FAILED
    assert reason in execution.error
    assert len(execution.nodes[0].attempts) == 1


async def test_largest_and_deepest_payloads_pass_through_every_node(address: str, client: NexumClient) -> None:
    async def first(task: TaskContext) -> Any:
        assert json.dumps(task.input).count("[") == 198
        return "x" * (16 * 1024 * 1024 - 2)

    async def second(task: TaskContext) -> Any:
        return [len(task.deps["a"]), json.loads("[" * 199 + "]" * 199)]

    execution_id = await begin(client, CHAIN, {"deep": json.loads("[" * 198 + "]" * 198)})
    async with working(address, {CHAIN: {"a": first, "b": second}}) as worker:
        execution = await ended(client, execution_id)
        assert not worker.run.done()
    assert execution.status is ExecutionStatus.COMPLETED, execution.error
    assert execution.outputs()["b"].startswith("[16777214,[[")


async def test_hanging_handler_blocks_only_its_slot(address: str, client: NexumClient) -> None:
    hung = asyncio.Event()

    async def hangs(task: TaskContext) -> None:
        hung.set()
        await asyncio.Event().wait()

    async with working(address, {ONE: {"a": hangs}, TYPED: {"a": _number}}, concurrency=2):
        await begin(client, ONE)
        await asyncio.wait_for(hung.wait(), SOON)
        for _ in range(5):
            assert (await ended(client, await begin(client, TYPED))).status is ExecutionStatus.COMPLETED


async def _number(task: TaskContext) -> Number:
    return Number(value=1)


async def _one(task: TaskContext) -> int:
    return 1


async def _until_cancelled(at_work: asyncio.Event, cleaned_up: asyncio.Event) -> dict[str, Any]:
    at_work.set()
    try:
        await asyncio.sleep(3600)
    finally:
        cleaned_up.set()
    return {}


async def test_handler_of_a_cancelled_execution_is_cancelled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nexum_engine.worker")
    at_work, cleaned_up = asyncio.Event(), asyncio.Event()

    async def wait(task: TaskContext) -> dict[str, Any]:
        if task.input.get("ends"):
            return {}
        return await _until_cancelled(at_work, cleaned_up)

    with nexum_server(tmp_path, lease=1.0) as server:  # a short lease, and so frequent heartbeats
        async with NexumClient(server.address) as client, working(server.address, {ONE: {"a": wait}}, concurrency=1):
            execution_id = await begin(client, ONE)
            await asyncio.wait_for(at_work.wait(), SOON)
            await client.cancel_execution(execution_id, by="ann")
            await asyncio.wait_for(cleaned_up.wait(), SOON)
            following = await begin(client, ONE, {"ends": True})
            assert (await ended(client, following)).status is ExecutionStatus.COMPLETED  # the slot is free again
            execution = await ended(client, execution_id)
    assert (execution.status, execution.error) == (ExecutionStatus.CANCELLED, "cancelled by ann")
    (line,) = [line for line in caplog.messages if line.startswith("failed") and execution_id in line]
    assert "the execution is CANCELLED" in line


async def test_handler_of_a_failed_execution_is_cancelled(tmp_path: Path) -> None:
    each = workflow("each").map("m", retry=RetryPolicy(max_attempts=1)).build()
    branches = workflow("branches").effect("a", retry=RetryPolicy(max_attempts=1)).effect("b", depends_on=[]).build()
    at_work, cleaned_up = asyncio.Event(), asyncio.Event()

    async def items(_: TaskContext) -> list[bool]:
        return [True, False]

    async def wait(_: TaskContext) -> dict[str, Any]:
        return await _until_cancelled(at_work, cleaned_up)

    async def fail(_: TaskContext) -> None:
        await asyncio.wait_for(at_work.wait(), SOON)
        raise ValueError("no")

    async def one(task: TaskContext) -> Any:
        return await (fail if task.item else wait)(task)

    handlers: dict[Workflow, Any] = {each: {"m": MapHandler(items=items, each=one)}, branches: {"a": fail, "b": wait}}
    with nexum_server(tmp_path, lease=1.0) as server:  # a short lease, and so frequent heartbeats
        async with NexumClient(server.address) as client, working(server.address, handlers, concurrency=2):
            for built in handlers:
                at_work.clear()
                cleaned_up.clear()
                execution_id = await begin(client, built)
                assert (await ended(client, execution_id)).status is ExecutionStatus.FAILED
                await asyncio.wait_for(cleaned_up.wait(), SOON)


async def test_client_refuses_input_that_does_not_match_the_workflow(client: NexumClient) -> None:
    built = workflow("numbers", input=Number).effect("a").build()
    with pytest.raises(InvalidRequest, match=r"^the input does not match Number: value: Input should be [^\n]*$"):
        await client.start_execution(built, {"value": "many"})


# ---- Draining --------------------------------------------------------------------------------------------------------


async def test_stopped_worker_finishes_its_tasks_and_takes_no_more(address: str, client: NexumClient) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def handler(task: TaskContext) -> str:
        begun.set()
        await go_on.wait()
        return "finished"

    first = await begin(client, ONE)
    async with working(address, {ONE: {"a": handler}}) as worker:
        await asyncio.wait_for(begun.wait(), SOON)
        stopping = asyncio.create_task(worker.stop())
        # When the server learns that the worker drains, it answers the polls of the other slots. Then no slot polls.
        await nobody_polls(client, first)
        second = await begin(client, ONE)
        assert not stopping.done()
        go_on.set()
        await stopping
    assert (await ended(client, first)).outputs() == {"a": '"finished"'}
    assert (await client.get_execution(second, with_attempts=True)).execution.nodes[0].attempts == ()


async def test_idle_worker_stops_at_once(address: str, client: NexumClient) -> None:
    await client.register_workflow(ONE)
    execution_id = await begin(client, TYPED)
    async with working(address, {ONE: {"a": _number}, TYPED: {"a": _number}}) as worker:
        await ended(client, execution_id)
        began = asyncio.get_running_loop().time()
        await worker.stop()
        assert asyncio.get_running_loop().time() - began < 2


@pytest.mark.parametrize("order", ["the server first", "both at once", "the worker first"])
async def test_idle_worker_stops_together_with_its_server(tmp_path: Path, order: str) -> None:
    """One Ctrl+C in a terminal reaches the worker and the server."""
    with nexum_server(tmp_path) as server:
        async with NexumClient(server.address) as client, working(server.address, {TYPED: {"a": _number}}) as worker:
            await ended(client, await begin(client, TYPED))
            if order == "the server first":
                server.process.terminate()
                assert await asyncio.to_thread(server.process.wait) == 0
                stopping = asyncio.create_task(worker.stop())
            else:
                stopping = asyncio.create_task(worker.stop())
                if order == "the worker first":
                    await asyncio.sleep(0)
                server.process.terminate()
            await asyncio.wait_for(stopping, SOON)


async def test_stopped_worker_does_not_wait_for_ended_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def handler(task: TaskContext) -> str:
        begun.set()
        await go_on.wait()
        return "made in between"

    with nexum_server(tmp_path) as server:
        async with working(server.address, {ONE: {"a": handler}}, worker_id="w1") as worker:
            async with NexumClient(server.address) as client:
                execution_id = await begin(client, ONE)
            await asyncio.wait_for(begun.wait(), SOON)
            server.process.kill()
            await until(lambda: "lost the Nexum server" in caplog.text)
            go_on.set()
            began = asyncio.get_running_loop().time()
            await worker.stop()
            assert asyncio.get_running_loop().time() - began < STOP_PATIENCE + 2
    (line,) = [one.getMessage() for one in caplog.records if "not reported" in one.getMessage()]
    assert line.startswith(f"finished a, execution {execution_id}, attempt 1, ")
    assert "not reported, so the task will be run again: the worker is stopping, and" in line


async def test_cancelled_worker_finishes_its_begun_report(address: str, client: NexumClient) -> None:
    reporting, go_on = asyncio.Event(), asyncio.Event()

    class Slow(NexumClient):
        async def complete_task(self, task_id: str, output_json: str, **options: Any) -> None:
            reporting.set()
            await go_on.wait()
            await super().complete_task(task_id, output_json, **options)

    async with Slow(address) as slow:
        running = Running(Worker(slow, [Binding(TYPED, {"a": _number})]))
        execution_id = await begin(client, TYPED)
        await asyncio.wait_for(reporting.wait(), SOON)
        running.run.cancel()
        await asyncio.sleep(0)  # the cancellation arrives
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(running.run, SOON)
    assert (await client.get_execution(execution_id)).execution.status is ExecutionStatus.COMPLETED


class Hung(NexumClient):
    """A client whose polls never get an answer."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.polls = asyncio.Event()

    async def poll_task(self, worker_id: str, version_hashes: Sequence[str], *, wait: float) -> Task | None:
        self.polls.set()
        await asyncio.Event().wait()
        raise AssertionError


async def test_stopped_worker_gives_up_its_polls_after_a_short_time(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nexum_engine.worker.STOP_PATIENCE", 0.1)
    hung = Hung(address)
    async with hung:
        running = Running(Worker(hung, [Binding(ONE, {"a": _one})]))
        await asyncio.wait_for(hung.polls.wait(), SOON)
        await running.stop()


async def test_worker_that_is_cancelled_while_it_stops_ends_at_once(address: str) -> None:
    hung = Hung(address)
    async with hung:
        running = Running(Worker(hung, [Binding(ONE, {"a": _one})]))
        await asyncio.wait_for(hung.polls.wait(), SOON)
        stopping = asyncio.create_task(running.stop())
        began = asyncio.get_running_loop().time()
        await asyncio.sleep(0.1)
        assert not running.run.done()
        running.run.cancel()
        await asyncio.wait({stopping, running.run}, timeout=SOON)
        assert running.run.cancelled()
        assert asyncio.get_running_loop().time() - began < STOP_PATIENCE
        await asyncio.gather(stopping, return_exceptions=True)


@pytest.mark.parametrize("first", ["worker", "poll"])
async def test_worker_that_is_cancelled_together_with_its_polls_ends(
    address: str, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    monkeypatch.setattr("nexum_engine.worker.STOP_PATIENCE", 0.1)
    hung = Hung(address)
    async with hung:
        worker = Running(Worker(hung, [Binding(ONE, {"a": _one})]))
        give_up = _Wait._give_up

        def cancel_both(wait: _Wait) -> None:
            if first == "worker":
                worker.run.cancel()
            give_up(wait)
            if first == "poll":
                worker.run.cancel()

        monkeypatch.setattr(_Wait, "_give_up", cancel_both)
        await asyncio.wait_for(hung.polls.wait(), SOON)
        stopping = asyncio.create_task(worker.stop())
        await asyncio.wait({worker.run}, timeout=SOON)
        assert worker.run.cancelled()
        await asyncio.gather(stopping, return_exceptions=True)


async def test_handler_cancelled_with_its_worker_is_not_reported_failed(address: str, client: NexumClient) -> None:
    begun = asyncio.Event()

    async def handler(task: TaskContext) -> str:
        begun.set()
        await asyncio.Event().wait()
        return "never"

    async with working(address, {ONE: {"a": handler}}) as running:
        execution_id = await begin(client, ONE)
        await asyncio.wait_for(begun.wait(), SOON)
        running.run.cancel()
        await asyncio.wait({running.run}, timeout=SOON)
        assert running.run.cancelled()
    execution = (await client.get_execution(execution_id, with_attempts=True)).execution
    assert execution.nodes[0].attempts[0].outcome in (Outcome.RUNNING, Outcome.LOST)


WAITS = """
import asyncio, sys
sys.path.insert(0, {root!r})
from nexum_engine.signals import stop_event

async def main():
    stop = stop_event()
    print("READY", flush=True)
    await stop.wait()
    print("STOPPING", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("first", ["Ctrl+C", "SIGTERM"])
def test_second_signal_ends_the_process_at_once(tmp_path: Path, first: str) -> None:
    with running(["-c", WAITS.format(root=str(ROOT))], cwd=tmp_path) as process:
        process.wait_for("READY")
        signals = [process.interrupt, process.terminate]
        for send in signals if first == "Ctrl+C" else signals[::-1]:
            send()
            if "STOPPING" not in process.output:
                process.wait_for("STOPPING")
        assert process.wait(10) != 0


async def test_exception_in_after_report_ends_the_draining_worker(address: str, client: NexumClient) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def handler(task: TaskContext) -> str:
        begun.set()
        await go_on.wait()
        return "finished"

    class Crash(Exception):
        pass

    def crash(_: object) -> None:
        raise Crash

    execution_id = await begin(client, ONE)
    async with working(address, {ONE: {"a": handler}}, after_report=crash) as worker:
        await asyncio.wait_for(begun.wait(), SOON)
        stopping = asyncio.create_task(worker.stop())
        await nobody_polls(client, execution_id)
        go_on.set()
        with pytest.raises(Crash):
            await stopping


# ---- The server ------------------------------------------------------------------------------------------------------


async def test_worker_waits_for_later_server_and_logs_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    port = free_port()
    address = f"127.0.0.1:{port}"
    async with working(address, {TYPED: {"a": _number}}):
        await until(lambda: "no Nexum server on" in caplog.text)
        with nexum_server(tmp_path, port=port):
            async with NexumClient(address) as client:
                assert (await ended(client, await begin(client, TYPED))).status is ExecutionStatus.COMPLETED
    assert caplog.text.count("no Nexum server on") == 1
    assert f"connected to {address} as worker" in caplog.text


async def test_worker_stops_at_once_while_it_waits_for_an_overloaded_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("nexum_engine.worker.pause_after", lambda *_: 60.0)
    with server_thread(tmp_path, limits=Limits(calls=1)) as server:
        async with working(server.address, {TYPED: {"a": _number}}, concurrency=3) as worker:
            await until(lambda: "reached its limit of calls" in caplog.text)
            await worker.stop()
    assert caplog.text.count("no task from") == 1


async def test_result_is_recorded_when_the_server_is_running_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    port = free_port()
    address = f"127.0.0.1:{port}"
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def handler(task: TaskContext) -> str:
        begun.set()
        await go_on.wait()
        return "made in between"

    async with working(address, {ONE: {"a": handler}}):
        with nexum_server(tmp_path, port=port):
            async with NexumClient(address) as client:
                execution_id = await begin(client, ONE)
                await asyncio.wait_for(begun.wait(), SOON)
        await until(lambda: "lost the Nexum server" in caplog.text)
        go_on.set()
        with nexum_server(tmp_path, port=port):
            async with NexumClient(address) as client:
                await client.register_workflow(ONE, patience=SOON)
                execution = await ended(client, execution_id)
            await until(lambda: "reconnected to" in caplog.text)
    assert execution.outputs() == {"a": '"made in between"'}
    assert [one.outcome for one in execution.nodes[0].attempts] == [Outcome.COMPLETED]


@pytest.mark.parametrize("kind", [pb.PollRequest, pb.CompleteRequest], ids=["a poll", "a report"])
async def test_task_in_lost_answer_is_run_soon_and_once(address: str, client: NexumClient, kind: type[Message]) -> None:
    runs: list[str] = []

    async def handler(task: TaskContext) -> str:
        runs.append(task.execution_id)
        return "done"

    ids = [await begin(client, ONE) for _ in range(3)]
    lossy = LossyClient(address, kind)
    async with lossy:
        running = Running(Worker(lossy, [Binding(ONE, {"a": handler})], concurrency=1))
        executions = await asyncio.wait_for(asyncio.gather(*(ended(client, one) for one in ids)), A_FEW_SECONDS)
        await running.stop()
    assert lossy.lost, "no answer was lost"
    outcomes = {one.execution_id: [attempt.outcome for attempt in one.nodes[0].attempts] for one in executions}
    if kind is pb.PollRequest:
        assert outcomes.pop(lossy.lost[0].execution_id) == [Outcome.LOST, Outcome.COMPLETED]
    assert {*map(tuple, outcomes.values())} == {(Outcome.COMPLETED,)}
    assert sorted(runs) == sorted(ids)


async def test_task_with_failed_report_is_run_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with engine_server(tmp_path, lease=0.5) as faulty, NexumClient(faulty.address) as client:
        faulty.watch(tasks.complete_task, raises)
        async with working(faulty.address, {ONE: {"a": _one}}, concurrency=1):
            execution = await ended(client, await begin(client, ONE))
    assert [one.outcome for one in execution.nodes[0].attempts] == [Outcome.LOST, Outcome.COMPLETED]
    assert "not reported, so the task will be run again" in caplog.text


async def test_server_fault_at_report_is_logged_and_worker_continues(
    address: str, client: NexumClient, caplog: pytest.LogCaptureFixture
) -> None:
    class Faulty(NexumClient):
        faults = 0

        async def complete_task(self, task_id: str, output_json: str, **options: Any) -> None:
            if not Faulty.faults:
                Faulty.faults += 1
                raise ServerFault("the server had an internal error; see its log under 1234abcd")
            await super().complete_task(task_id, output_json, **options)

    caplog.set_level(logging.INFO)
    await begin(client, TYPED)
    async with Faulty(address) as faulty:
        running = Running(Worker(faulty, [Binding(TYPED, {"a": _number})]))
        await until(lambda: Faulty.faults > 0)
        assert (await ended(client, await begin(client, TYPED))).status is ExecutionStatus.COMPLETED
        await running.stop()
    assert "not reported, so the task will be run again" in caplog.text


async def test_server_fault_at_poll_is_logged_and_worker_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nexum_engine.worker.FAULT_DELAY", 0.05)
    async with engine_server(tmp_path) as faulty, NexumClient(faulty.address) as client:
        faulty.watch(tasks.claim, raises, raises)
        async with working(faulty.address, {TYPED: {"a": _number}}, concurrency=1) as worker:
            assert (await ended(client, await begin(client, TYPED))).status is ExecutionStatus.COMPLETED
            await worker.stop()
        assert faulty.calls[tasks.claim] > 2
    assert caplog.text.count(f"no task from {faulty.address}, retrying: the server had an internal error") == 2


async def test_task_without_handler_fails(address: str, client: NexumClient) -> None:
    """Clients choose version hashes. If two workflows have one hash, a worker can get tasks without a handler."""
    other = Workflow("other", ONE.version_hash, '{"nodes":{"b":{"type":"EFFECT","dependencies":[]}}}', ())
    execution_id = await begin(client, other)
    async with working(address, {ONE: {"a": _one}}, worker_id="w1"):
        assert (await ended(client, await begin(client, ONE))).status is ExecutionStatus.COMPLETED
        execution = (await client.get_execution(execution_id, with_attempts=True)).execution
    first = execution.nodes[0].attempts[0]
    assert (first.outcome, first.error) == (
        Outcome.FAILED,
        f"worker w1 has no handler for node 'b' of version {ONE.version_hash!r}",
    )


async def test_exception_in_after_report_ends_the_worker(address: str, client: NexumClient) -> None:
    """crash_demo.py ends a worker in this way: by an exception after the result of a step is recorded."""

    class Crash(Exception):
        pass

    def crash(_: object) -> None:
        raise Crash

    execution_id = await begin(client, TYPED)
    async with working(address, {TYPED: {"a": _number}}, after_report=crash) as worker:
        with pytest.raises(Crash):
            await asyncio.wait_for(worker.run, SOON)
    assert (await ended(client, execution_id)).status is ExecutionStatus.COMPLETED


async def test_version_registered_with_another_definition_ends_the_worker(address: str, client: NexumClient) -> None:
    await client.register_workflow(ONE)
    other = Workflow("one", ONE.version_hash, CHAIN.ir_json, CHAIN.nodes)
    async with working(address, {other: {"a": _number, "b": _number}}) as worker:
        with pytest.raises(Conflict, match="registered with another definition"):
            await asyncio.wait_for(worker.run, SOON)


def test_binding_without_handler_for_a_node_is_refused() -> None:
    client: Any = None
    with pytest.raises(InvalidRequest, match=r"has the nodes \['a', 'b'\], but handlers for \['a'\]"):
        Worker(client, [Binding(CHAIN, {"a": _number})])
    with pytest.raises(InvalidRequest, match="give 1 or more"):
        Worker(client, [Binding(ONE, {"a": _number})], concurrency=0)
