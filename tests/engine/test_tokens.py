"""Tokens: what a token allows, what the server records about its holder, and the file with all tokens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import ADMIN, FORMER, TOKENS, USE, authority, private_file
from grpc_health.v1 import health_pb2, health_pb2_grpc
from harness import logged
from nexum_wire import connected, record, refused, register, start
from server_thread import Secured, server_thread, use

from nexum_engine.__main__ import main
from nexum_engine.client import NexumClient
from nexum_engine.embedded import EmbeddedNexum
from nexum_engine.errors import InvalidRequest, RoleRefused, ServerUnavailable, TokenRefused
from nexum_engine.location import address_file
from nexum_engine.owner import Owner
from nexum_engine.records import ExecutionStatus
from nexum_engine.server import bounds
from nexum_engine.server.access import Tokens
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.nexum_pb2_grpc import NexumServiceStub
from nexum_engine.worker import Binding, TaskContext, Worker
from nexum_engine.workflow import workflow

PROMPT = 5.0  # seconds
ONE = workflow("one").effect("a").build()
ASKED = workflow("asked").human_approval("boss").build()


# ---- What a token may do ---------------------------------------------------------------------------------------------


async def test_run_goes_through_with_a_token(secured: Secured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = use(monkeypatch, secured.env("", NEXUM_TOKEN_FILE=private_file(tmp_path / "mine", USE)))

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
    address = use(monkeypatch, secured.env(USE))
    async with NexumClient(address) as client:
        await client.register_workflow(ASKED)
        execution_id = (await client.start_execution(ASKED, {})).execution_id
        began = time.monotonic()
        for method, call in {
            "ApproveTask": client.approve(execution_id, "boss"),
            "RejectTask": client.reject(execution_id, "boss"),
            "ResolveNode": client.resolve(execution_id, "boss", not_done=True),
            "CancelExecution": client.cancel_execution(execution_id),
            "RetryExecution": client.retry_execution(execution_id),
            "Prune": client.prune(0.0),
            "Backup": anext(client.backup(secured.certificates.folder / "copy.db")),
        }.items():
            with pytest.raises(RoleRefused) as caught:
                await call
            assert f"token 'ci' may not call {method}: this needs a token with the role 'administer'" in str(
                caught.value
            )
        assert time.monotonic() - began < PROMPT
        assert (await client.get_status(execution_id)) is ExecutionStatus.RUNNING
    # A call that is a separate RPC is checked, too.
    with contextlib.closing(Raw(secured, USE)) as stub:
        code, _ = refused(lambda: stub.CancelExecution(pb.CancelRequest(execution_id=execution_id), timeout=9))
        assert code is grpc.StatusCode.PERMISSION_DENIED


class Raw:
    """A plain stub. Each of its calls is a separate RPC, while a NexumClient sends its calls through one stream."""

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


async def test_slow_health_checks_of_strangers_block_nobody(secured: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    credentials = grpc.ssl_channel_credentials(authority("ours").cert_pem.bytes())

    async with grpc.aio.secure_channel(secured.address, credentials) as channel:
        check: Any = channel.stream_stream("/grpc.health.v1.Health/Check")  # a call without a request sends nothing
        monkeypatch.setattr(bounds, "READ_PATIENCE", 60.0)
        for silent in [check() for _ in range(2 * bounds.READERS)]:
            await silent.wait_for_connection()
        stub: Any = NexumServiceStub(channel)
        await stub.GetServerInfo(pb.EmptyRequest(), metadata=[("authorization", f"Bearer {USE}")], timeout=PROMPT)
        monkeypatch.setattr(bounds, "READ_PATIENCE", 0.1)
        for silent in [check() for _ in range(2 * bounds.READERS)]:
            # The server has ended the call: it no longer counts as one of the calls that the server accepts.
            assert await asyncio.wait_for(silent.code(), PROMPT) is grpc.StatusCode.DEADLINE_EXCEEDED
        for messages in ([], [b"\xff"]):
            assert await asyncio.wait_for(check(iter(messages)).code(), PROMPT) is grpc.StatusCode.INVALID_ARGUMENT


def test_refused_call_can_not_write_lines_of_its_own_to_the_log(
    secured: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nexum_engine.server.access.LOG_INTERVAL", 0.0)
    lines: list[str] = []
    with contextlib.closing(Raw(secured, None)) as stub, logged(lines, "nexum_engine.server.access"):
        call: Any = stub.channel.unary_unary(f"/x/\x1b[31mred\nforged{'x' * 1000}")
        code, _ = refused(lambda: call(b"", timeout=9))
    assert code is grpc.StatusCode.UNAUTHENTICATED
    (line,) = lines
    assert line.startswith(r"refused a call of '\x1b[31mred\nforged")
    assert len(line) < 300
    assert line.isprintable()


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
        # The decision stays on record when the execution is retried, and so does the decision about an unknown effect.
        await client.retry_execution(rejected)
        async with Owner(client) as owner:
            unknown = await owner.start(ONE, {}, idempotency_key="unknown")
            assert unknown.task is not None
            await owner.fail(unknown.task, "no answer", unknown=True)
        await client.resolve(unknown.execution_id, "a", resolved_by="somebody else", output=7)
        decided = [
            (await client.get_execution(one, with_attempts=True)).execution.nodes[0].attempts[-1]
            for one in (approved, rejected, unknown.execution_id)
        ]
    assert [(one.worker_id, one.outcome.value, one.error) for one in decided] == [
        ("ann", "COMPLETED", ""),
        ("ann", "FAILED", "too much"),
        ("ann", "COMPLETED", ""),
    ]
    assert decided[1].ended_ms == ends[1].ended_ms
    decision = json.loads(ends[0].outputs()["boss"])
    assert decision["approver"] == "ann"
    assert before_ms - 1 <= decision["decided_ms"] == ends[0].ended_ms
    assert [one.error for one in ends[1:]] == ["boss: rejected by ann: too much", "cancelled by ann"]
    assert all(one.ended_ms is not None and one.ended_ms >= before_ms - 1 for one in ends)


def test_cancel_without_tokens_records_what_the_client_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with server_thread(tmp_path) as server, connected(server.address) as stub:
        register(stub, {"a": []})
        execution_id = start(stub)
        assert main(["cancel", execution_id, "--by", "Bob", "--nexum", server.address]) == 0
        assert record(stub, execution_id).error == "cancelled by Bob"
        assert main(["show", execution_id, "--nexum", server.address]) == 0
        assert "error      cancelled by Bob" in capsys.readouterr().out


async def test_client_that_searches_does_not_use_a_server_with_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client raises ServerUnavailable: its folder's own server may start later. A run opens the database itself."""
    for name in ("NEXUM_ADDRESS", "DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NEXUM_TOKEN", USE)
    monkeypatch.chdir(tmp_path)
    with server_thread(tmp_path, tokens=Tokens(Path(private_file(tmp_path / "tokens", TOKENS)))) as server:
        monkeypatch.setattr("nexum_engine.connection.DEFAULT_ADDRESS", server.address)
        async with NexumClient() as client:
            with pytest.raises(ServerUnavailable, match=r"^a server that needs a token listens on .* \(name it with"):
                await client.ping()
        async with EmbeddedNexum(None) as nexum:
            assert nexum.embedded


