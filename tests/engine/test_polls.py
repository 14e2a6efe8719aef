"""The dispatch of tasks to polls: every waiting call is woken, and no task is lost when a caller is cancelled.

The tests run in one process on a real store, so that they can choose the order of events.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sized
from itertools import pairwise
from typing import Any

import grpc
import pytest
from engine_server import Run, intercept

from nexum_engine.clock import Clock, ManualClock, SystemClock
from nexum_engine.errors import StoreUnavailable
from nexum_engine.records import ExecutionStatus, Task
from nexum_engine.server.liveness import LATE, RECONNECT_GRACE_MS
from nexum_engine.server.polls import MAX_REMEMBERED_VERSIONS
from nexum_engine.server.servicer import NexumServicer
from nexum_engine.store import Store, executions, leases, listing, open_store, reading, sqlite, tasks
from nexum_engine.store.results import ReadyTask
from nexum_engine.wire import nexum_pb2 as pb

LEASE_MS = 30_000
LONG_MS = 25_000  # longer than a test may take: a call that waits this long was not woken
SOON = 10.0  # seconds; much less than any lease or poll
LARGE = 2**40


class Call:
    """The part of a gRPC context that the servicer uses."""

    def __init__(self) -> None:
        self.gone = False

    def cancelled(self) -> bool:
        return self.gone

    def invocation_metadata(self) -> None:
        """Return no metadata."""

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: object = ()) -> None:
        raise AssertionError(f"{code}: {details}")


class Engine:
    """A server without its socket."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self.store = store
        self.servicer = NexumServicer(store, clock, LEASE_MS)
        self.polls, self.waiters, self.liveness = self.servicer.polls, self.servicer.waiters, self.servicer.liveness
        self.claims = 0

        def counted(run: Run) -> Awaitable[Any]:
            self.claims += 1
            return run()

        intercept(store, tasks.claim, counted)

    def look_again(self) -> None:
        """Act as the server does when the outcome of a transaction is unknown."""
        self.polls.look_again()
        self.waiters.look_again()

    async def stop_waiting(self) -> None:
        """Answer all waiting calls, as a stopping server does."""
        self.waiters.stop()
        await self.polls.stop()

    async def register(self, nodes: dict[str, list[str]], version: str = "v1", **limits: object) -> None:
        ir = {"nodes": {name: {"type": "EFFECT", "dependencies": needs, **limits} for name, needs in nodes.items()}}
        await self.store.run(executions.register_workflow, "w", version, json.dumps(ir))

    async def start(self, version: str = "v1", input_json: str = "{}") -> str:
        request = pb.StartRequest(workflow_id="w", version_hash=version, input_json=input_json)
        answer = await self.servicer.StartExecution(request, Call())  # type: ignore[arg-type]
        return str(answer.execution_id)

    async def complete(self, task: Task) -> None:
        request = pb.CompleteRequest(task_id=task.task_id, output_json="1")
        await self.servicer.CompleteTask(request, Call())  # type: ignore[arg-type]

    def poll(
        self,
        worker_id: str = "w1",
        *,
        wait_ms: int = LONG_MS,
        max_bytes: int = LARGE,
        version: str = "v1",
    ) -> asyncio.Task[Task | None]:
        return asyncio.create_task(self.polls.next_task(worker_id, (version,), max_bytes, wait_ms))

    async def attempts(self, execution_id: str) -> int:
        (node,) = (await self.store.run(reading.get_execution, execution_id, True)).nodes
        return len(node.attempts)

    async def task(self, poll: Awaitable[Task | None]) -> Task:
        task = await asyncio.wait_for(poll, SOON)
        assert task is not None
        return task


Make = Callable[[Clock], Awaitable[Engine]]

DISKS = ["quick", "slow"]


@pytest.fixture
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The speed of the disk: if it is slow, SQLite's transactions never run on the event loop."""
    speed: str = getattr(request, "param", "quick")
    if speed == "slow":
        monkeypatch.setattr(sqlite, "QUICK_TRANSACTION", 0.0)
    return speed


@pytest.fixture
async def make(database_url: str, disk: str) -> AsyncIterator[Make]:
    engines: list[Engine] = []

    async def engine_on(clock: Clock) -> Engine:
        engine = Engine(await open_store(database_url, clock), clock)
        engines.append(engine)
        await engine.liveness.start()
        return engine

    yield engine_on
    for engine in engines:
        await engine.stop_waiting()
        await engine.liveness.stop()
        await engine.store.close()


