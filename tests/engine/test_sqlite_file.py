"""Database files that change while a server has them open, logs that belong to another file, and restored backups."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from harness import ROOT, needs_links, nexum_server, run_to_end, running
from server_thread import ServerThread

from nexum_engine.clock import ManualClock
from nexum_engine.errors import StoreLocked, StoreRefused, StoreUnavailable
from nexum_engine.location import read_address
from nexum_engine.store import db, executions, listing, open_store, restore_database, sqlite_connection, sqlite_file
from nexum_engine.store.sqlite import SqliteStore

pytestmark = pytest.mark.sqlite
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows lets nobody delete or rename an open file")

ONE_NODE = '{"nodes": {"a": {"type": "EFFECT"}}}'


async def opened(path: Path) -> SqliteStore:
    store = await open_store(f"sqlite:///{path}", ManualClock())
    assert isinstance(store, SqliteStore)
    return store


async def start(store: SqliteStore, *inputs: int) -> set[str]:
    await store.run(executions.register_workflow, "w", "v1", ONE_NODE)
    return {(await store.run(executions.start_execution, "w", "v1", str(n), "")).execution_id for n in inputs}


async def stored(path: Path) -> set[str]:
    store = await opened(path)
    try:
        return {one.execution_id for one in await store.run(listing.list_executions, "", "", 1000)}
    finally:
        await store.close()


def nexum(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_to_end(["-m", "nexum_engine", *arguments], cwd=folder, forked=True)


def kill_after(path: Path, *inputs: int) -> set[str]:
    """Record executions in a process that dies without closing the database; return all executions' ids."""
    program = (
        f"import asyncio, os, sys; sys.path.insert(0, {str(ROOT / 'tests' / 'engine')!r})\n"
        "from pathlib import Path\nfrom test_sqlite_file import executions, listing, opened, start\n"
        "async def main():\n"
        f"    store = await opened(Path({str(path)!r})); await start(store, *{inputs!r})\n"
        "    found = await store.run(listing.list_executions, '', '', 1000)\n"
        "    print(*(one.execution_id for one in found), 'stored', flush=True); os._exit(9)\n"
        "asyncio.run(main())\n"
    )
    env = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests" / "support")))}
    with running(["-c", program], cwd=path.parent, env=env) as one:
        line = one.wait_for("stored")
        assert one.wait() == 9
    return set(line.split()[:-1])


def log_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def contents(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in folder.iterdir() if one.is_file() and not one.name.endswith(".lock")}


# ---- Files that change while the server runs -------------------------------------------------------------------------


def replace(database: Path) -> None:
    shutil.copyfile(database.parent.parent / "other.db", database.parent / "new.db")
    (database.parent / "new.db").replace(database)


HARMS: dict[str, Callable[[Path], object]] = {
    "the folder is deleted": lambda database: shutil.rmtree(database.parent),
    "the file is deleted": lambda database: database.unlink(),
    "the log is deleted": lambda database: log_of(database).unlink(),
    "the file is moved": lambda database: database.rename(database.parent.parent / "moved.db"),
    "the log is moved": lambda database: log_of(database).rename(database.parent.parent / "moved.log"),
    "the folder is moved": lambda database: database.parent.rename(database.parent.parent / "moved"),
    "the file is replaced": replace,
    "the file is truncated": lambda database: os.truncate(database, 0),
    "the file is cut": lambda database: os.truncate(database, database.stat().st_size - 4096),
    "the log is truncated": lambda database: os.truncate(log_of(database), 0),
    "the log is cut": lambda database: os.truncate(log_of(database), 4096),
    "the file is overwritten": lambda database: shutil.copyfile(database.parent.parent / "other.db", database),
}
SURVIVORS = {
    "the log is deleted": "folder/nexum.db",
    "the log is moved": "folder/nexum.db",
    "the file is moved": "moved.db",
    "the folder is moved": "moved/nexum.db",
}
"""The changes after which one file still has every acknowledged execution, each with the name of that file."""


