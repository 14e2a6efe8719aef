"""Reports on executions: text for a person (80 columns), and JSON for a program."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone

from nexum_engine import jsontext
from nexum_engine.records import (
    Attempt,
    DeclaredTool,
    Execution,
    ExecutionStatus,
    Node,
    NodeStatus,
    NodeType,
    Outcome,
    PendingApproval,
    UnknownNode,
)

WIDTH = 80
_EXCERPT_LINES = 4
_SHOWN_ITEMS = 20


def as_json(
    shown: Execution | Sequence[Execution] | Sequence[PendingApproval] | Sequence[UnknownNode] | Sequence[DeclaredTool],
) -> str:
    """Return an execution or a list as indented JSON."""
    value = asdict(shown) if isinstance(shown, Execution) else [asdict(one) for one in shown]
    return json.dumps(value, indent=2, ensure_ascii=True)


def as_json_line(execution: Execution) -> str:
    """Return the execution as JSON in one line."""
    return json.dumps(asdict(execution), ensure_ascii=True)


HEADING = f"{'EXECUTION':<39} {'STATUS':<11} {'STARTED':<10} WORKFLOW"


def table(executions: Sequence[Execution], now_ms: int) -> str:
    """Return a table of executions. A session has further lines, with its question and its calls."""
    if not executions:
        return "no executions"
    return "\n".join([HEADING, *(row(one, now_ms) for one in executions)])


def row(one: Execution, now_ms: int) -> str:
    """Return the lines of the table that show one execution, or one session."""
    session, name, status = one.session, one.execution_id, one.status.value
    if session is not None:
        name = f"session {session.session}"
        if one.status is ExecutionStatus.RUNNING and not session.is_running:
            status = "interrupted"
    facts = f"{status:<11} {age(now_ms - one.created_ms):<10} {_cut(one.workflow_id, 17)}"
    name = _cut(name, WIDTH)
    # Don't cut a name that is longer than its column: a person passes it to another command.
    first = [name, f"{'':<39} {facts}"] if len(name) > 39 else [f"{name:<39} {facts}"]
    lines = [line.rstrip() for line in first]
    if session is not None:
        if session.question:
            lines.append(f"    {_cut(session.question, WIDTH - 4)}")
        has_summary = session.question or session.calls or session.tokens
        counts = f"{session.calls:,} call(s), {session.tokens:,} token(s), " if has_summary else ""
        lines.append(f"    {counts}{session.events:,} event(s)")
    return "\n".join(lines)


def changes(execution: Execution) -> list[str]:
    """Return lines that say what has started and ended in `execution`. A later call has these lines and new ones."""
    lines = [f"{execution.execution_id} started {_moment(execution.created_ms)}"]
    for node in execution.nodes:
        name = _cut(node.node_id, WIDTH - 48)
        decisions = _decisions(node)
        for attempt in node.attempts:
            if attempt in decisions:
                lines.append(f"{name} decision {attempt.attempt}{_by(attempt)} {_moment(attempt.ended_ms or 0)}")
                lines += _wrapped(attempt.error, "    ") if attempt.error else []
                continue
            lines.append(f"{name} attempt {attempt.attempt} began {_moment(attempt.started_ms)}")
            if attempt.ended_ms is not None:
                took = seconds(attempt.started_ms, attempt.ended_ms)
                lines.append(f"{name} attempt {attempt.attempt} {attempt.outcome.value} after {took}")
                lines += _wrapped(attempt.error, "    ") if attempt.error else []
        if node.status not in (NodeStatus.PENDING, NodeStatus.READY, NodeStatus.RUNNING):
            lines.append(f"{name} is {node.status.value}")
    if execution.status.ended:
        lines.append(f"{execution.execution_id} is {execution.status.value}")
    return lines


def details(execution: Execution, children: Sequence[Execution] = ()) -> str:
    """Return one execution with its nodes and attempts, as text.

    `children` are the executions that the nodes started.
    """
    took = f", took {seconds(execution.created_ms, execution.ended_ms)}" if execution.ended_ms else ""
    lines = [
        f"execution  {printable(execution.execution_id)}",
        *_field("workflow", execution.workflow_id),
        *_field("version", execution.version_hash),
        f"status     {execution.status.value}",
        # Leave the time out if it is unknown: a published server sends it only in lists.
        *([f"started    {_moment(execution.created_ms)}{took}"] if execution.created_ms else []),
    ]
    if execution.parent_execution_id:
        lines += _field("started by", f"{execution.parent_node_id} of {execution.parent_execution_id}")
    if execution.idempotency_key:
        lines += _field("key", execution.idempotency_key)
    if execution.attributes:
        lines += _field("attributes", ", ".join(f"{name}={value}" for name, value in execution.attributes.items()))
    lines += _field("input", execution.input_json)
    if execution.error:
        lines += _field("error", execution.error)
    for node in execution.nodes:
        kind = f" ({printable(node.node_type)})" if node.node_type else ""
        lines += ["", f"node {_cut(node.node_id, WIDTH - 33)}{kind} {node.status.value}"]
        if node.due_ms is not None:
            lines.append(f"  waits    until {_moment(node.due_ms)}, at the longest")
        if waits_for_person(node):
            lines.append("  waits    for a person: its effect is UNKNOWN (nexum resolve)")
        decisions = _decisions(node)
        for attempt in node.attempts:
            lines += _attempt(attempt, is_decision=attempt in decisions)
        if node.error and (not node.attempts or node.attempts[-1].error != node.error):
            lines += _field("  note", node.error)
        if node.progress_json and not execution.status.ended:
            lines += _field("  progress", node.progress_json)
        lines += _children([child for child in children if child.parent_node_id == node.node_id])
        if node.output_json is not None:
            lines += _field("  output", node.output_json)
    return "\n".join(lines)


def _children(started: Sequence[Execution]) -> list[str]:
    """Return lines about the executions that a node started. For a MAP node, show only the items without a result."""
    lines = []
    items = [child for child in started if child.child_index is not None]
    if items:
        counts = Counter(child.status.value for child in items)
        lines.append(f"  items    {len(items):,}: {', '.join(f'{n:,} {status}' for status, n in counts.items())}")
    shown = [child for child in started if child.child_index is None or child.status is not ExecutionStatus.COMPLETED]
    for child in shown[:_SHOWN_ITEMS]:
        name = "child   " if child.child_index is None else f"item {child.child_index:<4}"
        lines.append(f"  {name} {_cut(child.execution_id, WIDTH - 26)} {child.status.value}")
        if child.error:
            lines += _wrapped(child.error, " " * 13)
    if len(shown) > _SHOWN_ITEMS:
        lines.append(f"           ... and {len(shown) - _SHOWN_ITEMS:,} more")
    return lines


def approvals(pending: Sequence[PendingApproval], now_ms: int) -> str:
    """Return some lines for each node that waits for approval: how long it has waited, and what it wants to do."""
    if not pending:
        return "nothing waits for approval"
    lines = []
    for one in pending:
        since = f"    of {_cut(one.workflow_id, WIDTH - 30)}, began to wait {age(now_ms - one.since_ms)}"
        lines += [_ids(one), since, *_asked(one.input_json)]
    return "\n".join(lines)


def unknown(nodes: Sequence[UnknownNode], now_ms: int) -> str:
    """Return some lines for each node whose effect is unknown: the input, and what is known about the attempt."""
    if not nodes:
        return "no effect is unknown"
    lines = []
    for one in nodes:
        lines += [
            _ids(one),
            f"    of {_cut(one.workflow_id, WIDTH - 35)}, UNKNOWN since {age(now_ms - one.since_ms)}",
            *_asked(one.input_json),
            f"    attempt    {one.attempt}, began {_moment(one.started_ms)}",
            f"    worker     {_cut(one.worker_id, WIDTH - 20)}",
            f"    heartbeat  {f'{_moment(one.heartbeat_ms)}, the last' if one.heartbeat_ms else 'none'}",
            *_wrapped(one.error, " " * 15),
        ]
    return "\n".join(lines)


def tools(declared: Sequence[DeclaredTool]) -> str:
    """Return some lines for each tool: how it is called, its policy, and whether a session or workers declared it."""
    if not declared:
        return "no connected worker or run has declared a tool"
    lines = []
    for one in declared:
        whose = f"session {one.session}" if one.session else f"{one.senders} worker(s)"
        lines += [*tool(one), f"    declared by {_cut(whose, WIDTH - 16)}"]
    return "\n".join(lines)


def tool(declared: DeclaredTool) -> list[str]:
    """Return two lines about a tool: how it is called, and its policy."""
    fields = json.loads(declared.policy_json).items()
    shown = ", ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in fields)
    return [printable(declared.signature or declared.name), f"    {printable(shown) or 'no policy'}"]


def _ids(one: PendingApproval | UnknownNode) -> str:
    # Don't cut the two ids: a person passes them to `approve`, `reject` or `resolve`.
    return f"{printable(one.execution_id)} {printable(one.node_id)}"


def _asked(input_json: str) -> list[str]:
    """Return lines with the fields of an execution's input. Don't cut the values: a person decides about them."""
    if input_json in ("", "{}", "null"):
        return []
    try:
        value = json.loads(input_json)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        return _whole("input", input_json)
    return [
        line
        for name, part in value.items()
        if part not in ("", None)
        for line in _whole(name, part if isinstance(part, str) else json.dumps(part, ensure_ascii=False))
    ]


def _whole(name: str, value: str) -> list[str]:
    """Return the lines of a named value, uncut. Escape the characters that aren't printable, and keep all spaces."""
    text, name = jsontext.escaped(value), f"{_cut(name, WIDTH // 2):<10}"
    width = WIDTH - 6 - len(name)
    parts = [text[start : start + width] for start in range(0, len(text), width)] or [""]
    return [f"    {name} {parts[0]}", *(f"{' ' * (5 + len(name))}{part}" for part in parts[1:])]


