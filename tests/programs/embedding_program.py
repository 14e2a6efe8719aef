"""Programs that embed the libraries: `embedding_program.py MODE LOG [SERVER [MODEL_URL]]`. They print their results.

NEXUM_ADDRESS names the server. Each mode is one function below.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from nexum_engine.client import NexumClient
from nexum_engine.owner import Owner
from nexum_engine.workflow import workflow
from submit_task import submit_tool_call
from support.session_file import SessionFile

SOON = 20.0  # seconds; a child that takes longer is considered hung
OWNED = workflow("owned").effect("a").build()


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked child. Return the child's exit code, or 99 if the child hangs.

    Before the child ends, it waits for its own threads.
    """
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(SOON)
    if child.is_alive():
        child.kill()
        return 99
    assert child.exitcode is not None
    return child.exitcode


def forked_call(log: str) -> None:
    """Make calls in a process, in its forked children, and in a process that one of these children forks."""

    def call(number: int) -> None:
        print("RESULT", os.getpid(), submit_tool_call("count_effect", {"log": log, "number": number}, timeout=SOON))

    def child() -> None:
        call(1)
        call(2)
        print("GRANDCHILD", in_child(lambda: call(3)))

    call(1)
    print("CHILDREN", in_child(child), in_child(lambda: call(4)))
    call(5)


def fork_during_call(log: str) -> None:
    """Fork while another thread waits for its call's result."""
    gate = f"{log}.gate"
    call = {"log": f"{log}.begun", "gate": gate}
    slow = threading.Thread(target=lambda: print("SLOW", submit_tool_call("effect_then_gate", call, timeout=SOON)))
    slow.start()
    while not os.path.exists(call["log"]):
        time.sleep(0.01)
    quick = {"log": log, "number": 1}
    print("CHILD", in_child(lambda: print("RESULT", submit_tool_call("count_effect", quick, timeout=SOON))))
    with open(gate, "w"):
        slow_was_waiting = slow.is_alive()
    slow.join()
    print("WAITED", slow_was_waiting)


def fork_with_end(log: str) -> None:
    """Fork with os.fork, and end the child as a script ends: with the interpreter's whole shutdown."""
    submit_tool_call("count_effect", {"log": log, "number": 1}, timeout=SOON)
    pid = os.fork()
    print("RESULT", submit_tool_call("count_effect", {"log": log, "number": 2 if pid else 3}, timeout=SOON), flush=True)
    if pid:
        print("CHILD", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def fork_with_client(_log: str) -> None:
    """Fork while an owner is connected. The child uses the same client, and an owner of its own."""
    client = NexumClient()

    async def own(key: str, then: Callable[[], object] = lambda: None) -> None:
        async with Owner(client) as owner:
            started = await owner.start(OWNED, {}, idempotency_key=key)
            assert started.task is not None
            then()
            await owner.complete(started.task, {"key": key * 1_000_000})
            print("OWNED", key, (await client.get_execution(started.execution_id)).execution.status.value)

    asyncio.run(own("p", lambda: print("CHILD", in_child(lambda: asyncio.run(own("c"))))))


def fork_with_locked_file(_log: str) -> None:
    """Fork while another thread has the session file locked."""
    file = SessionFile("locked")
    locked, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with file._one_thread, file._one_process:
            locked.set()
            forked.wait()
            time.sleep(0.2)  # the child waits for this process to unlock the file

    holder = threading.Thread(target=hold)
    holder.start()
    locked.wait()
    child = multiprocessing.get_context("fork").Process(
        target=lambda: asyncio.run(file.record("w", "of the child", "exec-1"))
    )
    child.start()
    forked.set()
    child.join(SOON)
    holder.join()
    print("CHILD", child.exitcode)
    child.kill()
    asyncio.run(file.record("w", "of the parent", "exec-2"))
    print("KEYS", sorted(json.loads(file.path.read_text())["executions"]["w"]))


def loops_one_client(_log: str) -> None:
    """Use one client in one event loop after the other, and in two at the same time."""
    client = NexumClient()

    async def ping(times: int) -> None:
        for _ in range(times):
            await client.ping()

    for _ in range(3):
        asyncio.run(ping(1))
    threads = [threading.Thread(target=lambda: asyncio.run(ping(300))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("PINGED")


def durable(url: str, session: str) -> Any:
    """Run an agent in a session; return its last text."""
    from autogen_agentchat.agents import AssistantAgent

    from durable_autogen import run_durable
    from support.models.live import LiveModel

    def build() -> AssistantAgent:
        return AssistantAgent("a", LiveModel(vendor="local", model="m", base_url=url, api_key="k"))

    result = asyncio.run(run_durable(build, task="Q", session_id=session, on_unrecorded="stop"))
    return result.messages[-1].to_text()


def fork_durable(_log: str, url: str) -> None:
    """Run sessions before a fork, in the child, and then in the parent. Each process replays the other's sessions."""
    print("RUN", durable(url, "before"))

    def child() -> None:
        print("RUN", durable(url, "before"))
        print("RUN", durable(url, "in-child"))

    print("CHILD", in_child(child))
    print("RUN", durable(url, "in-child"))
    print("RUN", durable(url, "after"))


def two_loops(log: str, url: str) -> None:
    """Make calls with submit_tool_call in two threads while sessions run in the main thread."""

    def calls(first: int) -> None:
        for number in range(first, first + 20):
            submit_tool_call("count_effect", {"log": log, "number": number}, timeout=SOON)

    threads = [threading.Thread(target=calls, args=(first,)) for first in (0, 20)]
    for thread in threads:
        thread.start()
    for number in range(3):
        print("RUN", durable(url, f"s{number}"))
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