@pytest.fixture
def make_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Return a function that lets the times of a folder count as old."""

    def make_old(folder: Path) -> None:
        monkeypatch.setattr(sqlite_file, "FOLDER_TICK", 0.0)
        probe = tmp_path.parent / f"{tmp_path.name}-probe"
        while True:  # until the file system's clock has moved on: the next change then changes the folder's times
            probe.touch()
            if probe.stat().st_mtime_ns > max(folder.stat().st_mtime_ns, folder.stat().st_ctime_ns):
                return

    return make_old


@posix
@pytest.mark.parametrize("is_old", [False, True], ids=["new folder", "old folder"])
@pytest.mark.parametrize("harm", HARMS)
async def test_nothing_is_acknowledged_into_lost_files(
    tmp_path: Path, harm: str, is_old: bool, make_old: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "FOLDER_TICK", 3600.0)  # on a busy machine, the new folder would soon be old
    await (await opened(tmp_path / "other.db")).close()
    database = tmp_path / "folder" / "nexum.db"
    store = await opened(database)
    if is_old:
        make_old(database.parent)
    acknowledged = await start(store, 1, 2, 3)
    assert (store._database._named_in is not None) == is_old
    HARMS[harm](database)
    left = {path: path.read_bytes() for path in (database, log_of(database)) if path.exists()}
    with pytest.raises(StoreUnavailable):
        await store.run(executions.start_execution, "w", "v1", "4", "")
    assert f"database {database} was changed while the server was running" in await store.failed
    await store.close()
    if harm in SURVIVORS:
        assert await stored(tmp_path / SURVIVORS[harm]) == acknowledged
    else:
        # After the harm, the store has written nothing to the files that were still there.
        assert {path: path.read_bytes() for path in left if path.exists()} == left


@posix
async def test_replacement_is_noticed_at_once_if_a_program_sets_the_folders_time_back(
    tmp_path: Path, make_old: Callable[[Path], None]
) -> None:
    """Programs such as rsync and tar write files, and then give the folder the time that it had in the copy."""
    await (await opened(tmp_path / "other.db")).close()
    database = tmp_path / "folder" / "nexum.db"
    store = await opened(database)
    make_old(database.parent)
    await start(store, 1)
    before = database.parent.stat()
    replace(database)
    os.utime(database.parent, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert database.parent.stat().st_mtime_ns == before.st_mtime_ns
    assert store._database._named_in is not None
    with pytest.raises(StoreUnavailable):
        await store.run(executions.start_execution, "w", "v1", "2", "")
    await store.close()


@posix
async def test_folder_whose_times_may_be_whole_seconds_counts_as_old_later(
    tmp_path: Path, make_old: Callable[[Path], None]
) -> None:
    store = await opened(tmp_path / "nexum.db")
    os.utime(tmp_path, (1e9, 1e9))
    make_old(tmp_path)
    await start(store, 1)
    counts_as_old = [store._database._named_in is not None]
    os.utime(tmp_path, (1e9, 1e9 + 0.5))
    make_old(tmp_path)
    await start(store, 2)
    counts_as_old.append(store._database._named_in is not None)
    assert counts_as_old == [False, True]
    await store.close()


@pytest.fixture
def frozen_times(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Return a function that makes the operating system always give a folder's present times."""

    def freeze(folder: Path) -> None:
        stat, before = os.stat, folder.stat()
        monkeypatch.setattr(os, "stat", lambda path, **more: before if path == str(folder) else stat(path, **more))

    return freeze


@posix
async def test_deletion_is_noticed_within_seconds_if_the_folder_keeps_its_times(
    tmp_path: Path, make_old: Callable[[Path], None], frozen_times: Callable[[Path], None]
) -> None:
    """Some file systems don't update the times of a folder."""
    store = await opened(tmp_path / "nexum.db")
    make_old(tmp_path)
    await start(store, 1)
    frozen_times(tmp_path)
    (tmp_path / "nexum.db").unlink()
    assert store._database._named_in is not None
    assert "was changed while the server was running" in await asyncio.wait_for(store.failed, 10)
    await store.close()


