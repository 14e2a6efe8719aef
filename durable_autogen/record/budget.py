"""Budgets: limits of a session that count over all of its runs, and the question to a person when a limit is reached.

What a session has spent is counted from its record. So a crash, a re-run or a fork doesn't reset the count, and a
replayed call counts once. A budget is checked before each live call. If a limit is reached, the session asks a person,
as it does for the approval of a tool call (nexum_engine/approvals.py). A session numbers its questions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.util import find_spec
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError

from durable_autogen.errors import BudgetExceeded
from durable_autogen.record.events import (
    SERVER_PATIENCE,
    Call,
    Event,
    EventInput,
    Frozen,
    GivenUp,
    Kind,
    Record,
    Returned,
    Revoked,
    usage_of,
)
from durable_autogen.record.journal import Journal
from nexum_engine.approvals import NODE, Decision, ask, decided
from nexum_engine.client import NexumClient
from nexum_engine.connection import OUTAGE_PATIENCE
from nexum_engine.errors import Conflict, InvalidRequest, first_problem
from nexum_engine.jsontext import escaped
from nexum_engine.records import Execution
from nexum_engine.settings import Settings
from nexum_engine.workflow import workflow

NEARLY = 0.8
"""The fraction of a limit at which the session logs a warning."""


class Budget(Settings):
    """Limits of a session, counted over all of its runs. A limit that is None doesn't apply.

    Budget(usd=2.0, model_calls=50, tool_calls={"charge": 1})
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    usd: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """The maximum cost of model replies, in US dollars. This needs the package `genai-prices`."""
    tokens: int | None = Field(default=None, ge=0)
    """The maximum number of prompt and completion tokens."""
    model_calls: int | None = Field(default=None, ge=0)
    """The maximum number of calls to models, including those that failed or that a crash cut off."""
    tool_calls: Mapping[str, Annotated[int, Field(ge=0)]] = {}
    """The maximum number of calls of each tool, by its name. A call that is made again after a crash counts once."""
    seconds: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """The maximum time that programs run the session. Pauses between runs and waits for a person don't count."""

    def raised_by(self, other: Budget) -> Budget:
        """Return a copy in which each limit is at least that of `other`. A limit that is None stays None."""
        found: dict[str, Any] = {
            "tool_calls": {name: max(n, other.tool_calls.get(name, 0)) for name, n in self.tool_calls.items()}
        }
        for name in ("usd", "tokens", "model_calls", "seconds"):
            mine, others = getattr(self, name), getattr(other, name)
            found[name] = None if mine is None else max(mine, others or 0)
        return Budget(**found)


# ---- Prices ----------------------------------------------------------------------------------------------------------


def has_prices() -> bool:
    """Return whether the package `genai-prices` is installed. Don't import it: that takes 0.4 s."""
    return find_spec("genai_prices") is not None


def check_prices() -> None:
    """Raise InvalidRequest if the package `genai-prices` is not installed."""
    if not has_prices():
        raise InvalidRequest(
            "a budget in US dollars needs the package genai-prices: install it with pip install genai-prices, or limit "
            "the tokens instead"
        )


def price_of(model: str, prompt_tokens: int, completion_tokens: int, at_ms: int) -> float | None:
    """Return the cost of a reply at the time `at_ms`, in US dollars; None if the model has no known price.

    The prices are those in the package `genai-prices`: no server is asked.
    """
    from genai_prices import Usage, calc_price

    usage = Usage(input_tokens=prompt_tokens, output_tokens=completion_tokens)
    at = datetime.fromtimestamp(at_ms / 1000, tz=timezone.utc)
    try:
        return float(calc_price(usage, model, genai_request_timestamp=at).total_price)
    except LookupError:
        return None


# ---- What is spent ---------------------------------------------------------------------------------------------------


@dataclass
class Spent:
    """What a session has spent, over all of its runs."""

    is_in_usd: bool
    """Whether the cost is counted, too."""
    model_calls: int = 0
    tokens: int = 0
    usd: float = 0.0
    active_ms: int = 0
    """How long programs ran the session, up to the last event of each run."""
    tool_calls: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """The scopes of each tool's calls, by the tool's name."""
    unpriced: set[str] = field(default_factory=set)
    """The models without a known price."""
    unmetered: set[str] = field(default_factory=set)
    """The models whose replies don't say how many tokens they took."""

    @classmethod
    def of(cls, record: Record, *, is_in_usd: bool) -> Spent:
        """Count what a session has spent, from its record."""
        spent, counted = cls(is_in_usd), Record()
        for one in record.history:
            content = one.content if isinstance(one, Event) else None
            if not isinstance(content, GivenUp) or content.was_made:
                spent.count_call(one, counted.scope_of(one.address))
            if isinstance(one, Event):
                counted.add(one)
                spent.count_usage(one)
        spent.active_ms = _active_ms(one for one in record.history if isinstance(one, Event))
        return spent

    def count_call(self, call: Call | Event | EventInput, scope: str) -> None:
        """Count a call with this scope."""
        if call.kind is Kind.REPLY:
            self.model_calls += 1
        elif call.kind is Kind.TOOL:
            self.tool_calls[call.tool].add(scope)

    def count_usage(self, event: Event) -> None:
        """Add the tokens of a model's reply, and what they cost."""
        if event.kind is not Kind.REPLY or not isinstance(event.content, Returned):
            return
        if event.content.value.get("cached"):
            return  # the client took the reply from its own cache
        model = str(event.request.get("model", ""))
        prompt, completion = usage_of(event.content)
        self.tokens += prompt + completion
        if not prompt + completion:
            self.unmetered.add(model)
        elif self.is_in_usd:
            price = price_of(model, prompt, completion, event.recorded_ms)
            if price is None:
                self.unpriced.add(model)
            self.usd += price or 0


