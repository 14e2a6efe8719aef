"""The worker's handlers for each node type: routers, maps, subworkflows, time limits, progress."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from harness import ROOT, running
from pydantic import BaseModel
from server_thread import ServerThread

from nexum_engine.client import NexumClient
from nexum_engine.errors import Conflict, InvalidRequest
from nexum_engine.records import Execution, ExecutionStatus, NodeStatus, Outcome
from nexum_engine.worker import Binding, Handler, MapHandler, TaskContext, Worker
from nexum_engine.workflow import RetryPolicy, Workflow, workflow

SOON = 15.0  # seconds
T = TypeVar("T")


class Length(BaseModel):
    word: str
    length: int


@pytest.fixture
async def client(server: ServerThread) -> AsyncIterator[NexumClient]:
    async with NexumClient(server.address) as connected:
        yield connected


@asynccontextmanager
async def working(client: NexumClient, *bindings: Binding) -> AsyncIterator[Worker]:
    stop = asyncio.Event()
    worker = Worker(client, bindings)
    run = asyncio.create_task(worker.run(stop))
    try:
        yield worker
    finally:
        stop.set()
        await asyncio.wait_for(run, SOON)


async def finished(client: NexumClient, built: Workflow, input: Mapping[str, Any]) -> Execution:
    await client.register_workflow(built)
    started = await client.start_execution(built, input, wait=SOON)
    return (await client.get_execution(started.execution_id, wait=SOON, with_attempts=True)).execution


def outputs(execution: Execution) -> dict[str, Any]:
    return {node_id: json.loads(output) for node_id, output in execution.outputs().items()}


async def until(happened: Callable[[], Awaitable[T]]) -> T:
    """Return the first true value of `happened`; fail the test if it never is true."""
    deadline = asyncio.get_running_loop().time() + SOON
    while not (value := await happened()):
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.02)
    return value


async def progress_is(client: NexumClient, execution_id: str, progress_json: str) -> None:
    async def is_so() -> bool:
        return (await client.get_execution(execution_id)).execution.nodes[0].progress_json == progress_json

    await until(is_so)


async def nothing(task: TaskContext) -> None:
    """Do nothing."""


async def test_one_workflow_with_every_node_type(client: NexumClient) -> None:
    child = workflow("child").compute("square").build()
    built = (
        workflow("every")
        .effect("fetch")
        .router("route", {"words": "there are words", "nothing": "there are none"}, depends_on=["fetch"])
        .compute("nothing", depends_on=["fetch"])
        .map("words", Length, depends_on=["fetch"])
        .reduce("total")
        .subworkflow("square", "child", depends_on=["total"])
        .timer("pause", 0.05, depends_on=["square"])
        .event("paid", "payment", depends_on=["pause"])
        .human_approval("boss", depends_on=["paid"])
        .effect("report", depends_on=["square", "boss", "nothing"])
        .build()
    )

    async def fetch(task: TaskContext) -> list[str]:
        return str(task.input["text"]).split()

    async def route(task: TaskContext) -> str:
        return "words" if task.deps["fetch"] else "nothing"

    async def items(task: TaskContext) -> list[str]:
        return list(task.deps["fetch"])

    async def each(task: TaskContext) -> Length:
        assert task.index is not None
        assert task.deps["fetch"][task.index] == task.item
        assert task.total == 3
        return Length(word=task.item, length=len(task.item))

    async def total(task: TaskContext) -> int:
        return sum(one["length"] for one in task.deps["words"])

    async def square(task: TaskContext) -> dict[str, int]:
        return {"n": task.deps["total"]}

    async def squared(task: TaskContext) -> int:
        return int(task.input["n"]) ** 2

    async def report(task: TaskContext) -> str:
        assert "nothing" not in task.deps
        return f"{task.deps['square']} approved by {task.deps['boss']['approver']}"

    handlers: dict[str, Handler | MapHandler] = {
        "fetch": fetch,
        "route": route,
        "nothing": nothing,
        "words": MapHandler(items, each),
        "total": total,
        "square": square,
        "report": report,
    }
    async with working(client, Binding(built, handlers), Binding(child, {"square": squared})):
        await client.register_workflow(built)
        await client.register_workflow(child)
        started = await client.start_execution(built, {"text": "one three seventeen"})
        await client.send_event(started.execution_id, "payment", {"cents": 5})  # before the node waits for it
        approvals = await until(client.pending_approvals)
        assert [(one.execution_id, one.node_id) for one in approvals] == [(started.execution_id, "boss")]
        await client.approve(started.execution_id, "boss", approver="Ann")
        with pytest.raises(Conflict):
            await client.reject(started.execution_id, "boss")
        execution = (await client.get_execution(started.execution_id, wait=SOON)).execution
    assert execution.status is ExecutionStatus.COMPLETED
    found = outputs(execution)
    assert found["words"][2] == {"word": "seventeen", "length": 9}
    assert (found["total"], found["square"], found["report"]) == (17, 289, "289 approved by Ann")
    assert found["paid"] == {"cents": 5}
    assert {node.node_id for node in execution.nodes if node.status is NodeStatus.SKIPPED} == {"nothing"}


async def test_choice_that_the_server_refuses_fails_the_node(client: NexumClient) -> None:
    built = workflow("w").router("route", {"a": ""}).effect("a").build()

    async def route(task: TaskContext) -> str:
        return "elsewhere"

    async with working(client, Binding(built, {"route": route, "a": nothing})):
        execution = await finished(client, built, {})
    assert execution.status is ExecutionStatus.FAILED
    assert "must be {\"routed_to\": TARGET}, where TARGET is one of: 'a'" in execution.error


async def test_item_result_of_another_shape_fails_the_node(client: NexumClient) -> None:
    built = workflow("w").map("each", Length).build()

    async def items(task: TaskContext) -> list[int]:
        return [1]

    async def each(task: TaskContext) -> dict[str, int]:
        return {"length": 1}

    async with working(client, Binding(built, {"each": MapHandler(items, each)})):
        execution = await finished(client, built, {})
    assert "does not match Length" in execution.error


async def test_child_of_a_workflow_that_is_registered_later_is_started_at_a_retry(client: NexumClient) -> None:
    built = workflow("parent").subworkflow("sub", "late").build()
    late = workflow("late").timer("now", 0).build()
    registered = asyncio.Event()

    async def sub(task: TaskContext) -> dict[str, int]:
        if task.attempt == 2:
            await registered.wait()
        return {}

    async with working(client, Binding(built, {"sub": sub})):
        await client.register_workflow(built)
        started = await client.start_execution(built, {}, wait=1.0)
        await client.register_workflow(late)
        registered.set()
        execution = (await client.get_execution(started.execution_id, wait=SOON, with_attempts=True)).execution
    assert execution.status is ExecutionStatus.COMPLETED
    first = execution.nodes[0].attempts[0]
    assert (first.outcome, "workflow 'late' is not registered" in first.error) == (Outcome.FAILED, True)


async def test_handler_over_its_time_limit_is_cancelled_and_retried(client: NexumClient) -> None:
    retry = RetryPolicy(max_attempts=2, first_delay_seconds=0)
    built = workflow("w").effect("slow", timeout_seconds=0.05, retry=retry).build()
    cancelled: list[int] = []

    async def slow(task: TaskContext) -> str:
        if task.attempt == 1:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(task.attempt)
                raise
        return "quick"

    async with working(client, Binding(built, {"slow": slow})):
        execution = await finished(client, built, {})
    assert (outputs(execution), cancelled) == ({"slow": "quick"}, [1])
    first = execution.nodes[0].attempts[0]
    assert first.error == "TimeoutError: the attempt took longer than its time limit of 0.05 s"


async def test_progress_reaches_the_next_attempt(client: NexumClient) -> None:
    retry = RetryPolicy(max_attempts=2, first_delay_seconds=0)
    built = workflow("w").effect("long", retry=retry).build()
    seen = asyncio.Event()

    async def long(task: TaskContext) -> Any:
        if task.attempt == 2:
            return task.progress
        await asyncio.to_thread(task.heartbeat, {"done": 1})
        task.heartbeat({"done": 2})
        with pytest.raises(InvalidRequest):
            task.heartbeat("x" * 5000)
        await seen.wait()
        raise RuntimeError("broke at 2")

    async with working(client, Binding(built, {"long": long})):
        await client.register_workflow(built)
        started = await client.start_execution(built, {})
        await progress_is(client, started.execution_id, '{"done":2}')
        seen.set()
        execution = (await client.get_execution(started.execution_id, wait=SOON)).execution
    assert outputs(execution) == {"long": {"done": 2}}


async def test_progress_of_a_killed_worker_reaches_the_next_one(
    server: ServerThread, client: NexumClient, tmp_path: Path
) -> None:
    built = workflow("w").effect("long").build()
    program = tmp_path / "dies.py"
    program.write_text(
        "import asyncio, sys\n"
        "from nexum_engine.client import NexumClient\n"
        "from nexum_engine.worker import Binding, Worker\n"
        "from nexum_engine.workflow import workflow\n"
        "async def long(task):\n"
        "    task.heartbeat('half way')\n"
        "    await asyncio.Event().wait()\n"
        "async def main():\n"
        "    async with NexumClient(sys.argv[1]) as client:\n"
        "        built = workflow('w').effect('long').build()\n"
        "        await Worker(client, [Binding(built, {'long': long})]).run(asyncio.Event())\n"
        "asyncio.run(main())\n",
        encoding="utf-8",
    )

    async def long(task: TaskContext) -> Any:
        return [task.attempt, task.progress]

    await client.register_workflow(built)
    started = await client.start_execution(built, {})
    with running([str(program), server.address], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        await progress_is(client, started.execution_id, '"half way"')
        process.kill()
    async with working(client, Binding(built, {"long": long})):
        execution = (await client.get_execution(started.execution_id, wait=SOON)).execution
    assert outputs(execution) == {"long": [2, "half way"]}


@pytest.mark.parametrize(
    ("built", "handlers", "problem"),
    [
        (workflow("w").map("m").build(), {"m": nothing}, "must be a MapHandler: the node's type is MAP"),
        (workflow("w").effect("e").build(), {"e": MapHandler(nothing, nothing)}, "must be a function"),
        (workflow("w").effect("e").timer("t", 1).build(), {"e": nothing, "t": nothing}, "one handler for each node"),
        (workflow("w").effect("e").timer("t", 1).build(), {}, "one handler for each node"),
    ],
)
def test_handlers_that_do_not_fit_the_nodes_are_refused(
    built: Workflow, handlers: dict[str, Handler | MapHandler], problem: str
) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        Worker(NexumClient("localhost:1"), [Binding(built, handlers)])