@posix
async def test_closing_server_looks_at_the_files_even_if_the_folder_keeps_its_times(
    tmp_path: Path,
    make_old: Callable[[Path], None],
    frozen_times: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = await opened(tmp_path / "nexum.db")
    make_old(tmp_path)
    await start(store, 1)
    frozen_times(tmp_path)
    (tmp_path / "nexum.db").rename(tmp_path / "moved.db")
    assert store._database._named_in is not None
    await store.close()
    assert "was not closed as usual" in caplog.text


@posix
async def test_deletion_is_noticed_at_once_if_the_path_leads_through_the_parent_of_a_link(
    tmp_path: Path, make_old: Callable[[Path], None]
) -> None:
    folder = tmp_path / "data" / "folder"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    store = await opened(tmp_path / "link" / ".." / "nexum.db")
    make_old(folder.parent)
    await start(store, 1)
    (folder.parent / "nexum.db").unlink()
    assert store._database._named_in is not None
    with pytest.raises(StoreUnavailable):
        await store.run(executions.start_execution, "w", "v1", "2", "")
    await store.close()


@posix
@pytest.mark.parametrize("name", ["nexum.db", "nexum.db-wal"])
async def test_truncation_during_a_transaction_is_noticed_before_it_is_acknowledged(tmp_path: Path, name: str) -> None:
    store = await opened(tmp_path / "nexum.db")
    await start(store, 1)
    truncated: list[str] = []

    def truncate(_: object) -> None:
        os.truncate(tmp_path / name, 0)
        truncated.append(name)

    outcomes = await asyncio.gather(
        store.run(executions.start_execution, "w", "v1", "2", ""), store.run(truncate), return_exceptions=True
    )
    assert truncated
    assert [type(one) for one in outcomes] == [StoreUnavailable] * 2
    await store.close()


@posix
async def test_link_that_leads_to_another_file_is_noticed(tmp_path: Path, make_old: Callable[[Path], None]) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(tmp_path / "one.db")
    store = await opened(link)
    make_old(tmp_path)
    await start(store, 1)
    await (await opened(tmp_path / "two.db")).close()
    link.unlink()
    link.symlink_to(tmp_path / "two.db")
    with pytest.raises(StoreUnavailable):
        await store.run(executions.start_execution, "w", "v1", "2", "")
    await store.close()
    assert len(await stored(tmp_path / "one.db")) == 1


@posix
def test_idle_server_of_a_deleted_folder_ends_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with nexum_server(folder) as server:
        shutil.rmtree(folder)
        assert server.process.wait(timeout=20) == 1
    assert len(server.process.lines) == 2, server.process.output
    line = server.process.lines[1]
    assert line.startswith(f"error: database {folder / 'nexum.db'} was changed while the server was running")


async def test_own_checkpoints_and_large_log_are_not_reported_as_foreign_changes(tmp_path: Path) -> None:
    store = await opened(tmp_path / "nexum.db")
    await store.run(executions.register_workflow, "w", "v1", ONE_NODE)
    text = f'"{"x" * 300_000}"'
    for _ in range(40):  # 12 MB in all: SQLite copies the log into the file whenever the log has 4 MB
        await store.run(executions.start_execution, "w", "v1", text, "")
    assert (tmp_path / "nexum.db").stat().st_size > 8_000_000
    await store.close()
    assert len(await stored(tmp_path / "nexum.db")) == 40


async def test_few_commits_make_the_log_longer(tmp_path: Path) -> None:
    store = await opened(tmp_path / "nexum.db")
    log = log_of(tmp_path / "nexum.db")
    sizes, beginnings = [log.stat().st_size], {log.read_bytes()[:32]}
    for n in range(300):  # more than 1,000 pages: SQLite copies the log into the file, and starts the log again
        await start(store, n)
        sizes.append(log.stat().st_size)
        beginnings.add(log.read_bytes()[:32])
    assert len(beginnings) == 2
    assert sizes == sorted(sizes)
    assert sizes[-1] == sqlite_file.LOG_BYTES
    assert len(set(sizes)) < 12  # its length is doubled each time
    await store.close()
    assert len(await stored(tmp_path / "nexum.db")) == 300


async def test_log_is_not_lengthened_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def write(_: int, data: bytes) -> int:
        tried.append(len(data))
        raise OSError(errno.ENOSPC, "No space left on device")

    store = await opened(tmp_path / "nexum.db")
    monkeypatch.setattr(os, "write", write)
    started = await start(store, *range(20))
    await store.close()
    assert len(tried) == 1
    assert await stored(tmp_path / "nexum.db") == started


# ---- One server for every name of a file -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["hard link", pytest.param("symbolic link", marks=needs_links), pytest.param("deleted lock file", marks=posix)],
)
def test_second_server_is_refused_by_every_name_of_the_file(tmp_path: Path, name: str) -> None:
    other = tmp_path / "elsewhere" / "other.db"
    other.parent.mkdir()
    with nexum_server(tmp_path) as server:
        database = tmp_path / "nexum.db"
        if name == "hard link":
            os.link(database, other)
        elif name == "symbolic link":
            other.symlink_to(database)
        else:
            (tmp_path / "nexum.db.lock").unlink()
            other = database
        run = nexum(tmp_path, "--listen", "127.0.0.1:0", "--database-url", f"sqlite:///{other}")
        assert (run.returncode, run.stdout, run.stderr.count("\n")) == (1, "", 1)
        assert f"database {other} is in use by another Nexum server" in run.stderr
        assert read_address(database) == server.address


