"""Tools in workers that may run only once: what happens if a worker dies between the effect and its record."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from harness import published_server
from policies import asked_in, decide, paid, parking_run, policy_caller, policy_worker, results
from processes import call_of, recorded, wait_until
from server_thread import ServerThread

from nexum_engine.client import NexumClient
from support.tools import TOOLS
from workflow import TOOL_CALL, ToolCallInput


def test_lost_effect_is_looked_up_or_waits_for_a_person(tmp_path: Path, server: ServerThread) -> None:
    log, gate, begun = tmp_path / "log", tmp_path / "gate", tmp_path / "begun"

    def call(number: int) -> dict[str, Any]:
        return {"log": str(log), "gate": str(gate), "number": number}

    given: dict[int, dict[str, Any]] = {
        1: {"output": "receipt 17"},
        2: {"output": {"at": 17}},
        3: {"failed": "no such card"},
        4: {"not_done": True},
    }
    calls = [("pay_once", call(number)) for number in given] + [
        ("pay_and_find", call(5)),
        ("find_before_paying", {**call(6), "begun": str(begun)}),
        ("pay_and_find", call(-7)),
    ]
    numbers = [*given, 5, 6, -7]
    with policy_caller(tmp_path, server.address, *calls) as caller:
        with policy_worker(tmp_path, server.address) as worker:
            wait_until(lambda: len(paid(log)) == 6 and len(paid(begun)) == 1, "all effects but one")
            worker.kill()
        gate.touch()
        with policy_worker(tmp_path, server.address):
            unknown = [caller.wait_for("is UNKNOWN") for _ in range(len(given) + 1)]
            inputs = {one["execution_id"]: call_of(one)[1]["number"] for one in recorded(tmp_path, server.address)}
            for line in unknown:
                how = given.get(inputs[asked_in(line)], {"output": "receipt 18"})
                decide(server.address, "resolve", asked_in(line), "tool_call", resolved_by="ann", **how)
            first = results(caller)
            for file in tmp_path.glob(".session-*.json"):
                file.unlink()
            with policy_caller(tmp_path, server.address, *calls) as again:
                assert results(again) == first
    lost = [line for line in unknown if inputs[asked_in(line)] > 0]
    (looked_up,) = (line for line in unknown if inputs[asked_in(line)] < 0)
    # On a busy machine, a task may reach the worker only at its second attempt.
    assert all(re.search(r"is UNKNOWN: attempt \d by worker", line) for line in lost), unknown
    assert "reconcile of pay_and_find failed: ConnectionError: the log is down" in looked_up
    assert dict(zip(numbers, first, strict=True)) == {
        1: "receipt 17",
        2: '{"at": 17}',
        3: "ERROR pay_once failed: no such card",
        4: "receipt for 4",
        5: "found 5",
        6: "receipt for 6",
        -7: "receipt 18",
    }
    # Only the call that a person allowed to run again has a second effect.
    assert Counter(one["number"] for one in paid(log)) == {1: 1, 2: 1, 3: 1, 4: 2, 5: 1, 6: 1, -7: 1}
    assert len(paid(begun)) == 2


def test_durable_run_parks_while_a_workers_effect_is_unknown(tmp_path: Path, server: ServerThread) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    call = ("pay_once", {"log": str(log), "gate": str(gate), "number": 1})
    with parking_run(tmp_path, server.address, call) as parked:
        with policy_worker(tmp_path, server.address) as worker:
            wait_until(lambda: len(paid(log)) == 1, "the effect")
            worker.kill()
        line = parked.wait_for("session s is parked, run it again after the decision: ")
        assert parked.wait() == 75
    assert "is UNKNOWN: attempt 1 by worker" in line
    decide(server.address, "resolve", asked_in(line), "tool_call", resolved_by="ann", output="receipt 17")
    with parking_run(tmp_path, server.address, call) as resumed:
        assert resumed.wait_for("RESULT") == "RESULT receipt 17"
        assert resumed.wait() == 0
    assert len(paid(log)) == 1


async def test_failed_tool_runs_again_only_as_its_policy_says(tmp_path: Path, server: ServerThread) -> None:
    tools = {"pay_and_fail": 1, "fail_twice": 2, "refuse": 1, "pay_slowly": 1, "count_slowly": 2}
    calls = [(tool, {"log": str(tmp_path / tool)}) for tool in tools]
    with policy_worker(tmp_path, server.address):
        with policy_caller(tmp_path, server.address, *calls) as caller:
            late = caller.wait_for("is UNKNOWN")
            await asyncio.to_thread(
                decide, server.address, "resolve", asked_in(late), "tool_call", output="it happened"
            )
            failed, retried, refused, resolved, number = results(caller)
        with policy_caller(tmp_path, server.address, *calls[:1]) as again:
            assert results(again) == [failed]
        async with NexumClient(server.address) as client:
            call = ToolCallInput(tool_name="pay_and_fail", tool_args={"log": str(tmp_path / "pay_and_fail")})
            started = await client.start_execution(TOOL_CALL, call)
            elsewhere = (await client.get_execution(started.execution_id, wait=20)).execution
            (counted,) = await client.list_executions(workflow_id="tool-call:count_slowly", with_nodes=True)
            counting = (await client.get_execution(counted.execution_id, with_attempts=True)).execution.nodes[0]
    assert number == "counted"
    assert [one.error for one in counting.attempts] == ["ToolTimeout: count_slowly sent no heartbeat for 1 s", ""]
    assert counting.progress_json == '{"counted":30}'
    assert failed.startswith("ERROR pay_and_fail failed: ConnectionError: no answer")
    assert retried.startswith("ERROR fail_twice failed: ConnectionError: no answer")
    assert refused.startswith("ERROR refuse failed: PermissionError: not yours")
    assert "pay_slowly took longer than its time limit of 0.2 s, and may still have its effect" in late
    assert resolved == "it happened"
    assert (
        "the policy of pay_and_fail needs a call of workflow tool-call:pay_and_fail, and this is one of tool-call"
        in (elsewhere.error)
    )
    assert {tool: len(paid(tmp_path / tool)) for tool in tools} == tools


async def test_limits_of_a_tool_count_over_its_workers(tmp_path: Path, server: ServerThread) -> None:
    log = tmp_path / "log"
    calls = [("pay_in_turn", {"log": str(log), "number": number}) for number in range(5)]
    address = server.address
    with (
        policy_worker(tmp_path, address),
        policy_worker(tmp_path, address),
        policy_caller(tmp_path, address, *calls) as caller,
    ):
        assert results(caller) == [f"receipt for {number}" for number in range(5)]
    async with NexumClient(server.address) as client:
        ids = [one.execution_id for one in await client.list_executions(workflow_id="tool-call:pay_in_turn")]
        found = [(await client.get_execution(one, with_attempts=True)).execution.nodes[0] for one in ids]
    attempts = sorted((one for node in found for one in node.attempts), key=lambda one: one.started_ms)
    assert len(attempts) == 5
    for earlier, later in pairwise(attempts):
        assert earlier.ended_ms is not None
        assert earlier.ended_ms <= later.started_ms
    assert attempts[4].started_ms - attempts[0].started_ms >= 399  # the rate lets 3 begin at once, then one every 0.2 s


def test_tool_with_a_policy_is_refused_on_a_published_server(tmp_path: Path) -> None:
    with published_server(tmp_path) as address:
        call = ("pay_once", {"log": "log", "gate": "gate", "number": 1})
        with policy_caller(tmp_path, address, call) as caller:
            (text,) = results(caller)
    assert text.startswith("ERROR pay_once has a policy (time_limit=3600, effect=once), and")


def test_call_without_a_policy_is_stored_as_before() -> None:
    assert {name: tool.declaration for name, tool in TOOLS.items() if name in ("web_search", "visit_webpage")} == {
        "web_search": "time_limit=60",
        "visit_webpage": "time_limit=90",
    }
    assert TOOL_CALL.version_hash == "sha256:ecbc4427ccf7ee7a638c61d9aab61186792c674bce73f6242e9760d7beccb79c"
    call = ToolCallInput(tool_name="web_search", tool_args={"query": "Tokyo"})
    assert call.model_dump_json() == '{"tool_name":"web_search","tool_args":{"query":"Tokyo"}}'
