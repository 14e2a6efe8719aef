"""The options of a budget on a command line, and what the command `budget` prints."""

from __future__ import annotations

import argparse
from typing import Any

from pydantic import ValidationError

from durable_autogen.record.budget import Budget, Spent, decide, has_prices, number_in_words, questions_of
from durable_autogen.record.events import check_session_id, read_record
from durable_autogen.recorded_sessions import has_begun, unknown_session, while_pruning
from nexum_engine.client import NexumClient
from nexum_engine.errors import InvalidRequest
from nexum_engine.report import printable

_LIMITS = (
    ("usd", "USD", "what the models' replies may cost, in US dollars"),
    ("tokens", "N", "prompt and completion tokens"),
    ("model-calls", "N", "calls to models"),
    ("seconds", "S", "how long programs may run the session, without its waits for a person"),
)


def add_limits(parser: argparse._ActionsContainer, prefix: str = "") -> None:
    """Add an option for each limit of a budget. `prefix` is the beginning of the options' names."""
    for name, metavar, words in _LIMITS:
        parser.add_argument(f"--{prefix}{name}", metavar=metavar, help=words)
    parser.add_argument(
        f"--{prefix}tool-calls", metavar="TOOL=N", action="append", help="calls of a tool; may be given repeatedly"
    )


def budget_of(args: argparse.Namespace, prefix: str = "") -> Budget | None:
    """Return the budget that the options give; None if they give none. Raises InvalidRequest for a wrong value."""
    given: dict[str, Any] = {
        name.replace("-", "_"): getattr(args, f"{prefix}{name}".replace("-", "_")) for name, _, _ in _LIMITS
    }
    tool_calls = {}
    for one in getattr(args, f"{prefix}tool-calls".replace("-", "_")) or ():
        tool, _, number = one.rpartition("=")
        if not tool:
            raise InvalidRequest(f"--{prefix}tool-calls: give TOOL=N, not {one!r}")
        tool_calls[tool] = number
    found = {name: value for name, value in {**given, "tool_calls": tool_calls or None}.items() if value is not None}
    try:
        return Budget.model_validate(found) if found else None
    except ValidationError as error:
        problem = error.errors()[0]
        option = ".".join(str(part) for part in problem["loc"]).replace("_", "-")
        raise InvalidRequest(f"--{prefix}{option}: {problem['msg']}, not {problem['input']!r}") from error


async def run_command(client: NexumClient, args: argparse.Namespace) -> str:
    """Run the command `budget`: decide about a session's budget, or report what it has spent; return the output."""
    check_session_id(args.session)
    raised = budget_of(args)
    if raised is None and args.stop is None:
        return await _report(client, args.session)
    if raised is not None and args.stop is not None:
        raise InvalidRequest("--stop stops the session, and a limit raises its budget: give one of them")
    await decide(client, args.session, raised, by=args.by, reason=args.stop or "")
    unbegun = "" if await has_begun(client, args.session) else "; it has not begun: the decision is kept for it"
    if raised is None:
        return f"session {args.session} stops when a limit of its budget is reached{unbegun}"
    return f"raised the budget of session {args.session} to {_limits(raised)}{unbegun}"


def _limits(budget: Budget) -> str:
    return ", ".join(
        [
            *([] if budget.usd is None else [f"${number_in_words(budget.usd)}"]),
            *([] if budget.tokens is None else [f"{budget.tokens:,} tokens"]),
            *([] if budget.model_calls is None else [f"{budget.model_calls:,} model call(s)"]),
            *(f"{limit:,} call(s) of {tool}" for tool, limit in budget.tool_calls.items()),
            *([] if budget.seconds is None else [f"{number_in_words(budget.seconds)} seconds"]),
        ]
    )


async def _report(client: NexumClient, session: str) -> str:
    """Return a text about what a session has spent, and about the budget decision that it waits for, if any."""
    record = await while_pruning(lambda: read_record(client, session))
    questions = await questions_of(client, session)
    if not record.history and not questions:
        raise unknown_session(session)
    spent = Spent.of(record, is_in_usd=has_prices())
    used = Budget(
        usd=spent.usd if has_prices() else None,
        tokens=spent.tokens,
        model_calls=spent.model_calls,
        tool_calls={tool: len(made) for tool, made in spent.tool_calls.items()},
        seconds=spent.active_ms / 1000,
    )
    lines = [f"session {session} has used {_limits(used)}"]
    if spent.unpriced:
        lines.append(f"no price is known for {', '.join(sorted(spent.unpriced))}")
    lines += [
        f"it waits for a decision about its budget: it has used {question.reason} (execution {execution.execution_id})"
        for question, execution in questions
        if not execution.status.ended
    ]
    return "\n".join(map(printable, lines))