async def test_hard_link_without_the_log_of_a_killed_server_is_refused(tmp_path: Path) -> None:
    acknowledged = kill_after(tmp_path / "nexum.db", 1, 2)
    (tmp_path / "elsewhere").mkdir()
    os.link(tmp_path / "nexum.db", tmp_path / "elsewhere" / "nexum.db")
    with pytest.raises(StoreRefused, match="hard links"):
        await opened(tmp_path / "elsewhere" / "nexum.db")
    assert await stored(tmp_path / "nexum.db") == acknowledged


@needs_links
def test_link_to_a_database_finds_its_server(tmp_path: Path, server: ServerThread) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(tmp_path / "nexum.db")
    assert read_address(link) == server.address
    run = nexum(tmp_path, "ps", "--nexum", str(link))
    assert (run.returncode, run.stderr) == (0, "")


@posix
def test_ending_server_leaves_the_address_of_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with nexum_server(folder) as first:
        first.process.popen.send_signal(signal.SIGSTOP)  # so that it doesn't notice yet that its folder is lost
        shutil.rmtree(folder)
        folder.mkdir()
        with nexum_server(folder) as second:
            first.process.popen.send_signal(signal.SIGCONT)
            assert first.process.wait(timeout=20) == 1
            assert read_address(folder / "nexum.db") == second.address


# ---- Logs and backups ------------------------------------------------------------------------------------------------


async def test_log_that_does_not_belong_to_the_file_is_refused(tmp_path: Path) -> None:
    database, backup = tmp_path / "nexum.db", tmp_path / "backup.db"
    old = await opened(database)
    saved = await start(old, 1)
    await old.close()
    shutil.copyfile(database, backup)
    acknowledged = kill_after(database, 2, 3)
    shutil.copyfile(database, tmp_path / "newest.db")
    shutil.copyfile(backup, database)
    before = contents(tmp_path)
    with pytest.raises(StoreRefused, match="is not the log of"):
        await opened(database)
    assert contents(tmp_path) == before
    # The refusal left the log intact: when the log's own database file is back, all executions are there.
    shutil.copyfile(tmp_path / "newest.db", database)
    assert await stored(database) == acknowledged > saved


async def test_file_of_an_interrupted_checkpoint_is_read_with_its_log(tmp_path: Path) -> None:
    database = tmp_path / "nexum.db"
    acknowledged = kill_after(database, *range(200))
    # Write only the first page, as an interrupted checkpoint does: it copies the pages in order. This page has the new
    # size of the database, so the file is now shorter than its first page says.
    shutil.copytree(tmp_path, tmp_path / "copied")
    with sqlite3.connect(tmp_path / "copied" / "nexum.db") as copied:
        copied.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    first_page = (tmp_path / "copied" / "nexum.db").read_bytes()[:4096]
    assert int.from_bytes(first_page[28:32], "big") * 4096 > database.stat().st_size
    with database.open("r+b") as file:
        file.write(first_page)
    before = contents(tmp_path)
    shutil.copyfile(database, tmp_path / "backup.db")
    shutil.copyfile(log_of(database), tmp_path / "backup.db-wal")
    assert restore_database(f"sqlite:///{tmp_path / 'restored.db'}", tmp_path / "backup.db") is None
    assert await stored(tmp_path / "restored.db") == acknowledged
    assert contents(tmp_path).items() >= before.items()
    assert await stored(database) == acknowledged


