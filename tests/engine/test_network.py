"""Servers with TLS and tokens, and the clients that do and don't get through to them, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import ADMIN, FORMER, TOKENS, USE, Certificates, authority, private_file
from grpc_health.v1 import health_pb2, health_pb2_grpc
from harness import ROOT, Server, nexum_server, running
from nexum_wire import connected, record, refused, register, start
from processes import run_script

from nexum_engine.__main__ import main
from nexum_engine.client import NexumClient
from nexum_engine.errors import AccessDenied, InvalidRequest, RoleRefused, ServerUnavailable, TokenRefused
from nexum_engine.location import address_file
from nexum_engine.owner import Owner
from nexum_engine.records import ExecutionStatus
from nexum_engine.server.access import Tokens
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.nexum_pb2_grpc import NexumServiceStub
from nexum_engine.worker import Binding, TaskContext, Worker
from nexum_engine.workflow import workflow

PROMPT = 5.0  # seconds
ONE = workflow("one").effect("a").build()
ASKED = workflow("asked").human_approval("boss").build()
VARIABLES = ("NEXUM_TLS_CA", "NEXUM_TLS_CERT", "NEXUM_TLS_KEY", "NEXUM_TOKEN", "NEXUM_TOKEN_FILE")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


class Secured:
    """A server process with TLS and tokens, and the settings of its clients."""

    def __init__(self, server: Server, folder: Path, certificates: Certificates, tokens: Path) -> None:
        self.server = server
        self.folder = folder
        self.certificates = certificates
        self.tokens = tokens
        self.address = f"localhost:{server.port}"

    def env(self, token: str = USE, **changes: str) -> dict[str, str]:
        return {"NEXUM_ADDRESS": self.address, "NEXUM_TLS_CA": self.certificates.ca, "NEXUM_TOKEN": token, **changes}


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    certificates = Certificates(folder)
    tokens = folder / "tokens"
    private_file(tokens, TOKENS)
    arguments = [*certificates.server_options(), "--tokens", str(tokens), "--listen", "0.0.0.0:0"]
    with nexum_server(folder, arguments=arguments) as server:
        yield Secured(server, folder, certificates, tokens)


def use(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> str:
    """Set the environment variables of a client; return the server's address."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return env["NEXUM_ADDRESS"]


# ---- Each obstacle is one clear line ---------------------------------------------------------------------------------

CLIENTS = {
    "ps": ["-m", "nexum_engine", "ps"],
    "worker": [str(ROOT / "worker.py")],
    "ls": ["-m", "durable_autogen", "ls"],
}
OBSTACLES = {
    "wrong CA": "was refused (unable to get local issuer certificate): NEXUM_TLS_CA must name the file",
    "expired certificate": "was refused (certificate has expired): renew it",
    "another name": "certificate is not valid for '127.0.0.2'): connect to a name that is in it",
    "server without TLS": "does not speak TLS: start it with --tls-cert and --tls-key, or unset NEXUM_TLS_CA",
    "client without TLS": "speaks TLS: set NEXUM_TLS_CA to the file with its CA certificate",
    "no token": "refuses the call: it has no token: set NEXUM_TOKEN_FILE or NEXUM_TOKEN",
    "wrong token": "refuses the call: the server doesn't know its token: set NEXUM_TOKEN_FILE or NEXUM_TOKEN",
}


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The addresses of two more servers: one with an expired certificate, and one without TLS."""
    found = {}
    with ExitStack() as stack:
        for name in ("expired", "plain"):
            folder = tmp_path_factory.mktemp(name)
            options = Certificates(folder).server_options(expired=True) if name == "expired" else []
            found[name] = f"localhost:{stack.enter_context(nexum_server(folder, arguments=options)).port}"
        yield found


def obstacle(name: str, secured: Secured, others: dict[str, str]) -> dict[str, str]:
    """Return the settings of a client that doesn't get through."""
    env = secured.env()
    if name == "wrong CA":
        env["NEXUM_TLS_CA"] = secured.certificates.other_ca
    elif name == "expired certificate":
        env["NEXUM_ADDRESS"] = others["expired"]
    elif name == "another name":
        env["NEXUM_ADDRESS"] = f"127.0.0.2:{secured.server.port}"
    elif name == "server without TLS":
        env["NEXUM_ADDRESS"] = others["plain"]
    elif name == "client without TLS":
        del env["NEXUM_TLS_CA"]
    elif name == "no token":
        env["NEXUM_TOKEN"] = ""
    else:
        env["NEXUM_TOKEN"] = FORMER
    return env


