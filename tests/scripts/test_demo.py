"""demo.py as a process: without an API key or a server, in a second run, and with every wrong argument."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import AbstractContextManager, ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import pytest
from filelock import FileLock
from harness import free_port
from processes import (
    DEMO,
    QUESTION,
    InProcess,
    answer,
    attempts,
    call_of,
    default_port,
    demo,
    read_one_line,
    recorded,
    result_of,
    run_demo,
    run_script,
    wait_until,
)

from demo import main as script


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which the README's question was asked once, and the demo's output."""
    folder = tmp_path_factory.mktemp("first")
    code, output = run_demo(folder, QUESTION)
    assert code == 0, output
    return folder, output


# ---- The main job ----------------------------------------------------------------------------------------------------


def test_the_first_run_names_its_model_first_and_answers_about_both_cities(first_run: tuple[Path, str]) -> None:
    _, output = first_run
    assert output.startswith("[demo] Model: offline (no model key found)")
    assert "Tokyo" in answer(output)
    assert "New York" in answer(output)
    assert "Tool calls: 4 executed, 0 cached, 0 attached" in output


def test_every_quote_and_every_source_of_the_answer_is_in_a_recorded_visit(first_run: tuple[Path, str]) -> None:
    folder, output = first_run
    calls = [(call_of(one), result_of(one)) for one in recorded(folder)]
    visits = {arguments["url"]: text for (name, arguments), text in calls if name == "visit_webpage"}
    quotes = re.findall(r'"([^"]+)"', answer(output))
    sources = re.findall(r"https?://\S+", answer(output))
    assert len(quotes) >= 2
    assert len(sources) >= 2
    assert all(any(quote in text for text in visits.values()) for quote in quotes)
    assert set(sources) <= set(visits)


def test_each_call_of_the_first_run_took_one_attempt(first_run: tuple[Path, str]) -> None:
    folder, _ = first_run
    assert [len(attempts(one)) for one in recorded(folder)] == [1, 1, 1, 1]


def test_repeated_question_gets_the_same_answer_from_the_record_alone(first_run: tuple[Path, str]) -> None:
    folder, output = first_run
    before = recorded(folder)
    code, again = run_demo(folder)
    assert code == 0
    assert f"[demo] No question given; asking this demo's own: {QUESTION}" in again
    assert re.search(r"Session: \w+, begun \d+ (s|min) ago: continuing it \(--new-session", again)
    assert again.count("for research_assistant: replayed from the record ✓") == 4
    assert "Submitted" not in again
    assert answer(again) == answer(output)
    assert recorded(folder) == before


def test_truncated_session_file_is_set_aside_and_keys_find_every_execution(
    first_run: tuple[Path, str],
) -> None:
    folder, output = first_run
    before = recorded(folder)
    (session,) = folder.glob(".session-*.json")
    whole = session.read_bytes()
    session.write_bytes(whole[:-20])
    code, again = run_demo(folder, QUESTION)
    assert code == 0
    assert f"{session.name} is corrupt" in again
    (aside,) = folder.glob(".session-*.json.corrupt-*")
    assert aside.read_bytes() == whole[:-20]
    assert "Tool calls: 0 executed, 4 cached, 0 attached" in again
    assert answer(again) == answer(output)
    assert recorded(folder) == before
    assert '"executions"' in session.read_text()
    aside.unlink()


def test_new_session_prints_the_id_under_which_it_continues(tmp_path: Path) -> None:
    code, output = run_demo(tmp_path, QUESTION, "--new-session")
    assert code == 0
    assert "Tool calls: 4 executed, 0 cached" in output
    match = re.search(r"Session: (\w+) \(new; continue it with --session-id \1\)", output)
    assert match
    code, output = run_demo(tmp_path, QUESTION, "--session-id", match[1])
    assert code == 0
    assert "Tool calls: 0 executed, 4 cached" in output
    code, output = run_demo(tmp_path, QUESTION)
    assert code == 0
    assert "Tool calls: 4 executed, 0 cached" in output


def test_a_question_that_no_page_covers_is_answered_with_the_topics(tmp_path: Path) -> None:
    code, output = run_demo(tmp_path, "How tall is Mount Everest's twin?", "--offline")
    assert code == 0
    assert "(requested)" in output
    assert "- Durable execution" in answer(output)


# ---- A crash, and the run after it -----------------------------------------------------------------------------------


