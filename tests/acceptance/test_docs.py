"""The programs in docs/ run as printed, each in a new folder."""

from __future__ import annotations

import re
import shlex
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import ROOT, Process, running
from policies import asked_in, decide
from server_thread import ServerThread

from durable_autogen.__main__ import build_parser
from nexum_engine.__main__ import build_parser as build_engine_parser
from nexum_engine.policy import Policy, read_policies
from nexum_engine.workflow import RetryPolicy

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN_AGENT = (ROOT / "docs" / "your-own-agent.md").read_text(encoding="utf-8")
TOOLS = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
DURABLE_RUNS = (ROOT / "docs" / "durable-runs.md").read_text(encoding="utf-8")

PAYMENTS = """
import pathlib

def charge_card(customer, cents, idempotency_key):
    with (pathlib.Path(__file__).parent / "charged").open("a") as log:
        log.write(f"{customer} {cents} {idempotency_key}\\n")
    return f"receipt for {customer}"
"""

MODEL = """
import asyncio
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core import FunctionCall
from autogen_core.models import CreateResult, ModelInfo, RequestUsage
from autogen_ext.models.replay import ReplayChatCompletionClient
from durable_autogen import DurableSession, run_durable

def model(*replies):
    said = [
        reply if isinstance(reply, str) else CreateResult(
            finish_reason="function_calls", content=[FunctionCall(id="1", name=reply[0], arguments=reply[1])],
            usage=RequestUsage(prompt_tokens=1, completion_tokens=1), cached=False,
        )
        for reply in replies
    ]
    info = ModelInfo(
        vision=False, function_calling=True, json_output=False, structured_output=False, family="unknown"
    )
    return ReplayChatCompletionClient(said, model_info=info)
"""


