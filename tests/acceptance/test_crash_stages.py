"""SIGKILL of server, worker and caller at each stage of one call; effects are counted.

The stages: before the start is acknowledged; queued; running, before the effect; after the effect, before the result is
recorded; recorded, before the caller has the result. SIGSTOP holds a call at its stage, so nothing depends on timing.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness import KILLED, Process, Server, nexum_server
from processes import attempts, counting_worker, effects, recorded, stat, submitter, wait_until

TIMEOUT = 40.0  # seconds that the caller waits: longer than the server waits for a lost worker


class Scene:
    """The server, the worker and the caller of one call. Tests kill, freeze and restart these processes."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.stack = stack
        self.log, self.arrivals, self.gate = folder / "log", folder / "arrivals", folder / "gate"
        self.server: Server = stack.enter_context(nexum_server(folder))
        self.worker: Process | None = None
        self.caller: Process | None = None

    def start_worker(self) -> None:
        self.worker = self.stack.enter_context(counting_worker(self.folder, self.server.address))

    def restart_server(self) -> None:
        self.server = self.stack.enter_context(nexum_server(self.folder, port=self.server.port))

    def call(self, tool: str) -> Process:
        arguments = {"log": str(self.log), "gate": str(self.gate)}
        if tool == "gate_then_effect":
            arguments["arrivals"] = str(self.arrivals)
        self.caller = self.stack.enter_context(
            submitter(self.folder, self.server.address, tool, arguments, timeout=TIMEOUT)
        )
        return self.caller

    def records(self) -> list[dict[str, Any]]:
        return recorded(self.folder, self.server.address)

    def outcomes(self) -> list[str]:
        """Return the outcomes of the execution's attempts."""
        (execution,) = self.records()
        assert execution["status"] == "COMPLETED"
        return [one["outcome"] for one in attempts(execution)]

    def assert_done(self, caller: Process, outcomes: list[str], effects_seen: int) -> None:
        """Check the caller's result, the attempts' outcomes and the number of effects. All effects have one key."""
        assert caller.wait(TIMEOUT) == 0, caller.output
        assert self.outcomes() == outcomes
        assert caller.lines[-1] == f"RESULT attempt {len(outcomes)}"
        assert len(effects(self.log)) == effects_seen
        assert len({effect.key for effect in effects(self.log)}) == 1


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with ExitStack() as stack:
        yield Scene(tmp_path, stack)


def kill(process: Process) -> None:
    process.kill()
    assert process.popen.returncode in KILLED


@contextmanager
def frozen(process: Process) -> Iterator[None]:
    """Stop the process for the length of a `with`, or until it is killed."""
    os.kill(process.popen.pid, signal.SIGSTOP)
    wait_until(lambda: stat(process.popen.pid)[0] == "T", "it stands still")
    try:
        yield
    finally:
        if process.popen.poll() is None:
            os.kill(process.popen.pid, signal.SIGCONT)


# ---- Before the start is acknowledged --------------------------------------------------------------------------------


def test_call_survives_kill_of_server_before_the_start_is_acknowledged(scene: Scene) -> None:
    scene.start_worker()
    scene.gate.touch()
    with frozen(scene.server.process):
        caller = scene.call("gate_then_effect")
        caller.wait_for("no Nexum server answers", timeout=30)
        kill(scene.server.process)
    scene.restart_server()
    scene.assert_done(caller, ["COMPLETED"], 1)


def test_call_survives_kill_of_caller_before_the_start_is_acknowledged(scene: Scene) -> None:
    scene.start_worker()
    scene.gate.touch()
    with frozen(scene.server.process):
        caller = scene.call("gate_then_effect")
        caller.wait_for("no Nexum server answers", timeout=30)
        kill(caller)
    scene.assert_done(scene.call("gate_then_effect"), ["COMPLETED"], 1)


# ---- Queued ----------------------------------------------------------------------------------------------------------


def test_call_survives_kill_of_server_while_it_is_queued(scene: Scene) -> None:
    scene.gate.touch()
    caller = scene.call("gate_then_effect")
    caller.wait_for("Submitted")
    kill(scene.server.process)
    scene.restart_server()
    scene.start_worker()
    scene.assert_done(caller, ["COMPLETED"], 1)


def test_call_survives_kill_of_caller_while_it_is_queued(scene: Scene) -> None:
    scene.gate.touch()
    caller = scene.call("gate_then_effect")
    caller.wait_for("Submitted")
    kill(caller)
    again = scene.call("gate_then_effect")
    again.wait_for("already RUNNING, attached")
    scene.start_worker()
    scene.assert_done(again, ["COMPLETED"], 1)


