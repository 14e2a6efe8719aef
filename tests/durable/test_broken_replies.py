"""Broken replies are retried, and values that JSON lacks (such as infinity) are replayed."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.base import TaskResult
from autogen_agentchat.messages import TextMessage
from autogen_core import CancellationToken, FunctionCall
from autogen_core.models import ChatCompletionTokenLogprob, CreateResult, ModelInfo, TopLogprob
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient
from durable_agents import QUESTION, Scripted, answer, asked, bench, inside, new_session, reply, run, texts, twice, word
from harness import Server
from openai_server import OpenAIServer
from web_servers import LoopbackServer, page

from durable_autogen import DriftError, fork_session
from nexum_engine.client import NexumClient

CUT_OFF = reply([FunctionCall(id="1", name="note", arguments='{"text": "half')], finish_reason="length")


@pytest.mark.parametrize("broken", [pytest.param("", id="empty"), pytest.param([], id="no call"), CUT_OFF])
async def test_broken_reply_at_end_is_reported_and_retried(shared_server: Server, broken: Any) -> None:
    happened: list[str] = []
    lines: list[str] = []
    session = new_session()

    async def program() -> list[str]:
        return [await asked(Scripted(happened)), await asked(Scripted(happened, *script))]

    script = [broken]
    first = await inside(shared_server, program, session, logs=lines)
    assert any("reply 2 of the program is empty or cut off" in line and "again" in line for line in lines)
    script = []
    lines.clear()
    second = await inside(shared_server, program, session, logs=lines)
    assert second[0] == first[0]
    assert second[1].startswith("word")
    assert not any("cut off" in line for line in lines)
    assert await inside(shared_server, program, session, logs=lines) == second
    assert happened == ["model"] * 3


@pytest.mark.parametrize("stream", [False, True])
async def test_empty_reply_is_kept_if_program_continued(shared_server: Server, stream: bool) -> None:
    happened: list[str] = []
    lines: list[str] = []

    async def program() -> TaskResult:
        agent = AssistantAgent("a", Scripted(happened, "", word()), model_client_stream=stream)
        await agent.run(task="Q")
        return await agent.run(task="R")

    await twice(shared_server, program, happened, logs=lines)
    assert happened == ["model"] * 2
    assert not any("cut off" in line for line in lines)


def openai(base_url: str) -> OpenAIChatCompletionClient:
    info = ModelInfo(vision=False, function_calling=True, json_output=True, structured_output=True, family="unknown")
    return OpenAIChatCompletionClient(
        model="m", base_url=base_url, api_key="k", model_info=info, max_retries=0, timeout=10
    )


@pytest.mark.filterwarnings("ignore")  # AutoGen warns of the empty reply and of the unknown model
@pytest.mark.parametrize("stream", [False, True])
async def test_web_page_as_reply_is_dropped(shared_server: Server, stream: bool) -> None:
    happened: list[str] = []
    session = new_session()

    def build(base_url: str) -> AssistantAgent:
        return AssistantAgent("a", openai(base_url), model_client_stream=stream)

    login = page("<html><body>Please log in.</body></html>", "text/html")
    with LoopbackServer({"/v1/chat/completions": login}) as proxy:
        for number in range(2):
            try:
                said = texts(
                    await run(shared_server, lambda: build(f"http://127.0.0.1:{proxy.port}/v1"), session=session)
                )[-1]
            except DriftError:
                raise
            except Exception as error:  # noqa: BLE001 - the client may raise any error
                said = f"failed: {error}"
            assert not said or "failed" in said
            assert proxy.connections > number
            happened.append(said)
    with OpenAIServer(lambda _: answer("yes")) as model:
        first = await run(shared_server, lambda: build(model.base_url), session=session)
        assert texts(first)[-1].startswith("yes")
        assert texts(await run(shared_server, lambda: build(model.base_url), session=session)) == texts(first)
        assert len(model.requests) == 1


async def test_arguments_given_as_an_object_reach_the_tool(shared_server: Server) -> None:
    happened: list[str] = []

    def note(text: str, more: dict[str, list[int]]) -> str:
        happened.append(f"{text} {more}")
        return word()

    async def program() -> TaskResult:
        arguments: Any = {"text": "über", "more": {"x": [1, 2]}}
        asks = [FunctionCall(id="1", name="note", arguments=arguments)]
        return await AssistantAgent("a", Scripted(happened, asks), tools=[note]).run(task="Q")

    await twice(shared_server, program, happened)
    assert happened == ["model", "über {'x': [1, 2]}"]


async def test_infinite_logprobs_are_replayed(shared_server: Server) -> None:
    happened: list[str] = []
    tops = [TopLogprob(logprob=-math.inf, bytes=[1]), TopLogprob(logprob=math.inf)]
    logprobs = [ChatCompletionTokenLogprob(token="x", logprob=-math.inf, top_logprobs=tops, bytes=[2])]

    async def program() -> CreateResult:
        return await Scripted(happened, reply(logprobs=logprobs)).create(QUESTION)

    assert (await twice(shared_server, program, happened))["logprobs"] == reply(logprobs=logprobs).model_dump()[
        "logprobs"
    ]


def nested(depth: int) -> str:
    return '{"tree": ' + '{"a": ' * depth + "1" + "}" * depth + "}"


@pytest.mark.parametrize("way", ["model", "workbench", "tool"])
async def test_deeply_nested_arguments_and_results_are_recorded(shared_server: Server, way: str) -> None:
    happened: list[str] = []

    def climb(tree: dict[str, Any]) -> str:
        here: Any = tree
        depth = 0
        while isinstance(here, dict):
            depth, here = depth + 1, here["a"]
        happened.append(f"climbed {depth}")
        return word()

    grown = json.loads(nested(300))["tree"]

    async def program() -> Any:
        if way == "model":
            asks = [FunctionCall(id="1", name="climb", arguments=nested(300))]
            return await AssistantAgent("a", Scripted(happened, asks), tools=[climb]).run(task="Q")
        if way == "workbench":
            return (await bench([climb]).call_tool("climb", {"tree": grown})).to_text()
        tree = FunctionTool(lambda: (climb(grown), grown)[1], "The tree.", name="tree")
        return await tree.run_json({}, CancellationToken())

    await twice(shared_server, program, happened)
    assert "climbed 300" in happened


@pytest.mark.parametrize("is_message", [False, True])
async def test_half_surrogate_pair_in_task_is_replaced(shared_server: Server, is_message: bool) -> None:
    happened: list[str] = []
    session = new_session()
    text = "half \ud83d of it"
    task: Any = TextMessage(content=text, source="user") if is_message else text
    first = await run(shared_server, lambda: AssistantAgent("a", Scripted(happened)), task, session)
    for again in (None, task):
        found = await run(shared_server, lambda: AssistantAgent("a", Scripted(happened)), again, session)
        assert texts(found)[-1] == texts(first)[-1]
    assert happened == ["model"]


async def test_half_surrogate_pair_in_message_of_fork_is_replaced(shared_server: Server) -> None:
    source, fork = new_session(), new_session()
    await run(shared_server, lambda: AssistantAgent("a", Scripted([])), "Q", source)
    async with NexumClient(shared_server.address) as nexum:
        for _ in range(2):
            await fork_session(nexum, source, 1, fork, "half \ud83d of it")
    found = await run(shared_server, lambda: AssistantAgent("a", Scripted([])), None, fork)
    assert "half \ufffd of it" in texts(found)


async def test_broken_reply_at_end_of_fork_is_dropped(shared_server: Server) -> None:
    """The source's numbers are larger than the fork's: the source had revoked a failure before its last reply."""
    happened: list[str] = []
    lines: list[str] = []
    source, fork = new_session(), new_session()
    scripts: list[Any] = [""]

    async def program() -> list[str]:
        return [await asked(Scripted(happened)), await asked(Scripted(happened, *scripts)), await asked(Scripted([]))]

    async def ends_early() -> list[str]:
        return [await asked(Scripted(happened)), await asked(Scripted(happened, *scripts))]

    for _ in range(3):  # each run drops its broken reply, and the numbers grow
        await inside(shared_server, ends_early, source)
    scripts = []
    await inside(shared_server, program, source)
    async with NexumClient(shared_server.address) as nexum:
        await fork_session(nexum, source, 3, fork)

    async def continues() -> list[str]:
        return [*await program(), await asked(Scripted(happened, ""))]

    await inside(shared_server, continues, fork, logs=lines)
    assert any("is empty or cut off" in line for line in lines)
