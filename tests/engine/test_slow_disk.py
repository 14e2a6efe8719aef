"""A disk that takes 200 ms for each commit delays only the calls that write."""

from __future__ import annotations

import asyncio
from pathlib import Path

from harness import running

from nexum_engine.client import NexumClient
from nexum_engine.records import ExecutionStatus, Outcome
from nexum_engine.worker import Binding, TaskContext, Worker
from nexum_engine.workflow import workflow

SLOW_COMMITS = """
import runpy, time
from nexum_engine.store.sqlite_file import DatabaseFile
commit = DatabaseFile.commit
def slow_commit(file):
    if file.connection.total_changes != file._changes:
        time.sleep(0.2)
        print("slow commit", flush=True)
    commit(file)
DatabaseFile.commit = slow_commit
runpy.run_module("nexum_engine", run_name="__main__", alter_sys=True)
"""
"""A server program whose committing thread sleeps 200 ms before each commit, as it would wait for a slow fsync."""
LEASE = 1.0  # seconds
CALLERS, STARTS = 4, 12
LONG = workflow("long").effect("a").build()
OTHER = workflow("other").effect("a").build()


async def test_slow_disk_delays_no_reading_call_and_loses_no_lease(tmp_path: Path) -> None:
    command = ["-c", SLOW_COMMITS, "--listen", "127.0.0.1:0", "--lease", str(LEASE)]
    url = f"sqlite:///{tmp_path / 'nexum.db'}"
    with running([*command, "--database-url", url], cwd=tmp_path) as server:
        address = server.wait_for_address()
        begun, finish, stop = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def handler(_: TaskContext) -> str:
            begun.set()
            await finish.wait()
            return "done"

        async with NexumClient(address) as client, NexumClient(address) as other:
            await client.register_workflow(LONG)
            await client.register_workflow(OTHER)
            worker = Worker(client, [Binding(LONG, {"a": handler})])
            working = asyncio.create_task(worker.run(stop))
            execution_id = (await client.start_execution(LONG, {})).execution_id
            await begun.wait()
            answers = 0

            async def keep_asking() -> None:
                nonlocal answers
                while True:
                    assert await other.server_info() is not None
                    answers += 1

            async def start_others() -> None:
                for _ in range(STARTS):
                    await other.start_execution(OTHER, {})

            asking = asyncio.create_task(keep_asking())
            await asyncio.gather(*(start_others() for _ in range(CALLERS)))
            asking.cancel()
            finish.set()
            ended = await client.get_execution(execution_id, wait=30, with_attempts=True)
            stop.set()
            await working
        server.interrupt()
        server.wait()
    commits = sum("slow commit" in line for line in server.lines)
    assert commits * 0.2 > 2 * LEASE
    # If the event loop waited for each commit, the server would give only one or two answers per commit.
    assert answers > 4 * commits
    assert ended is not None
    assert ended.execution.status is ExecutionStatus.COMPLETED
    (node,) = ended.execution.nodes
    assert [attempt.outcome for attempt in node.attempts] == [Outcome.COMPLETED]
