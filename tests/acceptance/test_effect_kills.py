"""SIGKILLs between the effect of a "once" tool and its record. EFFECT_KILLS=1000 takes some minutes."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from harness import nexum_server
from policies import paid, policy_caller, policy_worker, results
from processes import attempts, call_of, recorded, wait_until

from nexum_engine.client import NexumClient

KILLS = int(os.environ.get("EFFECT_KILLS") or 40)
"""How many calls are cut off between effect and record."""
SEED = int(os.environ.get("CRASH_SEED") or 8672)
AT_ONCE = 20  # calls that a worker runs at the same time
TOOLS = ("pay_once", "pay_and_find")


async def resolve_all(address: str, count: int) -> int:
    """Resolve unknown effects as a person would: give every second effect a result, and fail the others."""
    decided = 0
    async with NexumClient(address) as client:
        while decided < count:
            for one in await client.unknown():
                how: dict[str, Any] = {"failed": "not found"} if decided % 2 else {"output": "found by ann"}
                await client.resolve(one.execution_id, one.node_id, resolved_by="ann", **how)
                decided += 1
            await asyncio.sleep(0.05)  # the server may not have noticed yet that the last worker is dead
    return decided


@pytest.mark.timeout(120 + KILLS)
def test_once_tool_has_one_effect_however_often_its_workers_are_killed(tmp_path: Path) -> None:
    print(f"CRASH_SEED={SEED}")
    choose = random.Random(SEED)
    log = tmp_path / "log"
    calls = [
        (TOOLS[number % 2], {"log": str(log), "gate": str(tmp_path / "never"), "number": number})
        for number in range(KILLS)
    ]
    killed: Counter[str] = Counter()
    with ExitStack() as stack:
        server = stack.enter_context(nexum_server(tmp_path))
        caller = stack.enter_context(policy_caller(tmp_path, server.address, *calls))
        while (before := len(paid(log))) < KILLS:
            worker = stack.enter_context(policy_worker(tmp_path, server.address))
            expected = min(before + AT_ONCE, KILLS)
            wait_until(lambda expected=expected: len(paid(log)) >= expected, f"{expected} effects")  # type: ignore[misc]
            with_server = choose.random() < 0.3
            for process in (server.process, worker) if with_server else (worker,):
                process.kill()
            killed["server" if with_server else "worker"] += 1
            if with_server:
                server = stack.enter_context(nexum_server(tmp_path, port=server.port))
        # The last worker makes no payment. It only looks up the payments of the tool that has a reconcile.
        stack.enter_context(policy_worker(tmp_path, server.address))
        decided = asyncio.run(resolve_all(server.address, len(calls[::2])))
        said = results(caller)
        records = recorded(tmp_path, server.address)

    keys = Counter(one["key"] for one in paid(log))
    assert len(keys) == KILLS
    assert set(keys.values()) == {1}
    assert sorted(said[::2]) == sorted(
        "ERROR pay_once failed: not found" if number % 2 else "found by ann" for number in range(decided)
    )
    assert said[1::2] == [f"found {number}" for number in range(1, KILLS, 2)]
    # Every call was cut off. No call was handed to a worker again, except for a reconciliation.
    assert len(records) == KILLS
    for record in records:
        *cut_off, last = (one["outcome"] for one in attempts(record))
        if call_of(record)[0] == "pay_once":
            assert cut_off == ["UNKNOWN"]
            assert last in {"COMPLETED", "FAILED"}
        else:
            assert {*cut_off} <= {"LOST", "INTERRUPTED"}
            assert cut_off
            assert last == "COMPLETED"
    assert sum(killed.values()) >= KILLS / AT_ONCE
