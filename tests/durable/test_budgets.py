"""Budgets: what a session has spent is counted from its record, and a person decides at a limit."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from autogen_core import CancellationToken
from autogen_core.models import ChatCompletionClient, CreateResult, RequestUsage, UserMessage
from autogen_core.tools import FunctionTool
from durable_agents import Scripted, asked, inside, new_session, reply
from harness import Server
from processes import run_script
from server_thread import ServerThread

from durable_autogen import Budget, BudgetExceeded, DurableSession, Parked, current_session, fork_session, list_sessions
from durable_autogen.__main__ import build_parser
from durable_autogen.budget_command import run_command
from durable_autogen.record.budget import BudgetQuestion, Spent, decide, questions_of
from durable_autogen.record.events import read_record
from durable_autogen.record.journal import Journal
from nexum_engine.approvals import NODE, server_option
from nexum_engine.client import NexumClient
from nexum_engine.errors import InvalidRequest
from nexum_engine.records import Execution, ExecutionStatus

Asking = Callable[[], Awaitable[Any]]


class Priced(Scripted):
    """A model with a known price, whose replies all have the same size."""

    model = "gpt-4o"

    async def create(self, messages: Any, **_: Any) -> CreateResult:
        await super().create(messages)
        return reply(usage=RequestUsage(prompt_tokens=1000, completion_tokens=100))


PRICE = 1000 * 2.5e-6 + 100 * 10e-6  # US dollars for one call of gpt-4o


async def question(
    client: NexumClient, session: str, number: int = 1, status: ExecutionStatus | None = None
) -> tuple[BudgetQuestion, Execution]:
    """Wait until the session's question of this number is asked and has the status; return it with its execution."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for one, execution in await questions_of(client, session):
            if one.number == number and status in (None, execution.status):
                return one, execution
        await asyncio.sleep(0.01)
    raise AssertionError(f"question {number} was not asked")


class Run:
    """A session of one program, with a budget. Its program runs in a task, and may be run again."""

    def __init__(self, server: Server, budget: Budget) -> None:
        self.server, self.budget, self.session = server, budget, new_session()
        self.happened: list[str] = []
        self.lines: list[str] = []
        self.client = NexumClient(server.address)

    def start(self, program: Asking, **more: Any) -> asyncio.Task[Any]:
        running = inside(self.server, program, self.session, self.lines, budget=self.budget, **more)
        return asyncio.create_task(running)

    async def decide(self, raised: Budget | None, number: int = 1, **more: str) -> BudgetQuestion:
        """Wait for a question, and decide it; return the question."""
        asked, _ = await question(self.client, self.session, number)
        await decide(self.client, self.session, raised, **more)
        return asked

    def told(self, text: str) -> list[str]:
        return [line for line in self.lines if text in line]


async def questions(run: Run) -> int:
    return len(await questions_of(run.client, run.session))


@pytest.mark.parametrize(
    ("nexum", "option"), [(None, ""), ("host:50051", " --nexum host:50051"), ("/folder/.nexum/local.db", "")]
)
def test_printed_command_names_a_server_but_no_database_file(nexum: str | None, option: str) -> None:
    """The command finds the folder's database, even while no server has the database open."""
    assert server_option(nexum) == option


async def test_parallel_calls_stop_at_the_limit_and_share_one_question(shared_server: Server) -> None:
    run = Run(shared_server, Budget(model_calls=3))

    async def program() -> list[str]:
        clients = [Scripted(run.happened, name="model") for _ in range(6)]
        return await asyncio.gather(*map(asked, clients))

    running = run.start(program)
    first = await run.decide(Budget(model_calls=5))
    assert first.reason == "3 of 3 model calls"
    assert len(run.happened) == 3
    second = await run.decide(Budget(model_calls=6), 2)
    assert second.reason == "5 of 5 model calls"
    assert len(set(await running)) == 6
    assert (len(run.happened), await questions(run)) == (6, 2)
    assert len(run.told("and waits for a decision")) == 2
    # A replay makes no call, and asks nothing.
    await run.start(program)
    assert (len(run.happened), await questions(run)) == (6, 2)