@pytest.fixture
async def engine(make: Make) -> Engine:
    return await make(SystemClock())


async def turns(count: int = 50) -> None:
    """Let all ready tasks of the event loop run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until_idle(engine: Engine, *polls: asyncio.Task[Task | None]) -> None:
    """Wait until the polls are idle: none of them has a claim under way."""
    await engine.store.run(listing.list_executions, "", "", 1)
    await turns()
    assert not any(poll.done() for poll in polls)


# ---- Waking ----------------------------------------------------------------------------------------------------------


async def test_waiting_poll_gets_a_task_as_it_is_started(engine: Engine) -> None:
    await engine.register({"a": []})
    poll = engine.poll()
    await until_idle(engine, poll)
    execution_id = await engine.start()
    assert (await engine.task(poll)).execution_id == execution_id


async def test_each_root_of_a_workflow_wakes_one_poll(engine: Engine) -> None:
    await engine.register({"a": [], "b": [], "c": []})
    polls = [engine.poll(f"w{n}") for n in range(3)]
    await until_idle(engine, *polls)
    await engine.start()
    assert {(await engine.task(poll)).node_id for poll in polls} == {"a", "b", "c"}


async def test_later_polls_find_every_root_of_a_workflow(engine: Engine) -> None:
    await engine.register({"a": [], "b": []})
    assert await engine.poll(wait_ms=0) is None
    await engine.start()
    assert {(await engine.task(engine.poll(wait_ms=0))).node_id for _ in range(2)} == {"a", "b"}


@pytest.mark.both_stores
async def test_poll_ends_although_the_clock_stands_still(make: Make) -> None:
    engine = await make(ManualClock())
    await engine.register({"a": []})
    assert await asyncio.wait_for(engine.poll(wait_ms=50), SOON) is None


async def test_each_node_that_becomes_ready_wakes_a_poll(engine: Engine) -> None:
    await engine.register({"a": [], "b": ["a"], "c": ["a"]})
    await engine.start()
    first = await engine.task(engine.poll())
    polls = [engine.poll(f"w{n}") for n in range(2)]
    await until_idle(engine, *polls)
    await engine.complete(first)
    assert {(await engine.task(poll)).node_id for poll in polls} == {"b", "c"}


@pytest.mark.parametrize(
    ("disk", "hops"), [("quick", 0), ("quick", 1), *(("slow", hops) for hops in range(4))], indirect=["disk"]
)
async def test_worker_death_during_its_report_does_not_delay_next_nodes(engine: Engine, hops: int) -> None:
    await engine.register({"a": [], "b": ["a"]})
    execution_id = await engine.start()
    first = await engine.task(engine.poll())
    assert await engine.poll("w2", wait_ms=0) is None
    waiting = engine.poll("w2")
    await until_idle(engine, waiting)
    report = asyncio.create_task(engine.complete(first))
    await turns(1 + hops)
    assert not report.done(), "the worker was cancelled only after its report"
    report.cancel()
    assert (await engine.task(waiting)).node_id == "b"
    assert (await engine.store.run(reading.get_execution, execution_id)).outputs() == {"a": "1"}


async def test_cancel_by_dying_caller_still_wakes_waiting_callers(engine: Engine) -> None:
    await engine.register({"a": []})
    execution_id = await engine.start()
    request = pb.GetExecutionRequest(execution_id=execution_id, wait_ms=LONG_MS)
    waiting = asyncio.create_task(engine.servicer.GetExecution(request, Call()))  # type: ignore[arg-type]
    await turns()
    cancelling = asyncio.create_task(
        engine.servicer.CancelExecution(pb.CancelRequest(execution_id=execution_id), Call())  # type: ignore[arg-type]
    )
    await turns(1)
    assert not cancelling.done()
    cancelling.cancel()
    assert (await asyncio.wait_for(waiting, SOON)).status == "CANCELLED"


@pytest.mark.both_stores
async def test_start_by_dying_caller_still_hands_out_the_task(engine: Engine) -> None:
    await engine.register({"a": [], "b": []})
    polls = [engine.poll(f"w{n}") for n in range(2)]
    await until_idle(engine, *polls)
    start = asyncio.create_task(engine.start())
    await turns(1)
    assert not start.done()
    start.cancel()
    assert {(await engine.task(poll)).node_id for poll in polls} == {"a", "b"}


@pytest.mark.both_stores
async def test_due_retry_reaches_a_waiting_poll(engine: Engine) -> None:
    await engine.register({"a": []})
    await engine.start()
    first = await engine.task(engine.poll())
    await engine.servicer.FailTask(pb.FailRequest(task_id=first.task_id, error_message="no"), Call())  # type: ignore[arg-type]
    assert await engine.poll(wait_ms=0) is None
    assert (await engine.task(engine.poll())).attempt == 2


# ---- Polls that are given up -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("disk", DISKS, indirect=True)
@pytest.mark.parametrize("hops", range(12))
async def test_cancelled_poll_leaves_its_task_to_the_next_poll(engine: Engine, hops: int) -> None:
    await engine.register({"a": []})
    given_up, waiting = engine.poll("w1"), engine.poll("w2")
    await until_idle(engine, given_up, waiting)
    start = asyncio.create_task(engine.start())
    await turns(hops)
    given_up.cancel()
    execution_id = await start
    handed_out = [await engine.task(waiting)] if not _has_task(given_up) else []
    await asyncio.gather(given_up, return_exceptions=True)
    handed_out += [given_up.result()] if not given_up.cancelled() and given_up.result() else []  # type: ignore[list-item]
    assert [task.execution_id for task in handed_out] == [execution_id]
    waiting.cancel()


async def test_claim_of_a_cancelled_poll_does_not_hide_a_later_task(engine: Engine) -> None:
    """The claim runs before the start, and finds nothing. The next poll must get the task of the start."""
    await engine.register({"a": []})
    go_on = threading.Event()
    holding = engine.store.run(lambda _: go_on.wait(SOON))
    given_up = engine.poll("w1")
    await turns()
    given_up.cancel()
    await turns()
    start = asyncio.create_task(engine.start())
    await turns()
    go_on.set()
    await holding
    execution_id = await start
    await asyncio.gather(given_up, return_exceptions=True)
    assert (await engine.task(engine.poll("w2"))).execution_id == execution_id


def _has_task(poll: asyncio.Task[Task | None]) -> bool:
    return poll.done() and not poll.cancelled() and poll.result() is not None


async def test_task_of_unsent_answer_goes_to_the_next_poll(engine: Engine) -> None:
    await engine.register({"a": []})
    await engine.start()
    call = Call()
    call.gone = True
    request = pb.PollRequest(worker_id="w1", version_hash="v1")
    answer = await engine.servicer.PollTask(request, call)  # type: ignore[arg-type]
    assert answer.has_task
    assert (await engine.task(engine.poll("w2"))).attempt == 2


# ---- Sizes -----------------------------------------------------------------------------------------------------------


async def test_too_small_poll_answers_at_once_after_one_claim(engine: Engine) -> None:
    await engine.register({"a": []})
    await engine.start(input_json=json.dumps("x" * 5000))
    before = engine.claims
    assert await asyncio.wait_for(engine.poll(wait_ms=0, max_bytes=1000), SOON) is None
    assert engine.claims == before + 1


async def test_large_waiting_poll_gets_task_too_large_for_another(engine: Engine) -> None:
    await engine.register({"a": []})
    small, large = engine.poll("small", max_bytes=1000), engine.poll("large")
    await until_idle(engine, small, large)
    await engine.start(input_json=json.dumps("x" * 5000))
    assert len((await engine.task(large)).input_json) > 5000
    before = engine.claims
    await until_idle(engine, small)
    assert engine.claims == before
    execution_id = await engine.start()
    assert (await engine.task(small)).execution_id == execution_id


async def test_task_too_large_only_with_its_frame_is_passed_on(engine: Engine) -> None:
    """A start wakes a poll that may take the input. The task's whole message can still be too large for that poll."""
    await engine.register({"a": []})
    small, large = engine.poll("small", max_bytes=1010), engine.poll("large")
    await until_idle(engine, small, large)
    await engine.start(input_json=json.dumps("x" * 1000))
    assert (await engine.task(large)).node_id == "a"
    small.cancel()


