"""A worker of the workflow `limited`. Arguments: the server's address, how many tasks it runs at once, and LIMITS.

LIMITS is JSON, with a rate, a concurrency, and how long each task takes, in seconds.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys

from nexum_engine.client import NexumClient
from nexum_engine.signals import stop_event
from nexum_engine.worker import Binding, TaskContext, Worker
from nexum_engine.workflow import Workflow, workflow


def limited(rate: str | None, concurrency: int | None) -> Workflow:
    """Return a workflow with one node that has these limits."""
    return workflow("limited").effect("a", rate=rate, concurrency=concurrency).build()


async def main() -> None:
    """Run the worker until a signal stops it."""
    limits = json.loads(sys.argv[3])

    async def work(task: TaskContext) -> None:
        print(f"began {task.execution_id}", flush=True)
        await asyncio.sleep(limits["takes"])

    binding = Binding(limited(limits.get("rate"), limits.get("concurrency")), {"a": work})
    async with NexumClient(sys.argv[1]) as client:
        await Worker(client, [binding], concurrency=int(sys.argv[2])).run(stop_event())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    asyncio.run(main())
