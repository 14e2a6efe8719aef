"""The output of ps and show: 80 columns for a person, JSON for a program."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from nexum_engine import report
from nexum_engine.records import (
    Attempt,
    Execution,
    ExecutionStatus,
    Node,
    NodeStatus,
    Outcome,
    PendingApproval,
    SessionSummary,
)

START = 1_700_000_000_000
LONG = "a word and averyveryverylongwordwithoutaspace" * 60

EXECUTION = Execution(
    execution_id="exec-01234567-89ab-cdef-0123-456789abcdef",
    workflow_id="w" * 200,
    version_hash=f"sha256:{'f' * 64}",
    status=ExecutionStatus.FAILED,
    input_json=json.dumps({"query": LONG}),
    idempotency_key="k" * 200,
    created_ms=START,
    ended_ms=START + 61_250,
    error=f"fetch: {LONG}\nsecond line\x1b[31m",
    nodes=(
        Node(
            "n" * 200,
            "COMPUTE",
            NodeStatus.FAILED,
            None,
            LONG,
            tuple(
                Attempt(n, f"host-{'x' * 300}", START, START + 1234, outcome, LONG)
                for n, outcome in enumerate(Outcome, start=1)
            ),
        ),
        Node("done", "EFFECT", NodeStatus.COMPLETED, json.dumps(LONG), ""),
        Node("now", "EFFECT", NodeStatus.RUNNING, None, "", (Attempt(1, "w1", START, None, Outcome.RUNNING, ""),)),
        Node("big", "EFFECT", NodeStatus.READY, None, "the task is 5,000,000 bytes"),
    ),
)


def test_output_with_long_names_fits_80_columns() -> None:
    long = replace(EXECUTION, attributes={"a" * 64: "b" * 200}, session=SessionSummary("s" * 64, 5, False, LONG, 3, 50))
    changes = "\n".join(report.changes(EXECUTION))
    texts = (report.details(long), report.table([EXECUTION, long], START + 5000), changes)
    lines = "\n".join(texts).split("\n")
    assert [line for line in lines if len(line) > report.WIDTH] == []


def test_table_has_whole_names() -> None:
    """The ids of a published server are wider than their column, and so are long session ids. They are not cut."""
    session = replace(EXECUTION, session=SessionSummary("s" * 64, 5, False, "", 0, 0))
    lines = report.table([EXECUTION, session], START + 5000).splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        report.HEADING,
        EXECUTION.execution_id,
        f"session {'s' * 64}",
    ]
    assert [line.split()[:2] for line in lines if "FAILED" in line] == [["FAILED", "5"]] * 2


def session_rows(status: ExecutionStatus, *, is_running: bool, question: str = "Why?", calls: int = 3) -> list[str]:
    summary = SessionSummary("s1", 1234, is_running, question, calls, 5000 * calls)
    return report.table([replace(EXECUTION, status=status, session=summary)], START + 5000).splitlines()[1:]


def test_session_is_a_row_with_its_question_and_counts() -> None:
    rows = session_rows(ExecutionStatus.COMPLETED, is_running=False)
    assert rows[0].split() == ["session", "s1", "COMPLETED", "5", "s", "ago", f"{'w' * 14}..."]
    assert rows[1:] == ["    Why?", "    3 call(s), 15,000 token(s), 1,234 event(s)"]
    assert session_rows(ExecutionStatus.RUNNING, is_running=True)[0].split()[2] == "RUNNING"
    assert session_rows(ExecutionStatus.RUNNING, is_running=False)[0].split()[2] == "interrupted"
    # A session that an earlier version of this project recorded has no summary.
    assert session_rows(ExecutionStatus.FAILED, is_running=False, question="", calls=0)[1:] == ["    1,234 event(s)"]


def test_changes_only_grow_while_execution_runs() -> None:
    before = report.changes(replace(EXECUTION, status=ExecutionStatus.RUNNING, nodes=EXECUTION.nodes[1:]))
    done = replace(EXECUTION.nodes[2], attempts=(Attempt(1, "w1", START, START + 10, Outcome.COMPLETED, ""),))
    after = report.changes(replace(EXECUTION, nodes=(EXECUTION.nodes[1], done, EXECUTION.nodes[3])))
    assert set(before) < set(after)
    assert set(after) - set(before) == {
        "now attempt 1 COMPLETED after 0.01 s",
        f"{EXECUTION.execution_id} is FAILED",
    }


def test_show_prints_workers_times_and_errors() -> None:
    text = report.details(EXECUTION)
    for outcome in Outcome:
        assert re.search(rf"attempt \d +{outcome.value} +2023-11-14 22:13:20.000 UTC +1.23 s", text)
    assert "worker host-xxx" in text
    assert "took 61.25 s" in text
    assert "still running" in text
    assert "note     the task is 5,000,000 bytes" in text
    assert f"({len(EXECUTION.input_json):,} characters; --json has them all)" in text


def test_details_removes_control_characters() -> None:
    assert "\x1b" not in report.details(EXECUTION)


def test_all_reports_remove_control_characters_of_names() -> None:
    name = "a\x1b[2J\x9b\x07b"
    attempt = Attempt(1, name, START, None, Outcome.RUNNING, name)
    node = Node(name, name, NodeStatus.READY, None, name, (attempt,))
    names = ("execution_id", "workflow_id", "version_hash", "input_json", "idempotency_key", "error")
    changed: dict[str, Any] = {**dict.fromkeys(names, name), "nodes": (node,)}
    execution = replace(EXECUTION, **changed)
    for text in (report.details(execution), report.table([execution], START), report.as_json(execution)):
        assert text.replace("\n", "").isprintable()


def test_approvals_show_long_names_of_fields_whole() -> None:
    pending = PendingApproval("exec-1", "boss", "w", START, json.dumps({"amount_in_cents": "9" * 100, "to": "ann"}))
    lines = report.approvals([pending], START).splitlines()
    shown = [line.split() for line in lines[2:]]
    assert shown == [["amount_in_cents", "9" * 59], ["9" * 41], ["to", "ann"]]
    assert max(map(len, lines)) <= report.WIDTH


def test_json_has_all_fields() -> None:
    one = json.loads(report.as_json(EXECUTION))
    assert one["error"] == EXECUTION.error
    assert one["nodes"][0]["attempts"][3]["outcome"] == "LOST"
    assert report.as_json([EXECUTION]).isascii()
    assert json.loads(report.as_json([EXECUTION])) == [one]


def test_age_is_in_its_largest_unit() -> None:
    assert [report.age(s * 1000) for s in (0, 59, 60, 3599, 3600, 86_400 * 3)] == [
        "0 s ago",
        "59 s ago",
        "1 min ago",
        "59 min ago",
        "1 h ago",
        "3 d ago",
    ]


def test_empty_table_says_no_executions() -> None:
    assert report.table([], START) == "no executions"


def test_clock_that_was_put_back_shows_no_negative_time() -> None:
    assert report.age(-315_359_999_000) == "in the future"
    assert report.age(-999) == "0 s ago"  # two clocks are never quite equal
    assert report.seconds(START, START - 5000) == "an unknown time (the clock was set back)"
    assert "in the future" in report.table([EXECUTION], START - 3_600_000)
    assert "took an unknown time" in report.details(replace(EXECUTION, ended_ms=START - 1))


@pytest.mark.parametrize("ms", [2**62, -(2**62)])
def test_impossible_time_of_another_server_is_shown_as_its_number(ms: int) -> None:
    assert f"at {ms} ms since 1970" in report.details(replace(EXECUTION, created_ms=ms))
