"""demo.py with a live model: a local OpenAI-compatible server, and a real worker on the offline pages."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import free_port
from openai_server import OpenAIServer, Reply
from processes import (
    QUESTION,
    InProcess,
    answer,
    attempts,
    call_of,
    counting_worker,
    demo,
    recorded,
    run_demo,
    run_script,
)
from server_thread import ServerThread

from demo import main as script

TOKYO = "https://offline.example/tokyo-population"
NEW_YORK = "https://offline.example/new-york-population"


@pytest.fixture
def address(server: ServerThread, tmp_path: Path) -> Iterator[str]:
    """Run a server with a worker."""
    with counting_worker(tmp_path, server.address):
        yield server.address


def ask(folder: Path, model: OpenAIServer, address: str, *arguments: str, **env: str) -> tuple[int, str]:
    return run_demo(
        folder,
        *(QUESTION, "--nexum", address, *arguments),
        env={"OPENAI_BASE_URL": model.base_url, "NEXUM_MODEL": "test-model", **env},
    )


def tool_messages(body: dict[str, Any]) -> list[str]:
    return [message["content"] for message in body["messages"] if message["role"] == "tool"]


def test_parallel_tool_calls_of_a_streaming_model_run_in_the_worker_and_reach_the_model(
    tmp_path: Path, address: str
) -> None:
    replies = [
        Reply(calls=[("web_search", {"query": "Tokyo"}), ("web_search", {"query": "New York", "max_results": 3})]),
        Reply(calls=[("visit_webpage", {"url": TOKYO}), ("visit_webpage", {"url": NEW_YORK})]),
        Reply("Tokyo has more people than New York, says a page ✓"),
    ]
    with OpenAIServer(replies) as model:
        code, output = ask(tmp_path, model, address)
        assert code == 0
        assert output.startswith("[demo] Model: OpenAI-compatible server at 127.0.0.1:")
        assert answer(output).strip() == "Tokyo has more people than New York, says a page ✓"
        assert "Tool calls: 4 executed, 0 cached" in output
        assert [request.body["stream"] for request in model.requests] == [True, True, True]
        hits = [[hit["href"] for hit in json.loads(text)] for text in tool_messages(model.requests[1].body)]
        assert TOKYO in hits[0]
        assert NEW_YORK in hits[1]
        pages = tool_messages(model.requests[2].body)[2:]
        assert "14,047,594" in pages[0]
        assert "8,804,190" in pages[1]
    assert [len(attempts(one)) for one in recorded(tmp_path, address)] == [1, 1, 1, 1]

    # In the second run, every reply and every call comes from the record.
    with OpenAIServer(replies) as model:
        code, output = ask(tmp_path, model, address, "--session-id", session_of(output))
        assert code == 0
        assert "Tool calls: 0 executed, 4 cached" in output
        assert model.requests == []


def session_of(output: str) -> str:
    return output.partition("Session: ")[2].partition(" ")[0]


def test_model_with_wrong_calls_sees_the_errors_and_continues(tmp_path: Path, address: str) -> None:
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("web_search", {"query": 5}),
        ("web_search", {"query": "x", "max_results": "many"}),
        ("web_search", {}),
        ("visit_webpage", {"url": "file:///etc/hostname"}),
        ("look_up", {"word": "x"}),
    ]
    with OpenAIServer([Reply(calls=wrong), Reply("Sorry about that.")]) as model:
        code, output = ask(tmp_path, model, address)
        assert code == 0
        assert answer(output).strip() == "Sorry about that."
        seen = tool_messages(model.requests[1].body)
    assert "query\n  Input should be a valid string" in seen[0]
    assert "max_results\n  Input should be a valid integer" in seen[1]
    assert "query\n  Field required" in seen[2]
    assert "file:///etc/hostname" in seen[3]
    assert "look_up" in seen[4]
    assert "[demo] Tool calls: 0 executed, 0 cached, 0 attached, 5 failed" in output
    # Wrong arguments and undeclared tools don't reach a worker. A final error is not retried.
    (record,) = recorded(tmp_path, address)
    assert (call_of(record)[0], record["status"]) == ("visit_webpage", "FAILED")
    assert len(attempts(record)) == 1


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (500, "InternalServerError: Error code: 500 - scripted failure"),
        (401, "AuthenticationError: Error code: 401 - scripted failure"),
        (429, "RateLimitError: Error code: 429 - scripted failure"),
    ],
)
def test_model_error_is_one_line_and_exit_code_1(tmp_path: Path, server: ServerThread, status: int, said: str) -> None:
    with OpenAIServer([Reply(status=status)]) as model:
        code, output = ask(tmp_path, model, server.address)
        assert model.requests
    assert code == 1
    assert output.splitlines()[-1].startswith(
        "error: the model gave no usable answer (OpenAI-compatible server, test-m"
    )
    assert said in output.splitlines()[-1]


def test_calls_before_a_model_failure_are_recorded(tmp_path: Path, address: str) -> None:
    calls = Reply(calls=[("web_search", {"query": "Tokyo"})])
    with OpenAIServer([calls, Reply(status=401)]) as model:
        code, output = ask(tmp_path, model, address, "--session-id", "s")
    assert code == 1
    assert "the same command continues" in output.splitlines()[-1]
    with OpenAIServer([Reply("Done.")]) as model:
        code, output = ask(tmp_path, model, address, "--session-id", "s")
        assert len(model.requests) == 1
    assert code == 0
    assert "Tool calls: 0 executed, 1 cached" in output


def test_absent_model_server_is_one_line_and_exit_code_1(tmp_path: Path, server: ServerThread) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    env = {"OPENAI_BASE_URL": url, "NEXUM_MODEL": "test-model"}
    code, output = run_demo(tmp_path, "--nexum", server.address, env=env)
    assert code == 1
    assert "APIConnectionError" in output.splitlines()[-1]


def test_an_empty_answer_is_an_error(tmp_path: Path, server: ServerThread) -> None:
    with OpenAIServer([Reply("")]) as model:
        code, output = ask(tmp_path, model, server.address)
    assert code == 1
    assert output.splitlines()[-1].startswith("error: no answer: the model's last reply was empty")


def test_model_that_only_calls_tools_is_stopped_after_its_rounds(tmp_path: Path, address: str) -> None:
    with OpenAIServer([Reply(calls=[("web_search", {"query": "Tokyo"})])]) as model:
        code, output = ask(tmp_path, model, address)
        assert len(model.requests) == 12
    assert code == 1
    assert "Tool calls: 12 executed, 0 cached" in output
    assert "12 rounds of tool calls" in output.splitlines()[-1]


def test_model_is_not_asked_beyond_the_budget_until_a_person_raises_it(tmp_path: Path, server: ServerThread) -> None:
    with OpenAIServer([Reply("Hello.")]) as model:
        env = {"OPENAI_BASE_URL": model.base_url, "NEXUM_MODEL": "gpt-4o"}
        options = ("--nexum", server.address, "--session-id", "s", "--budget", "0")
        with demo(tmp_path, QUESTION, *options, env=env) as waiting:
            told = waiting.wait_for("has used $0 of $0 of its budget")
            assert model.requests == []
            command = shlex.split(told.partition("Raise the budget: python ")[2].partition(";")[0])
            assert run_script(command, tmp_path, forked=True) == (0, "raised the budget of session s to $1")
            assert waiting.wait() == 0
        assert "Hello." in waiting.output
        assert len(model.requests) == 1
        command = ["-m", "durable_autogen", "budget", "--nexum", server.address, "s"]
        code, output = run_script(command, tmp_path, forked=True)
        assert (code, output.partition("session s has used $0.0")[0]) == (0, "")


def test_a_compatible_server_gets_the_openai_key_and_no_other(tmp_path: Path, server: ServerThread) -> None:
    keys = {name: f"{name}-secret" for name in ("GEMINI_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY")}
    with OpenAIServer([Reply("Hello.")]) as model:
        code, output = ask(tmp_path, model, server.address, **keys)
        assert code == 0
        assert model.keys == {"Bearer OPENAI_API_KEY-secret"}
        sent = json.dumps([[request.headers, request.body] for request in model.requests])
    assert "GEMINI_API_KEY-secret" not in sent
    assert "ANTHROPIC_API_KEY-secret" not in sent
    assert "secret" not in output


def test_a_compatible_server_needs_no_key(tmp_path: Path, server: ServerThread) -> None:
    with OpenAIServer([Reply("Hello.")]) as model:
        code, _ = ask(tmp_path, model, server.address)
        assert code == 0
        assert model.keys == {"Bearer no-key-needed"}


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"NEXUM_MODEL": "gpt-4o"}, "NEXUM_MODEL=gpt-4o needs OPENAI_API_KEY, which is not set"),
        ({"NEXUM_MODEL": "claude-opus", "OPENAI_API_KEY": "k"}, "NEXUM_MODEL=claude-opus needs ANTHROPIC_API_KEY"),
        ({"NEXUM_MODEL": "llama3"}, "NEXUM_MODEL=llama3 needs OPENAI_BASE_URL"),
        ({"OPENAI_BASE_URL": "http://localhost:1/v1"}, "OPENAI_BASE_URL needs NEXUM_MODEL"),
    ],
)
def test_wrong_model_setting_is_a_one_line_error(
    in_process: InProcess, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], said: str
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    code, output = in_process(script)
    assert code == 2
    assert output.splitlines() == [line for line in output.splitlines() if line.startswith(f"error: {said}")]
