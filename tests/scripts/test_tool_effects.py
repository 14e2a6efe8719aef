"""Tools in workers that may run only once: what happens if a worker dies between the effect and its record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness import Process, Server, published_server
from policies import asked_in, decide, paid, policy_caller, policy_worker, result
from processes import attempts, recorded, wait_until

from nexum_engine.client import NexumClient
from support.tools import TOOLS
from workflow import TOOL_CALL, ToolCallInput


class Scene:
    """A call whose first worker is killed after its effect."""

    def __init__(self, folder: Path, server: Server, tool: str) -> None:
        self.folder, self.server, self.tool = folder, server, tool
        self.log, self.gate, self.down = folder / "log", folder / "gate", folder / "log.down"
        self.call = {"log": str(self.log), "gate": str(self.gate), "number": 7}

    @contextmanager
    def killed_after_its_effect(self) -> Iterator[Process]:
        """Yield the caller, with a second worker."""
        with policy_caller(self.folder, self.server.address, self.tool, self.call) as caller:
            with policy_worker(self.folder, self.server.address) as worker:
                wait_until(lambda: bool(paid(self.log)), "the effect")
                worker.kill()
            with policy_worker(self.folder, self.server.address):
                yield caller

    def resolve(self, execution_id: str, **how: Any) -> None:
        decide(self.server.address, "resolve", execution_id, "tool_call", resolved_by="ann", **how)

    def outcomes(self) -> list[str]:
        (execution,) = recorded(self.folder, self.server.address)
        return [one["outcome"] for one in attempts(execution)]


@pytest.fixture
def once(tmp_path: Path, server: Server) -> Scene:
    return Scene(tmp_path, server, "pay_once")


@pytest.fixture
def with_reconcile(tmp_path: Path, server: Server) -> Scene:
    return Scene(tmp_path, server, "pay_and_find")


# ---- Without reconcile -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "text"), [("receipt 17", "receipt 17"), ({"number": 17}, '{"number": 17}')])
def test_lost_effect_waits_for_a_person_who_gives_the_result(once: Scene, given: object, text: str) -> None:
    with once.killed_after_its_effect() as caller:
        line = caller.wait_for("is UNKNOWN")
        execution_id = asked_in(line)
        assert "attempt 1 by worker" in line
        once.resolve(execution_id, output=given)
        caller.wait_for(f"RESULT {text}")
        assert result(once.folder, once.server.address, once.tool, once.call) == f"RESULT {text}"
    assert len(paid(once.log)) == 1


def test_person_who_found_no_effect_lets_the_tool_run(once: Scene) -> None:
    with once.killed_after_its_effect() as caller:
        execution_id = asked_in(caller.wait_for("is UNKNOWN"))
        once.log.unlink()
        once.gate.touch()
        once.resolve(execution_id, not_done=True)
        caller.wait_for("RESULT receipt for")
    assert len(paid(once.log)) == 1


def test_person_who_found_a_failure_fails_the_call_for_good(once: Scene) -> None:
    with once.killed_after_its_effect() as caller:
        execution_id = asked_in(caller.wait_for("is UNKNOWN"))
        once.resolve(execution_id, failed="the card was refused")
        assert "the card was refused" in caller.wait_for("ERROR ToolCallFailed")
        once.gate.touch()
        for file in once.folder.glob(".session-*"):  # with and without the session file
            assert "the card was refused" in result(once.folder, once.server.address, once.tool, once.call)
            file.unlink()
    assert len(paid(once.log)) == 1


def test_tool_that_is_late_is_unknown(tmp_path: Path, server: Server) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    call = {"log": str(log), "gate": str(gate)}
    with (
        policy_worker(tmp_path, server.address),
        policy_caller(tmp_path, server.address, "pay_slowly", call) as caller,
    ):
        line = caller.wait_for("is UNKNOWN")
        assert "ran longer than its time limit of 0.2 s, and may still have its effect" in line
        decide(server.address, "resolve", asked_in(line), "tool_call", output="done")
        caller.wait_for("RESULT done")
    assert len(paid(log)) == 1


def test_tool_that_failed_does_not_run_again(tmp_path: Path, server: Server) -> None:
    log = tmp_path / "log"
    with policy_worker(tmp_path, server.address):
        for _ in range(2):
            text = result(tmp_path, server.address, "pay_and_fail", {"log": str(log)})
            assert text.startswith("ERROR ToolCallFailed pay_and_fail failed: ConnectionError: no answer")
            (tmp_path / ".session-s.json").unlink()
    assert len(paid(log)) == 1


# ---- With reconcile --------------------------------------------------------------------------------------------------


def test_reconcile_finds_the_result(with_reconcile: Scene) -> None:
    with with_reconcile.killed_after_its_effect() as caller:
        caller.wait_for("RESULT found 7")
    assert len(paid(with_reconcile.log)) == 1
    assert with_reconcile.outcomes() == ["LOST", "COMPLETED"]


def test_tool_runs_if_reconcile_finds_nothing(tmp_path: Path, server: Server) -> None:
    log, gate, arrivals = tmp_path / "log", tmp_path / "gate", tmp_path / "arrivals"
    call = {"arrivals": str(arrivals), "gate": str(gate), "log": str(log), "number": 7}
    with policy_caller(tmp_path, server.address, "find_before_paying", call) as caller:
        with policy_worker(tmp_path, server.address) as worker:
            wait_until(lambda: bool(paid(arrivals)), "the tool has begun")
            worker.kill()
        gate.touch()
        with policy_worker(tmp_path, server.address):
            caller.wait_for("RESULT receipt for")
    assert len(paid(arrivals)) == 2
    assert len(paid(log)) == 1


def test_reconcile_that_fails_leaves_it_to_a_person(with_reconcile: Scene) -> None:
    with_reconcile.down.touch()
    with with_reconcile.killed_after_its_effect() as caller:
        line = caller.wait_for("is UNKNOWN")
        assert "reconcile of pay_and_find failed: ConnectionError: the log is down" in line
        with_reconcile.resolve(asked_in(line), output="receipt 17")
        caller.wait_for("RESULT receipt 17")
    assert len(paid(with_reconcile.log)) == 1


# ---- Retries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tool", "effects", "reason"), [("fail_twice", 2, "no answer"), ("refuse", 1, "not yours")])
def test_retries_follow_the_policy(tmp_path: Path, server: Server, tool: str, effects: int, reason: str) -> None:
    log = tmp_path / "log"
    with policy_worker(tmp_path, server.address):
        assert reason in result(tmp_path, server.address, tool, {"log": str(log)})
    assert len(paid(log)) == effects


# ---- Programs and servers that don't know the policy -----------------------------------------------------------------


async def test_worker_refuses_a_once_tool_whose_caller_declares_it_differently(tmp_path: Path, server: Server) -> None:
    log = tmp_path / "log"
    with policy_worker(tmp_path, server.address):
        async with NexumClient(server.address) as client:
            call = ToolCallInput(tool_name="pay_once", tool_args={"log": str(log), "gate": "g", "number": 1})
            started = await client.start_execution(TOOL_CALL, call)
            ended = (await client.get_execution(started.execution_id, wait=20)).execution
    assert "the policy of pay_once needs a call of workflow tool-call:pay_once, and this is one of tool-call" in (
        ended.error
    )
    assert paid(log) == []


def test_tool_with_a_policy_is_refused_on_a_published_server(tmp_path: Path) -> None:
    with published_server(tmp_path) as address:
        text = result(tmp_path, address, "pay_once", {"log": "log", "gate": "gate", "number": 1})
    assert text.startswith("ERROR InvalidRequest pay_once has a policy (time_limit=3600, effect=once), and")


def test_call_without_a_policy_is_stored_as_before() -> None:
    assert {name: tool.declaration for name, tool in TOOLS.items() if name in ("web_search", "visit_webpage")} == {
        "web_search": "time_limit=60",
        "visit_webpage": "time_limit=90",
    }
    assert TOOL_CALL.version_hash == "sha256:ecbc4427ccf7ee7a638c61d9aab61186792c674bce73f6242e9760d7beccb79c"
    call = ToolCallInput(tool_name="web_search", tool_args={"query": "Tokyo"})
    assert call.model_dump_json() == '{"tool_name":"web_search","tool_args":{"query":"Tokyo"}}'
