"""A client uses the server that has the client's database open, on any port. It uses no server of another folder."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from harness import free_port, logged, needs_links, nexum_server

from nexum_engine.client import NexumClient
from nexum_engine.connection import Connection
from nexum_engine.embedded import EmbeddedNexum
from nexum_engine.errors import InvalidRequest, NotANexumServer, ServerError, ServerUnavailable
from nexum_engine.heartbeat import new_worker_id
from nexum_engine.location import (
    address_file,
    database_path,
    database_url,
    last_server,
    place_of,
    place_of_url,
    read_address,
    read_process,
    write_address,
)
from nexum_engine.owner import Owner
from nexum_engine.server import run_server
from nexum_engine.wire.addressee import metadata_for
from nexum_engine.workflow import workflow

NOWHERE = "127.0.0.1:1"


async def opened_by(client: NexumClient) -> tuple[str, bool]:
    """Return the database of the client's server, and whether the server is embedded."""
    info = await client.server_info()
    assert info is not None
    return info.database, info.embedded


@asynccontextmanager
async def serving(
    database: Path, listen: str = "127.0.0.1:0", *, embedded: bool = False, else_free_port: bool = False
) -> AsyncIterator[str]:
    """Run a server in this process; yield its address."""
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    running = asyncio.create_task(
        run_server(
            listen,
            f"sqlite:///{database}",
            lease=30,
            stop=stop,
            embedded=embedded,
            else_free_port=else_free_port,
            on_ready=lambda address, _: ready.set_result(address),
        )
    )
    watched: set[asyncio.Future[Any]] = {running, ready}
    await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
    try:
        if running.done():
            await running
        yield await ready
    finally:
        stop.set()
        await running


@pytest.fixture
def default_port(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Unset NEXUM_ADDRESS and DATABASE_URL, and use a default port on which nothing listens."""
    for name in ("NEXUM_ADDRESS", "DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("nexum_engine.connection.DEFAULT_ADDRESS", NOWHERE)
    return monkeypatch


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make `folder` the working folder of this process; return its database."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    return folder / ".nexum" / "local.db"


# ---- The file beside the database ------------------------------------------------------------------------------------


async def test_address_file_exists_while_the_server_runs(tmp_path: Path) -> None:
    database = tmp_path / "nexum.db"
    async with serving(database) as address:
        assert read_address(database) == address
        assert new_worker_id().startswith(read_process(database))
    assert not address_file(database).exists()
    assert (read_address(database), read_process(database)) == (None, "")


@pytest.mark.parametrize("text", ["", "localhost", "example.com:80", "127.0.0.1:0", "127.0.0.1:80\na\nb", "\xff"])
def test_file_without_loopback_address_is_ignored(tmp_path: Path, text: str) -> None:
    database = tmp_path / "nexum.db"
    address_file(database).write_bytes(text.encode("latin-1"))
    assert read_address(database) is None


@pytest.mark.parametrize(
    ("process", "last"),
    [
        ("ab12cd-1-0a1b2c-", "process 1 of ab12cd, another machine or container, on 127.0.0.1:80"),
        (f"{socket.gethostname()}-7-0a1b2c-", f"process 7 of {socket.gethostname()}, on 127.0.0.1:80"),
        ("\x1b[2J", ""),
        ("", ""),
    ],
)
def test_last_server_of_a_database_is_named(tmp_path: Path, process: str, last: str) -> None:
    database = tmp_path / "nexum.db"
    address_file(database).write_text(f"127.0.0.1:80\n{process}\n")
    assert last_server(database) == last


@pytest.mark.parametrize("name", ["nexum.db", "with space.db", "100%.db", "ünï?code#.db"])
def test_database_url_names_its_path(tmp_path: Path, name: str) -> None:
    assert database_path(database_url(tmp_path / name)) == tmp_path / name


async def test_server_leaves_taken_port_only_with_else_free_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        async with serving(tmp_path / "one.db", listen, else_free_port=True) as address:
            assert address != listen
            async with NexumClient(address) as client:
                assert await opened_by(client) == (str(tmp_path / "one.db"), False)
        with pytest.raises(ServerError, match="the port is in use"):
            async with serving(tmp_path / "two.db", listen):
                pass


# ---- A client of a database ------------------------------------------------------------------------------------------


@pytest.mark.sqlite
async def test_client_of_a_database_follows_its_server_to_another_port(tmp_path: Path) -> None:
    database = tmp_path / "nexum.db"
    async with NexumClient(str(database)) as client:
        with pytest.raises(ServerUnavailable, match=r"no running Nexum server has .*nexum.db open"):
            await client.ping()
        with nexum_server(tmp_path) as first:
            await client.ping()
            first.process.kill()
        assert read_address(database) == first.address, "a killed server leaves its file"
        with nexum_server(tmp_path) as second:
            assert second.address != first.address
            await client.ping(patience=10)


async def test_route_names_the_database_of_a_server_that_has_just_started(tmp_path: Path) -> None:
    """Without the database's name, another server that gets the same port would accept the heartbeats."""
    database = tmp_path / "local.db"
    connection = Connection(str(database))
    await connection.reach()
    write_address(database, NOWHERE)
    assert connection.route() == (NOWHERE, metadata_for(database), None)


async def test_server_refuses_calls_for_another_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.db"
    async with serving(tmp_path / "nexum.db") as address:
        write_address(other, address)
        async with NexumClient(str(other)) as client:
            with pytest.raises(ServerUnavailable, match=r"the server has .*nexum.db open, not .*other.db"):
                await client.ping()
            monkeypatch.setattr("nexum_engine.owner.CONNECT_TIMEOUT", 1.5)
            with pytest.raises(ServerError, match=r"the server has .*nexum.db open, not .*other.db"):
                async with Owner(client):
                    pass


@pytest.mark.skipif(sys.platform == "win32", reason="Windows can't rename the folder of an open file")
async def test_owner_follows_its_database_into_a_new_folder_of_the_same_path(tmp_path: Path) -> None:
    database, listen = tmp_path / "folder" / "nexum.db", f"127.0.0.1:{free_port()}"
    async with AsyncExitStack() as stack:
        async with serving(database, listen):
            client = await stack.enter_async_context(NexumClient(str(database)))
            owner = await stack.enter_async_context(Owner(client))
        database.parent.rename(tmp_path / "former")
        async with serving(database, listen):
            await client.ping(patience=20)
            await asyncio.wait_for(owner._heartbeat.connected.wait(), 20)


@needs_links
async def test_link_names_the_same_database(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    async with serving(tmp_path / "real" / "nexum.db"), NexumClient(str(tmp_path / "link" / "nexum.db")) as client:
        await client.ping()


@pytest.mark.parametrize(
    "address",
    [
        *("http://localhost:50051", "nonsense", "localhost:0", ":1", "localhost:99999", f"{'x' * 64}:1"),
        *("localhost:1:2", "::1:5"),
    ],
)
async def test_bad_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequest, match="is not the address of a server"):
        NexumClient(address)


async def test_program_that_listens_on_one_of_several_addresses_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nexum_engine.embedded.FIRST_ANSWER", 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(NotANexumServer, match="does not answer as a Nexum server"),
    ):
        async with EmbeddedNexum(f"{NOWHERE},localhost:{silent.getsockname()[1]}"):
            pass