def test_programs_in_the_folder_of_a_server_with_tokens_say_to_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NEXUM_ADDRESS", raising=False)
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'nexum.db'}")
    monkeypatch.setattr("nexum_engine.server_or_database.LOOK_PATIENCE", 0.1)
    lines: list[str] = []

    async def work() -> None:
        stop = asyncio.Event()
        async with NexumClient() as client:
            working = asyncio.create_task(Worker(client, [Binding(ASKED, {})]).run(stop))
            end = time.monotonic() + PROMPT
            while not lines and time.monotonic() < end:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            stop.set()
            await working

    with server_thread(tmp_path, tokens=Tokens(Path(private_file(tmp_path / "tokens", TOKENS)))) as server:
        monkeypatch.setattr("nexum_engine.connection.DEFAULT_ADDRESS", server.address)
        advice = f"a server that needs a token listens on {server.address} (name it with NEXUM_ADDRESS or --nexum)"
        assert main(["ps"]) == 1
        assert capsys.readouterr().err.startswith(f"error: {advice}, and a Nexum server has sqlite:///")
        with logged(lines, "nexum_engine.worker"):
            asyncio.run(work())
        assert lines == [f"not connected to {server.address}, retrying: {advice}"]


# ---- The token file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no tokens"),
        ("# only a comment\n", "has no tokens"),
        (f"ci {USE}\n", "line 1 of the token file {path} has 2 words"),
        (f"\nci root {USE}\n", "line 2 of the token file {path}: the role must be use or administer"),
        ("ci use short\n", "the token must have at least 32 ASCII characters; make one with: python -c"),
        (f"ci use {USE}\nme use {USE}\n", "line 2 of the token file {path}: an earlier line has the same token"),
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


def replace_file(path: Path, text: str) -> None:
    """Give a file another text in one step: the server could read a file that is only half written."""
    Path(private_file(path.with_name("new"), text)).replace(path)


async def test_changed_token_file_counts_soon_also_for_calls_and_streams_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nexum_engine.server.access.LOOK_INTERVAL", 0.05)
    tokens = tmp_path / "tokens"
    private_file(tokens, f"{TOKENS}ci use {FORMER}\n")
    errors: list[str] = []
    with server_thread(tmp_path, tokens=Tokens(tokens)) as server, logged(errors, "nexum_engine.server.access"):
        monkeypatch.setenv("NEXUM_TOKEN", FORMER)
        async with NexumClient(server.address) as former, grpc.aio.insecure_channel(server.address) as channel:
            await former.ping()
            stub: Any = NexumServiceStub(channel)
            metadata = [("authorization", f"Bearer {FORMER}")]
            waiting = asyncio.create_task(former.poll_task("y", ["v1"], wait=25))
            alone = stub.PollTask(pb.PollRequest(worker_id="x", version_hash="v1", wait_ms=25_000), metadata=metadata)
            beats = stub.WorkerStream(metadata=metadata)
            await beats.write(pb.WorkerBeat(worker_id="w"))
            assert (await beats.read()).lease_ms
            replace_file(tokens, "broken\n")
            end = time.monotonic() + PROMPT
            while not errors and time.monotonic() < end:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await former.ping()
            start = "the former tokens stay valid, because the changed file is wrong: line 1 of the token file"
            assert errors[0].startswith(f"{start} {tokens}")
            replace_file(tokens, TOKENS)
            # A waiting poll could still get a task. So the server refuses it at once, not only at the next call.
            with pytest.raises(TokenRefused):
                await asyncio.wait_for(waiting, PROMPT)
            assert await asyncio.wait_for(alone.code(), PROMPT) is grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(TokenRefused):
                await former.ping()
            await beats.write(pb.WorkerBeat(worker_id="w"))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await beats.read()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            monkeypatch.setenv("NEXUM_TOKEN", USE)
            async with NexumClient(server.address) as client:
                await client.ping()
        assert not address_file(tmp_path / "nexum.db").exists()
