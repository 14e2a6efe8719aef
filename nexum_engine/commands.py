"""The commands that list, show and change executions, and the command that lists tools.

The commands ask a server. If no server is named, and no server answers, they open the database themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import os
import sys
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from nexum_engine import jsontext, report
from nexum_engine.client import NexumClient
from nexum_engine.clock import SystemClock
from nexum_engine.errors import (
    Conflict,
    InvalidRequest,
    NexumError,
    NotANexumServer,
    NotFound,
    ServerUnavailable,
    perhaps_sent,
)
from nexum_engine.location import default_database_url
from nexum_engine.options import attribute, count, moment, user_name
from nexum_engine.records import (
    Attempt,
    Execution,
    ExecutionStatus,
    Node,
    NodeStatus,
    NodeType,
    Outcome,
    PendingApproval,
    UnknownNode,
)
from nexum_engine.screen import Screen
from nexum_engine.server_or_database import Executions, InDatabase, OnServer, on_server_or_database
from nexum_engine.store import database_exists, waits

WATCH_INTERVAL = 1.0  # seconds
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_commands(commands: Commands) -> list[argparse.ArgumentParser]:
    """Add the commands to the parser of the command line, and return them."""
    added = [
        *_add_execution_commands(commands),
        *_add_approval_commands(commands),
        *_add_effect_commands(commands),
        *_add_worker_commands(commands),
    ]
    for command in added:
        command.set_defaults(run=_run)
    return added


def _add_execution_commands(commands: Commands) -> list[argparse.ArgumentParser]:
    ps = commands.add_parser(
        "ps",
        help="list executions, newest first",
        description="List executions, newest first. A durable session is one row: its latest run, with the session's "
        "question, calls and tokens.",
    )
    ps.set_defaults(answer=_ps, refresh=_refresh_list)
    ps.add_argument("--workflow", default="", help="only executions of this workflow, without grouping sessions")
    ps.add_argument(
        "--status",
        default="",
        type=str.upper,
        help="only executions with this status: RUNNING, COMPLETED, FAILED or CANCELLED",
    )
    ps.add_argument("--key", default="", metavar="PREFIX", help="only those whose idempotency key begins with PREFIX")
    ps.add_argument(
        "--since",
        type=moment,
        default=0,
        metavar="TIME",
        help="only those that were started after TIME: an age (30s, 15m, 2h, 7d) or a date (2026-01-31, "
        "2026-01-31T12:00: local time, or with Z or +01:00)",
    )
    ps.add_argument("--until", type=moment, default=0, metavar="TIME", help="only those that were started before TIME")
    ps.add_argument(
        "--attr",
        type=attribute,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="only those with this attribute; if you repeat the option, only those with all of them",
    )
    ps.add_argument("--all", action="store_true", help="list each execution of a session, too")
    ps.add_argument(
        "--limit",
        type=count(1, 1000),
        default=20,
        metavar="N",
        help="how many to list (default: %(default)s, at most 1000)",
    )
    ps.add_argument(
        "--watch",
        action="store_true",
        help="refresh the list each second until Ctrl+C; without a terminal, print what changes",
    )
    ps.add_argument("--json", action="store_true", help="print JSON; with --watch, print a line for each change")
    show = commands.add_parser(
        "show",
        help="show an execution with its nodes and attempts",
        description="Show an execution with its nodes and attempts.",
    )
    show.set_defaults(answer=_show, refresh=_refresh_execution)
    show.add_argument(
        "--follow",
        action="store_true",
        help="refresh until the execution ends; without a terminal, print what happens. The exit code is 0 if it "
        "COMPLETED, else 1",
    )
    _add_execution(show, "ps")
    show.add_argument("--json", action="store_true", help="print JSON; with --follow, print a line for each change")
    cancel = commands.add_parser("cancel", help="cancel an execution", description="Cancel an execution.")
    cancel.set_defaults(answer=_cancel)
    _add_execution(cancel, "ps")
    _add_by(cancel)
    retry = commands.add_parser(
        "retry",
        help="continue a FAILED execution at its failed node",
        description="Continue a FAILED execution at its failed node, with fresh retries. Recorded results are kept.",
    )
    retry.set_defaults(answer=_retry)
    _add_execution(retry, "ps")
    return [ps, show, cancel, retry]


def _add_approval_commands(commands: Commands) -> list[argparse.ArgumentParser]:
    approvals = commands.add_parser(
        "approvals",
        help="list the nodes that wait for a person's approval",
        description="List the HUMAN_APPROVAL nodes that wait for a person.",
    )
    approvals.set_defaults(answer=_approvals)
    approvals.add_argument("--json", action="store_true", help="print JSON")
    approve = commands.add_parser(
        "approve",
        help="approve a node that waits for approval: the node completes",
        description="Approve a HUMAN_APPROVAL node: it completes, and its execution continues.",
    )
    reject = commands.add_parser(
        "reject",
        help="reject a node that waits for approval: the node and its execution fail",
        description="Reject a HUMAN_APPROVAL node: the node and its execution fail.",
    )
    for command in (approve, reject):
        command.set_defaults(answer=_approve_or_reject)
        command.add_argument(
            "execution", nargs="?", default="", metavar="EXECUTION", help="the execution's id, as approvals prints it"
        )
        command.add_argument(
            "--session",
            default="",
            metavar="ID",
            help="instead of EXECUTION: decide about all calls of this session that wait",
        )
        _add_node(command, "approvals")
        _add_by(command)
    approve.add_argument("--comment", default="", help="stored with the approval")
    approve.add_argument(
        "--args",
        type=_not_null,
        metavar="JSON",
        help="an answer that is stored with the approval: for a tool call, the arguments to call the tool with instead",
    )
    reject.add_argument("--reason", default="", help="stored as the error of the node and the execution")
    return [approvals, approve, reject]


def _add_effect_commands(commands: Commands) -> list[argparse.ArgumentParser]:
    unknown = commands.add_parser(
        "unknown",
        help="list the nodes whose effect may or may not have happened",
        description="List the nodes whose effect may or may not have happened. Each waits until a person resolves it.",
    )
    unknown.set_defaults(answer=_unknown)
    unknown.add_argument("--json", action="store_true", help="print JSON")
    resolve = commands.add_parser(
        "resolve",
        # argparse would write the alternatives in one long line.
        usage="%(prog)s [-h] [--by NAME] [--attempt N]\n"
        "       [--nexum HOST:PORT] [--database-url URL]\n"
        "       (--result JSON | --not-done | --failed REASON) EXECUTION [NODE]",
        help="say whether the effect of an UNKNOWN node has happened",
        description="Say whether the effect of an UNKNOWN node has happened. Look at the target of the effect first.",
    )
    resolve.set_defaults(answer=_resolve)
    _add_execution(resolve, "unknown")
    _add_node(resolve, "unknown")
    _add_by(resolve)
    decision = resolve.add_mutually_exclusive_group(required=True)
    decision.add_argument(
        "--result",
        type=_json,
        default=argparse.SUPPRESS,  # with the default None, argparse takes `--result null` for no option
        metavar="JSON",
        help="the effect has happened: the node completes with this result",
    )
    decision.add_argument(
        "--not-done", action="store_true", help="the effect has not happened: the node is handed out again"
    )
    decision.add_argument("--failed", metavar="REASON", help="the node and its execution fail")
    resolve.add_argument(
        "--attempt",
        type=count(1, 1_000_000),
        default=0,
        metavar="N",
        help="the attempt that you have looked at, as unknown prints it. If another attempt is in doubt by now, the "
        "decision is refused (needed if a person has decided about an earlier attempt)",
    )
    return [unknown, resolve]


def _add_worker_commands(commands: Commands) -> list[argparse.ArgumentParser]:
    tools = commands.add_parser(
        "tools",
        help="list the tools of connected workers and runs, with their policies",
        description="List the tools of the workers and durable runs that are connected to the server, with their "
        "policies. Of a run, list the tools that have a policy.",
    )
    tools.set_defaults(answer=_tools)
    tools.add_argument("--json", action="store_true", help="print JSON")
    send = commands.add_parser(
        "send",
        help="send an event to an execution",
        description="Send an event to an execution. The event completes the node that waits for it. If no node waits "
        "for the event yet, the event is kept.",
    )
    send.set_defaults(answer=_send)
    _add_execution(send, "ps")
    send.add_argument("name", metavar="NAME", help="the event's name")
    send.add_argument(
        "payload", nargs="?", default="null", type=_json, metavar="JSON", help="the output of the node (default: null)"
    )
    send.add_argument("--key", default="", help="an idempotency key: a second event with this key changes nothing")
    return [tools, send]


def _add_execution(command: argparse.ArgumentParser, lister: str) -> None:
    command.add_argument("execution", metavar="EXECUTION", help=f"the execution's id, as {lister} prints it")


def _add_node(command: argparse.ArgumentParser, lister: str) -> None:
    command.add_argument(
        "node",
        nargs="?",
        default="",
        metavar="NODE",
        help=f"the node's name, as {lister} prints it (needed if several nodes of the execution wait, or if a "
        "person has decided about another one)",
    )


def _add_by(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--by",
        default=user_name(),
        metavar="NAME",
        help="who does it (default: %(default)s). A server with tokens records the name of the token instead",
    )


def _json(text: str) -> Any:
    """Read a JSON value from the command line."""
    try:
        return jsontext.parse(text, "the value")
    except InvalidRequest as error:
        raise argparse.ArgumentTypeError(f"{error}; a text needs quotes: '\"text\"'") from error


def _not_null(text: str) -> Any:
    """Read the answer of an approval. An approval without an answer has null, so null can't be an answer."""
    value = _json(text)
    if value is None:
        raise argparse.ArgumentTypeError("the answer can't be null: give another value, or leave out the option")
    return value