def waits_for_person(node: Node) -> bool:
    """Return whether the node waits for a person because its effect is unknown."""
    return node.status is NodeStatus.WAITING and bool(node.attempts) and node.attempts[-1].outcome is Outcome.UNKNOWN


def _decisions(node: Node) -> list[Attempt]:
    """Return the attempts that are decisions of a person."""
    if node.node_type == NodeType.HUMAN_APPROVAL:
        return list(node.attempts)
    pairs = zip(node.attempts, node.attempts[1:], strict=False)
    return [later for earlier, later in pairs if earlier.outcome is Outcome.UNKNOWN]


def last_decision(nodes: Iterable[Node]) -> tuple[Node, Attempt] | None:
    """Return the last decision that a person has made about one of the nodes, and its node."""
    made = [(node, decision) for node in nodes for decision in _decisions(node)]
    return max(made, key=lambda one: one[1].ended_ms or 0, default=None)


def decision_in_words(node: Node, decision: Attempt, now_ms: int) -> str:
    """Return who made a decision about a node, when, and which one."""
    verb = "resolved"
    if node.node_type == NodeType.HUMAN_APPROVAL:
        verb = "approved" if decision.outcome is Outcome.COMPLETED else "rejected"
    who = printable(decision.worker_id) or "somebody"
    when = age(now_ms - (decision.ended_ms or 0))
    return f"{who} {verb} {node.node_id} {when}{decision.error and f': {printable(decision.error)}'}"