def test_a_run_after_a_crash_repeats_nothing_that_was_recorded(tmp_path: Path) -> None:
    code, crashed = run_demo(tmp_path, QUESTION, "--crash-after-step", "1")
    assert code not in (0, 1, 2)
    # This is the last line of the demo itself. After it, a child process of the demo may print another line.
    assert crashed.rpartition("[demo] ")[2].startswith("step 1 is recorded; crashing now")
    (done,) = re.findall(r"(exec-\S+) \(\w+\) done ✓", crashed)

    # Run the demo again at once: the crashed run's server is still ending, and holds its port and its lock.
    code, output = run_demo(tmp_path, QUESTION)
    assert code == 0
    assert re.search(rf"{done} \(web_search\) already COMPLETED \(cached\) ✓", output)
    (before,) = [one for one in recorded(tmp_path) if one["execution_id"] == done]
    assert [one["outcome"] for one in attempts(before)] == ["COMPLETED"]
    assert len(recorded(tmp_path)) == 4

    # If the demo never reaches the step, it reports that.
    code, output = run_demo(tmp_path, QUESTION, "--crash-after-step", "3")
    assert code == 0
    assert output.splitlines()[-1] == "[demo] No crash: this run executed 0 tool call(s), not 3"


def test_demo_crashes_at_the_requested_step(tmp_path: Path) -> None:
    code, _ = run_demo(tmp_path, QUESTION, "--crash-after-step", "3")
    assert code not in (0, 1, 2)
    assert sum(one["status"] == "COMPLETED" for one in recorded(tmp_path)) >= 3


def test_run_waits_for_the_database_of_a_dying_server_and_prints_that(tmp_path: Path) -> None:
    (tmp_path / ".nexum").mkdir()
    lock = FileLock(tmp_path / ".nexum" / "local.db.lock")
    with lock, demo(tmp_path, QUESTION) as process:
        process.wait_for("another server may still have the database open")
        lock.release()
        assert process.wait() == 0
        assert "Tool calls: 4 executed" in process.output


# ---- What can't work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--crash-after-step", "0"], "'0' is not a number between 1 and 1,000,000"),
        (["--crash-after-step", "-2"], "'-2' is not a number between 1"),
        (["--crash-after-step", "one"], "'one' is not a number between 1"),
        (["--budget", "two"], "'two' is not an amount of US dollars"),
        ([""], "the question is empty"),
        (["  \n"], "the question is empty"),
        (["--session-id", "../x"], "session id '../x' can't be used"),
        (["--session-id", "a/../../b"], "can't be used"),
        (["--session-id", "x" * 65], "can't be used"),
        (["--session-id", "x\n"], "can't be used"),
        (["--session-id", ""], "session id '' can't be used"),
        (["--session-id", "a", "--new-session"], "not allowed with"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(
    tmp_path: Path, in_process: InProcess, arguments: list[str], said: str
) -> None:
    code, output = in_process(script, *arguments)
    assert code == 2
    assert "error: " in output.splitlines()[-1]
    assert said in output.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("nonsense", "'nonsense' is not the address of a server: give HOST:PORT"),
        ("localhost:99999", "is not the address of a server"),
        ("localhost:{free}", "error: no Nexum server answers on localhost:{free}"),
    ],
)
def test_a_wrong_address_is_one_line_and_exit_code_2(tmp_path: Path, address: str, said: str) -> None:
    port = str(free_port())
    code, output = run_demo(tmp_path, "--nexum", address.replace("{free}", port))
    assert code == 2
    assert "error: " in output.splitlines()[-1]
    assert said.replace("{free}", port) in output.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_nexum_address_without_a_server_is_an_error(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    code, output = run_demo(tmp_path, env={"NEXUM_ADDRESS": address})
    assert code == 2
    assert output.splitlines()[-1].startswith(f"error: no Nexum server answers on {address}")


def test_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".nexum").mkdir()
    database = tmp_path / ".nexum" / "local.db"
    database.write_bytes(b"dear diary" * 100)
    code, output = run_demo(tmp_path)
    assert code == 2
    reason = (
        f"{database} is not a database: it was left untouched; name another file with DATABASE_URL "
        "(or the option --database-url of nexum)"
    )
    assert output.splitlines()[-1] == f"error: {reason}"
    assert database.read_bytes() == b"dear diary" * 100


def test_unreadable_session_file_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / ".session-s.json").mkdir()
    code, output = run_demo(tmp_path, "--session-id", "s")
    assert code == 2
    assert output.splitlines()[-1].startswith(f"error: the session file {tmp_path / '.session-s.json'} can't be read")