# ---- Running, before its effect --------------------------------------------------------------------------------------


def running_before_effect(scene: Scene) -> Process:
    scene.start_worker()
    caller = scene.call("gate_then_effect")
    wait_until(lambda: bool(effects(scene.arrivals)), "the tool runs")
    return caller


def test_call_survives_kill_of_server_while_it_runs(scene: Scene) -> None:
    caller = running_before_effect(scene)
    kill(scene.server.process)
    scene.restart_server()
    scene.gate.touch()
    scene.assert_done(caller, ["COMPLETED"], 1)


def test_call_survives_kill_of_worker_before_its_effect(scene: Scene) -> None:
    caller = running_before_effect(scene)
    assert scene.worker is not None
    kill(scene.worker)
    scene.start_worker()
    scene.gate.touch()
    scene.assert_done(caller, ["LOST", "COMPLETED"], 1)


def test_call_survives_kill_of_caller_while_it_runs(scene: Scene) -> None:
    caller = running_before_effect(scene)
    kill(caller)
    again = scene.call("gate_then_effect")
    again.wait_for("already RUNNING, attached")
    scene.gate.touch()
    scene.assert_done(again, ["COMPLETED"], 1)


def test_call_survives_kill_of_server_and_worker_while_it_runs(scene: Scene) -> None:
    caller = running_before_effect(scene)
    assert scene.worker is not None
    kill(scene.server.process)
    kill(scene.worker)
    scene.restart_server()
    scene.start_worker()
    scene.gate.touch()
    # The server was restarted, so this lost attempt doesn't count towards the limit.
    scene.assert_done(caller, ["INTERRUPTED", "COMPLETED"], 1)


# ---- After the effect, before its record -----------------------------------------------------------------------------


def running_after_effect(scene: Scene) -> Process:
    scene.start_worker()
    caller = scene.call("effect_then_gate")
    wait_until(lambda: bool(effects(scene.log)), "the effect is done")
    return caller


def test_call_survives_kill_of_server_between_effect_and_record(scene: Scene) -> None:
    caller = running_after_effect(scene)
    assert scene.worker is not None
    with frozen(scene.server.process):
        scene.gate.touch()
        kill(scene.server.process)
    scene.worker.wait_for("lost the Nexum server")
    scene.restart_server()
    scene.assert_done(caller, ["COMPLETED"], 1)


def test_kill_of_worker_between_effect_and_record_repeats_the_effect_under_its_key(scene: Scene) -> None:
    caller = running_after_effect(scene)
    assert scene.worker is not None
    kill(scene.worker)
    scene.gate.touch()
    scene.start_worker()
    scene.assert_done(caller, ["LOST", "COMPLETED"], 2)


def test_call_survives_kill_of_caller_between_effect_and_record(scene: Scene) -> None:
    caller = running_after_effect(scene)
    kill(caller)
    scene.gate.touch()
    scene.assert_done(scene.call("effect_then_gate"), ["COMPLETED"], 1)


# ---- After the record, before the caller has it ----------------------------------------------------------------------


@contextmanager
def recorded_and_not_delivered(scene: Scene) -> Iterator[Process]:
    """Stop the caller before it has its result. When the result is recorded, yield the caller."""
    caller = running_after_effect(scene)
    with frozen(caller):
        scene.gate.touch()
        wait_until(lambda: [one["status"] for one in scene.records()] == ["COMPLETED"], "the result is recorded")
        yield caller


def test_call_survives_kill_of_server_between_record_and_delivery(scene: Scene) -> None:
    with recorded_and_not_delivered(scene) as caller:
        kill(scene.server.process)
        scene.restart_server()
    scene.assert_done(caller, ["COMPLETED"], 1)


def test_call_survives_kill_of_worker_between_record_and_delivery(scene: Scene) -> None:
    with recorded_and_not_delivered(scene) as caller:
        assert scene.worker is not None
        kill(scene.worker)
        scene.start_worker()
    scene.assert_done(caller, ["COMPLETED"], 1)


def test_call_survives_kill_of_caller_between_record_and_delivery(scene: Scene) -> None:
    with recorded_and_not_delivered(scene) as caller:
        kill(caller)
    again = scene.call("effect_then_gate")
    scene.assert_done(again, ["COMPLETED"], 1)
    assert "already COMPLETED (cached) ✓" in again.output
