"""A server's connection through PgBouncer: in session mode it works, and in the other modes the server refuses it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from harness import free_port, nexum_server
from nexum_wire import complete, connected, poll, record, register, start
from processes import wait_until

from nexum_engine.clock import SystemClock
from nexum_engine.errors import StoreRefused
from nexum_engine.store import open_store

psycopg = pytest.importorskip("psycopg", reason="psycopg isn't installed")

from postgres import answers, in_schema  # noqa: E402

from nexum_engine.store import postgresql_connection  # noqa: E402

PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin")
Pool = Callable[[str], AbstractContextManager[str]]


@pytest.fixture
def pool(postgres_url: str) -> Pool:
    """A function that starts PgBouncer in a mode, and yields the URL of the database behind it."""
    if PGBOUNCER is None:
        pytest.skip("pgbouncer isn't installed")
    program = PGBOUNCER
    given = psycopg.conninfo.conninfo_to_dict(postgres_url)

    @contextmanager
    def started(mode: str) -> Iterator[str]:
        port = free_port()
        with tempfile.TemporaryDirectory() as folder:
            settings = Path(folder, "pgbouncer.ini")
            target = " ".join(f"{name}={value}" for name, value in given.items())
            settings.write_text(
                f"[databases]\nnexum = {target}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n"
                f"auth_type = any\npool_mode = {mode}\nunix_socket_dir =\n"
            )
            Path(folder).chmod(0o755)
            # PgBouncer refuses to run as root, and PostgreSQL's socket is in a folder of PostgreSQL's user.
            user = ["-u", Path(str(given["host"])).owner()] if os.geteuid() == 0 else []
            process = subprocess.Popen([program, *user, settings], stderr=subprocess.DEVNULL)
            try:
                url = f"postgresql://any@127.0.0.1:{port}/nexum"
                wait_until(lambda: answers(url), "PgBouncer answers")
                yield url
            finally:
                process.kill()
                process.wait(10)

    return started


def test_server_behind_a_pool_in_session_mode_works(tmp_path: Path, pool: Pool) -> None:
    with (
        pool("session") as url,
        nexum_server(tmp_path, database_url=url) as server,
        connected(server.address) as stub,
    ):
        register(stub, {"a": []})
        execution_id = start(stub)
        complete(stub, poll(stub))
        assert record(stub, execution_id).status == "COMPLETED"


@pytest.mark.parametrize("mode", ["transaction", "statement"])
async def test_pool_that_shares_sessions_is_refused(pool: Pool, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql_connection, "NOTIFICATION_SECONDS", 0.5)
    with (
        pool(mode) as url,
        pytest.raises(StoreRefused, match="or of a pool in session mode"),
    ):
        await open_store(url, SystemClock())


async def test_setting_that_the_pool_does_not_know_is_refused_in_one_line(pool: Pool) -> None:
    with (
        pool("session") as url,
        pytest.raises(StoreRefused, match=r"startup parameter.*ALTER ROLE") as caught,
    ):
        await open_store(in_schema(url, "mine"), SystemClock())
    assert "\n" not in str(caught.value)