def _active_ms(events: Iterable[Event]) -> int:
    """Return the session's active time, with the time of revoked events.

    The `active_ms` of an event is the total at that event, without the time of revoked events. So it may be smaller
    than that of an earlier event, and the largest one isn't the whole time.
    """
    kept: dict[int, int] = {}
    total = reached = 0
    for event in events:
        if isinstance(event.content, Revoked):
            for seq in event.content.seqs:
                kept.pop(seq, None)
            reached = max(kept.values(), default=0)
        else:
            kept[event.seq] = event.active_ms
            total += max(0, event.active_ms - reached)
            reached = max(reached, event.active_ms)
    return total


@dataclass(frozen=True)
class Use:
    """How much of one limit is used."""

    used: float
    limit: float
    unit: str
    option: str
    """The option of the command `budget` that raises the limit."""

    @property
    def raised(self) -> str:
        """The option of the command `budget` that doubles the limit."""
        return f"{self.option}{2 * self.limit or 1}"

    def __str__(self) -> str:
        if self.unit == "$":
            return f"${number_in_words(self.used)} of ${number_in_words(self.limit)}"
        return f"{number_in_words(self.used)} of {number_in_words(self.limit)} {self.unit}"


def number_in_words(value: float) -> str:
    """Return a number with at most four decimals."""
    return f"{value:,.4f}".rstrip("0").rstrip(".")


# ---- Questions to a person -------------------------------------------------------------------------------------------


class BudgetQuestion(Frozen):
    """The question whether a session may spend more than its budget."""

    session: str
    number: int
    reason: str = ""
    """The limits that are reached. Empty if a person decided before the session asked."""
    decide_with: str = ""
    """The command that decides. `nexum approvals` shows it."""

    @property
    def key(self) -> str:
        """The idempotency key of the question."""
        return f"{budget_prefix(self.session)}{self.number:06d}"


BUDGET_QUESTION = workflow("budget", input=BudgetQuestion).human_approval(NODE).build()


def budget_prefix(session: str) -> str:
    """Return the beginning of the idempotency keys of a session's questions about its budget."""
    return f"{session}:budget/"


async def questions_of(
    client: NexumClient, session: str, *, patience: float = SERVER_PATIENCE
) -> list[tuple[BudgetQuestion, Execution]]:
    """Return a session's questions with their newest executions, ordered by number."""
    found: dict[int, tuple[BudgetQuestion, Execution]] = {}
    async for execution in client.all_executions(
        workflow_id=BUDGET_QUESTION.workflow_id,
        key_prefix=budget_prefix(session),
        with_nodes=True,
        patience=patience,
    ):
        question = BudgetQuestion.model_validate_json(execution.input_json)
        found.setdefault(question.number, (question, execution))  # the newest: a cancelled question may be asked again
    return [found[number] for number in sorted(found)]


async def decide(client: NexumClient, session: str, raised: Budget | None, *, by: str = "", reason: str = "") -> None:
    """Decide the question that the session waits for. If there is none, decide its next question in advance.

    `raised` holds the new limits. If it is None, the session stops at the limit, and its error contains `reason`.
    """
    while True:
        questions = await questions_of(client, session)
        waiting = [question for question, execution in questions if not execution.status.ended]
        number = questions[-1][0].number + 1 if questions else 1
        question = waiting[0] if waiting else BudgetQuestion(session=session, number=number)
        try:
            execution_id = await ask(client, BUDGET_QUESTION, question, question.key)
            if raised is None:
                await client.reject(execution_id, NODE, approver=by, reason=reason)
            else:
                answer = raised.model_dump(mode="json", exclude_defaults=True)
                await client.approve(execution_id, NODE, approver=by, comment=reason, answer=answer)
        except Conflict:
            continue  # the question was decided or asked in the meantime: look again
        return


