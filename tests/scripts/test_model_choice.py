"""The choice of a model from the environment; each key reaches only its vendor."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.messages import TextMessage
from autogen_core import FunctionCall
from autogen_core.models import CreateResult, UserMessage
from openai_server import OpenAIServer, Reply

from support.models import KEYLESS, VENDORS, ModelChoice, ModelChoiceError, Vendor, choose_model
from support.models.live import refuses_tools_while_reasoning
from support.models.vendors import OPENAI
from support.offline.model import OfflineModel

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"GEMINI_API_KEY": "gem-secret", "OPENAI_API_KEY": "oai-secret", "ANTHROPIC_API_KEY": "ant-secret"}
ASK = [UserMessage(content="Hello", source="user")]


@pytest.fixture
def servers() -> Iterator[dict[str, OpenAIServer]]:
    """One server for each vendor, by the name of the key's variable."""
    with ExitStack() as stack:
        yield {vendor.key_variable: stack.enter_context(OpenAIServer()) for vendor in VENDORS}


def vendors_at(servers: dict[str, OpenAIServer]) -> list[Vendor]:
    return [replace(vendor, base_url=servers[vendor.key_variable].base_url) for vendor in VENDORS]


@pytest.mark.parametrize(
    ("env", "description"),
    [
        (KEYS, "Google Gemini, gemini-flash-latest"),
        ({"OPENAI_API_KEY": "k", "ANTHROPIC_API_KEY": "k"}, "OpenAI, gpt-5.4-mini"),
        ({"ANTHROPIC_API_KEY": "k"}, "Anthropic Claude, claude-sonnet-5"),
        ({**KEYS, "NEXUM_MODEL": "gpt-4o"}, "OpenAI, gpt-4o"),
        ({**KEYS, "NEXUM_MODEL": "claude-3-5-sonnet-20241022"}, "Anthropic Claude, claude-3-5-sonnet-20241022"),
        ({**KEYS, "NEXUM_MODEL": "gemini/gemini-3.8-flash"}, "Google Gemini, gemini-3.8-flash"),
        ({**KEYS, "NEXUM_MODEL": "something-new"}, "OpenAI, something-new"),
        ({"NEXUM_MODEL": "  ", "GEMINI_API_KEY": "", "OPENAI_API_KEY": " k\n"}, "OpenAI, gpt-5.4-mini"),
        ({}, "offline (no model key found)"),
        ({"GEMINI_API_KEY": " "}, "offline (no model key found)"),
    ],
)
def test_the_environment_picks_vendor_and_model(env: dict[str, str], description: str) -> None:
    assert choose_model(env, offline=False).description == description


def test_offline_wins_over_every_key_and_even_over_a_wrong_setting() -> None:
    choice = choose_model({**KEYS, "OPENAI_BASE_URL": "nonsense"}, offline=True)
    assert choice.offline
    assert choice.slug == "offline"
    assert isinstance(choice.client(), OfflineModel)


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"NEXUM_MODEL": "gpt-4o", "GEMINI_API_KEY": "SECRET"}, "OPENAI_API_KEY"),
        ({"NEXUM_MODEL": "claude-opus-5", "OPENAI_API_KEY": "SECRET"}, "ANTHROPIC_API_KEY"),
        ({"NEXUM_MODEL": "gemini-3-flash", "OPENAI_API_KEY": "SECRET"}, "GEMINI_API_KEY"),
        ({"NEXUM_MODEL": "llama3.2", "GEMINI_API_KEY": "SECRET"}, "OPENAI_BASE_URL"),
        ({"OPENAI_BASE_URL": "http://localhost:11434/v1"}, "NEXUM_MODEL"),
        ({"OPENAI_BASE_URL": "http://localhost:11434/v1", "GEMINI_API_KEY": "SECRET"}, "NEXUM_MODEL"),
        ({"OPENAI_BASE_URL": "localhost:11434/v1", "NEXUM_MODEL": "x"}, "OPENAI_BASE_URL"),
        ({"OPENAI_BASE_URL": "http://user:SECRET@", "NEXUM_MODEL": "x"}, "OPENAI_BASE_URL"),
        ({"GEMINI_API_KEY": "SECRET\nX-Other: 1"}, "GEMINI_API_KEY"),
        ({"OPENAI_API_KEY": "“SECRET”"}, "OPENAI_API_KEY"),
        ({"NEXUM_MODEL": "gpt-4o\nevil", "OPENAI_API_KEY": "SECRET"}, "NEXUM_MODEL"),
    ],
)
def test_wrong_setting_is_a_one_line_error_with_the_variable_and_no_key(env: dict[str, str], said: str) -> None:
    with pytest.raises(ModelChoiceError, match=said) as raised:
        choose_model(env, offline=False)
    assert "\n" not in str(raised.value)
    assert "SECRET" not in str(raised.value)
    assert raised.value.__cause__ is None


