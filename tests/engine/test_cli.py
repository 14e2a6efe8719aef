"""The command `python -m nexum_engine`: the server's life cycle, and ps, show and cancel with and without a server."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import harness
import pytest
from harness import Process, Server, environment, free_port, nexum_server, running, sqlite_url
from processes import (
    Command,
    counting_worker,
    effects,
    recorded,
    run_script,
    submitter,
    wait_until,
)
from server_thread import ServerThread, server_thread

WIDTH = 80


def nexum_process(folder: Path, *arguments: str) -> tuple[int, str]:
    return run_script(["-m", "nexum_engine", *arguments], folder, forked=True)


def database(folder: Path) -> tuple[str, str]:
    """Return the argument that names the test server's database."""
    return "--database-url", f"sqlite:///{folder / 'nexum.db'}"


@dataclass(frozen=True)
class Run:
    """The two executions of `run_one_call`, on a running server."""

    address: str
    completed: str
    failed: str


def run_one_call(folder: Path, server: ServerThread) -> Run:
    """Make a completed execution with a long result, and a failed one with control characters."""
    arguments = {"url": "https://offline.example/tokyo-population", "\u001b[31m": "x" * 3000}
    with counting_worker(folder, server.address):
        with submitter(folder, server.address, "visit_webpage", {"url": arguments["url"]}) as process:
            assert process.wait() == 0
        with submitter(folder, server.address, "visit_webpage", arguments) as process:
            assert process.wait() == 1
    completed, failed = [one["execution_id"] for one in recorded(folder, server.address)]
    return Run(server.address, completed, failed)