class PartlyDecided(Conflict):
    """Some decisions of a command were refused: `failures` says which and why. `done` has a line for each other one."""

    def __init__(self, done: Sequence[str], failures: Sequence[str]) -> None:
        super().__init__("; ".join(failures))
        self.done, self.failures = done, failures


def _run(args: argparse.Namespace) -> int:
    """Run a command of this module; return the exit code."""
    if getattr(args, "watch", False) or getattr(args, "follow", False):
        return asyncio.run(watch(args))
    try:
        say(asyncio.run(look(args)))
    except PartlyDecided as partly:
        for line in partly.done:
            say(line)
        for failure in partly.failures:
            complain(failure)
        return 1
    return 0


async def look(args: argparse.Namespace) -> str:
    """Run a command of this module, but don't watch; return what to print."""
    has_new_key = args.command == "send" and not args.key
    if has_new_key:
        # If the server ends before it answers, the command sends the event again, and the event must not count twice.
        args.key = uuid.uuid4().hex
    try:
        return await on_server_or_database(
            args, lambda client: args.answer(args, OnServer(client)), lambda store: args.answer(args, InDatabase(store))
        )
    except ServerUnavailable as error:
        if has_new_key:
            raise perhaps_sent(error, args.key) from error
        raise


async def _ps(args: argparse.Namespace, source: Executions) -> str:
    found = await source.find(args)
    return report.as_json(found) if args.json else report.table(found, SystemClock().now_ms())