@pytest.mark.parametrize("wanted", ["gemini-x", "gpt-4o", "claude-x", None])
async def test_each_key_arrives_at_its_own_vendor_only(
    servers: dict[str, OpenAIServer], wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "oai-admin-secret")
    monkeypatch.setenv("OPENAI_ORG_ID", "oai-organization")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "oai-project")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer oai-custom\nX-Extra: oai-extra")
    env = {**KEYS, **({"NEXUM_MODEL": wanted} if wanted else {})}
    client = choose_model(env, offline=False, vendors=vendors_at(servers)).client()
    result = await client.create(ASK)
    await client.close()
    assert result.content == "ok"

    asked = {variable: server for variable, server in servers.items() if server.requests}
    assert len(asked) == 1
    for variable, server in asked.items():
        assert server.keys == {f"Bearer {KEYS[variable]}"}
        if variable != OPENAI.key_variable:
            assert "oai-" not in str(server.requests)


async def test_compatible_server_comes_first_and_gets_a_placeholder_without_a_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", "gem-secret")
    monkeypatch.setenv("OPENAI_ORG_ID", "oai-organization")
    with OpenAIServer() as server:
        env = {"GEMINI_API_KEY": "gem-secret", "OPENAI_BASE_URL": server.base_url, "NEXUM_MODEL": "gemini-3-flash"}
        choice = choose_model(env, offline=False)
        assert choice.description.startswith("OpenAI-compatible server at 127.0.0.1:")
        client = choice.client()
        await client.create(ASK)
        assert server.keys == {f"Bearer {KEYLESS}"}
        assert "oai-" not in str(server.requests)
        assert server.requests[0].path == "/v1/chat/completions"

        client = choose_model({**env, "OPENAI_API_KEY": "own"}, offline=False).client()
        await client.create(ASK)
        assert server.requests[-1].headers["authorization"] == "Bearer own"


async def test_a_redirect_is_not_followed_with_the_key() -> None:
    with OpenAIServer() as other, OpenAIServer([Reply(status=307, location=other.base_url)]) as server:
        client = choose_model({"OPENAI_BASE_URL": server.base_url, "NEXUM_MODEL": "m"}, offline=False).client()
        with pytest.raises(Exception, match="scripted failure"):
            await client.create(ASK)
        assert server.requests
        assert not other.requests


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["gemini-flash-latest", "gpt-5.4-mini", "claude-sonnet-5", "unheard-of"])
async def test_an_agent_makes_parallel_calls_and_answers_with_any_model_name(
    servers: dict[str, OpenAIServer], name: str, stream: bool, recwarn: pytest.WarningsRecorder
) -> None:
    def respond(body: dict[str, object]) -> Reply:
        if "called twice" in str(body["messages"]):
            return Reply("the end")
        return Reply(calls=[("look", {"what": "one called twice"}), ("look", {"what": "two"})])

    looked: list[str] = []

    def look(what: str) -> str:
        """Look at something."""
        looked.append(what)
        return f"saw {what}"

    for server in servers.values():
        server.replies = respond
    client = choose_model({**KEYS, "NEXUM_MODEL": name}, offline=False, vendors=vendors_at(servers)).client()
    agent = AssistantAgent("a", client, tools=[look], max_tool_iterations=3, model_client_stream=stream)
    result = await agent.run(task="Look twice")
    await client.close()
    final = result.messages[-1]
    assert isinstance(final, TextMessage)
    assert final.content.strip() == "the end"
    assert sorted(looked) == ["one called twice", "two"]
    assert final.models_usage is not None
    assert final.models_usage.prompt_tokens > 0  # also if the reply is streamed
    assert not [warning for warning in recwarn if "model" in str(warning.message).lower()]

    second = next(server for server in servers.values() if server.requests).requests[1].body
    calls = next(message["tool_calls"] for message in second["messages"] if message.get("tool_calls"))
    signed = ["extra_content" in call for call in calls]
    assert signed == ([True, False] if name.startswith("gemini") else [False, False])
    assert second.get("reasoning_effort") == ("none" if name == "gpt-5.4-mini" else None)