# ---- What is remembered ----------------------------------------------------------------------------------------------


async def test_polls_remember_a_limited_number_of_versions(make: Make) -> None:
    clock = ManualClock()
    engine = await make(clock)
    for n in range(2 * MAX_REMEMBERED_VERSIONS):
        clock.advance(0.01)
        engine.polls.task_ready(ReadyTask(f"started {n}", 0))
        claim = engine.poll(version=f"taken {n}", wait_ms=0)
        await turns(1)
        if n % 100 == 99:
            await claim
    await turns()
    sizes = {name: len(value) for name, value in vars(engine.polls).items() if isinstance(value, Sized)}
    assert max(sizes.values()) > 0, "nothing is remembered: the test reads the wrong attributes"
    assert {name: size for name, size in sizes.items() if size > MAX_REMEMBERED_VERSIONS} == {}


async def test_task_started_during_a_polls_claim_is_found_by_that_poll(engine: Engine) -> None:
    await engine.register({"a": []})
    poll = engine.poll(wait_ms=0)
    await turns(1)
    assert engine.claims == 1
    execution_id = await engine.start()
    assert (await engine.task(poll)).execution_id == execution_id
    assert engine.claims == 2, "the first claim found the task: the test proves nothing"


async def test_waiting_poll_claims_once_until_a_task_is_due(engine: Engine) -> None:
    await engine.register({"a": []})
    for _ in range(3):
        assert await engine.poll(wait_ms=0) is None
    assert engine.claims == 1
    await engine.start()
    await engine.task(engine.poll(wait_ms=0))
    assert engine.claims == 2


