"""The programs in docs/ run as they are printed, with nothing but what the text says to copy."""

from __future__ import annotations

import re
import shutil
import textwrap
from pathlib import Path

from harness import ROOT, Process, Server

OWN_AGENT = (ROOT / "docs" / "your-own-agent.md").read_text(encoding="utf-8")
DURABLE_RUNS = (ROOT / "docs" / "durable-runs.md").read_text(encoding="utf-8")

PAYMENTS = """
import pathlib

def charge(customer, cents, idempotency_key):
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


def copy_what_it_says(page: str, folder: Path) -> None:
    """Copy the files and folders that the page tells to copy."""
    sentence = re.search(r"Copy (.*?) beside your code", page, re.DOTALL)
    assert sentence is not None
    for name in re.findall(r"`([\w./]+)`", sentence[1]):
        copy = shutil.copytree if name.endswith("/") else shutil.copy
        copy(ROOT / name, folder / name)


def test_an_agent_of_ones_own_runs_from_the_copied_files(server: Server, tmp_path: Path) -> None:
    charge, agent, without_an_agent = programs(OWN_AGENT)
    own = tmp_path / "own"
    own.mkdir()
    copy_what_it_says(OWN_AGENT, own)
    (own / "payments.py").write_text(PAYMENTS)
    with (own / "tools" / "__init__.py").open("a", encoding="utf-8") as tools:
        tools.write(f"\nimport payments\n{charge}")
    given = agent.replace(
        "model_client=...", 'model_client=model(("charge", \'{"customer": "c-17", "cents": 990}\'), "ok")'
    )
    assert given != agent
    (own / "program.py").write_text(
        f"{MODEL}\nfrom durable_autogen import DurableTool\nfrom submit_task import Session, submit_tool_call\n"
        f"from tools import TOOLS\nasync def main():\n{textwrap.indent(given, '    ')}\n"
        "    print('AGENT', result.messages[-1].content)\n"
        f"asyncio.run(main())\n{without_an_agent}\nprint('TEXT', text)\n"
    )
    env = {"NEXUM_ADDRESS": server.address, "PYTHONPATH": ""}
    with_worker = Process(["worker.py"], cwd=own, env=env)
    try:
        with_worker.wait_for("connected")
        for _ in range(2):
            run = Process(["program.py"], cwd=own, env=env)
            assert run.wait() == 0, run.output
            assert "AGENT ok" in run.output
            assert "TEXT receipt for c-17" in run.output
    finally:
        with_worker.popen.terminate()
        with_worker.wait()
    assert len((own / "charged").read_text().splitlines()) == 1


def test_a_durable_run_and_a_session_run_as_they_are_printed(server: Server, tmp_path: Path) -> None:
    whole_team, session, *_ = programs(DURABLE_RUNS)
    session = session.replace("order-4711", "another")  # both are printed with the same id
    copy_what_it_says(DURABLE_RUNS, tmp_path)
    (tmp_path / "program.py").write_text(
        f"{MODEL}\n"
        "def charge(customer: str) -> str:\n    'Charge.'\n    return customer\n"
        "def refund(customer: str) -> str:\n    'Refund.'\n    return customer\n"
        "def build_team():\n    one = AssistantAgent('one', model('from the team'))\n"
        "    return RoundRobinGroupChat([one], max_turns=1)\n"
        f"async def whole_team():\n{textwrap.indent(whole_team, '    ')}\n    print(result.messages[-1].content)\n"
        "client = model(('charge', '{\"customer\": \"c-17\"}'))\n"
        f"async def own():\n{textwrap.indent(session, '    ')}\n"
        "        result = await agent.run(task='Charge c-17.')\n"
        "        print(result.messages[-1].content, (await team.run(task='Say it.')).messages[-1].content)\n"
        "asyncio.run(whole_team())\n"
        "asyncio.run(own())\n"
    )
    for _ in range(2):
        run = Process(["program.py"], cwd=tmp_path, env={"NEXUM_ADDRESS": server.address, "PYTHONPATH": ""})
        assert run.wait() == 0, run.output
        assert "\nfrom the team\n" in run.output
        assert "\nc-17 from the team\n" in run.output