async def test_dollars_and_tokens_are_counted_from_the_record(shared_server: Server) -> None:
    run = Run(shared_server, Budget(usd=2 * PRICE, tokens=10_000))
    count = 2

    async def program() -> list[str]:
        model = Priced(run.happened)
        return [await asked(model) for _ in range(count)]

    await run.start(program)
    count = 10
    running = run.start(program)
    assert (await run.decide(Budget(usd=1))).reason == "$0.007 of $0.007"
    # The last call began below the limit of 10,000 tokens, so it is made. After it, the calls have taken 11,000 tokens.
    assert len(await running) == 10
    assert (len(run.happened), await questions(run)) == (10, 1)
    count = 11
    running = run.start(program)
    assert (await run.decide(Budget(tokens=20_000), 2)).reason == "11,000 of 10,000 tokens"
    await running


async def test_model_without_a_price_is_told_once_and_its_tokens_count(shared_server: Server) -> None:
    run = Run(shared_server, Budget(usd=1, tokens=10))

    async def program() -> list[str]:
        model = Scripted(run.happened)
        return [await asked(model) for _ in range(3)]

    running = run.start(program)
    assert (await run.decide(Budget(tokens=20))).reason == "10 of 10 tokens"
    await running
    assert run.told("no price") == [
        "no price is known for the model 'Scripted': the budget's limit in dollars doesn't count its replies. "
        "Limit the tokens or the model calls, too"
    ]


async def test_price_is_known_after_a_call_that_was_given_up(shared_server: Server) -> None:
    run = Run(shared_server, Budget(usd=1))

    async def hangs() -> None:
        await asyncio.Event().wait()

    async def program() -> None:
        model = Priced(run.happened, hangs)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asked(model), 0.5)
        await asked(model)

    await run.start(program)
    assert len(run.happened) == 2
    assert run.told("no price is known") == []


async def test_model_that_reports_no_usage_is_told_once(shared_server: Server) -> None:
    for budget, told in ((Budget(tokens=10), 1), (Budget(model_calls=10), 0)):
        run = Run(shared_server, budget)

        async def program(happened: list[str] = run.happened) -> list[str]:
            nothing = RequestUsage(prompt_tokens=0, completion_tokens=0)
            model = Scripted(happened, *(reply(usage=nothing) for _ in range(3)))
            return [await asked(model) for _ in range(3)]

        await run.start(program)
        assert len(run.told("doesn't say how many tokens its replies take")) == told


async def test_budget_in_dollars_needs_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    DurableSession("s", budget=Budget(tokens=1))
    with pytest.raises(InvalidRequest, match="pip install genai-prices"):
        DurableSession("s", budget=Budget(usd=1))


async def test_limit_of_a_tool_counts_its_calls_and_no_others(shared_server: Server) -> None:
    run = Run(shared_server, Budget(tool_calls={"charge": 1}))

    def charge(cents: int) -> str:
        run.happened.append(f"charge {cents}")
        return "charged"

    def look() -> str:
        run.happened.append("look")
        return "seen"

    async def program() -> None:
        token = CancellationToken()
        for arguments in ({"cents": 1}, {"cents": 2}):
            await FunctionTool(look, "").run_json({}, token)
            await FunctionTool(charge, "").run_json(arguments, token)

    running = run.start(program)
    assert (await run.decide(None, reason="once is enough", by="ann")).reason == "1 of 1 calls of charge"
    with pytest.raises(
        BudgetExceeded, match=r"used 1 of 1 calls of charge of its budget, and ann stopped it: once is enough\."
    ):
        await running
    assert run.happened == ["look", "charge 1", "look"]
    # The decision to stop stays in force until a person raises the budget.
    with pytest.raises(BudgetExceeded, match="once is enough"):
        await run.start(program)
    await decide(run.client, run.session, Budget(tool_calls={"charge": 2}))
    await run.start(program)
    assert run.happened == ["look", "charge 1", "look", "charge 2"]


async def test_run_that_may_park_ends_at_the_limit_when_its_other_calls_have_ended(shared_server: Server) -> None:
    run = Run(shared_server, Budget(model_calls=2))
    at_the_limit = asyncio.Event()

    async def late() -> str:
        await at_the_limit.wait()
        return "late"

    async def program() -> list[str]:
        clients = [Scripted(run.happened, late, "soon", "again", "more") for _ in range(1)]
        return await asyncio.gather(*(asked(client) for client in clients * 4))

    running = run.start(program, park=True)
    await question(run.client, run.session)
    assert not running.done()
    at_the_limit.set()
    with pytest.raises(Parked, match=r"used 2 of 2 model calls .* budget .* --model-calls 4"):
        await running
    # The call that was in flight at the limit is recorded.
    assert len(run.happened) == 2
    await decide(run.client, run.session, Budget(model_calls=4))
    await run.start(program, park=True)
    assert len(run.happened) == 4


