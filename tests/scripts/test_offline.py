"""The offline stand-ins for the web and the model: the search, the pages as visit_webpage reads them, the answers."""

import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.conditions import MaxMessageTermination
from autogen_agentchat.messages import TextMessage, ToolCallRequestEvent
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core import FunctionCall
from autogen_core.models import (
    AssistantMessage,
    CreateResult,
    FunctionExecutionResult,
    FunctionExecutionResultMessage,
    UserMessage,
)
from autogen_core.models import LLMMessage as Message
from autogen_core.tools import BaseTool, ToolSchema

from support.offline.model import OfflineModel
from support.offline.reading import choose_sentences, plan_searches, quoted, sentences, words
from support.offline.web import CONTENT_TYPES, PAGES, OfflineWeb
from support.tools import TOOLS, ToolContext, Web
from support.tools.web.page import page_to_markdown

pytestmark = pytest.mark.every_python


POPULATIONS = "What is the population of Tokyo vs New York?"
TOKYO = "https://offline.example/tokyo-population"
NEW_YORK = "https://offline.example/new-york-population"
OFFERED: list[ToolSchema] = [{"name": "web_search"}, {"name": "visit_webpage"}]


class Run:
    """One agent's run over a folder of pages, with all results of its tools."""

    def __init__(self, web: OfflineWeb) -> None:
        self.web = web
        self.model = OfflineModel(web.topics)
        self.returned: list[str] = []
        self.visits: dict[str, str] = {}
        self.rounds: list[list[tuple[str, dict[str, Any]]]] = []
        self.answers: list[str] = []
        self.agent = AssistantAgent("agent", self.model, tools=self.tools(), max_tool_iterations=5)

    def tools(self) -> list[BaseTool[Any, Any] | Callable[..., Any] | Callable[..., Awaitable[Any]]]:
        async def web_search(query: str, max_results: int = 5) -> str:
            """Search the web."""
            return await self.call("web_search", {"query": query, "max_results": max_results})

        async def visit_webpage(url: str) -> str:
            """Read a page."""
            self.visits[url] = await self.call("visit_webpage", {"url": url})
            return self.visits[url]

        return [web_search, visit_webpage]

    async def call(self, name: str, arguments: dict[str, Any]) -> str:
        returned = await TOOLS[name].run(arguments, ToolContext("key", 1, self.web))
        self.returned.append(returned)
        return returned

    async def ask(self, question: str) -> str:
        result = await self.agent.run(task=question)
        for message in result.messages:
            if isinstance(message, ToolCallRequestEvent):
                self.rounds.append([(call.name, json.loads(call.arguments)) for call in message.content])
        last = result.messages[-1]
        assert isinstance(last, TextMessage)
        self.answers.append(last.content)
        return last.content


def assert_grounded(answer: str, run: Run) -> None:
    """Check that every source is quoted, and that each quote is in the text that the agent read at this source."""
    sources = {int(number): url for number, url in re.findall(r"^\[(\d+)\] .* - (\S+)$", answer, re.MULTILINE)}
    cited = re.findall(r'"([^"]+)" \[(\d+)\]', answer)
    assert cited
    for sentence, number in cited:
        assert sentence in run.visits[sources[int(number)]]
    assert {int(number) for _, number in cited} == set(sources)
    assert answer.isascii()


async def test_a_comparison_is_searched_in_parallel_read_and_answered_with_quotes() -> None:
    run = Run(OfflineWeb())
    answer = await run.ask(POPULATIONS)
    assert run.rounds == [
        [("web_search", {"query": "population of Tokyo"}), ("web_search", {"query": "population of New York"})],
        [("visit_webpage", {"url": TOKYO}), ("visit_webpage", {"url": NEW_YORK})],
    ]
    assert_grounded(answer, run)
    assert "14,047,594" in answer
    assert "8,804,190" in answer
    assert TOKYO in answer
    assert NEW_YORK in answer


async def test_two_offline_runs_are_identical() -> None:
    first, second = Run(OfflineWeb()), Run(OfflineWeb())
    assert await first.ask(POPULATIONS) == await second.ask(POPULATIONS)
    assert (first.rounds, sorted(first.returned)) == (second.rounds, sorted(second.returned))


