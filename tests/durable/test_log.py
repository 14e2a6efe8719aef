"""Progress and warnings go to the logger, or to the program's own function."""

from __future__ import annotations

from typing import Any

import pytest
from durable_agents import agent, answer, inside, is_after_a_tool, new_session, run, texts
from harness import logged
from openai_server import OpenAIServer, Reply
from server_thread import ServerThread


async def test_library_logs_and_prints_nothing(server: ServerThread, capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    with OpenAIServer(lambda _: answer("yes")) as model:
        for _ in range(2):
            await run(server, lambda: agent(model, "one"), logs=lines)
    assert capsys.readouterr().out == ""
    assert "reply 1 of one: replayed from the record ✓" in lines


async def test_function_gets_the_lines_of_its_session_and_the_logger_gets_none(server: ServerThread) -> None:
    told: list[str] = []
    lines: list[str] = []
    session = new_session()
    with OpenAIServer(lambda _: answer("yes")) as model, logged(lines):
        for _ in range(2):
            await inside(server, agent(model, "one").run, session, tell=told.append)
    assert told[-2] == "[Nexum] reply 1 of one: replayed from the record ✓"
    assert lines == []


@pytest.mark.parametrize("line", ["note for one: replayed", "reply 1 of one: replayed", "reply 2 of one: replayed"])
async def test_error_of_the_function_ends_the_run(server: ServerThread, line: str) -> None:
    def note() -> str:
        return "noted"

    def tell(text: str) -> None:
        if line in text:
            raise BrokenPipeError

    def reply(body: dict[str, Any]) -> Reply:
        return answer("end") if is_after_a_tool(body) else Reply(calls=[("note", {})])

    with OpenAIServer(reply) as model:
        first = await run(server, lambda: agent(model, "one", [note]))
        with pytest.raises(BrokenPipeError):
            await run(server, lambda: agent(model, "one", [note]), tell=tell)
        assert texts(await run(server, lambda: agent(model, "one", [note]))) == texts(first)
        assert len(model.requests) == 2