@pytest.mark.both_stores
async def test_end_of_an_attempt_wakes_a_poll_for_a_task_that_a_limit_holds_back(engine: Engine) -> None:
    await engine.register({"a": []}, concurrency=1)
    await engine.register({"a": []}, "v2", concurrency=1)
    first, second = engine.poll("w1"), engine.poll("w2", version="v2")
    await until_idle(engine, first, second)
    await engine.start()
    task = await engine.task(first)
    execution_id = await engine.start("v2")
    await until_idle(engine, second)
    await engine.complete(task)
    assert (await engine.task(second)).execution_id == execution_id


@pytest.mark.both_stores
async def test_rate_wakes_waiting_polls_one_after_the_other(engine: Engine) -> None:
    await engine.register({"a": []}, rate={"calls": 1, "seconds": 0.1})
    polls = [engine.poll(f"w{n}") for n in range(4)]
    await until_idle(engine, *polls)
    ids = [await engine.start() for _ in polls]
    assert {(await engine.task(poll)).execution_id for poll in polls} == set(ids)
    found = [await engine.store.run(reading.get_execution, one, True) for one in ids]
    started = sorted(one.nodes[0].attempts[0].started_ms for one in found)
    assert all(later - earlier >= 99 for earlier, later in pairwise(started))
    # Each task wakes a few polls: when it is started, and again when the rate allows it.
    assert engine.claims < 40


async def test_large_task_started_during_small_polls_claim_is_found_by_large_poll(engine: Engine) -> None:
    await engine.register({"a": []})
    small = engine.poll("small", wait_ms=0, max_bytes=1000)
    await turns(1)
    assert engine.claims == 1, "the poll has not claimed yet"
    start = asyncio.create_task(engine.start(input_json=json.dumps("x" * 5000)))
    assert await small is None
    assert (await engine.task(engine.poll("large", wait_ms=0))).execution_id == await start


async def test_task_taken_during_another_claim_is_counted_once(engine: Engine) -> None:
    await engine.register({"a": []})
    idle = engine.poll("w1")
    await until_idle(engine, idle)
    claim = asyncio.create_task(engine.polls.next_task("w2", ("v1", "v2"), LARGE, 0))
    await turns(1)
    start = asyncio.create_task(engine.start())
    assert await claim is None, "the claim found the task: the test proves nothing"
    assert (await engine.task(idle)).execution_id == await start
    later = await engine.start()
    assert (await engine.task(engine.poll(wait_ms=0))).execution_id == later


async def test_task_started_during_a_claim_is_found(engine: Engine) -> None:
    await engine.register({"a": []})
    poll = engine.poll()
    await turns(1)
    assert engine.claims == 1, "the poll has not claimed yet"
    start = asyncio.create_task(engine.start())
    await turns(1)
    assert not start.done()
    assert (await engine.task(poll)).execution_id == await start
    assert engine.claims == 2, "the first claim found the task: the test proves nothing"


# ---- Streams ---------------------------------------------------------------------------------------------------------