@pytest.mark.parametrize(
    ("question", "slugs"),
    [
        ("asyncio vs threading in Python", {"asyncio-in-python", "threading-in-python"}),
        ("Impact of Rust on systems programming", {"rust-in-systems-programming"}),
        ("What is durable execution?", {"durable-execution"}),
        ("How does write-ahead logging in SQLite work?", {"sqlite-wal"}),
        ("What is gRPC?", {"grpc"}),
        ("What are idempotency keys for?", {"idempotency-keys"}),
        ("How does HTTP caching work?", {"http-caching"}),
        ("How can an AI agent recover from a crash?", {"agent-crash-recovery"}),
        ("What is AutoGen?", {"autogen-multi-agent"}),
        ("How many people live in Tokyo?", {"tokyo-population"}),
        ("Explain exponential backoff", {"retries-and-backoff"}),
    ],
)
async def test_each_topic_is_found_and_cited(question: str, slugs: set[str]) -> None:
    run = Run(OfflineWeb())
    answer = await run.ask(question)
    assert_grounded(answer, run)
    assert slugs <= {url.rsplit("/", 1)[1] for url in re.findall(r"https://\S+", answer)}


@pytest.mark.parametrize(
    "question",
    [
        "Who won the 1998 chess olympiad?",
        "What is the population of Paris?",
        "Who is the mayor of Tokyo?",
        "What is the GDP of New York?",
        "What is the weather in Tokyo today?",
        "hello",
        "?!",
    ],
)
async def test_question_without_a_page_is_answered_with_the_topics(question: str) -> None:
    run = Run(OfflineWeb())
    answer = await run.ask(question)
    assert answer.startswith("No offline page covers this question")
    assert '"' not in answer
    assert not run.visits
    for topic in run.web.topics():
        assert f"- {topic}" in answer


async def test_half_covered_comparison_answers_one_half_and_names_the_other() -> None:
    run = Run(OfflineWeb())
    answer = await run.ask("What is the population of Tokyo vs Paris?")
    assert_grounded(answer, run)
    assert "14,047,594" in answer
    assert "On population of Paris: the search found no page." in answer


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "otters.md",
            "# Sea otters\n\nSea otters rest on their backs.\nThey hold hands, so that\nthey stay together.",
        ),
        ("Otter facts.html", "<title>Sea otters</title><nav>Menu</nav><p>Sea otters sleep in beds of kelp.</p>"),
        ("otters.htm", "<h1>Sea <b>otters</b></h1><p>Sea otters eat  urchins\n with great appetite.</p>"),
        ("OTTERS.MARKDOWN", "Sea otters have the densest fur of all animals.\r\n"),
        ("otters.md", "\ufeff# Sea otters\r\n\r\nSea otters use stones as tools.\r\n"),
    ],
)
async def test_a_page_dropped_into_the_folder_is_found_and_cited_at_once(
    tmp_path: Path, name: str, content: str
) -> None:
    run = Run(OfflineWeb(tmp_path))
    assert (await run.ask("What do sea otters do?")).startswith("No offline page")
    (tmp_path / name).write_bytes(content.encode())
    answer = await run.ask("What do sea otters do?")
    assert_grounded(answer, run)
    assert list(run.visits) == [f"https://offline.example/{name.rsplit('.', 1)[0].replace(' ', '%20')}"]


async def test_a_follow_up_question_starts_a_new_plan() -> None:
    run = Run(OfflineWeb())
    await run.ask(POPULATIONS)
    answer = await run.ask("What is gRPC?")
    assert run.rounds[2][0] == ("web_search", {"query": "gRPC"})
    assert "https://offline.example/grpc" in answer
    assert "Tokyo" not in answer
    ids = [call.id async for call in calls_made(run)]
    assert len(ids) == len(set(ids))


async def calls_made(run: Run) -> Any:
    for message in await run.agent.model_context.get_messages():
        if isinstance(message, AssistantMessage) and not isinstance(message.content, str):
            for call in message.content:
                yield call


async def test_without_tools_a_team_member_answers_from_the_conversation() -> None:
    run = Run(OfflineWeb())
    writer = AssistantAgent("writer", OfflineModel(), system_message="You write.")
    team = RoundRobinGroupChat([run.agent, writer], termination_condition=MaxMessageTermination(3))
    result = await team.run(task=POPULATIONS)
    last = result.messages[-1]
    assert isinstance(last, TextMessage)
    assert last.source == "writer"
    assert "14,047,594" in last.content
    for sentence in re.findall(r'"([^"]+)"', last.content):
        assert any(sentence in page for page in run.visits.values())