# ---- A client that was told no address -------------------------------------------------------------------------------


async def test_client_prefers_own_server_to_default_port(tmp_path: Path, default_port: pytest.MonkeyPatch) -> None:
    own = enter(tmp_path / "own", default_port)
    async with serving(own, embedded=True), serving(tmp_path / "other.db") as other:
        default_port.setattr("nexum_engine.connection.DEFAULT_ADDRESS", other)
        async with NexumClient() as client:
            assert await opened_by(client) == (str(own), True)
            assert client.address == str(own)


async def test_client_uses_a_persons_server_on_default_port(tmp_path: Path, default_port: pytest.MonkeyPatch) -> None:
    own = enter(tmp_path / "own", default_port)
    async with serving(tmp_path / "other.db") as other:
        default_port.setattr("nexum_engine.connection.DEFAULT_ADDRESS", other)
        own.parent.mkdir()
        write_address(own, other)  # a killed server left this file, and another server has its port now
        async with NexumClient() as client:
            assert await opened_by(client) == (str(tmp_path / "other.db"), False)
            assert client.address == other
        default_port.setattr("nexum_engine.host.DEFAULT_ADDRESS", other)
        told: list[str] = []
        with logged(told, "nexum_engine"):
            async with EmbeddedNexum(None) as nexum:
                assert nexum.address == other
        assert told == [f"using the server on {other} (database {tmp_path / 'other.db'})"]


async def test_embedded_server_of_another_folder_is_not_used(tmp_path: Path, default_port: pytest.MonkeyPatch) -> None:
    enter(tmp_path / "own", default_port)
    async with serving(tmp_path / "other.db", embedded=True) as other:
        default_port.setattr("nexum_engine.connection.DEFAULT_ADDRESS", other)
        async with NexumClient() as client:
            with pytest.raises(ServerUnavailable, match="open for runs of another folder"):
                await client.ping()
        async with NexumClient(other) as client:
            await client.ping()  # if the address is given, the client doesn't check the folder


async def test_run_on_postgresql_uses_no_embedded_server_of_another_database(
    postgres_url: str, tmp_path: Path, default_port: pytest.MonkeyPatch
) -> None:
    enter(tmp_path / "own", default_port)
    default_port.setenv("DATABASE_URL", postgres_url)
    default_port.setenv("NEXUM_TLS_CERT", "missing.pem")  # a run uses no TLS for a server that it starts
    async with serving(tmp_path / "other.db", embedded=True) as taken:
        for module in ("connection", "host"):
            default_port.setattr(f"nexum_engine.{module}.DEFAULT_ADDRESS", taken)
        default_port.setattr("nexum_engine.host.DEFAULT_LISTEN", taken)
        told: list[str] = []
        with logged(told, "nexum_engine"):
            async with EmbeddedNexum(None, owners=True) as nexum, NexumClient(nexum.address) as client:
                assert nexum.address != taken
                database, is_embedded = await opened_by(client)
                assert (database.partition(" ")[0], is_embedded) == ("postgresql:", True)
                # A client that searches, such as one in a tool of the run, finds the server by its database's URL.
                default_port.setattr("nexum_engine.connection.DEFAULT_ADDRESS", nexum.address)
                async with NexumClient() as searching:
                    assert await opened_by(searching) == (database, True)
        opened = f"this program opened the database and listens on {nexum.address} ({database})"
        assert told == [f"{taken} is in use: {opened}"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("postgresql://u:p@h/one?application_name=app@x", "postgresql://u:p@h/two?application_name=app@x"),
        ("postgresql://one:p@h/db", "postgresql://two:p@h/db"),  # each user may have a schema
    ],
)
def test_urls_of_different_databases_are_different_places(one: str, other: str) -> None:
    assert place_of_url(one) != place_of_url(other)