class Stream:
    """The worker's side of a WorkerStream."""

    def __init__(self, engine: Engine) -> None:
        self._sent: asyncio.Queue[pb.WorkerBeat | None] = asyncio.Queue()
        self._acks: asyncio.Queue[int] = asyncio.Queue()
        self._running = asyncio.create_task(self._run(engine))

    async def _beats(self) -> AsyncIterator[pb.WorkerBeat]:
        while (beat := await self._sent.get()) is not None:
            yield beat

    async def _run(self, engine: Engine) -> None:
        async for ack in engine.liveness.beats(self._beats()):
            self._acks.put_nowait(ack.lease_ms)

    def beat(self, *task_ids: str, worker_id: str = "w1", draining: bool = False) -> None:
        self._sent.put_nowait(pb.WorkerBeat(worker_id=worker_id, task_ids=task_ids, draining=draining))

    def breaks(self) -> None:
        self._sent.put_nowait(None)

    async def acked(self) -> None:
        assert await asyncio.wait_for(self._acks.get(), SOON) == LEASE_MS

    async def ended(self) -> None:
        await asyncio.wait_for(self._running, SOON)


async def swept(engine: Engine) -> int:
    """Sweep; return how many lost attempts will be retried."""
    return len((await engine.store.run(leases.sweep, 2**60)).changed.ready)


@pytest.mark.parametrize("disk", DISKS, indirect=True)
@pytest.mark.parametrize("hops", range(8))
async def test_worker_keeps_task_when_new_stream_opens_before_old_ends(make: Make, hops: int) -> None:
    clock = ManualClock()
    engine = await make(clock)
    await engine.register({"a": []})
    await engine.start()
    old, new = Stream(engine), Stream(engine)
    old.beat()
    await old.acked()
    task = await engine.task(engine.poll())
    old.breaks()
    await turns(hops)
    new.beat(task.task_id)
    await new.acked()
    await old.ended()
    await engine.store.run(listing.list_executions, "", "", 1)
    clock.advance(RECONNECT_GRACE_MS / 1000)
    assert await swept(engine) == 0
    clock.advance((LEASE_MS - RECONNECT_GRACE_MS) / 1000)
    assert await swept(engine) == 1  # no heartbeat has come for the length of the lease


async def test_end_of_old_stream_takes_no_task_from_reconnected_worker(make: Make) -> None:
    clock = ManualClock()
    engine = await make(clock)
    await engine.register({"a": []})
    await engine.start()
    old, new = Stream(engine), Stream(engine)
    old.beat()
    await old.acked()
    task = await engine.task(engine.poll())
    new.beat(task.task_id)
    await new.acked()
    old.breaks()
    await old.ended()
    assert engine.polls.lease_of("w1") == (LEASE_MS, True)
    await engine.store.run(listing.list_executions, "", "", 1)
    clock.advance(RECONNECT_GRACE_MS / 1000)
    assert await swept(engine) == 0


async def test_worker_that_stays_disconnected_loses_task_after_grace(make: Make) -> None:
    clock = ManualClock()
    engine = await make(clock)
    await engine.register({"a": []})
    await engine.start()
    stream = Stream(engine)
    stream.beat()
    await stream.acked()
    await engine.task(engine.poll())
    stream.breaks()
    await stream.ended()
    await engine.store.run(listing.list_executions, "", "", 1)
    clock.advance((RECONNECT_GRACE_MS - 1) / 1000)
    assert await swept(engine) == 0
    clock.advance(0.001)
    assert await swept(engine) == 1


async def test_heartbeat_that_came_while_the_event_loop_was_blocked_keeps_the_task(make: Make) -> None:
    clock = ManualClock()
    engine = await make(clock)
    await engine.register({"a": []})
    execution_id = await engine.start()
    stream = Stream(engine)
    stream.beat()
    await stream.acked()
    task = await engine.task(engine.poll())
    other = engine.poll("w2")
    await until_idle(engine, other)
    engine.liveness.due_at(clock.now_ms() + 1)
    await turns()  # the sweep waits for its timer
    clock.advance(LEASE_MS / 1000)
    time.sleep(2 * LATE)  # noqa: ASYNC251 - the event loop must be blocked
    await turns()  # it takes some turns of the event loop to read the heartbeat
    await until_idle(engine, other)
    stream.beat(task.task_id)
    await stream.acked()
    clock.advance(RECONNECT_GRACE_MS / 1000)
    engine.liveness._due_changed.set()
    await until_idle(engine, other)
    assert await engine.attempts(execution_id) == 1
    clock.advance((LEASE_MS - RECONNECT_GRACE_MS) / 1000)
    engine.liveness._due_changed.set()
    await engine.task(other)  # no further heartbeat has come for the length of the lease


