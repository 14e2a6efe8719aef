"""The demo's own server and worker: the worker ends with the demo. The demo survives if its server or worker ends."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Process
from processes import (
    QUESTION,
    answer,
    attempts,
    children,
    demo,
    is_alive,
    recorded,
    run_demo,
    send,
    wait_until,
)

if sys.platform != "linux":
    pytest.skip("finds the demo's processes in /proc", allow_module_level=True)

GONE_WITHIN = 2.0  # seconds after the demo's end
OTHER_QUESTION = "What is the difference between asyncio and threading in Python?"


OPENED = "this program opened the database"


def started(process: Process) -> dict[str, int]:
    """Wait until the demo has opened the database and started its worker; return the ids of its children."""
    process.wait_for(OPENED)
    wait_until(lambda: set(children(process.popen.pid)) == {"worker"}, "the worker is started")
    return children(process.popen.pid)


def assert_gone(pids: dict[str, int], since: float) -> None:
    with contextlib.suppress(AssertionError):
        left = max(0.0, GONE_WITHIN - (time.monotonic() - since))
        wait_until(lambda: not any(map(is_alive, pids.values())), "gone", timeout=left)
    assert {name for name, pid in pids.items() if is_alive(pid)} == set()


def freeze_worker(process: Process) -> dict[str, int]:
    """Stop the worker before it takes a task, so that every call waits until the worker gets SIGCONT."""
    pids = started(process)
    os.kill(pids["worker"], signal.SIGSTOP)
    return pids


# ---- No child outlives its demo --------------------------------------------------------------------------------------


def test_no_child_is_left_after_a_normal_end(tmp_path: Path) -> None:
    with demo(tmp_path, QUESTION) as process:
        pids = started(process)
        assert process.wait() == 0
        assert_gone(pids, time.monotonic())


@pytest.mark.parametrize(
    ("end", "code", "moment"),
    [
        (Process.kill, -signal.SIGKILL, OPENED),
        (Process.kill, -signal.SIGKILL, "Submitted"),
        (Process.terminate, -signal.SIGTERM, "Submitted"),
        (Process.interrupt, 130, OPENED),
        (Process.interrupt, 130, "Submitted"),
    ],
    ids=["SIGKILL early", "SIGKILL", "SIGTERM", "Ctrl+C early", "Ctrl+C"],
)
def test_no_child_is_left_two_seconds_after_the_demo_was_ended(
    tmp_path: Path, end: Callable[[Process], None], code: int, moment: str
) -> None:
    with demo(tmp_path, QUESTION) as process:
        pids = started(process)
        if moment == "Submitted":
            process.wait_for(moment)
        end(process)
        since = time.monotonic()
        assert process.wait() == code
        assert_gone(pids, since)
        assert "Traceback" not in process.output


def test_ctrl_c_within_a_call_prints_a_message_and_the_next_run_attaches(tmp_path: Path) -> None:
    with demo(tmp_path, QUESTION) as process:
        pids = freeze_worker(process)
        process.wait_for("waiting: no worker polls for tool-call-offline")
        process.interrupt()
        send(pids["worker"], signal.SIGCONT)
        since = time.monotonic()
        assert process.wait() == 130
        assert_gone(pids, since)
        assert process.lines[-1] == "interrupted; the same command continues from what is recorded"
        assert "Traceback" not in process.output
    code, output = run_demo(tmp_path, QUESTION)
    assert code == 0
    assert len(recorded(tmp_path)) == 4
    assert re.search(r"Tool calls: 2 executed, \d cached, \d attached", output)


# ---- A demo outlives its database and its worker ---------------------------------------------------------------------


def test_demo_opens_a_new_database_when_its_file_is_deleted(tmp_path: Path) -> None:
    with demo(tmp_path, QUESTION) as process:
        pids = freeze_worker(process)
        process.wait_for("Submitted")
        process.wait_for("Submitted")
        for file in (tmp_path / ".nexum").glob("local.db*"):
            file.unlink()
        process.wait_for("the server in this program ended (database")
        os.kill(pids["worker"], signal.SIGCONT)
        assert process.wait() == 0
    assert "Tokyo" in answer(process.output)
    assert "Traceback" not in process.output
    assert len(recorded(tmp_path)) == 4


def test_demo_restarts_a_killed_worker_and_finishes(tmp_path: Path) -> None:
    with demo(tmp_path, QUESTION) as process:
        pids = freeze_worker(process)
        process.wait_for("waiting:")
        os.kill(pids["worker"], signal.SIGKILL)
        process.wait_for("[Nexum] worker.py ended (exit -9): restarted it")
        assert process.wait() == 0
    assert "Tokyo" in answer(process.output)
    assert len(recorded(tmp_path)) == 4


def test_demo_fails_when_its_workers_keep_dying(tmp_path: Path) -> None:
    with demo(tmp_path, QUESTION) as process:
        worker = freeze_worker(process)["worker"]
        process.wait_for("waiting:")
        for _ in range(5):
            os.kill(worker, signal.SIGKILL)
            process.wait_for("worker.py ended (exit -9): restarted it")
            wait_until(lambda: "worker" in children(process.popen.pid), "another worker is started")
            worker = children(process.popen.pid)["worker"]
            os.kill(worker, signal.SIGSTOP)
        os.kill(worker, signal.SIGKILL)
        assert process.wait() == 2
    assert process.lines[-1] == "error: worker.py ended again: giving up after 5 restarts within a minute"
    assert "Traceback" not in process.output


# ---- Two demos -------------------------------------------------------------------------------------------------------


def test_two_demos_at_once_in_one_folder_share_every_execution(tmp_path: Path) -> None:
    with demo(tmp_path, QUESTION) as one, demo(tmp_path, QUESTION) as other:
        ended = [(process.wait(), process.output) for process in (one, other)]
    # On a busy machine, one demo may give up waiting for the session before the other demo has ended.
    ended = [
        run_demo(tmp_path, QUESTION) if code == 2 and "is being run" in output else (code, output)
        for code, output in ended
    ]
    assert [code for code, _ in ended] == [0, 0]
    (said,) = {answer(output).replace("\n", "") for _, output in ended}
    assert said
    outcomes = [[attempt["outcome"] for attempt in attempts(execution)] for execution in recorded(tmp_path)]
    assert [one[-1] for one in outcomes] == ["COMPLETED"] * 4
    # If the demo with the server ends first, the other demo takes over the server. On a busy machine, a worker may be
    # too late to reconnect, and its task is handed out again.
    assert {outcome for one in outcomes for outcome in one[:-1]} <= {"INTERRUPTED", "LOST"}


def test_two_demos_at_once_in_two_folders_have_a_server_and_a_record_each(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    with demo(folders[0], QUESTION) as one, demo(folders[1], OTHER_QUESTION) as other:
        assert one.wait() == 0
        assert other.wait() == 0
    assert "Tokyo" in answer(one.output)
    assert "asyncio" in answer(other.output)
    assert len([process for process in (one, other) if f" is in use: {OPENED} and listens on " in process.output])
    for folder, process in zip(folders, (one, other), strict=True):
        assert f"({folder}/.nexum/local.db)" in process.output
        assert len(recorded(folder)) == 4


def test_second_demo_shares_the_first_ones_server_and_survives_its_end(tmp_path: Path) -> None:
    with demo(tmp_path, QUESTION) as first:
        pids = freeze_worker(first)
        first.wait_for("waiting:")
        with demo(tmp_path, OTHER_QUESTION) as second:
            second.wait_for("Submitted")
            assert OPENED not in second.output
            first.kill()
            os.kill(pids["worker"], signal.SIGCONT)
            second.wait_for(f"the server does not answer: {OPENED}")
            assert second.wait() == 0
        assert first.wait() == -signal.SIGKILL
    assert "asyncio" in answer(second.output)
    assert "an error" not in second.output
    assert "is unknown to this server" not in second.output


def test_stale_server_address_leads_no_run_to_another_folders_server(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        (folder / ".nexum").mkdir(parents=True)
    with demo(folders[0], QUESTION) as first:
        freeze_worker(first)
        left = folders[1] / ".nexum" / "local.db.address"
        left.write_bytes((folders[0] / ".nexum" / "local.db.address").read_bytes())
        code, output = run_demo(folders[1], OTHER_QUESTION)
    assert code == 0
    assert OPENED in output
    assert len(recorded(folders[1])) == 4
    assert not left.exists()