async def test_fork_counts_what_it_copied(shared_server: Server) -> None:
    run = Run(shared_server, Budget(model_calls=2))

    async def program() -> list[str]:
        model = Scripted(run.happened)
        return [await asked(model) for _ in range(3)]

    running = run.start(program)
    await run.decide(Budget(model_calls=3))
    await running
    source, run.session = run.session, new_session()
    await fork_session(run.client, source, 2, run.session)
    running = run.start(program)
    # The decision of the original session does not count for the fork.
    assert (await run.decide(Budget(model_calls=9))).reason == "2 of 2 model calls"
    await running
    assert len(run.happened) == 4


async def test_time_of_a_wait_for_a_person_does_not_count(shared_server: Server) -> None:
    run = Run(shared_server, Budget(seconds=0))

    async def program() -> str:
        return await asked(Scripted(run.happened))

    running = run.start(program)
    await question(run.client, run.session)
    await asyncio.sleep(1.1)  # longer than the new limit
    assert (await run.decide(Budget(seconds=1))).reason == "0 of 0 seconds"
    await running
    assert await questions(run) == 1


async def test_time_that_another_program_ran_the_session_counts(shared_server: Server) -> None:
    run = Run(shared_server, Budget(seconds=1))

    class Slow(Scripted):
        async def create(self, messages: Any, **_: Any) -> CreateResult:
            await asyncio.sleep(1.1)  # longer than the limit
            return await super().create(messages)

    async def program(content: str) -> CreateResult:
        return await Slow(run.happened).create([UserMessage(content=content, source="user")])

    await run.start(lambda: program("one question"))
    # The run drops the recorded call, but the time that this call took still counts.
    running = run.start(lambda: program("another question"), on_drift="continue")
    assert (await run.decide(Budget(seconds=9))).reason == "1 of 1 seconds"
    await running
    assert len(run.happened) == 2


async def test_decision_before_the_limit_counts_and_a_useless_one_is_asked_again(shared_server: Server) -> None:
    run = Run(shared_server, Budget(model_calls=1))
    await decide(run.client, run.session, Budget(model_calls=2))

    async def program() -> list[str]:
        model = Scripted(run.happened)
        return [await asked(model) for _ in range(4)]

    running = run.start(program)
    for number, answer in ((2, {"model_cals": 9}), (3, None), (4, {"model_calls": 1})):
        _, execution = await question(run.client, run.session, number)
        assert len(run.happened) == 2
        await run.client.approve(execution.execution_id, NODE, answer=answer)
    await run.decide(Budget(model_calls=4), 5)
    await running
    assert (len(run.happened), await questions(run)) == (4, 5)
    assert len(run.told("holds no limits that can be read")) == len(run.told("gives no new limits")) == 1


async def test_list_of_sessions_shows_the_command_that_raises_the_budget(shared_server: Server) -> None:
    run = Run(shared_server, Budget(model_calls=0))
    running = run.start(lambda: asked(Scripted(run.happened)))
    waiting, _ = await question(run.client, run.session)
    (info,) = [one for one in await list_sessions(run.client) if one.session == run.session]
    assert "--model-calls 1" in waiting.decide_with
    words = f"has used 0 of 0 model calls of its budget, and waits for a decision: {waiting.decide_with}"
    assert info.questions == (words,)
    await decide(run.client, run.session, Budget(model_calls=1))
    await running


async def test_call_given_up_at_the_limit_is_not_counted(shared_server: Server) -> None:
    run = Run(shared_server, Budget(model_calls=1))
    is_given_up, has_more = asyncio.Event(), False

    async def program() -> None:
        model: ChatCompletionClient = Scripted(run.happened)
        await asked(model)
        waiting = asyncio.create_task(asked(model))
        await question(run.client, run.session)
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting
        is_given_up.set()
        await asked(model)
        if has_more:
            await asked(model)

    running = run.start(program)
    await is_given_up.wait()
    await run.decide(Budget(model_calls=2))
    await running
    assert (len(run.happened), await questions(run)) == (2, 1)
    # The next run counts from the record. If the given-up call counted, this run would ask again.
    has_more = True
    await decide(run.client, run.session, Budget(model_calls=3))
    await run.start(program)
    assert (len(run.happened), await questions(run)) == (3, 2)