@contextmanager
def web_server(port: int) -> Iterator[None]:
    """Run an HTTP server on the port."""
    with ThreadingHTTPServer(("127.0.0.1", port), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        try:
            yield
        finally:
            server.shutdown()


@contextmanager
def silent_server(port: int) -> Iterator[None]:
    """Run a server on the port. It accepts connections and sends nothing."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        yield
        listener.setblocking(False)
        listener.accept()[0].close()  # raises an error if no client has connected


@contextmanager
def other_grpc_server(port: int) -> Iterator[None]:
    """Run a gRPC server without Nexum's service on the port."""
    server = grpc.server(futures.ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield
    finally:
        server.stop(None).wait()


Other = Callable[[int], AbstractContextManager[None]]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (web_server, "error: the program that listens on localhost:{port} does not answer as a Nexum server: end it"),
        (
            silent_server,
            "error: the program that listens on localhost:{port} does not answer as a Nexum server: end it",
        ),
        (other_grpc_server, "error: the server on localhost:{port} does not speak this Nexum contract"),
    ],
)
def test_port_of_another_program_is_an_early_one_line_error(tmp_path: Path, other: Other, told: str) -> None:
    port = free_port()
    with other(port), demo(tmp_path, "--nexum", f"localhost:{port}") as process:
        process.wait_for("Session: ")
        begun = time.monotonic()
        assert process.wait() == 2
        took = time.monotonic() - begun
    assert process.lines[-1].startswith(told.format(port=port))
    # The demo waits 2 s, in case a server is just ending. By default, gRPC would try to connect for 20 s.
    assert took < 8
    assert list(tmp_path.iterdir()) == []


@contextmanager
def on_the_default_port(other: Other) -> Iterator[None]:
    """Wait until no embedded server of another test holds the default port. Then start the server `other` there."""
    with ExitStack() as stack:

        def is_started() -> bool:
            try:
                stack.enter_context(other(default_port()))
            except (OSError, RuntimeError):
                return False
            return True

        wait_until(is_started, f"port {default_port()} is free", timeout=60)
        yield


@pytest.mark.parametrize("other", [web_server, silent_server, other_grpc_server])
def test_default_port_of_another_program_is_reported_and_a_free_port_used(tmp_path: Path, other: Other) -> None:
    with on_the_default_port(other):
        code, output = run_demo(tmp_path)
    assert code == 0
    address = re.search(r"\[Nexum\] localhost:50051 is in use: .* listens on (127.0.0.1:\d+) ", output)
    assert address is not None
    assert not address[1].endswith(":50051")
    assert "Tool calls: 4 executed" in output


# ---- Consoles --------------------------------------------------------------------------------------------------------


def test_help_imports_neither_autogen_nor_the_search(tmp_path: Path) -> None:
    code, output = run_script(["-X", "importtime", DEMO, "--help"], tmp_path)
    assert code == 0
    assert "--crash-after-step N" in output
    imported = {line.rpartition("|")[2].strip() for line in output.splitlines() if "|" in line}
    assert "nexum_engine" in imported
    heavy = {"autogen_core", "autogen_agentchat", "autogen_ext", "openai", "ddgs", "selectolax", "support.offline"}
    assert not imported & heavy


@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["cp1252", "ascii", "C locale"],
)
def test_console_replaces_a_character_that_it_cannot_encode(tmp_path: Path, env: dict[str, str]) -> None:
    code, output = run_demo(tmp_path, "東京 ✓", env=env)
    assert code == 0, output
    assert "(web_search) done ?" in output
    assert "- Durable execution" in answer(output)


def test_the_same_question_is_the_same_session_whatever_the_locale(tmp_path: Path) -> None:
    run_demo(tmp_path, "Bevölkerung Tokyo")
    code, output = run_demo(
        tmp_path, "Bevölkerung Tokyo", env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    )
    assert code == 0
    assert "continuing it" in output
    assert "Tool calls: 0 executed" in output


def test_closed_output_causes_no_traceback(tmp_path: Path) -> None:
    line, code, errors = read_one_line([DEMO], tmp_path)
    assert line.startswith("[demo] Model")
    assert (code, errors) == (1, "")


def test_foreign_file_under_the_session_files_name_is_kept(tmp_path: Path) -> None:
    (tmp_path / ".session-s.json").write_text('{"mine": "not yours"}')
    with demo(tmp_path, "--session-id", "s", "Tokyo") as process:
        assert process.wait() == 0
    (aside,) = tmp_path.glob(".session-s.json.corrupt-*")
    assert aside.read_text() == '{"mine": "not yours"}'


def test_unwritable_session_file_does_not_fail_the_run(tmp_path: Path) -> None:
    (tmp_path / ".session-s.json.tmp").mkdir()
    code, output = run_demo(tmp_path, "--session-id", "s")
    assert code == 0
    assert ".session-s.json can't be written" in output
    assert "Tool calls: 4 executed" in output
    code, output = run_demo(tmp_path, "--session-id", "s")
    assert code == 0
    assert "Tool calls: 0 executed, 4 cached" in output
