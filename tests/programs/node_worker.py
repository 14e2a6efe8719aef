"""A worker of a workflow with every node type. It logs each effect.

An effect is one line of a file: time in ms, attempt, execution, node, number of the item or "-", idempotency key.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from typing import Any

from nexum_engine.client import NexumClient
from nexum_engine.signals import stop_event
from nexum_engine.worker import Binding, Handler, MapHandler, TaskContext, Worker
from nexum_engine.workflow import RetryPolicy, workflow

ITEMS = 6
TIMER_MS = 300
SOON = RetryPolicy(max_attempts=3, first_delay_seconds=0.2)

CHILD = (
    workflow("crash-child").effect("first").timer("rest", TIMER_MS / 1000).effect("last", depends_on=["rest"]).build()
)
EVERY = (
    workflow("crash-every")
    .effect("fetch", retry=SOON)
    .map("each", depends_on=["fetch"], retry=SOON)
    .reduce("sum")
    .timer("pause", TIMER_MS / 1000, depends_on=["fetch"])
    .human_approval("boss", depends_on=["sum"])
    .event("paid", "payment", depends_on=["pause"])
    .router("route", {"sub": "always", "never": "never"}, depends_on=["fetch"])
    .subworkflow("sub", "crash-child", depends_on=["route"])
    .effect("never", depends_on=["route"])
    .effect("report", depends_on=["boss", "paid", "sub", "never"])
    .build()
)


async def effect(task: TaskContext, result: Any) -> Any:
    """Wait a little, log the effect, wait a little again, and return the result."""
    await asyncio.sleep(0.06)
    item = "-" if task.index is None else task.index
    words = [time.time_ns() // 1_000_000, task.attempt, task.execution_id, task.node_id, item, task.idempotency_key]
    descriptor = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, (" ".join(map(str, words)) + "\n").encode())
    os.close(descriptor)
    await asyncio.sleep(0.06)
    return result


def returns(result: Any) -> Handler:
    async def handler(task: TaskContext) -> Any:
        return await effect(task, result)

    return handler


async def fetch(task: TaskContext) -> list[int]:
    await effect(task, None)
    if task.attempt == 1:
        raise RuntimeError("the first attempt fails")
    return list(range(ITEMS))


async def items(task: TaskContext) -> Any:
    return await effect(task, task.deps["fetch"])


async def each(task: TaskContext) -> Any:
    await effect(task, None)
    if task.attempt == 1 and task.index == 0:
        raise RuntimeError("the first attempt of the first item fails")
    return task.item * 10


async def total(task: TaskContext) -> Any:
    return await effect(task, sum(task.deps["each"]))


async def report(task: TaskContext) -> Any:
    return await effect(task, sorted(task.deps))


HANDLERS: dict[str, Handler | MapHandler] = {
    "fetch": fetch,
    "each": MapHandler(items=items, each=each),
    "sum": total,
    "route": returns("sub"),
    "sub": returns({"n": 1}),
    "never": returns(None),
    "report": report,
}


async def main() -> None:
    """Run the worker for the server whose address is the first argument."""
    stop = stop_event()
    bindings = [Binding(EVERY, HANDLERS), Binding(CHILD, {"first": returns(1), "last": returns("the child's end")})]
    async with NexumClient(sys.argv[1]) as client:
        await Worker(client, bindings, concurrency=4).run(stop)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    asyncio.run(main())