async def _show(args: argparse.Namespace, source: Executions) -> str:
    execution, children = await _with_children(source, args.execution)
    return report.as_json(execution) if args.json else report.details(execution, children)


async def _approvals(args: argparse.Namespace, source: Executions) -> str:
    pending = await source.approvals()
    return _as_json(pending) if args.json else report.approvals(pending, SystemClock().now_ms()) + _more(pending)


async def _unknown(args: argparse.Namespace, source: Executions) -> str:
    nodes = await source.unknown()
    return _as_json(nodes) if args.json else report.unknown(nodes, SystemClock().now_ms()) + _more(nodes)


async def _tools(args: argparse.Namespace, source: Executions) -> str:
    declared = await source.tools()
    return report.as_json(declared) if args.json else report.tools(declared)


async def _send(args: argparse.Namespace, source: Executions) -> str:
    await source.send(args.execution, args.name, args.payload, idempotency_key=args.key)
    return f"sent {args.name} to {args.execution}"


def _more(waiting: Sequence[PendingApproval | UnknownNode], separator: str = "\n") -> str:
    """Return a note that more nodes may wait, if the list of waiting nodes is as long as it can be. Else return ""."""
    if len(waiting) < waits.MAX_WAITING:
        return ""
    return f"{separator}(only the {waits.MAX_WAITING:,} that have waited the longest are listed)"