@pytest.fixture(scope="module")
def run_of_calls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A server that the tests only read, with the executions of `run_one_call`."""
    folder = tmp_path_factory.mktemp("calls")
    with server_thread(folder, database_url=harness.url_of(folder)) as server:
        yield run_one_call(folder, server)


# ---- The server ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [Process.interrupt, Process.terminate], ids=["Ctrl+C", "SIGTERM"])
def test_server_prints_one_line_and_stops_cleanly(
    tmp_path: Path, end: Callable[[Process], None], loop_of_processes: str
) -> None:
    port = free_port()
    with running(["-m", "nexum_engine", "--listen", f"127.0.0.1:{port}"], cwd=tmp_path) as server:
        line = server.wait_for("Nexum engine")
        where = re.escape(str(tmp_path / ".nexum" / "local.db"))
        assert re.fullmatch(
            rf"Nexum engine \d+\.\d+\.\d+ on 127\.0\.0\.1:{port}, database {where} \(Ctrl\+C to stop\)", line
        )
        if (maps := Path(f"/proc/{server.popen.pid}/maps")).exists():  # on Linux
            # A process that uses uvloop has uvloop's library in memory.
            assert ("uvloop" in maps.read_text()) == (loop_of_processes == "uvloop")
        end(server)
        assert server.wait(10) == 0
        assert server.lines == [line]
    assert sorted(path.name for path in (tmp_path / ".nexum").iterdir()) == [".gitignore", "local.db", "local.db.lock"]
    assert (tmp_path / ".nexum" / ".gitignore").read_text() == "*\n"
    assert (tmp_path / ".nexum" / "local.db").stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("loop_of_processes")
def test_server_stops_while_worker_and_caller_are_connected(tmp_path: Path) -> None:
    arguments = {"log": str(tmp_path / "log"), "gate": str(tmp_path / "gate")}
    with (
        nexum_server(tmp_path) as server,
        counting_worker(tmp_path, server.address) as worker,
        submitter(tmp_path, server.address, "effect_then_gate", arguments),
    ):
        wait_until(lambda: bool(effects(tmp_path / "log")), "the tool runs")
        server.process.interrupt()
        assert server.process.wait(10) == 0
        worker.wait_for("lost the Nexum server")
        assert "Traceback" not in server.process.output + worker.output


def test_second_server_on_port_is_refused_in_one_line(tmp_path: Path, server: ServerThread) -> None:
    code, output = nexum_process(
        tmp_path, "--listen", server.address, "--database-url", f"sqlite:///{tmp_path / 'other.db'}"
    )
    assert code == 1
    assert output == (
        f"error: can't listen on {server.address}: the port is in use (by another Nexum server?) or not allowed; "
        "give another port with --listen"
    )


@pytest.mark.sqlite
@pytest.mark.usefixtures("server")
def test_second_server_on_database_is_refused_in_one_line(tmp_path: Path) -> None:
    code, output = nexum_process(tmp_path, "--listen", f"127.0.0.1:{free_port()}", *database(tmp_path))
    assert code == 1
    assert output.startswith(f"error: database {tmp_path / 'nexum.db'} is in use by another Nexum server")
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--listen", "0.0.0.0:5000"], "refusing to listen on 0.0.0.0:5000: without TLS and tokens"),
        (["--listen", "[::]:5000"], "refusing to listen on [::]:5000"),
        (["--listen", "example.com:5000"], "refusing to listen on example.com:5000"),
        (["--listen", "5000"], "'5000' is not an address: give HOST:PORT"),
        (["--listen", "localhost:99999"], "is not an address"),
        (["--database-url", "postgresql://127.0.0.1:1/x"], "can't open postgresql: dbname=x host=127.0.0.1 port=1"),
        (["--database-url", "mysql://localhost/x"], "database URL 'mysql://localhost/x' is not supported"),
        (["--database-url", sqlite_url(Path(__file__))], "can't be opened"),
        (["--database-url", "sqlite:///a%00b"], "database URL 'sqlite:///a%00b' is not supported"),
        (["--listen", "127.0.0.1:٥٠٠٠"], "is not an address"),
    ],
)
def test_server_that_cannot_start_says_why_in_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    code, output = nexum_process(tmp_path, *arguments)
    assert code == 1
    assert "error: " in output.splitlines()[-1]
    assert said in output.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["ps", "--database-url", "sqlite:///a%00b"], 1, "database URL 'sqlite:///a%00b' is not supported"),
        (["--lease", "inf"], 2, "argument --lease: 'inf' is not a number of seconds between 0.1 and 1,000,000"),
        (["--lease", "soon"], 2, "argument --lease: 'soon' is not a number of seconds between 0.1 and"),
        (["--lease", "0"], 2, "argument --lease: '0' is not a number of seconds between 0.1 and 1,000,000"),
        (["--patience", "nan"], 2, "argument --patience: 'nan' is not a number of seconds between 0 and"),
        (["frob"], 2, "invalid choice: 'frob'"),
        (["ps", "--limit", "0"], 2, "argument --limit: '0' is not a number between 1 and 1,000"),
        (["ps", "--limit", "many"], 2, "argument --limit: 'many' is not a number between 1 and 1,000"),
        (["ps", "--limit", "9" * 5000], 2, "...' is not a number between 1 and 1,000"),
        (["show"], 2, "the following arguments are required: EXECUTION"),
        (["ps", "--nexum", "nonsense"], 1, "'nonsense' is not the address of a server"),
        (["ps", "--key", "caf\udce9"], 2, r"the argument 'caf\udce9' is not text in UTF-8"),
        (["show", "caf\udce9"], 2, r"the argument 'caf\udce9' is not text in UTF-8"),
        (["prune", "--older-than", "0s", "--session", ""], 2, "argument --session: the value is empty: give one, or"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    tmp_path: Path, nexum: Command, arguments: list[str], code: int, said: str
) -> None:
    got, output = nexum(*arguments)
    assert got == code
    assert "error: " in output.splitlines()[-1]
    assert said in output.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["ps"], ["check"], ["check", "copy.db"], ["backup", "copy.db"]])
def test_folder_that_is_not_text_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nexum: Command, arguments: list[str]
) -> None:
    folder = tmp_path / "caf\udce9"  # as an archive that was made in Latin-1 leaves it
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("file names are text here")
    (folder / "copy.db").touch()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    # Another program of this machine may have a server on the default port, which `ps` would ask.
    monkeypatch.setattr("nexum_engine.connection.DEFAULT_ADDRESS", f"localhost:{free_port()}")
    code, output = nexum(*arguments)
    assert code == 1
    assert r"caf\udce9" in output.splitlines()[-1]
    assert "is not text in UTF-8: rename the folder" in output.splitlines()[-1]


def test_foreign_database_is_refused_and_left_untouched(tmp_path: Path, nexum: Command) -> None:
    foreign = tmp_path / "nexum.db"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE diary (entry TEXT)")
    connection.close()
    before = foreign.read_bytes()
    code, output = nexum_process(tmp_path, *database(tmp_path), "--listen", f"127.0.0.1:{free_port()}")
    assert code == 1
    assert output.startswith("error: ")
    assert "left untouched" in output
    assert foreign.read_bytes() == before
    code, output = nexum("ps", *database(tmp_path))
    assert code == 1
    assert foreign.read_bytes() == before


# ---- ps and show -----------------------------------------------------------------------------------------------------


@pytest.mark.sqlite
def test_ps_and_show_print_the_same_with_and_without_server(tmp_path: Path, nexum: Command) -> None:
    with server_thread(tmp_path) as server:
        execution_id = run_one_call(tmp_path, server).completed
        online = [nexum(*command, "--nexum", server.address) for command in commands(execution_id)]
    offline = [nexum(*command, *database(tmp_path)) for command in commands(execution_id)]
    without_age = re.compile(r"\d+ (s|min) ago *")
    assert [code for code, _ in online] == [0] * 5
    for (_, with_server), (_, without) in zip(online, offline, strict=True):
        assert without_age.sub("", with_server) == without_age.sub("", without)
    listed, one_status, listed_json, shown, shown_json = (output for _, output in online)

    assert listed.splitlines()[0].split() == ["EXECUTION", "STATUS", "STARTED", "WORKFLOW"]
    assert [line.split()[1] for line in listed.splitlines()[1:]] == ["FAILED", "COMPLETED"]
    assert len(one_status.splitlines()) == 2
    assert [one["status"] for one in json.loads(listed_json)] == ["FAILED", "COMPLETED"]
    for part in (f"execution  {execution_id}", "workflow   tool-call", "status     COMPLETED", "attempt 1", "worker "):
        assert part in shown
    record = json.loads(shown_json)
    assert "14,047,594" in record["nodes"][0]["output_json"]
    assert "characters; --json has them all)" in shown
    for line in (listed + "\n" + shown).splitlines():
        assert len(line) <= WIDTH
        assert line.isprintable()


def commands(execution_id: str) -> list[list[str]]:
    ps, show = ["ps"], ["show", execution_id]
    return [ps, [*ps, "--status", "completed"], [*ps, "--json"], show, [*show, "--json"]]


def test_show_removes_control_characters(run_of_calls: Run, nexum: Command) -> None:
    code, output = nexum("show", run_of_calls.failed, "--nexum", run_of_calls.address)
    assert code == 0
    assert "was called with wrong arguments" in output
    assert "\x1b" not in output
    assert max(map(len, output.splitlines())) <= WIDTH


def test_ps_reports_an_empty_database(server: ServerThread, nexum: Command) -> None:
    assert nexum("ps", "--nexum", server.address) == (0, "no executions")
    assert nexum("ps", "--json", "--nexum", server.address) == (0, "[]")


@pytest.mark.parametrize(
    "command", [["ps"], ["show", "exec-1"], ["cancel", "exec-1"], ["retry", "exec-1"]], ids=lambda one: one[0]
)
def test_look_without_server_and_database_fails_and_creates_none(
    tmp_path: Path, nexum: Command, command: list[str]
) -> None:
    code, output = nexum(*command)
    assert code == 1
    assert output == (
        "error: no server on localhost:50051, and no database at sqlite:///.nexum/local.db: nothing recorded"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("before", [True, False], ids=["before the command", "after it"])
@pytest.mark.parametrize("command", ["ps", "show", "cancel"])
def test_database_url_is_opened_without_asking_a_server(
    tmp_path: Path, run_of_calls: Run, nexum: Command, monkeypatch: pytest.MonkeyPatch, command: str, before: bool
) -> None:
    monkeypatch.setenv("NEXUM_ADDRESS", run_of_calls.address)
    arguments = [command] if command == "ps" else [command, run_of_calls.completed]
    named = ("--database-url", f"sqlite:///{tmp_path / 'other.db'}")
    command_line = [*named, *arguments] if before else [*arguments, *named]
    assert nexum(*command_line) == (1, f"error: no database at {named[1]}: nothing recorded")


@pytest.mark.sqlite
def test_database_open_in_a_server_is_not_opened(
    tmp_path: Path, server_process: Server, nexum: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXUM_ADDRESS", server_process.address)
    code, output = nexum("ps", *database(tmp_path))
    url = database(tmp_path)[1]
    assert (code, output) == (1, f"error: a Nexum server has {url} open: ask that server with --nexum HOST:PORT")
    code, output = nexum("ps", *database(tmp_path), "--nexum", server_process.address)
    assert (code, output.endswith("give only one of them")) == (1, True)


@pytest.mark.parametrize("command", ["show", "cancel"])
def test_unknown_execution_is_named_in_the_error(run_of_calls: Run, nexum: Command, command: str) -> None:
    for name in ("exec-nope", "x" * 200, "'; DROP TABLE executions; --"):
        code, output = nexum(command, name, "--nexum", run_of_calls.address)
        assert code == 1
        assert output.startswith("error: ")
        assert len(output.splitlines()) == 1
        assert name[:60] in output


def test_named_server_must_answer(nexum: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("NEXUM_ADDRESS", address)
    code, output = nexum("ps")
    assert code == 2
    assert output.startswith(f"error: no Nexum server answers on {address}")


def test_named_server_must_be_a_nexum_server(nexum: Command) -> None:
    other = grpc.server(ThreadPoolExecutor())
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    code, output = nexum("ps", "--nexum", f"127.0.0.1:{port}")
    other.stop(None).wait()
    assert code == 2
    assert output.startswith(f"error: the server on 127.0.0.1:{port} does not speak this Nexum contract")


def test_closed_pipe_prints_no_traceback(tmp_path: Path, run_of_calls: Run) -> None:
    show = ["show", run_of_calls.completed, "--json", "--nexum", run_of_calls.address]
    with subprocess.Popen(
        [sys.executable, "-m", "nexum_engine", *show],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
@pytest.mark.parametrize("command", [["ps"], ["--listen", "127.0.0.1:0"]], ids=["ps", "the server"])
def test_full_disk_under_output_is_a_one_line_error(tmp_path: Path, server: ServerThread, command: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        run = subprocess.run(
            [sys.executable, "-m", "nexum_engine", *command],
            cwd=tmp_path,
            env=environment({"NEXUM_ADDRESS": server.address}),
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=30,
        )
    assert (run.returncode, run.stderr) == (1, b"error: the output can't be written: No space left on device\n")


def test_closed_pipe_on_windows_prints_no_traceback(tmp_path: Path, server: ServerThread) -> None:
    program = (
        "import errno, io, sys\n"
        "from nexum_engine.__main__ import main\n"
        "class Closed(io.TextIOWrapper):\n"
        "    def write(self, _):\n"
        "        raise OSError(errno.EINVAL, 'Invalid argument')\n"
        "sys.stdout = Closed(sys.stdout.buffer)\n"
        f"sys.exit(main(['ps', '--nexum', {server.address!r}]))\n"
    )
    assert run_script(["-c", program], tmp_path) == (1, "")


# ---- cancel ----------------------------------------------------------------------------------------------------------


def test_cancel_ends_running_execution_but_not_ended_one(tmp_path: Path, server: ServerThread, nexum: Command) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    arguments = {"log": str(log), "gate": str(gate)}
    with counting_worker(tmp_path, server.address) as worker:
        with submitter(tmp_path, server.address, "effect_then_gate", arguments) as process:
            wait_until(lambda: bool(effects(log)), "the tool runs")
            (execution,) = recorded(tmp_path, server.address)
            cancel = ["cancel", execution["execution_id"], "--by", "Ann", "--nexum", server.address]
            assert nexum(*cancel) == (0, f"{execution['execution_id']} is CANCELLED")
            assert process.wait() == 1
            assert process.lines[-1] == "ERROR ToolCallFailed effect_then_gate failed: the execution was cancelled"
        # The worker's later report changes nothing.
        gate.touch()
        worker.wait_for("refused")
        code, output = nexum(*cancel)
        assert (code, output.startswith(f"already done: {execution['execution_id']} was cancelled by Ann ")) == (
            0,
            True,
        )
        (execution,) = recorded(tmp_path, server.address)
        assert execution["status"] == "CANCELLED"
        assert execution["nodes"][0]["output_json"] is None

        with submitter(tmp_path, server.address, "effect_then_gate", arguments) as process:
            assert process.wait() == 0
        _, done = recorded(tmp_path, server.address)
        code, output = nexum("cancel", done["execution_id"], "--nexum", server.address)
        assert code == 1
        assert output == f"error: execution {done['execution_id']} is COMPLETED and can't be cancelled any more"


@pytest.mark.sqlite
def test_cancel_works_after_server_has_ended(tmp_path: Path, nexum: Command) -> None:
    with server_thread(tmp_path) as server:
        with submitter(tmp_path, server.address, "web_search", {"query": "x"}) as process:
            process.wait_for("Submitted")
        (execution,) = recorded(tmp_path, server.address)
        assert execution["status"] == "RUNNING"
    code, _ = nexum("cancel", execution["execution_id"], *database(tmp_path))
    assert code == 0
    code, output = nexum("ps", *database(tmp_path))
    assert code == 0
    assert "CANCELLED" in output