async def test_model_without_tools_and_conversation_claims_nothing() -> None:
    result = await OfflineModel().create([UserMessage(content=POPULATIONS, source="user")])
    assert isinstance(result.content, str)
    assert "no tools" in result.content


def history(*rounds: list[tuple[FunctionCall, str, bool]]) -> list[Message]:
    messages: list[Message] = [UserMessage(content=POPULATIONS, source="user")]
    for calls in rounds:
        messages.append(AssistantMessage(content=[call for call, _, _ in calls], source="agent"))
        results = [
            FunctionExecutionResult(content=text, name=call.name, call_id=call.id, is_error=failed)
            for call, text, failed in calls
        ]
        messages.append(FunctionExecutionResultMessage(content=results))
    return messages


def search(number: int, query: str) -> FunctionCall:
    return FunctionCall(id=f"call_1_{number}", name="web_search", arguments=json.dumps({"query": query}))


def visit(number: int, url: str) -> FunctionCall:
    return FunctionCall(id=f"call_2_{number}", name="visit_webpage", arguments=json.dumps({"url": url}))


HIT = json.dumps([{"title": "Population of Tokyo", "href": TOKYO, "body": ""}])
PAGE = "The population of Tokyo was 14,047,594 at the census."


async def answer_to(messages: list[Message]) -> str:
    result = await OfflineModel(lambda: ["A topic"]).create(messages, tools=OFFERED)
    assert isinstance(result.content, str)
    return result.content


async def test_failed_search_is_reported_and_the_other_one_used() -> None:
    found = (search(1, "population of Tokyo"), HIT, False)
    failed = (search(2, "population of New York"), "the search engine said 500", True)
    result = await OfflineModel().create(history([found, failed]), tools=OFFERED)
    assert result.content == [FunctionCall(id="call_2_1", name="visit_webpage", arguments=json.dumps({"url": TOKYO}))]
    answer = await answer_to(history([found, failed], [(visit(1, TOKYO), PAGE, False)]))
    assert f'"{PAGE}" [1]' in answer
    assert "The search for population of New York failed: the search engine said 500" in answer


@pytest.mark.parametrize("text", ["not JSON", '[{"title": 1}]', '{"a": 1}', ""])
async def test_search_results_of_another_form_are_a_failure_not_a_crash(text: str) -> None:
    answer = await answer_to(history([(search(1, "population of Tokyo"), text, False)]))
    assert answer.startswith("I have no answer, because the tools failed.")


@pytest.mark.parametrize(("text", "failed"), [("HTTP 503", True), ("", False), ("   \n", False)])
async def test_unreadable_page_is_reported(text: str, failed: bool) -> None:
    found = (search(1, "population of Tokyo"), HIT, False)
    answer = await answer_to(history([found], [(visit(1, TOKYO), text, failed)]))
    assert f"{TOKYO} could not be read: {text.strip() or 'it was empty'}" in answer
    assert "[1]" not in answer


async def test_page_without_a_fitting_sentence_gives_no_quote() -> None:
    found = (search(1, "population of Tokyo"), HIT, False)
    answer = await answer_to(history([found], [(visit(1, TOKYO), "Cherry trees bloom here in spring.", False)]))
    assert answer == "I have no answer: the search found pages, but I could quote nothing from them."


async def test_stream_equals_the_answer_and_counts_words() -> None:
    model = OfflineModel(lambda: ["A topic"])
    messages = history([(search(1, "x"), "[]", False)])
    parts = [part async for part in model.create_stream(messages, tools=OFFERED)]
    whole = parts[-1]
    assert isinstance(whole, CreateResult)
    assert "".join(part for part in parts if isinstance(part, str)) == whole.content
    assert model.actual_usage().completion_tokens == len(str(whole.content).split())
    assert model.remaining_tokens(messages) > model.count_tokens(messages) > 0