async def test_draining_worker_gets_polls_answered_and_no_tasks(engine: Engine) -> None:
    await engine.register({"a": []})
    stream = Stream(engine)
    stream.beat()
    await stream.acked()
    leaving, other = engine.poll("w1"), engine.poll("w2")
    await until_idle(engine, leaving, other)
    stream.beat(draining=True)
    assert await asyncio.wait_for(leaving, SOON) is None
    assert await asyncio.wait_for(engine.poll("w1"), SOON) is None
    await engine.start()
    await engine.task(other)
    stream.breaks()
    await stream.ended()
    # The end of the stream has ended the draining, so a poll with the same worker id gets tasks again.
    back = engine.poll("w1")
    await until_idle(engine, back)
    await engine.start()
    await engine.task(back)


async def test_drained_worker_gets_tasks_on_a_new_stream(engine: Engine) -> None:
    await engine.register({"a": []})
    old, new = Stream(engine), Stream(engine)
    old.beat(draining=True)
    await old.acked()
    new.beat()
    await new.acked()
    old.breaks()
    await old.ended()
    back = engine.poll("w1")
    await until_idle(engine, back)
    execution_id = await engine.start()
    assert (await engine.task(back)).execution_id == execution_id


async def test_stream_cancelled_during_its_answer_ends_at_once(engine: Engine) -> None:
    async def beats() -> AsyncIterator[pb.WorkerBeat]:
        yield pb.WorkerBeat(worker_id="w1")
        await asyncio.Event().wait()

    call = engine.servicer.WorkerStream(beats(), Call())  # type: ignore[arg-type]
    await anext(call)
    assert engine.polls.lease_of("w1") == (LEASE_MS, True)
    await call.aclose()
    assert engine.polls.lease_of("w1") == (2 * LEASE_MS, False)


@pytest.mark.parametrize("disk", DISKS, indirect=True)
@pytest.mark.parametrize("hops", range(8))
async def test_task_due_while_worker_drains_is_not_lost(engine: Engine, hops: int) -> None:
    await engine.register({"a": []})
    stream = Stream(engine)
    stream.beat()
    await stream.acked()
    leaving, other = engine.poll("w1"), engine.poll("w2")
    await until_idle(engine, leaving, other)
    stream.beat(draining=True)
    await turns(hops)
    execution_id = await engine.start()
    given = await asyncio.wait_for(leaving, SOON) or await engine.task(other)
    assert given.execution_id == execution_id
    other.cancel()


# ---- Answers that are lost -------------------------------------------------------------------------------------------


async def beating(engine: Engine) -> Stream:
    stream = Stream(engine)
    stream.beat()
    await stream.acked()
    return stream


async def outcomes(engine: Engine, execution_id: str) -> list[str]:
    (node,) = (await engine.store.run(reading.get_execution, execution_id, True)).nodes
    return [attempt.outcome.value for attempt in node.attempts]


async def test_task_missing_in_two_heartbeats_goes_to_another_worker(engine: Engine) -> None:
    await engine.register({"a": []})
    stream = await beating(engine)
    execution_id = await engine.start()
    await engine.task(engine.poll("w1"))
    other = engine.poll("w2")
    await until_idle(engine, other)
    stream.beat()
    await stream.acked()
    await until_idle(engine, other)
    assert await outcomes(engine, execution_id) == ["RUNNING"], "after one heartbeat, the task may still be on its way"
    stream.beat()
    task = await engine.task(other)
    assert (task.execution_id, task.attempt) == (execution_id, 2)
    assert await outcomes(engine, execution_id) == ["LOST", "RUNNING"]


async def test_task_named_by_every_second_heartbeat_is_kept(engine: Engine) -> None:
    await engine.register({"a": []})
    stream = await beating(engine)
    execution_id = await engine.start()
    task = await engine.task(engine.poll("w1"))
    for named in ([], [task.task_id], [], [task.task_id]):
        stream.beat(*named)
        await stream.acked()
    assert await outcomes(engine, execution_id) == ["RUNNING"]


async def test_tasks_of_one_worker_are_lost_separately(engine: Engine) -> None:
    await engine.register({"a": []})
    stream = await beating(engine)
    kept_id, lost_id = await engine.start(), await engine.start()
    kept, _ = await engine.task(engine.poll("w1")), await engine.task(engine.poll("w1"))
    for _ in range(2):
        stream.beat(kept.task_id)
        await stream.acked()
    assert await outcomes(engine, kept_id) == ["RUNNING"]
    assert await outcomes(engine, lost_id) == ["LOST"]