@pytest.mark.parametrize("name", OBSTACLES)
async def test_client_names_the_obstacle_and_the_next_step(
    name: str, secured: Secured, others: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = use(monkeypatch, obstacle(name, secured, others))
    began = time.monotonic()
    async with NexumClient(address) as client:
        # `patience` must not make the client retry what a retry can't fix.
        with pytest.raises(AccessDenied) as caught:
            await client.ping(patience=60)
        with pytest.raises(AccessDenied):
            async with Owner(client):
                pass
        with pytest.raises(AccessDenied):
            await Worker(client, [Binding(ONE, {"a": never})]).run(asyncio.Event())
    assert OBSTACLES[name] in str(caught.value)
    assert address in str(caught.value)
    assert time.monotonic() - began < 3 * PROMPT


async def never(task: TaskContext) -> None:
    raise AssertionError("no task may come")


@pytest.mark.parametrize(
    ("program", "name"),
    [("worker", "wrong CA"), ("ps", "expired certificate"), ("ls", "no token"), ("worker", "no token")],
)
def test_program_ends_with_one_line(
    program: str, name: str, secured: Secured, others: dict[str, str], tmp_path: Path
) -> None:
    with running(CLIENTS[program], cwd=tmp_path, env=obstacle(name, secured, others)) as process:
        assert process.wait(20) == 2
    (line,) = process.lines
    assert line.startswith("error: ")
    assert OBSTACLES[name] in line


def test_token_is_not_sent_in_plaintext_to_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUM_TOKEN", USE)
    for address in ("192.0.2.1:5", "example.com:5", "localhost:5,example.com:5", "[2001:db8::1]:5"):
        with pytest.raises(InvalidRequest, match="in plaintext: set NEXUM_TLS_CA"):
            NexumClient(address)
    for address in ("localhost:5", "127.0.0.1:5,127.9.9.9:6", "[::1]:5"):
        NexumClient(address)


async def test_token_is_not_sent_to_a_server_that_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUM_TOKEN", USE)
    monkeypatch.delenv("NEXUM_ADDRESS", raising=False)
    with nexum_server(tmp_path):
        async with NexumClient(str(tmp_path / "nexum.db")) as client:
            await client.ping()
            assert client.route().security is None


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"NEXUM_TLS_CA": "{missing}"}, "NEXUM_TLS_CA {missing} can't be read: No such file"),
        ({"NEXUM_TLS_CA": "{key}"}, "NEXUM_TLS_CA names a file without certificates in PEM format"),
        ({"NEXUM_TLS_CA": "{ca}", "NEXUM_TLS_CERT": "{cert}"}, "NEXUM_TLS_CERT and NEXUM_TLS_KEY belong together"),
        ({"NEXUM_TLS_CERT": "{cert}", "NEXUM_TLS_KEY": "{key}"}, "NEXUM_TLS_CERT needs TLS: set NEXUM_TLS_CA"),
        (
            {"NEXUM_TLS_CA": "{ca}", "NEXUM_TLS_CERT": "{ca}", "NEXUM_TLS_KEY": "{key}"},
            "NEXUM_TLS_CERT {ca} and the key",
        ),
        (
            {"NEXUM_TLS_CA": "{ca}", "NEXUM_TLS_CERT": "{cert}", "NEXUM_TLS_KEY": "{ca}"},
            "NEXUM_TLS_KEY {ca} is open to",
        ),
        ({"NEXUM_TOKEN": "x", "NEXUM_TOKEN_FILE": "{key}"}, "NEXUM_TOKEN and NEXUM_TOKEN_FILE are both set"),
        ({"NEXUM_TOKEN_FILE": "{key}"}, "NEXUM_TOKEN_FILE {key} is not one token"),
        ({"NEXUM_TOKEN_FILE": "{ca}"}, "NEXUM_TOKEN_FILE {ca} is open to other users"),
        ({"NEXUM_TOKEN": "two words"}, "NEXUM_TOKEN is not one token"),
    ],
)
def test_wrong_setting_of_a_client_is_named(
    env: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.platform == "win32" and "is open to" in message:
        pytest.skip("Windows has no file modes")
    certificates = Certificates(tmp_path)
    certificate, key = certificates.issue("client", "client")
    Path(certificates.ca).chmod(0o644)
    names = {"missing": str(tmp_path / "missing"), "ca": certificates.ca, "cert": certificate, "key": key}
    for name, value in env.items():
        monkeypatch.setenv(name, value.format(**names))
    with pytest.raises(InvalidRequest) as caught:
        NexumClient("localhost:5")
    assert str(caught.value).startswith(message.format(**names))


# ---- What a token may do ---------------------------------------------------------------------------------------------


async def test_run_goes_through_with_a_token(secured: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    address = use(monkeypatch, secured.env(NEXUM_TOKEN="", NEXUM_TOKEN_FILE=private_file(secured.folder / "mine", USE)))

    async def work(task: TaskContext) -> int:
        return 7

    stop = asyncio.Event()
    async with NexumClient(address) as client:
        working = asyncio.create_task(Worker(client, [Binding(ONE, {"a": work})]).run(stop))
        await client.register_workflow(ONE)
        started = await client.start_execution(ONE, {"large": "x" * 20_000}, idempotency_key="large")
        observed = await client.get_execution(started.execution_id, wait=20)
        assert observed.execution.outputs() == {"a": "7"}
        stop.set()
        await working


async def test_token_that_may_use_may_not_administer(secured: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    address = use(monkeypatch, secured.env())
    async with NexumClient(address) as client:
        await client.register_workflow(ASKED)
        execution_id = (await client.start_execution(ASKED, {})).execution_id
        began = time.monotonic()
        for method, call in {
            "ApproveTask": client.approve(execution_id, "boss"),
            "RejectTask": client.reject(execution_id, "boss"),
            "CancelExecution": client.cancel_execution(execution_id),
            "Prune": client.prune(0.0),
            "Backup": anext(client.backup(secured.folder / "copy.db")),
        }.items():
            with pytest.raises(RoleRefused) as caught:
                await call
            assert f"token 'ci' may not call {method}: this needs a token with the role 'administer'" in str(
                caught.value
            )
        assert time.monotonic() - began < PROMPT
        assert (await client.get_status(execution_id)) is ExecutionStatus.RUNNING
    # A call that is an RPC of its own has no way around the check, either.
    with refusing_channel(secured, USE) as stub:
        code, _ = refused(lambda: stub.CancelExecution(pb.CancelRequest(execution_id=execution_id), timeout=9))
        assert code is grpc.StatusCode.PERMISSION_DENIED


def refusing_channel(secured: Secured, token: str) -> Any:
    return contextlib.closing(Raw(secured, token))


class Raw:
    """A plain stub, whose calls are RPCs of their own."""

    def __init__(self, secured: Secured, token: str | None) -> None:
        credentials = grpc.ssl_channel_credentials(authority("ours").cert_pem.bytes())
        if token is not None:
            credentials = grpc.composite_channel_credentials(credentials, grpc.access_token_call_credentials(token))
        self.channel = grpc.secure_channel(secured.address, credentials)
        self._stub = NexumServiceStub(self.channel)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stub, name)

    def close(self) -> None:
        self.channel.close()


def test_every_rpc_but_the_health_check_needs_a_token(secured: Secured) -> None:
    with contextlib.closing(Raw(secured, None)) as stub:
        for method in pb.DESCRIPTOR.services_by_name["NexumService"].methods:
            request = getattr(pb, method.input_type.name)()
            if method.client_streaming:
                code, _ = refused(lambda: next(getattr(stub, method.name)(iter([request]), timeout=9)))  # noqa: B023
            else:
                code, _ = refused(lambda: getattr(stub, method.name)(request, timeout=9))  # noqa: B023
            assert code is grpc.StatusCode.UNAUTHENTICATED, method.name
        health = health_pb2_grpc.HealthStub(stub.channel)
        for service in ("", "nexum.NexumService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=9)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        code, _ = refused(lambda: next(health.Watch(health_pb2.HealthCheckRequest(), timeout=9)))
        assert code is grpc.StatusCode.UNAUTHENTICATED


async def test_decisions_and_cancels_record_the_holder_of_the_token_and_the_time(
    secured: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = use(monkeypatch, secured.env(ADMIN))
    before_ms = time.time() * 1000
    async with NexumClient(address) as client:
        await client.register_workflow(ASKED)
        approved, rejected, cancelled = [(await client.start_execution(ASKED, {})).execution_id for _ in range(3)]
        await client.approve(approved, "boss", approver="somebody else")
        await client.reject(rejected, "boss", approver="somebody else", reason="too much")
        await client.cancel_execution(cancelled, by="somebody else")
        ends = [(await client.get_execution(one)).execution for one in (approved, rejected, cancelled)]
    decision = json.loads(ends[0].outputs()["boss"])
    assert decision["approver"] == "ann"
    assert before_ms - 1 <= decision["decided_ms"] == ends[0].ended_ms
    assert [one.error for one in ends[1:]] == ["boss: rejected by ann: too much", "cancelled by ann"]
    assert all(one.ended_ms is not None and one.ended_ms >= before_ms - 1 for one in ends)


def test_cancel_without_tokens_records_what_the_client_says(tmp_path: Path) -> None:
    with nexum_server(tmp_path) as server, connected(server.address) as stub:
        register(stub, {"a": []})
        execution_id = start(stub)
        code, output = run_script(
            ["-m", "nexum_engine", "cancel", execution_id, "--by", "Bob", "--nexum", server.address], tmp_path
        )
        assert code == 0, output
        assert record(stub, execution_id).error == "cancelled by Bob"
        _, output = run_script(["-m", "nexum_engine", "show", execution_id, "--nexum", server.address], tmp_path)
        assert "note       cancelled by Bob" in output


# ---- The token file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no tokens"),
        ("# only a comment\n", "has no tokens"),
        (f"ci {USE}\n", "line 1 of the token file {path} has 2 words"),
        (f"\nci root {USE}\n", "line 2 of the token file {path}: the role must be use or administer"),
        ("ci use short\n", "the token must have at least 32 ASCII characters; make one with: python -c"),
        (f"ci use {USE}\nme use {USE}\n", "line 2 of the token file {path}: the token is in an earlier line, too"),
        (f"{'n' * 101} use {USE}\n", "the name must have at most 100 printable characters"),
        (f"ci use {USE[:-1]}é\n", "the token must have at least 32 ASCII characters"),
    ],
)
def test_wrong_token_file_is_refused_without_showing_a_token(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    private_file(path, text)
    with pytest.raises(InvalidRequest) as caught:
        Tokens(path)
    assert message.format(path=path) in str(caught.value)
    assert USE[:-1] not in str(caught.value)


@pytest.mark.skipif(sys.platform == "win32", reason="file modes")
def test_token_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    private_file(path, TOKENS)
    for mode in (0o644, 0o604, 0o620):
        path.chmod(mode)
        with pytest.raises(InvalidRequest, match=f"open to other users .mode {mode:04o}.: run chmod 600"):
            Tokens(path)
    path.chmod(0o440)
    Tokens(path)


async def test_changed_token_file_counts_at_once_also_for_open_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tmp_path / "tokens"
    private_file(tokens, f"{TOKENS}ci use {FORMER}\n")
    with nexum_server(tmp_path, arguments=["--tokens", str(tokens)], lease=1.0) as server:
        monkeypatch.setenv("NEXUM_TOKEN", FORMER)
        async with NexumClient(server.address) as former:
            await former.register_workflow(ONE)
            working = asyncio.create_task(Worker(former, [Binding(ONE, {"a": never})]).run(asyncio.Event()))
            monkeypatch.setenv("NEXUM_TOKEN", USE)
            async with NexumClient(server.address) as client:
                await client.ping()
                tokens.write_text("broken\n")
                server.process.wait_for("the former tokens stay valid: line 1 of the token file")
                await former.ping()
                tokens.write_text(TOKENS)
                with pytest.raises(TokenRefused):
                    await asyncio.wait_for(working, 20)
                with pytest.raises(TokenRefused):
                    await former.ping()
                await client.ping()
        assert not address_file(tmp_path / "nexum.db").exists()


# ---- The server's certificates ---------------------------------------------------------------------------------------


async def test_client_certificate_is_required_if_the_server_names_its_ca(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificates = Certificates(tmp_path)
    with nexum_server(
        tmp_path, arguments=[*certificates.server_options(), "--tls-client-ca", certificates.other_ca]
    ) as server:
        address = f"localhost:{server.port}"
        monkeypatch.setenv("NEXUM_TLS_CA", certificates.ca)
        async with NexumClient(address) as client:
            with pytest.raises(AccessDenied, match=r"wants a client certificate: set NEXUM_TLS_CERT"):
                await client.ping()
        for by, is_accepted in (("ours", False), ("other", True)):
            certificate, key = certificates.issue(by, "client", by=by)
            monkeypatch.setenv("NEXUM_TLS_CERT", certificate)
            monkeypatch.setenv("NEXUM_TLS_KEY", key)
            async with NexumClient(address) as client:
                if is_accepted:
                    await client.ping()
                else:
                    with pytest.raises(AccessDenied, match="refuses this client's certificate"):
                        await client.ping()


async def test_changed_certificate_is_used_for_new_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificates = Certificates(tmp_path)
    with nexum_server(tmp_path, arguments=certificates.server_options()) as server:
        monkeypatch.setenv("NEXUM_TLS_CA", certificates.ca)
        async with NexumClient(f"localhost:{server.port}") as client:
            await client.ping()
        certificates.server_options(by="other")
        monkeypatch.setenv("NEXUM_TLS_CA", certificates.other_ca)
        async with NexumClient(f"localhost:{server.port}") as client:
            await client.ping()


async def test_forked_process_speaks_tls_and_sends_its_token(secured: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the channel of a forked process, without a fork."""
    address = use(monkeypatch, secured.env())
    monkeypatch.setattr("nexum_engine.channel._is_forked", True)
    async with NexumClient(address) as client:
        await client.ping()
        monkeypatch.setenv("NEXUM_TOKEN", FORMER)
        async with NexumClient(address) as other:
            with pytest.raises(TokenRefused):
                await other.ping()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--listen", "0.0.0.0:0", "{tls}"], "refusing to listen on 0.0.0.0:0: without TLS and tokens"),
        (["--listen", "0.0.0.0:0", "--tokens", "{tokens}"], "refusing to listen on 0.0.0.0:0: without TLS and tokens"),
        (
            ["--listen", "localhost.:0", "{tls}", "--tokens", "{tokens}"],
            "refusing to listen on localhost.:0: give an IP",
        ),
        (["--tls-cert", "{cert}"], "TLS needs both --tls-cert and --tls-key"),
        (["--tls-client-ca", "{cert}"], "TLS needs both --tls-cert and --tls-key"),
        (["--tls-cert", "{cert}", "--tls-key", "{tokens}"], "are not a certificate and its key in PEM format"),
        (["--tls-cert", "{cert}", "--tls-key", "{cert}"], "the key {cert} is open to other users"),
        (["--tls-cert", "missing", "--tls-key", "{key}"], "the certificate missing can't be read: No such file"),
        (["{tls}", "--tls-client-ca", "{tokens}"], "--tls-client-ca names a file without certificates in PEM format"),
        (["--tokens", "missing"], "the token file missing can't be read: No such file"),
    ],
)
def test_server_names_a_wrong_setting(
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nexum_engine.signals.stop_event", asyncio.Event)
    certificates = Certificates(tmp_path)
    certificate, key = certificates.issue("server", "localhost")
    Path(certificate).chmod(0o644)
    names = {"cert": certificate, "key": key, "tokens": private_file(tmp_path / "tokens", TOKENS)}
    arguments = []
    for option in options:
        arguments += ["--tls-cert", certificate, "--tls-key", key] if option == "{tls}" else [option.format(**names)]
    assert main([*arguments, "--database-url", f"sqlite:///{tmp_path / 'nexum.db'}"]) == 1
    assert message.format(**names) in capsys.readouterr().err


def test_server_reads_its_settings_from_the_environment(tmp_path: Path) -> None:
    certificate, key = Certificates(tmp_path).issue("server", "localhost")
    env = {
        "NEXUM_SERVER_TLS_CERT": certificate,
        "NEXUM_SERVER_TLS_KEY": key,
        "NEXUM_SERVER_TOKENS": private_file(tmp_path / "tokens", TOKENS),
    }
    with running(["-m", "nexum_engine", "--listen", "0.0.0.0:0"], cwd=tmp_path, env=env) as process:
        process.wait_for("Nexum engine")


# ---- Several servers -------------------------------------------------------------------------------------------------


def on_two_servers(stack: ExitStack, tmp_path: Path) -> list[Server]:
    servers = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        servers.append(stack.enter_context(nexum_server(tmp_path / name)))
    return servers


async def test_clients_use_all_servers_and_stay_with_one(tmp_path: Path) -> None:
    with ExitStack() as stack:
        servers = on_two_servers(stack, tmp_path)
        address = ", ".join([*(server.address for server in servers), "127.0.0.1:1"])
        used = set()
        for _ in range(20):
            async with NexumClient(address) as client:
                await client.ping()  # never the one that doesn't answer
                first = client.address
                await client.ping()
                assert client.address == first
                used.add(first)
        assert used == {server.address for server in servers}


async def test_calls_and_worker_continue_with_another_server(tmp_path: Path) -> None:
    async def work(task: TaskContext) -> str:
        return task.idempotency_key and "done"

    with ExitStack() as stack:
        servers = {server.address: server for server in on_two_servers(stack, tmp_path)}
        address = ",".join(servers)
        async with NexumClient(address) as client, NexumClient(address) as other:
            stop = asyncio.Event()
            worker = Worker(client, [Binding(ONE, {"a": work})])
            working = asyncio.create_task(worker.run(stop))
            await worker._heartbeat.connected.wait()
            while other.address != client.address:  # each client has chosen one by itself
                other = await stack_client(address)
            await other.register_workflow(ONE)
            first = servers.pop(client.address)
            idle = Owner(other)
            async with idle:
                first.process.kill()
                # The owner makes no call: its heartbeat finds the other server.
                await asyncio.wait_for(until(lambda: idle.is_holding and other.address in servers), 20)
                await other.register_workflow(ONE, patience=20)
                started = await other.start_execution(ONE, {}, idempotency_key="k", patience=20)
                observed = await other.get_execution(started.execution_id, wait=20, patience=20)
                assert observed.execution.outputs() == {"a": '"done"'}
            stop.set()
            await working


async def stack_client(address: str) -> NexumClient:
    client = NexumClient(address)
    await client.ping()
    return client


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def test_server_that_refuses_the_client_is_left_for_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXUM_TOKEN", USE)
    with ExitStack() as stack:
        servers = []
        for name, token in (("one", FORMER), ("two", USE)):
            (tmp_path / name).mkdir()
            tokens = private_file(tmp_path / name / "tokens", f"ci use {token}\n")
            servers.append(stack.enter_context(nexum_server(tmp_path / name, arguments=["--tokens", tokens])))
        async with NexumClient(",".join(server.address for server in servers)) as client:
            async with Owner(client):
                await client.ping()
            assert client.address == servers[1].address
        async with NexumClient(f"{servers[0].address},{servers[0].address}") as client:
            with pytest.raises(TokenRefused):
                await client.ping(patience=60)
        async with NexumClient(f"{servers[0].address},127.0.0.1:1") as client:
            with pytest.raises(
                ServerUnavailable, match=r"doesn't know its token(?s:.)*127.0.0.1:1|127.0.0.1:1(?s:.)*know its token"
            ):
                await client.ping()