def cancel_in_words(execution: Execution, now_ms: int) -> str:
    """Return who cancelled an execution, and when, as far as the server knows."""
    when = f" {age(now_ms - execution.ended_ms)}" if execution.ended_ms else ""
    return f"{printable(execution.error) or 'cancelled'}{when}"


def _by(decision: Attempt) -> str:
    return f" by {_cut(decision.worker_id, WIDTH - 60)}" if decision.worker_id else ""


def _attempt(attempt: Attempt, *, is_decision: bool) -> list[str]:
    took = seconds(attempt.started_ms, attempt.ended_ms) if attempt.ended_ms else "still running"
    kind, who, moment = "attempt", "worker", f"{_moment(attempt.started_ms)}  {took}"
    if is_decision:
        kind, who, moment = "decided", "by", _moment(attempt.ended_ms or 0)
    lines = [
        f"  {kind} {attempt.attempt:<2} {attempt.outcome.value:<11} {moment}",
        *([f"             {who} {_cut(attempt.worker_id, WIDTH - 20)}"] if attempt.worker_id else []),
    ]
    if attempt.error:
        lines += _wrapped(attempt.error, " " * 13)
    return lines


def _field(name: str, value: str) -> list[str]:
    lines = _wrapped(value, " " * 11)
    return [f"{name:<10} {lines[0].lstrip()}", *lines[1:]] if lines else []


def _wrapped(value: str, indent: str) -> list[str]:
    # Break long words, too: JSON has few spaces, and a terminal that breaks a line doesn't indent the rest.
    lines = textwrap.wrap(
        printable(value[: WIDTH * (_EXCERPT_LINES + 1)]), WIDTH - 1, initial_indent=indent, subsequent_indent=indent
    )
    if len(lines) > _EXCERPT_LINES or len(value) > WIDTH * (_EXCERPT_LINES + 1):
        lines = [*lines[:_EXCERPT_LINES], f"{indent}... ({len(value):,} characters; --json has them all)"]
    return lines


def printable(text: str) -> str:
    """Return `text` with each control character replaced by a space. Some servers accept names with such characters."""
    return "".join(char if char.isprintable() else " " for char in text)


def _cut(text: str, width: int) -> str:
    text = printable(text)
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _moment(ms: int) -> str:
    try:
        moment = datetime.fromtimestamp(ms / 1000, tz=timezone.utc)
    except (ValueError, OverflowError, OSError):  # some servers may send a number that is not a time
        return f"at {ms} ms since 1970"
    return moment.isoformat(sep=" ", timespec="milliseconds")[:-6] + " UTC"


def seconds(start_ms: int, end_ms: int) -> str:
    """Return the duration between two times in seconds, as text."""
    if end_ms < start_ms:
        return "an unknown time (the clock was set back)"
    return f"{(end_ms - start_ms) / 1000:.2f} s"


def size(count: int) -> str:
    """Return a number of bytes as text, in its largest unit."""
    amount, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:,.0f} {unit}" if unit == "bytes" or amount >= 100 else f"{amount:.1f} {unit}"


def age(ms: int) -> str:
    """Return the age `ms` as text, in its largest unit. A clock that was set back makes an age negative."""
    if ms <= -1000:
        return "in the future"
    amount, unit = ms / 1000, "s"
    for limit, larger in ((60, "min"), (60, "h"), (24, "d")):
        if amount < limit:
            break
        amount, unit = amount / limit, larger
    return f"{int(amount)} {unit} ago"