def _as_json(waiting: Sequence[PendingApproval] | Sequence[UnknownNode]) -> str:
    """Return waiting nodes as JSON. If more nodes may wait, say so on standard error."""
    if note := _more(waiting, ""):
        with contextlib.suppress(OSError):  # standard error itself may have failed
            print(note, file=sys.stderr, flush=True)
    return report.as_json(waiting)


async def _approve_or_reject(args: argparse.Namespace, source: Executions) -> str:
    """Approve or reject a node, or all waiting calls of a session. Return a line for each node."""
    if bool(args.execution) == bool(args.session):
        raise InvalidRequest("give either an EXECUTION or --session")
    approves = args.command == "approve"
    if args.session and approves and args.args is not None:
        raise InvalidRequest("--args are the arguments of one call: give its EXECUTION instead of --session")

    def stands(node: Node, made: Attempt) -> bool:
        if not approves:
            return node.status is NodeStatus.FAILED and made.outcome is Outcome.FAILED
        return node.status is NodeStatus.COMPLETED and _is_same(_recorded(node).get("answer"), args.args)

    verb = "approved" if approves else "rejected"
    decision = _Decision(
        source,
        NodeType.HUMAN_APPROVAL,
        partial(source.approve, approver=args.by, comment=args.comment, answer=args.args)
        if approves
        else partial(source.reject, approver=args.by, reason=args.reason),
        stands,
        f"is {verb}",
    )
    if args.execution:
        return await decision.make(args.execution, args.node)
    pending = await source.approvals()
    chosen = [(one.execution_id, one.node_id) for one in pending if await _session_of(source, one) == args.session]
    if not chosen:
        raise Conflict(f"no call of session {args.session} waits for approval{_more(pending, ' ')}")
    done: list[str] = []
    failures: list[str] = []
    for execution_id, node in chosen:
        try:
            done.append(await decision.make(execution_id, node))
        except NexumError as error:  # such as: another person was faster
            if not done and not isinstance(error, (Conflict, NotFound)):
                raise  # for instance, there is no server: the other decisions would fail, too
            # If only the answer of the server was lost, the decision is on record.
            is_not = "may not be" if isinstance(error, ServerUnavailable) else "is not"
            failures.append(f"{node} of {execution_id} {is_not} {verb}: {error}")
    if failures:
        raise PartlyDecided(done, failures)
    return "\n".join(done)


async def _session_of(source: Executions, pending: PendingApproval) -> object:
    """Return the session of a tool call that waits for approval, or None if `pending` is no tool call."""
    # The list of approvals leaves out a long input.
    input_json = pending.input_json or (await source.get(pending.execution_id)).input_json
    value = jsontext.parse(input_json or "null", "the input")
    return value.get("session") if isinstance(value, dict) and "tool" in value else None