async def test_log_of_a_deleted_file_is_not_copied_into_a_new_one(tmp_path: Path) -> None:
    kill_after(tmp_path / "nexum.db", 1)
    (tmp_path / "nexum.db").unlink()
    before = contents(tmp_path)
    with pytest.raises(StoreRefused, match="is gone, but its log"):
        await opened(tmp_path / "nexum.db")
    assert contents(tmp_path) == before


async def test_copied_folder_of_a_killed_server_keeps_its_log(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    acknowledged = kill_after(tmp_path / "one" / "nexum.db", 1, 2)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert await stored(tmp_path / "two" / "nexum.db") == acknowledged


async def test_journal_of_another_program_is_refused(tmp_path: Path) -> None:
    await (await opened(tmp_path / "nexum.db")).close()
    (tmp_path / "nexum.db-journal").write_bytes(b"x")
    before = contents(tmp_path)
    with pytest.raises(StoreRefused, match="journal of another program"):
        await opened(tmp_path / "nexum.db")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("copied", [False, True], ids=["killed", "copied over"])
async def test_restored_backup_replaces_database_and_log(tmp_path: Path, copied: bool) -> None:
    database, backup = tmp_path / "nexum.db", tmp_path / "backup.db"
    store = await opened(database)
    saved = await start(store, 1)
    await store.close()
    shutil.copyfile(database, backup)
    acknowledged = kill_after(database, 2)
    if copied:
        shutil.copyfile(backup, database)
    run = nexum(tmp_path, "restore", "backup.db", "--database-url", f"sqlite:///{database}")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith(f"{database} now has the contents of backup.db; the former database is kept as ")
    assert await stored(database) == saved
    former = Path(run.stdout.strip().rpartition(" ")[2])
    assert log_of(former).exists()
    if not copied:
        assert await stored(former) == acknowledged


async def test_backup_with_its_log_is_restored_whole(tmp_path: Path) -> None:
    acknowledged = kill_after(tmp_path / "backup.db", 1, 2)
    before = contents(tmp_path)
    assert restore_database(f"sqlite:///{tmp_path / 'nexum.db'}", tmp_path / "backup.db") is None
    assert contents(tmp_path).items() > before.items()
    assert await stored(tmp_path / "nexum.db") == acknowledged


KILLED_RESTORE = """
import os, signal, sys
from pathlib import Path

from nexum_engine.store import restore_database

STEPS = ("os.rename", "os.link", "os.remove", "os.chmod", "shutil.copyfile", "sqlite3.connect")
database, backup, left = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])

def kill(event, _):
    global left
    if event in STEPS:
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
restore_database(database, backup)
"""
"""A program that restores a backup, and kills itself before one of its steps that change files."""


@posix
async def test_killed_restore_leaves_the_former_database_with_its_log(tmp_path: Path) -> None:
    """In each case, the path has the former database or the backup, or the server refuses and says what to do."""
    store = await opened(tmp_path / "backup.db")
    saved = await start(store, 1)
    await store.close()
    acknowledged = kill_after(tmp_path / "nexum.db", 1, 2, 3)
    found: list[str] = []
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        folder = tmp_path / str(len(found))
        folder.mkdir()
        database = folder / "nexum.db"
        for name in ("backup.db", "nexum.db", "nexum.db-wal"):
            shutil.copyfile(tmp_path / name, folder / name)
        before = database.stat().st_ino
        arguments = [f"sqlite:///{database}", str(folder / "backup.db"), str(len(found))]
        code = run_to_end(["-c", KILLED_RESTORE, *arguments], cwd=folder).returncode
        refusal = ""
        try:
            now = await stored(database)
        except StoreRefused as error:
            refusal = str(error)
            restore_database(f"sqlite:///{database}", folder / "backup.db")
            now = await stored(database)
            assert now == saved
        assert "To use a backup, run `nexum restore FILE`" in refusal or not refusal
        assert now in (acknowledged, saved)
        found.append("refused" if refusal else "former" if now == acknowledged else "backup")
        assert database.stat().st_nlink == 1, "the server could not compact a file with a second name"
        if found[-1] == "former":
            assert list(folder.glob("nexum.db.2*")) == []
        else:
            kept = [one for one in folder.glob("nexum.db.2*") if not one.name.endswith("-wal")]
            # After a refusal, the next restore has kept the pair that the server refused, too.
            whole = [one for one in kept if not refusal or one.stat().st_ino == before]
            assert [await stored(one) for one in whole] == [acknowledged]
    assert code == 0
    assert set(found) == {"former", "refused", "backup"}


async def test_second_name_of_a_killed_restore_is_kept_if_it_has_the_only_log(tmp_path: Path) -> None:
    acknowledged = kill_after(tmp_path / "nexum.db", 1, 2)
    second = tmp_path / "nexum.db.20260131-235959-0a1b"
    os.link(tmp_path / "nexum.db", second)
    log_of(tmp_path / "nexum.db").rename(log_of(second))
    with pytest.raises(StoreRefused, match="hard links"):
        await opened(tmp_path / "nexum.db")
    assert await stored(second) == acknowledged


@pytest.mark.parametrize(
    ("backup", "reason"),
    [("missing.db", "there is no backup"), ("text.db", "is not a database"), ("damaged.db", "damaged|can't be opened")],
)
async def test_bad_backup_is_refused_and_database_left_untouched(tmp_path: Path, backup: str, reason: str) -> None:
    database = tmp_path / "nexum.db"
    store = await opened(database)
    await start(store, 1)
    await store.close()
    (tmp_path / "text.db").write_text("text")
    damaged = bytearray(database.read_bytes())
    damaged[4096:] = b"\xff" * (len(damaged) - 4096)
    (tmp_path / "damaged.db").write_bytes(damaged)
    before = contents(tmp_path)
    with pytest.raises(StoreRefused, match=reason):
        restore_database(f"sqlite:///{database}", tmp_path / backup)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("lock", ["lock file", pytest.param("no lock file", marks=posix)])
def test_database_of_a_running_server_is_not_restored(tmp_path: Path, server: ServerThread, lock: str) -> None:
    shutil.copyfile(tmp_path / "nexum.db", tmp_path / "backup.db")
    if lock == "no lock file":
        (tmp_path / "nexum.db.lock").unlink()
    with pytest.raises(StoreLocked):
        restore_database(f"sqlite:///{tmp_path / 'nexum.db'}", tmp_path / "backup.db")
    assert nexum(tmp_path, "ps", "--nexum", server.address).returncode == 0


@pytest.mark.parametrize("missing", ["queries.sql", "sqlite_migrations"])
async def test_missing_file_of_the_package_is_not_reported_as_a_missing_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    package = tmp_path / "package"
    shutil.copytree(ROOT / "nexum_engine" / "store", package)
    (package / missing).rename(package / "other")  # as a program that was frozen without its data files
    monkeypatch.setattr(db, "files", lambda name: package)
    monkeypatch.setattr(sqlite_connection, "_migrations", partial(db.load_migrations, "sqlite_migrations"))
    with pytest.raises(StoreRefused, match=f"the package nexum_engine lacks its file .*{missing}: install"):
        await opened(tmp_path / "nexum.db")


async def test_database_of_the_version_before_is_opened_with_its_data(tmp_path: Path) -> None:
    database = tmp_path / "nexum.db"
    connection = sqlite3.connect(database)
    first = (ROOT / "nexum_engine" / "store" / "sqlite_migrations" / "0001_initial.sql").read_text(encoding="utf-8")
    connection.executescript(f"{first}; PRAGMA application_id = {0x4E58554D}; PRAGMA user_version = 1;")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("INSERT INTO workflow_versions VALUES (1, 'w', 'v1', ?, 'NEW', 0)", (ONE_NODE,))
    connection.execute("INSERT INTO executions VALUES (1, 'exec-1', 'w', 'v1', 'RUNNING', '1', NULL, 0, NULL, '')")
    connection.commit()
    connection.close()
    assert await stored(database) == {"exec-1"}


# ---- Files that can't be used ----------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("suffix", ["", "-wal", ".lock"])
def test_folder_in_place_of_a_file_is_refused_in_one_line(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"nexum.db{suffix}").mkdir()
    run = nexum(tmp_path, "--listen", "127.0.0.1:0", "--database-url", "sqlite:///nexum.db")
    assert (run.returncode, run.stderr.count("\n")) == (1, 1), run.stderr
    assert f"{tmp_path / 'nexum.db'}" in run.stderr
    assert "another file with DATABASE_URL" in run.stderr