class BudgetCheck:
    """The check of one run: it counts the run's calls, and asks a person when a limit is reached."""

    def __init__(self, budget: Budget, journal: Journal) -> None:
        self._budget = budget
        self._client = journal.client
        self._journal = journal
        self._command = journal.command("budget")
        """The command line that decides the question, without its options."""
        self._spent = Spent.of(journal.recorded, is_in_usd=budget.usd is not None)
        self._decided = 0
        """The number of the last question whose decision this run has applied."""
        self._warned: set[object] = set()
        """What this run has warned of: lines, and the nearly reached limits."""
        self._warn_of_models()

    def exceeded(self, call: Call, live_ms: int) -> list[Use]:
        """Return the reached limits that apply to this call. Log a warning for each limit that is nearly reached.

        `live_ms` is how long this run has been live, without the replay of the record.
        """
        uses = list(self._uses(call, live_ms))
        for use in uses:
            if NEARLY * use.limit <= use.used < use.limit:
                self._warn(f"session {self._journal.session} has used {use} of its budget", (use.option, use.limit))
        return [use for use in uses if use.used >= use.limit]

    def _uses(self, call: Call, live_ms: int) -> Iterator[Use]:
        """Yield the use of each limit that applies to this call."""
        budget, spent = self._budget, self._spent
        if call.kind is Kind.REPLY:
            if budget.model_calls is not None:
                yield Use(spent.model_calls, budget.model_calls, "model calls", "--model-calls ")
            if budget.tokens is not None:
                yield Use(spent.tokens, budget.tokens, "tokens", "--tokens ")
            if budget.usd is not None:
                yield Use(spent.usd, budget.usd, "$", "--usd ")
        if call.kind is Kind.TOOL and (limit := budget.tool_calls.get(call.tool)) is not None:
            made, scope = spent.tool_calls[call.tool], self._journal.recorded.scope_of(call.address)
            if scope not in made:  # else a crash cut the call off: the same call, made again, counts once
                yield Use(len(made), limit, f"calls of {call.tool}", f"--tool-calls {call.tool}=")
        if call.kind.is_call and budget.seconds is not None:
            yield Use((spent.active_ms + live_ms) // 1000, budget.seconds, "seconds", "--seconds ")

    def count_call(self, call: Call) -> None:
        """Count a call that is about to be made."""
        self._spent.count_call(call, self._journal.recorded.scope_of(call.address))

    def count_usage(self, event: Event) -> None:
        """Count the tokens and the cost of a call whose outcome has just been recorded."""
        self._spent.count_usage(event)
        self._warn_of_models()

    def _warn_of_models(self) -> None:
        for model in self._spent.unpriced:
            self._warn(
                f"no price is known for the model {model!r}: the budget's limit in dollars doesn't count its replies. "
                "Limit the tokens or the model calls, too"
            )
        if self._spent.is_in_usd or self._budget.tokens is not None:
            for model in self._spent.unmetered:
                self._warn(
                    f"the model {model!r} doesn't say how many tokens its replies take, so they don't count. If it "
                    "streams, let its client ask for the usage (stream_options)"
                )

    def _warn(self, line: str, about: object = None) -> None:
        """Log a warning, unless this run has logged the same line, or another line with the same `about`."""
        if (about or line) not in self._warned:
            self._warned.add(about or line)
            self._journal.log.warning("%s", line)

    async def ask(self, exceeded: Sequence[Use], waiting: Callable[[str], AbstractContextManager[None]]) -> None:
        """Apply the next decision about the budget. If there is none yet, ask a person and wait.

        For the length of the wait, enter `waiting(line)`; the line says how to decide. The caller must check the limits
        again afterwards: the decision may be an old one, or may raise a limit too little. Raises BudgetExceeded if a
        person has stopped the session.
        """
        session, words = self._journal.session, ", ".join(map(str, exceeded))
        ahead = [
            question
            for question, _ in await questions_of(self._client, session, patience=OUTAGE_PATIENCE)
            if question.number > self._decided
        ]
        options = " ".join(use.raised for use in exceeded)
        command = f"{self._command} {options}, or --stop"
        new = BudgetQuestion(session=session, number=self._decided + 1, reason=words, decide_with=command)
        question = ahead[0] if ahead else new
        line = (
            f"session {session} has used {words} of its budget, and waits for a decision. Raise the budget: "
            f"{self._command} {options}; or stop the session: {self._command} --stop"
        )
        self._journal.may_leave_open = True
        try:
            decision = await decided(
                self._client, BUDGET_QUESTION, question, question.key, waiting=lambda _: waiting(line)
            )
        except Conflict:
            return  # another call or a person began a different question of this number: the next `ask` reads it
        self._decided = max(self._decided, question.number)
        if decision.approved:
            self._raise_limits(decision)
        elif not ahead[1:]:  # else a later decision replaces this one: the next `ask` applies it
            reason = f": {decision.reason}" if decision.reason else ""
            stopped = escaped(f"{decision.by or 'a person'} stopped it{reason}")
            raise BudgetExceeded(
                f"session {session} has used {words} of its budget, and {stopped}. To continue, raise the budget "
                f"({self._command} {options}), and run the session again"
            )

    def _raise_limits(self, decision: Decision) -> None:
        """Raise the limits to those of a person's decision. Log a warning if the decision has none."""
        if not decision.answer:  # `nexum approve ID` without --args
            self._journal.log.warning(
                "the decision %s about the budget gives no new limits, so nothing has changed", decision.execution_id
            )
            return
        try:
            raised = Budget.model_validate(decision.answer)
        except ValidationError as error:
            self._journal.log.warning(
                "the decision %s about the budget holds no limits that can be read: %s",
                *(decision.execution_id, first_problem(error)),
            )
            return
        self._budget = self._budget.raised_by(raised)