async def test_heartbeats_on_two_streams_are_not_in_a_row(engine: Engine) -> None:
    await engine.register({"a": []})
    first = await beating(engine)
    execution_id = await engine.start()
    task = await engine.task(engine.poll("w1"))
    first.beat()
    await first.acked()
    second = await beating(engine)
    first.breaks()
    await first.ended()
    second.beat(task.task_id)
    await second.acked()
    assert await outcomes(engine, execution_id) == ["RUNNING"]


async def test_report_between_two_heartbeats_without_the_task_is_recorded(engine: Engine) -> None:
    await engine.register({"a": []})
    stream = await beating(engine)
    execution_id = await engine.start()
    task = await engine.task(engine.poll("w1"))
    stream.beat()
    await stream.acked()
    await engine.complete(task)
    stream.beat()
    await stream.acked()
    assert await outcomes(engine, execution_id) == ["COMPLETED"]


async def test_heartbeats_of_one_worker_take_nothing_from_another_without_a_stream(engine: Engine) -> None:
    await engine.register({"a": []})
    stream = await beating(engine)
    execution_id = await engine.start()
    await engine.task(engine.poll("published"))
    for _ in range(3):
        stream.beat()
        await stream.acked()
    assert await outcomes(engine, execution_id) == ["RUNNING"]


async def test_new_stream_answers_earlier_polls_of_its_worker(engine: Engine) -> None:
    """The earlier polls may have come on a dead connection: the tasks that they take would never arrive."""
    await engine.register({"a": []})
    dead, other = engine.poll("w1"), engine.poll("w2")
    await until_idle(engine, dead, other)
    await beating(engine)
    assert await asyncio.wait_for(dead, SOON) is None
    execution_id = await engine.start()
    assert (await engine.task(other)).execution_id == execution_id


# ---- The end ---------------------------------------------------------------------------------------------------------


@pytest.mark.both_stores
async def test_stopping_server_answers_all_waiting_calls(engine: Engine) -> None:
    await engine.register({"a": []})
    execution_id = await engine.start()
    await engine.task(engine.poll())
    stream = Stream(engine)
    stream.beat()
    await stream.acked()
    poll = engine.poll()
    request = pb.GetExecutionRequest(execution_id=execution_id, wait_ms=LONG_MS)
    waiting = asyncio.create_task(engine.servicer.GetExecution(request, Call()))  # type: ignore[arg-type]
    await until_idle(engine, poll)
    await engine.stop_waiting()
    await engine.liveness.stop()
    assert await asyncio.wait_for(poll, SOON) is None
    assert (await asyncio.wait_for(waiting, SOON)).status == "RUNNING"
    await stream.ended()
    # Calls that arrive now are answered, too.
    late = engine.servicer.GetExecution(request, Call())  # type: ignore[arg-type]
    assert (await asyncio.wait_for(late, SOON)).status == "RUNNING"
    assert await asyncio.wait_for(engine.poll(), SOON) is None


@pytest.mark.parametrize("disk", DISKS, indirect=True)
@pytest.mark.parametrize("hops", range(6))
async def test_server_stops_while_a_lease_changes(engine: Engine, hops: int) -> None:
    """The server cancels its sweep just when a lease wakes it. The sweep must end, not wait for the next lease."""
    engine.liveness.task_handed_out()
    await until_idle(engine)  # the sweep waits for the end of the lease
    engine.liveness.due_at(0)
    for _ in range(hops):
        await asyncio.sleep(0)
    await asyncio.wait_for(engine.liveness.stop(), SOON)


async def test_unknown_outcome_makes_every_waiter_look_again(engine: Engine) -> None:
    await engine.register({"a": []})
    poll = engine.poll()
    await until_idle(engine, poll)
    # Store a start without waking the poll, as when the outcome of the start's transaction is unknown.
    await engine.store.run(executions.start_execution, "w", "v1", "{}", "")
    await until_idle(engine, poll)
    engine.look_again()
    await engine.task(poll)


@pytest.mark.both_stores
async def test_waiting_caller_sees_end_stored_despite_unknown_outcome(engine: Engine) -> None:
    await engine.register({"a": []})
    execution_id = await engine.start()
    task = await engine.task(engine.poll())
    request = pb.GetExecutionRequest(execution_id=execution_id, wait_ms=LONG_MS)
    waiting = asyncio.create_task(engine.servicer.GetExecution(request, Call()))  # type: ignore[arg-type]
    await turns()
    await engine.store.run(tasks.complete_task, task.task_id, "1")
    engine.look_again()
    assert (await asyncio.wait_for(waiting, SOON)).status == "COMPLETED"
    later = engine.servicer.GetExecution(request, Call())  # type: ignore[arg-type]
    assert (await asyncio.wait_for(later, SOON)).status == "COMPLETED"