def test_place_of_url_depends_on_the_variables_that_complete_it_and_not_on_the_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = place_of_url("postgresql://u:one@h/db")
    assert place_of_url("postgresql://u:two@h/db") == here
    monkeypatch.setenv("PGOPTIONS", "-csearch_path=other")
    assert place_of_url("postgresql://u:one@h/db") != here


@pytest.mark.skipif(sys.platform == "win32", reason="Windows can't rename the folder of an open file")
@pytest.mark.parametrize("address_file_is_left", [True, False])
async def test_embedded_server_of_another_folder_at_the_same_path_is_not_used(
    address_file_is_left: bool, tmp_path: Path, default_port: pytest.MonkeyPatch
) -> None:
    """Containers that share a network can have different files at the same path."""
    own = enter(tmp_path / "own", default_port)
    async with serving(own, embedded=True) as address:
        default_port.setattr("nexum_engine.connection.DEFAULT_ADDRESS", address)
        (tmp_path / "own").rename(tmp_path / "of another container")
        enter(tmp_path / "own", default_port)
        if address_file_is_left:
            own.parent.mkdir()
            write_address(own, address)  # a killed server had the same address
        async with NexumClient() as client:
            with pytest.raises(ServerUnavailable, match="another file of that path, perhaps in another container"):
                await client.ping()
        (tmp_path / "own").rename(tmp_path / "own as well")
        (tmp_path / "of another container").rename(tmp_path / "own")


async def test_client_finds_a_server_that_is_started_later(tmp_path: Path, default_port: pytest.MonkeyPatch) -> None:
    own = enter(tmp_path / "own", default_port)
    async with NexumClient() as client:
        pinging = asyncio.create_task(client.ping(patience=20))
        await asyncio.sleep(0.2)
        async with serving(own, f"127.0.0.1:{free_port()}", embedded=True):
            await pinging


async def test_client_waits_for_its_folders_server_while_another_program_has_the_default_port(
    tmp_path: Path, default_port: pytest.MonkeyPatch
) -> None:
    own = enter(tmp_path / "own", default_port)
    other = grpc.aio.server()
    default_port.setattr(
        "nexum_engine.connection.DEFAULT_ADDRESS", f"127.0.0.1:{other.add_insecure_port('127.0.0.1:0')}"
    )
    await other.start()
    async with NexumClient() as client:
        with pytest.raises(ServerUnavailable, match=r"another program listens on .*: start a server on a free port"):
            await client.ping()
        async with serving(own, f"127.0.0.1:{free_port()}", embedded=True):
            await client.ping(patience=20)
    await other.stop(None)


async def test_client_leaves_default_port_after_its_server_changes(
    tmp_path: Path, default_port: pytest.MonkeyPatch
) -> None:
    enter(tmp_path / "own", default_port)
    async with serving(tmp_path / "person.db") as address:
        default_port.setattr("nexum_engine.connection.DEFAULT_ADDRESS", address)
        client = NexumClient()
        await client.ping()
    async with client, serving(tmp_path / "other.db", address, embedded=True):
        with pytest.raises(ServerUnavailable, match="open for runs of another folder"):
            await client.ping()


async def test_path_with_a_zero_byte_is_an_error_in_words(tmp_path: Path) -> None:
    async with NexumClient(f"{tmp_path}/a\0b") as client:
        with pytest.raises(ServerUnavailable, match="no running Nexum server has"):
            await client.ping()
    assert place_of(f"{tmp_path}/a\0b") != place_of(f"{tmp_path}/ab")


@pytest.mark.parametrize("wait", [float("nan"), float("inf"), -1.0])
async def test_wait_of_any_size_is_refused_in_words_or_limited(tmp_path: Path, wait: float) -> None:
    one = workflow("one").effect("a").build()
    async with serving(tmp_path / "nexum.db") as address, NexumClient(address) as client:
        await client.register_workflow(one)
        if wait != wait:
            with pytest.raises(InvalidRequest, match="wait is nan: give a number"):
                await client.start_execution(one, {}, wait=wait)
        else:
            starting = asyncio.create_task(client.start_execution(one, {}, wait=wait))
            while not (found := await client.list_executions()):
                pass
            await client.cancel_execution(found[0].execution_id)
            assert (await starting).execution_id == found[0].execution_id
