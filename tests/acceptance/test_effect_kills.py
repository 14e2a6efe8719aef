"""SIGKILLs between the effect of a "once" tool and its record. EFFECT_KILLS=1000 takes some minutes."""

from __future__ import annotations

import os
import random
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from harness import nexum_server
from policies import paid, policy_caller, policy_worker
from processes import attempts, call_of, recorded, wait_until

from nexum_engine.client import NexumClient

KILLS = int(os.environ.get("EFFECT_KILLS") or 40)
"""How many calls are cut off between effect and record."""
SEED = int(os.environ.get("CRASH_SEED") or 8672)
AT_ONCE = 20  # calls that a worker runs at the same time
TOOLS = ("pay_once", "pay_and_find")


@pytest.mark.timeout(120 + KILLS)
async def test_once_tool_has_one_effect_however_often_its_workers_are_killed(tmp_path: Path) -> None:
    print(f"CRASH_SEED={SEED}")
    choose = random.Random(SEED)
    log = tmp_path / "log"
    calls: dict[str, list[dict[str, Any]]] = {tool: [] for tool in TOOLS}
    for number in range(KILLS):
        call = {"log": str(log), "gate": str(tmp_path / "never"), "number": number}
        calls[TOOLS[number % 2]].append(call)
    killed: Counter[str] = Counter()
    with ExitStack() as stack:
        server = stack.enter_context(nexum_server(tmp_path))
        callers = [
            stack.enter_context(
                policy_caller(tmp_path, server.address, tool, *calls[tool], session=tool.replace("_", ""))
            )
            for tool in TOOLS
        ]
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
        # The last worker only looks up what can be looked up.
        stack.enter_context(policy_worker(tmp_path, server.address))
        assert callers[1].wait(60) == 0, callers[1].output
        async with NexumClient(server.address) as client:
            unknown = await client.unknown()
            for number, one in enumerate(unknown):
                how: dict[str, Any] = {"failed": "not found"} if number % 2 else {"output": {"result": "found by ann"}}
                await client.resolve(one.execution_id, one.node_id, resolved_by="ann", **how)
        assert callers[0].wait(60) == 0, callers[0].output
        records = recorded(tmp_path, server.address)

    keys = Counter(one["key"] for one in paid(log))
    assert len(keys) == KILLS
    assert set(keys.values()) == {1}
    assert len(unknown) == len(calls["pay_once"])
    assert sum(line.startswith("RESULT found by ann") for line in callers[0].lines) == len(unknown) - len(unknown) // 2
    assert sum(line.startswith("ERROR") for line in callers[0].lines) == len(unknown) // 2
    assert sum(line.startswith("RESULT found") for line in callers[1].lines) == len(calls["pay_and_find"])
    # Every call was cut off, and none was handed to a worker again except to look it up.
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