async def test_stream_options_are_sent_with_streams_only() -> None:
    with OpenAIServer([Reply("some words here")]) as server:
        client = choose_model({"OPENAI_BASE_URL": server.base_url, "NEXUM_MODEL": "m"}, offline=False).client()
        await client.create(ASK)
        parts = [part async for part in client.create_stream(ASK)]
    assert isinstance(parts[-1], CreateResult)
    assert parts[-1].usage.completion_tokens == 3
    assert "stream_options" not in server.requests[0].body
    assert server.requests[1].body["stream_options"] == {"include_usage": True}


async def test_streamed_parallel_calls_arrive_whole() -> None:
    with OpenAIServer([Reply(calls=[("f", {"a": 1}), ("f", {"a": 2})])]) as server:
        client = choose_model({"OPENAI_BASE_URL": server.base_url, "NEXUM_MODEL": "m"}, offline=False).client()
        parts = [part async for part in client.create_stream(ASK)]
    assert isinstance(parts[-1], CreateResult)
    assert parts[-1].content == [
        FunctionCall(id="call_1_1", arguments='{"a": 1}', name="f"),
        FunctionCall(id="call_1_2", arguments='{"a": 2}', name="f"),
    ]


def test_no_text_form_of_a_choice_holds_the_key() -> None:
    choice = choose_model(KEYS, offline=False)
    forms = [repr(choice), str(choice), choice.model_dump_json(), choice.description, choice.slug]
    assert "secret" not in " ".join(forms)
    assert choice.api_key is not None
    assert choice.api_key.get_secret_value() == "gem-secret"


def test_slugs_differ_between_choices_and_are_valid_in_names() -> None:
    def slug(**env: str) -> str:
        return choose_model({**KEYS, **env}, offline=False).slug

    here = slug(OPENAI_BASE_URL="http://localhost:1/v1", NEXUM_MODEL="m")
    there = slug(OPENAI_BASE_URL="http://localhost:2/v1", NEXUM_MODEL="m")
    slugs = [slug(), slug(NEXUM_MODEL="gpt-4o"), slug(NEXUM_MODEL="claude-x"), here, there]
    assert len(set(slugs)) == len(slugs)
    assert all(part.isalnum() and part.isascii() for each in slugs for part in each.split("-"))


def test_only_chat_models_from_5_4_on_get_reasoning_effort_none() -> None:
    told = ["gpt-5.4", "gpt-5.4-mini", "gpt-5.10", "gpt-6-sol"]
    not_told = ["gpt-4o", "gpt-4.1", "gpt-5", "gpt-5-mini", "gpt-5.1", "o3", "ft:gpt-5.4"]
    assert [name for name in told + not_told if refuses_tools_while_reasoning(name)] == told


@pytest.mark.parametrize("module", ["support.models", "support.offline.web", "support.offline.reading"])
def test_importing_does_not_import_autogen(module: str) -> None:
    code = f"import sys, {module}; sys.exit(any(name.startswith(('autogen', 'openai')) for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_choice_without_address_is_refused() -> None:
    with pytest.raises(ModelChoiceError, match="choose_model"):
        ModelChoice(vendor="x", model="y", description="x, y").client()