async def _resolve(args: argparse.Namespace, source: Executions) -> str:
    output = getattr(args, "result", None)

    def stands(node: Node, made: Attempt) -> bool:
        if report.waits_for_person(node) or args.attempt not in (0, made.attempt - 1):
            return False  # another attempt is in doubt, or the decision was made about another attempt
        if args.not_done or args.failed is not None:
            return made.outcome is Outcome.FAILED and args.not_done == (made.error == waits.NOT_DONE)
        return made.outcome is Outcome.COMPLETED and _is_same(_recorded(node), output)

    decide = partial(
        source.resolve,
        resolved_by=args.by,
        output=output,
        not_done=args.not_done,
        failed=args.failed,
        attempt=args.attempt,
    )
    done = f"is {'COMPLETED' if args.failed is None else 'FAILED'}"
    if args.not_done:
        done = (
            "has not happened: a worker, or the session's next run, makes the call (or cancels it, if the program no "
            "longer makes it)"
        )
    return await _Decision(source, NodeType.EFFECT, decide, stands, done).make(args.execution, args.node)


@dataclass(frozen=True)
class _Decision:
    """A person's decision about a node."""

    source: Executions
    node_type: NodeType
    decide: Callable[[str, str], Awaitable[None]]
    """Records the decision about a node of an execution. Raises Conflict if the node doesn't wait for one."""
    stands: Callable[[Node, Attempt], bool]
    """Returns whether the last decision about a node is this one, and still counts."""
    done: str
    """What the command says about the node when it has recorded the decision, such as `is approved`."""

    async def make(self, execution_id: str, node_id: str) -> str:
        """Make the decision, unless the same one was made before; return a line about it.

        Without `node_id`, decide about the execution's only node that waits. Raises Conflict, with the decision that
        counts, if another one was made.
        """
        try:
            chosen = node_id or await self._only_node(execution_id)
            await self.decide(execution_id, chosen)
        except Conflict as refused:
            # Another person may have been faster, or the answer to this person's own command was lost.
            made = self._last((await self.source.get(execution_id)).nodes, node_id)
            if made is None:
                raise
            words = report.decision_in_words(*made, SystemClock().now_ms())
            if not self.stands(*made):
                raise Conflict(f"{refused}; {words}") from refused
            return f"already done: {words}"
        return f"{chosen} of {execution_id} {self.done}"

    async def _only_node(self, execution_id: str) -> str:
        """Return the name of the execution's only node that waits. Raises Conflict, InvalidRequest."""
        execution = await self.source.get(execution_id)
        is_approval = self.node_type is NodeType.HUMAN_APPROVAL
        is_waiting = _waits_for_approval if is_approval else report.waits_for_person
        names = [node.node_id for node in execution.nodes if is_waiting(node)]
        if not names:
            what = "approval" if is_approval else "a decision about its effect"
            raise Conflict(f"no node of execution {execution_id} waits for {what}: it is {execution.status.value}")
        if len(names) > 1:
            raise InvalidRequest(f"several nodes of execution {execution_id} wait: name one of {', '.join(names)}")
        made = self._last(execution.nodes)
        if made is not None and made[0].node_id != names[0]:
            # A person who repeats the command after a lost answer means the earlier node.
            words = report.decision_in_words(*made, SystemClock().now_ms())
            raise InvalidRequest(f"{words}. Now {names[0]} waits: name the node, if you mean {names[0]}")
        return names[0]

    def _last(self, nodes: Sequence[Node], node_id: str = "") -> tuple[Node, Attempt] | None:
        return report.last_decision(
            node for node in nodes if node.node_type == self.node_type and node_id in ("", node.node_id)
        )


def _recorded(node: Node) -> Any:
    return jsontext.parse(node.output_json or "{}", "the result")


def _is_same(one: object, other: object) -> bool:
    return jsontext.same(jsontext.dump(one, "the value"), jsontext.dump(other, "the value"))


def _waits_for_approval(node: Node) -> bool:
    return node.status is NodeStatus.WAITING and node.node_type == NodeType.HUMAN_APPROVAL


async def _cancel(args: argparse.Namespace, source: Executions) -> str:
    if await source.status(args.execution) is ExecutionStatus.CANCELLED:
        execution = await source.get(args.execution)
        return f"already done: {args.execution} was {report.cancel_in_words(execution, SystemClock().now_ms())}"
    await source.cancel(args.execution, by=args.by)
    return f"{args.execution} is CANCELLED"