def test_offline_pages_are_well_formed_and_readable_by_visit_webpage() -> None:
    web: Web = OfflineWeb()
    files = [path for path in PAGES.iterdir() if path.suffix in CONTENT_TYPES]
    assert len(files) >= 10
    assert {".md", ".html"} <= {path.suffix for path in files}
    for path in files:
        page = web.fetch(f"https://offline.example/{path.stem}")
        assert page.status == 200
        assert page.body == path.read_bytes()
        text = page_to_markdown(page)
        assert text.startswith("# ")
        assert 230 <= len(text.split()) <= 500
        assert len(sentences(text)) >= 12


@pytest.mark.parametrize(
    "url",
    [
        "https://offline.example/",
        "https://offline.example/nothing",
        "https://offline.example/../web",
        "https://offline.example/..%2Fmodel",
        "https://offline.example/pages/grpc",
        "https://elsewhere.example/grpc",
    ],
)
async def test_unknown_address_is_a_404_within_the_folder(url: str) -> None:
    page = OfflineWeb().fetch(url)
    assert page.status == 404
    with pytest.raises(Exception, match="no such page"):
        page_to_markdown(page)


def test_an_empty_or_binary_file_is_left_out_and_the_rest_still_found(tmp_path: Path) -> None:
    (tmp_path / "empty.md").write_text("")
    (tmp_path / "binary.html").write_bytes(b"\0\1\2" * 100)
    (tmp_path / "note.txt").write_text("Otters are not searched for here.")
    (tmp_path / "folder.md").mkdir()
    (tmp_path / "otters.md").write_text("# Otters\n\nOtters are good swimmers in every season.")
    web = OfflineWeb(tmp_path)
    assert web.topics() == ["Otters"]
    assert [hit.href for hit in web.search("otters", 5)] == ["https://offline.example/otters"]


def test_search_excerpt_is_the_answering_passage() -> None:
    hit = OfflineWeb().search("threads without the global interpreter lock", 1)[0]
    assert hit.href.endswith("/threading-in-python")
    assert "lock" in hit.body
    assert len(hit.body) <= 300


@pytest.mark.parametrize(
    ("question", "searches"),
    [
        (POPULATIONS, ["population of Tokyo", "population of New York"]),
        ("Compare the populations of Tokyo and New York", ["populations of Tokyo", "populations of New York"]),
        ("Tokyo vs New York population", ["Tokyo population", "New York population"]),
        ("Should I use asyncio or threading in Python?", ["asyncio in Python", "threading in Python"]),
        ("How do retries and idempotency keys work?", ["retries and idempotency keys work"]),
        ("Tokyo, Paris, Rome and Oslo populations", ["Tokyo populations", "Paris populations", "Rome populations"]),
        ("What is gRPC? And what is HTTP caching?", ["gRPC", "HTTP caching"]),
        ("  What's durable execution ?  Be brief.", ["durable execution"]),
        ("", []),
    ],
)
def test_questions_become_searches(question: str, searches: list[str]) -> None:
    assert plan_searches(question) == searches


def test_forms_of_a_word_have_one_stem() -> None:
    assert len(set(words("thread threads threading"))) == 1
    assert len(set(words("crash crashes crashed crashing"))) == 1
    assert len(set(words("cache caches cached caching"))) == 1
    assert len(set(words("retry retries retried"))) == 1
    assert len(set(words("recover recovers recovery recovering"))) == 1
    assert len(set(words("durable durability"))) == 1
    assert words("What is the difference between them?") == []


def test_sentences_are_verbatim_prose() -> None:
    text = (
        "# A heading is no sentence at all.\n\nDr. Ada Lovelace wrote notes, e.g. about numbers, in 1843.0 or so. "
        "Does this one\ncount as well? Too short.\n\n- A point of a list can be a sentence.\n\n```\nNor is this code a "
        'sentence of prose.\n```\n| a table row is not one either. |\n\nHe said "this can not be quoted here" and left.'
    )
    found = sentences(text)
    assert found == [
        "Dr. Ada Lovelace wrote notes, e.g. about numbers, in 1843.0 or so.",
        "Does this one\ncount as well?",
        "A point of a list can be a sentence.",
    ]
    assert all(sentence in text for sentence in found)
    assert choose_sentences("Ada Lovelace", text, 1) == found[:1]
    assert quoted(f'He: "{found[2]}" [1] and "{found[0]}" alone') == [found[2]]