async def test_model_call_that_a_crash_cut_off_counts_although_the_next_run_gives_it_up(
    shared_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(shared_server, Budget(model_calls=10))
    is_asked, is_over = asyncio.Event(), False

    async def hangs() -> str:
        is_asked.set()
        return await asyncio.Event().wait() and ""

    async def program() -> None:
        asking = asyncio.create_task(asked(Scripted(run.happened, hangs)))
        await (asyncio.sleep(0) if is_over else is_asked.wait())
        if not is_over:
            raise LookupError("a crash")
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await asked(Scripted(run.happened))

    async def nothing(*_: Any) -> None:
        """Leave the calls in flight open, as a kill does."""

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "_close_open", nothing)
        with pytest.raises(LookupError):
            await run.start(program)
    is_over = True
    await run.start(program)
    assert len(run.happened) == 2
    assert Spent.of(await read_record(run.client, run.session), is_in_usd=False).model_calls == 2


async def test_question_of_a_call_that_was_given_up_is_withdrawn_at_the_end_and_asked_again(
    shared_server: Server,
) -> None:
    run = Run(shared_server, Budget(model_calls=0))

    async def program() -> None:
        waiting = asyncio.create_task(asked(Scripted(run.happened)))
        await question(run.client, run.session)
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting

    await run.start(program)
    _, withdrawn = await question(run.client, run.session)
    assert withdrawn.status is ExecutionStatus.CANCELLED

    async def other_program() -> str:
        with current_session().agent("other"):
            return await asked(Scripted(run.happened))

    running = run.start(other_program, on_drift="continue")
    await question(run.client, run.session, status=ExecutionStatus.RUNNING)
    await run.decide(Budget(model_calls=1))
    await running
    assert len(run.happened) == 1


async def test_warning_comes_at_four_fifths_of_a_limit(shared_server: Server) -> None:
    run = Run(shared_server, Budget(model_calls=5))

    async def program() -> list[str]:
        model = Scripted(run.happened)
        return [await asked(model) for _ in range(5)]

    await run.start(program)
    assert run.told("of its budget") == [f"session {run.session} has used 4 of 5 model calls of its budget"]


@pytest.mark.parametrize(("budget", "begun"), [(None, 0), (Budget(model_calls=9), 1)])
async def test_beginning_of_a_model_call_is_recorded_only_with_a_budget(
    shared_server: Server, budget: Budget | None, begun: int
) -> None:
    """A call that a crash cuts off counts, so a session with a budget records that the call began."""
    session, found = new_session(), []

    class Model(Scripted):
        async def create(self, messages: Any, **_: Any) -> CreateResult:
            async with NexumClient(shared_server.address) as client:
                found.extend(await client.list_executions(workflow_id="agent-event", key_prefix=f"{session}/"))
            return await super().create(messages)

    async with DurableSession(session, nexum=shared_server.address, budget=budget):
        await asked(Model([]))
    assert len(found) == begun


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"usd": -1}, "usd: Input should be greater than or equal to 0 (given: -1)"),
        ({"usd": float("nan")}, "usd: Input should be a finite number (given: nan)"),
        ({"dollars": 1}, "dollars: there is no such field"),
        (
            {"tool_calls": {"charge": -1}},
            "tool_calls.charge: Input should be greater than or equal to 0 (given: -1)",
        ),
    ],
)
def test_wrong_budget_is_refused_with_one_line(wrong: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Budget(**wrong)
    assert str(caught.value) == f"Budget: {problem}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["s", "--usd", ""], "--usd: Input should be a valid number"),
        (["s", "--tool-calls", "=3"], "--tool-calls: give TOOL=N, not '=3'"),
        (["s", "--tool-calls", "charge"], "--tool-calls: give TOOL=N, not 'charge'"),
        (["../s", "--usd", "4"], "'../s' is not a session id"),
    ],
)
def test_wrong_budget_on_the_command_line_is_one_line(
    tmp_path: Path, server: Server, arguments: list[str], said: str
) -> None:
    command = ["-m", "durable_autogen", "budget", *arguments, "--nexum", server.address]
    code, output = run_script(command, tmp_path, forked=True)
    assert code == 2
    assert output.startswith(f"error: {said}")
    assert output.count("\n") <= 1


async def test_command_budget_tells_that_a_session_has_not_begun(server: ServerThread) -> None:
    async with NexumClient(server.address) as nexum:
        for arguments in (["s", "--usd", "4"], ["s", "--stop"]):
            told = await run_command(nexum, build_parser().parse_args(["budget", *arguments]))
            assert told.endswith("; it has not begun: the decision is kept for it")
        async with DurableSession("s", nexum=server.address):
            pass
        told = await run_command(nexum, build_parser().parse_args(["budget", "s", "--usd", "4"]))
        assert told == "raised the budget of session s to $4"