def programs(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def libraries(server: ServerThread) -> dict[str, str]:
    """Return the environment variables with which a program finds both libraries and this server."""
    return {"NEXUM_ADDRESS": server.address, "PYTHONPATH": str(ROOT)}


def run_twice(folder: Path, env: dict[str, str], *expected: str) -> None:
    for _ in range(2):
        run = Process(["program.py"], cwd=folder, env=env, forked=True)
        assert run.wait() == 0, run.output
        assert [line for line in expected if line not in run.output] == [], run.output
    assert len((folder / "charged").read_text().splitlines()) == 1


@contextmanager
def worker_of(folder: Path, env: dict[str, str]) -> Iterator[None]:
    worker = Process(["worker.py"], cwd=folder, env=env, forked=True)
    try:
        yield
    finally:
        worker.popen.terminate()
        assert worker.wait() == 0, worker.output


def test_tool_in_a_custom_worker_is_executed_once(server: ServerThread, tmp_path: Path) -> None:
    shop, worker, agent, _, _ = programs(OWN_AGENT)
    given = agent.replace(
        "model_client=...", 'model_client=model(("charge", \'{"customer": "c-17", "cents": 990}\'), "ok")'
    )
    assert given != agent
    for name, text in (("shop", shop), ("payments", PAYMENTS), ("worker", worker)):
        (tmp_path / f"{name}.py").write_text(text)
    imports, _, body = given.partition("\n\n\n")
    (tmp_path / "program.py").write_text(
        f"{MODEL}\n{imports}\nasync def main():\n{textwrap.indent(body, '    ')}\n"
        "    print('AGENT', result.messages[-1].content, result.messages[-2].content)\n"
        "asyncio.run(main())\n"
    )
    with worker_of(tmp_path, libraries(server)):
        run_twice(tmp_path, libraries(server), "AGENT ok", "receipt for c-17")


def test_tool_added_to_this_project_is_executed_once(server: ServerThread, tmp_path: Path) -> None:
    _, _, _, tool, without_an_agent = programs(OWN_AGENT)
    own = tmp_path / "own"
    shutil.copytree(ROOT, own, ignore=shutil.ignore_patterns(".*", "tests", "benchmarks", "docs"))
    (own / "payments.py").write_text(PAYMENTS)
    with (own / "support" / "tools" / "__init__.py").open("a", encoding="utf-8") as tools:
        tools.write(f"\nfrom payments import charge_card\n{tool}")
    (own / "program.py").write_text(
        f"from submit_task import submit_tool_call\n{without_an_agent}\nprint('TEXT', text)\n"
    )
    env = {"NEXUM_ADDRESS": server.address, "PYTHONPATH": ""}
    with worker_of(own, env):
        run_twice(own, env, "TEXT receipt for c-17")


def test_program_of_workflows_runs_as_printed(server: ServerThread, tmp_path: Path) -> None:
    (program,) = programs((ROOT / "docs" / "workflows.md").read_text(encoding="utf-8"))
    (tmp_path / "program.py").write_text(program)
    for forked in (False, True):
        run = Process(["program.py"], cwd=tmp_path, env=libraries(server), forked=forked)
        assert run.wait() == 0, run.output
        assert 'COMPLETED {"paid":2,"approved by":"Ann"}' in run.output


TEAM = """
import pathlib


def charge(customer: str) -> str:
    "Charge a customer."
    with (pathlib.Path(__file__).parent / "charged").open("a") as log:
        log.write(customer)
    return f"receipt for {customer}"

def build_team():
    clerk = AssistantAgent("clerk", model(("charge", '{"customer": "c-17"}')), tools=[charge])
    return RoundRobinGroupChat([clerk], max_turns=1)
"""


@pytest.mark.every_python
def test_programs_of_durable_runs_run_as_printed(server: ServerThread, tmp_path: Path) -> None:
    one_line, with_result, _, branches = programs(DURABLE_RUNS)[:4]
    (tmp_path / "program.py").write_text(
        f"{MODEL}\nfrom autogen_core.models import UserMessage\n{TEAM}\n"
        "async def main():\n"
        f"{textwrap.indent(one_line, '    ')}\n    print('ONE LINE', result.messages[-1].content)\n"
        f"{textwrap.indent(with_result, '    ')}\n    print('WITH RESULT', result.messages[-1].content)\n"
        "    client = model('first', 'second')\n"
        f"{textwrap.indent(branches, '    ')}\n    print('NEWS', news)\n"
        "asyncio.run(main())\n"
    )
    news = set()
    for forked in (False, True):
        run = Process(["program.py"], cwd=tmp_path, env=libraries(server), forked=forked)
        assert run.wait() == 0, run.output
        lines = run.output.splitlines()
        assert "ONE LINE receipt for c-17" in lines
        assert "WITH RESULT receipt for c-17" in lines
        news.add(next(line for line in lines if line.startswith("NEWS")))
    assert news <= {"NEWS ['first', 'second']", "NEWS ['second', 'first']"}
    assert len(news) == 1
    assert (tmp_path / "charged").read_text() == "c-17" * 2  # in two sessions


def test_conversation_of_durable_runs_remembers_earlier_messages(server: ServerThread, tmp_path: Path) -> None:
    conversation = programs(DURABLE_RUNS)[2].replace("(conversation)", "(conversation, on_drift=sys.argv[1])")
    team = TEAM.replace('"c-17"}\')', '"c-17"}\'), "paid", "once"')
    assert team != TEAM
    (tmp_path / "program.py").write_text(
        f"{MODEL}\nimport sys\n{team}\n{conversation}\n"
        "try:\n    print('ANSWER', asyncio.run(answer('c1', sys.argv[2:])))\n"
        "except Exception as error:\n    print(type(error).__name__)\n"
    )

    def asked(*arguments: str) -> str:
        run = Process(["program.py", *arguments], cwd=tmp_path, env=libraries(server), forked=True)
        assert run.wait() == 0, run.output
        return run.output.splitlines()[-1]

    for messages, answered in ((["Pay."], "receipt for c-17"), (["Pay.", "Done?"], "paid")):
        for _ in range(2):
            assert asked("stop", *messages) == f"ANSWER {answered}"
    assert asked("stop", "Pay.", "Done?", "How often?") == "ANSWER once"
    assert asked("stop", "Pay.", "Really?") == "DriftError"
    assert asked("continue", "Pay.", "Really?") == "ANSWER paid"
    assert asked("stop", "Pay.", "Really?", "How often?") == "ANSWER once"
    assert (tmp_path / "charged").read_text() == "c-17"


@pytest.mark.every_python
def test_command_of_durable_runs_continues_killed_script(server: ServerThread, tmp_path: Path) -> None:
    command = next(one for one in durable_commands() if one[:2] == ["run", "--session"])
    script = f"{MODEL}\n{TEAM}".replace("from durable_autogen import DurableSession, run_durable\n", "")
    assert "durable" not in script
    (tmp_path / command[-1]).write_text(
        f"{script}\nimport os\n"
        "async def main():\n"
        "    result = await build_team().run(task='Charge customer c-17.')\n"
        "    if not pathlib.Path('killed').exists():\n"
        "        pathlib.Path('killed').touch()\n"
        "        os._exit(9)\n"
        "    print('SAID', result.messages[-1].content)\n"
        "asyncio.run(main())\n"
    )
    for code in (9, 0, 0):
        run = Process(["-m", "durable_autogen", *command], cwd=tmp_path, env=libraries(server), forked=code == 0)
        assert run.wait() == code, run.output
        assert ("SAID receipt for c-17" in run.output) == (code == 0)
    assert (tmp_path / "charged").read_text() == "c-17"


def test_program_of_durable_runs_waits_for_an_approval(server: ServerThread, tmp_path: Path) -> None:
    (program,) = (one for one in programs(DURABLE_RUNS) if "durable_tool(" in one)
    charge = '(\'charge\', \'{"customer": "c-17", "cents": 20000}\')'
    given = program.replace("model_client=...", f"model_client=model({charge}, 'paid')")
    assert given != program
    definitions, _, body = given.partition("async with")
    (tmp_path / "payments.py").write_text(PAYMENTS)
    (tmp_path / "program.py").write_text(
        f"{MODEL}\nfrom payments import charge_card\ndef find_receipt(key):\n    return None\n{definitions}\n"
        f"async def main():\n{textwrap.indent(f'async with{body}', '    ')}\n"
        "    print('SAID', result.messages[-1].content, result.messages[-2].content)\nasyncio.run(main())\n"
    )
    with running(["program.py"], cwd=tmp_path, env=libraries(server), forked=True) as waiting:
        line = waiting.wait_for("waiting for a decision on charge")
        command = line.partition(": python ")[2].partition(", or")[0]
        with running(shlex.split(command), cwd=tmp_path, env=libraries(server), forked=True) as deciding:
            assert deciding.wait() == 0, deciding.output
        waiting.wait_for("SAID paid")
        assert waiting.wait() == 0
        assert "receipt for c-17" in waiting.output
    assert (tmp_path / "charged").read_text().startswith("c-17 20000 order-4717/")
    assert len((tmp_path / "charged").read_text().splitlines()) == 1


def test_policies_of_durable_runs_are_valid(tmp_path: Path) -> None:
    (tables,) = re.findall(r"```toml\n(.*?)```", DURABLE_RUNS, re.DOTALL)
    (tmp_path / "policies.toml").write_text(tables)
    assert read_policies(tmp_path / "policies.toml").keys() == {"charge", "model"}


def test_program_of_durable_runs_waits_at_its_budget(server: ServerThread, tmp_path: Path) -> None:
    (program,) = (one for one in programs(DURABLE_RUNS) if "Budget(" in one)
    charge = "('charge', '{\"customer\": \"c-17\"}')"
    team = TEAM.replace(
        'model(("charge", \'{"customer": "c-17"}\'))', f"model({charge}, {charge}), max_tool_iterations=2"
    )
    assert team != TEAM
    (tmp_path / "program.py").write_text(
        f"{MODEL}\n{team}\nasync def main():\n{textwrap.indent(program, '    ')}\nasyncio.run(main())\n"
    )
    raised, stopped, reported, _ = (one for one in durable_commands() if "budget" in " ".join(one))
    with running(["program.py"], cwd=tmp_path, env=libraries(server), forked=True) as waiting:
        waiting.wait_for("has used 1 of 1 calls of charge of its budget")
        for command, printed in ((reported, "2 model call(s), 1 call(s) of charge"), (raised, "raised the budget")):
            command = ["-m", "durable_autogen", *command]
            with running(command, cwd=tmp_path, env=libraries(server), forked=True) as process:
                assert process.wait() == 0, process.output
            assert printed in process.output
        assert waiting.wait() == 0, waiting.output
    assert (tmp_path / "charged").read_text() == "c-17" * 2
    assert stopped[2] == "--stop"


@pytest.mark.timeout(240)
def test_waiting_program_of_durable_runs_continues_after_kill(server: ServerThread, tmp_path: Path) -> None:
    waiting = programs(DURABLE_RUNS)[-1]
    (tmp_path / "program.py").write_text(
        "import asyncio\nfrom durable_autogen import DurableSession\n"
        f"async def main():\n{textwrap.indent(waiting, '    ')}\n    print('OUTCOME', outcome)\nasyncio.run(main())\n"
    )
    with running(["program.py"], cwd=tmp_path, env=libraries(server), forked=True) as killed:
        killed.wait_for("waiting for event 'payment'")
        killed.kill()
        assert killed.wait() != 0
    command = next(one for one in durable_commands() if one[0] == "send")
    for run in (["-m", "durable_autogen", *command], ["program.py"], ["program.py"]):
        with running(run, cwd=tmp_path, env=libraries(server), forked=True) as process:
            assert process.wait() == 0, process.output
    assert "OUTCOME paid 990" in process.output


PAYMENT_SERVICE = """
import os, pathlib

CHARGED = pathlib.Path(__file__).parent / "charged"

def charge_card(customer, cents, idempotency_key):
    with CHARGED.open("a") as log:
        log.write(f"{customer} {cents} {idempotency_key}\\n")
    if "DIES" in os.environ:
        os._exit(9)
    return find_receipt(idempotency_key)

def find_receipt(idempotency_key):
    lines = CHARGED.read_text().splitlines() if CHARGED.exists() else []
    return next((f"receipt for {line.split()[0]}" for line in lines if line.split()[2] == idempotency_key), None)
"""
CLERKS = """
import logging
from durable_autogen import call_id
from payments import charge_card

logging.basicConfig(level=logging.INFO)

replies = [("charge", '{"customer": "c-17", "cents": 99000}'), "ok"]

def charge(customer: str) -> str:
    "Charge a customer."
    return charge_card(customer, 990, call_id())

def build_team():
    clerk = AssistantAgent("clerk", model(("charge", '{"customer": "c-17"}')), tools=[charge])
    return RoundRobinGroupChat([clerk], max_turns=1)
"""


@pytest.mark.parametrize(("number", "receipt"), [(0, "receipt for c-17"), (1, "receipt 17")])
def test_programs_of_tools_charge_once_if_they_die_after_the_charge(
    server: ServerThread, tmp_path: Path, number: int, receipt: str
) -> None:
    program = programs(TOOLS)[number].replace("model_client=...", "model_client=model(*replies)")
    declarations, session, body = program.partition("async with DurableSession")
    (tmp_path / "payments.py").write_text(PAYMENT_SERVICE)
    (tmp_path / "program.py").write_text(
        f"{MODEL}\n{CLERKS}\n{declarations}\nasync def main():\n{textwrap.indent(session + body, '    ')}\n"
        "    print('SAID', *(message.to_text() for message in result.messages))\n"
        "asyncio.run(main())\n"
    )
    env = libraries(server)
    with running(["program.py"], cwd=tmp_path, env={**env, "DIES": "1"}, forked=True) as dying:
        asked = asked_in(dying.wait_for("waiting for a decision on charge"))
        decide(server.address, "approve", asked, "approval", approver="ann")
        assert dying.wait() == 9, dying.output
    with running(["program.py"], cwd=tmp_path, env=env, forked=True) as again:
        if number == 1:  # its tool has no reconcile, so a person decides
            asked = asked_in(again.wait_for("may or may not have happened"))
            decide(server.address, "resolve", asked, "effect", output=receipt)
        assert again.wait() == 0, again.output
    assert receipt in next(line for line in again.lines if line.startswith("SAID"))
    assert len((tmp_path / "charged").read_text().splitlines()) == 1


def test_tool_of_tools_runs_in_a_worker_after_its_approval(server: ServerThread, tmp_path: Path) -> None:
    declaration = programs(TOOLS)[2]
    find_charge = re.search(r"^def find_charge.*?NOT_DONE\n", TOOLS, re.DOTALL | re.MULTILINE)
    assert find_charge
    own = tmp_path / "own"
    shutil.copytree(ROOT, own, ignore=shutil.ignore_patterns(".*", "tests", "benchmarks", "docs"))
    (own / "payments.py").write_text(PAYMENT_SERVICE)
    with (own / "support" / "tools" / "__init__.py").open("a", encoding="utf-8") as tools:
        tools.write("\nfrom nexum_engine.policy import NOT_DONE\nfrom payments import charge_card, find_receipt\n")
        tools.write(f"\n{find_charge[0]}\n{declaration}")
    call = ["submit_task.py", "charge", '{"customer": "c-17", "cents": 99000}']
    env = {"NEXUM_ADDRESS": server.address, "PYTHONPATH": ""}
    with worker_of(own, env):
        with running(call, cwd=own, env=env) as asking:
            decide(server.address, "approve", asked_in(asking.wait_for("waiting for a decision on")), "approval")
            assert asking.wait() == 0, asking.output
        again = Process(call, cwd=own, env=env)
        assert again.wait() == 0, again.output
    assert asking.lines[-1] == again.lines[-1] == "receipt for c-17"
    assert len((own / "charged").read_text().splitlines()) == 1


def test_policies_of_tools_are_read_from_the_printed_file(tmp_path: Path) -> None:
    (tmp_path / "policies.toml").write_text(re.findall(r"```toml\n(.*?)```", TOOLS, re.DOTALL)[0])
    policies = read_policies(tmp_path / "policies.toml")
    assert policies["charge"] == Policy(approval="always", approval_timeout=86400, effect="once")
    assert policies["web_search"].timeout == 30
    assert policies["model"].retry == RetryPolicy(max_attempts=6)


def test_nexum_engine_accepts_every_command_of_tools() -> None:
    commands = re.findall(r"^python -m nexum_engine (.*)", TOOLS, re.MULTILINE)
    assert len(commands) >= 8
    for command in commands:
        build_engine_parser().parse_args(shlex.split(command, comments=True))


def durable_commands() -> list[list[str]]:
    """Return the arguments of each `python -m durable_autogen` in a code block of a page."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            lines = re.findall(r"^python -m durable_autogen (.*)", block, re.MULTILINE)
            found += [shlex.split(line, comments=True) for line in lines]
    return found


def test_durable_autogen_accepts_every_documented_command() -> None:
    commands = durable_commands()
    assert commands
    for command in commands:
        args = build_parser().parse_args(command)
        if args.command == "run":
            assert (Path(args.script).suffix, args.arguments) == (".py", [])