async def _retry(args: argparse.Namespace, source: Executions) -> str:
    try:
        await source.retry(args.execution)
    except Conflict:
        # An earlier command may have retried it, and its answer was lost.
        if await source.status(args.execution) is not ExecutionStatus.RUNNING:
            raise
        return f"{args.execution} is RUNNING: there is nothing to retry"
    return f"{args.execution} is RUNNING again"


async def _with_children(source: Executions, execution_id: str) -> tuple[Execution, list[Execution]]:
    """Return an execution, and the executions that its nodes started, the oldest first."""
    execution = await source.get(execution_id)
    children: list[Execution] = []
    if any(node.node_type in (NodeType.MAP, NodeType.SUBWORKFLOW) for node in execution.nodes):
        while page := await source.children(execution_id, children[-1].execution_id if children else ""):
            children += page
    return execution, children[::-1]


# ---- Watching --------------------------------------------------------------------------------------------------------


async def watch(args: argparse.Namespace) -> int:
    """Run `ps --watch` until Ctrl+C, or `show --follow` until the execution ends. Return the exit code."""
    if args.database_url is not None:
        raise InvalidRequest("--watch and --follow need a server: leave out --database-url")
    address = os.environ.get("NEXUM_ADDRESS") if args.nexum is None else args.nexum
    screen = Screen(say, in_place=sys.stdout.isatty() and not args.json)
    if address or args.command == "show" or database_exists(default_database_url()):
        code: int | None = await on_server_or_database(
            args,
            lambda client: args.refresh(args, OnServer(client), screen),
            lambda store: args.refresh(args, InDatabase(store), screen),
        )
        if code is not None:
            return code
    # Don't keep the database open while waiting: the next run's embedded server must be able to open it.
    while True:
        with contextlib.suppress(ServerUnavailable, NotANexumServer):
            async with NexumClient(address or None) as client:
                while True:
                    code = await args.refresh(args, OnServer(client), screen)
                    if code is not None:
                        return code
                    await asyncio.sleep(WATCH_INTERVAL)
        screen.note(
            f"no server answers on {address}: waiting for it (Ctrl+C ends this)"
            if address
            else "no server or run is active here: this shows the changes when one is (Ctrl+C ends this)"
        )
        await asyncio.sleep(WATCH_INTERVAL)


async def _refresh_list(args: argparse.Namespace, source: Executions, screen: Screen) -> None:
    """Show the list of `ps` as it is now."""
    found = await source.find(args)
    now_ms = SystemClock().now_ms()
    news = [(repr(one), report.as_json_line(one) if args.json else report.row(one, now_ms)) for one in reversed(found)]
    lines = report.table(found, now_ms).splitlines()
    screen.show(lines, news if args.json else [("", report.HEADING), *news])


async def _refresh_execution(args: argparse.Namespace, source: Executions, screen: Screen) -> int | None:
    """Show the execution of `show` as it is now. Return the exit code if the execution has ended."""
    execution, children = await _with_children(source, args.execution)
    facts = [report.as_json_line(execution)] if args.json else report.changes(execution)
    screen.show(report.details(execution, children).splitlines(), [(fact, fact) for fact in facts])
    if not execution.status.ended:
        return None
    return 0 if execution.status is ExecutionStatus.COMPLETED else 1


def say(text: str) -> None:
    """Print and flush `text`. Raises BrokenPipeError, on every system, if nobody reads standard output."""
    try:
        print(text, flush=True)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # Raise BrokenPipeError here, too: Windows reports EINVAL for a pipe that nobody reads.
        raise BrokenPipeError(errno.EPIPE, "nobody reads the output") from error


def complain(error: str) -> None:
    """Print an error on standard error."""
    with contextlib.suppress(OSError):  # standard error itself may have failed
        print(f"error: {report.printable(error)}", file=sys.stderr, flush=True)