@pytest.mark.parametrize("error", [StoreUnavailable("unknown"), RuntimeError("a bug")], ids=["unknown", "a bug"])
async def test_failing_store_raises_in_polls_and_logs_no_lost_exception(
    engine: Engine, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    await engine.register({"a": []})

    def unavailable(_: Run) -> Awaitable[Any]:
        failing: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        failing.set_exception(error)
        return failing

    kept = engine.store.run
    intercept(engine.store, tasks.claim, unavailable)
    with pytest.raises(type(error)):
        await engine.poll()
    engine.store.run = kept  # type: ignore[method-assign]
    await turns()
    await engine.start()
    await engine.task(engine.poll())
    gc.collect()
    assert "never retrieved" not in caplog.text


# ---- All at once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [{}, {"rate": {"calls": 20, "seconds": 0.2}, "concurrency": 2}], ids=["", "limited"])
@pytest.mark.parametrize("disk", DISKS, indirect=True)
@pytest.mark.parametrize("seed", range(5))
async def test_no_wake_up_is_lost_when_callers_die_at_random(
    engine: Engine, disk: str, seed: int, limits: dict[str, object]
) -> None:
    """Leases and polls are longer than the test: a call that isn't woken fails the test."""
    chance = random.Random(seed)
    graphs: dict[str, dict[str, list[str]]] = {
        "one": {"a": []},
        "chain": {"a": [], "b": ["a"], "c": ["b"]},
        "fan": {"a": [], "b": [], "c": ["a", "b"], "d": ["a"]},
    }
    for version, nodes in graphs.items():
        await engine.register(nodes, version, **limits)
    died = {"polls": 0, "reports": 0, "starts": 0}
    runs: dict[tuple[str, str], int] = {}
    stop = asyncio.Event()

    async def die_sometimes(what: str, work: asyncio.Task[Any], share: float) -> Any:
        if chance.random() < share:
            await turns(1 + chance.randrange(30 if disk == "slow" else 3))  # the first turn submits the call
            if not work.done():
                died[what] += 1
                work.cancel()
        return (await asyncio.gather(work, return_exceptions=True))[0]

    async def worker(name: str) -> None:
        versions = tuple(chance.sample(list(graphs), chance.randint(1, 3)))
        while not stop.is_set():
            polling = asyncio.create_task(engine.polls.next_task(name, versions, LARGE, LONG_MS))
            task = await die_sometimes("polls", polling, 0.3)
            if not isinstance(task, Task):
                continue
            key = (task.execution_id, task.node_id)
            runs[key] = runs.get(key, 0) + 1
            await turns(chance.randrange(10))
            await die_sometimes("reports", asyncio.create_task(engine.complete(task)), 0.3)

    async def starter() -> None:
        for _ in range(40):
            version = chance.choice(list(graphs))
            await die_sometimes("starts", asyncio.create_task(engine.start(version)), 0.2)
            await turns(chance.randrange(20))

    # `_complete_all` polls for all versions, so that each version has a worker.
    workers = [asyncio.create_task(worker(f"w{n}")) for n in range(8)]
    everything = asyncio.create_task(_complete_all(engine, tuple(graphs), runs))
    await asyncio.gather(*(starter() for _ in range(4)))
    try:
        for execution in await engine.store.run(listing.list_executions, "", "", 1000):
            with engine.waiters.watch(execution.execution_id, 2 * SOON) as ended:
                current = await engine.store.run(reading.get_execution, execution.execution_id)
                if current.status is ExecutionStatus.RUNNING:
                    await asyncio.wait_for(ended, SOON)
    finally:
        stop.set()
        everything.cancel()
        await engine.stop_waiting()
        await asyncio.gather(everything, *workers, return_exceptions=True)
    found = await engine.store.run(listing.list_executions, "", "", 1000)
    assert {one.status for one in found} == {ExecutionStatus.COMPLETED}
    assert len(found) > 100
    assert set(runs.values()) == {1}, "a task was handed out twice"
    assert min(died.values()) > 5, died


async def _complete_all(engine: Engine, versions: tuple[str, ...], runs: dict[tuple[str, str], int]) -> None:
    while True:
        task = await engine.polls.next_task("steady", versions, LARGE, LONG_MS)
        if task is not None:
            runs[task.execution_id, task.node_id] = runs.get((task.execution_id, task.node_id), 0) + 1
            await engine.complete(task)
