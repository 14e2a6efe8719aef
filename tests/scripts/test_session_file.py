"""The session file: it stays whole with many writers, and stays in its folder."""

from __future__ import annotations

import asyncio
import json
import stat
import threading
from pathlib import Path

import pytest
from filelock import FileLock
from harness import running

from nexum_engine.errors import InvalidRequest
from support.session_file import SessionFile, SessionFileError, SessionRecord, check_session_id

pytestmark = pytest.mark.every_python

WRITER = """
import asyncio, sys
from support.session_file import SessionFile


async def main(name):
    file = SessionFile("shared")
    await asyncio.gather(*(file.record("w", f"{name}-{n}", f"exec-{name}-{n}") for n in range(50)))

asyncio.run(main(sys.argv[1]))
"""


def names(folder: Path, pattern: str = "*") -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


@pytest.mark.parametrize("session_id", ["a", "A-1_b", "0" * 64])
def test_an_id_of_letters_digits_and_dashes_is_accepted(session_id: str) -> None:
    assert check_session_id(session_id) == session_id


@pytest.mark.parametrize(
    "session_id", ["", "..", "../x", "a/b", "a\\b", "-a", "_a", ".a", "a.b", "a b", "é", "a\n", "a\0", "0" * 65]
)
def test_id_that_is_a_path_or_hidden_name_is_refused(session_id: str) -> None:
    with pytest.raises(InvalidRequest, match="can't be used"):
        SessionFile(session_id)


async def test_recorded_call_is_found_by_another_instance(tmp_path: Path) -> None:
    await SessionFile("s", tmp_path).record("w", "key", "exec-1")
    other = SessionFile("s", tmp_path)
    assert await other.find("w", "key") == "exec-1"
    assert await other.find("w", "other key") is None
    assert await other.find("other workflow", "key") is None


async def test_later_record_of_another_process_is_found(tmp_path: Path) -> None:
    one, other = SessionFile("s", tmp_path), SessionFile("s", tmp_path)
    await one.record("w", "a", "exec-a")
    await other.record("w", "b", "exec-b")
    assert await one.find("w", "b") == "exec-b"
    await one.record("w", "c", "exec-c")
    record = SessionFile("s", tmp_path).load()
    assert record is not None
    assert record.executions == {"w": {"a": "exec-a", "b": "exec-b", "c": "exec-c"}}


async def test_entry_written_right_after_a_read_is_found_by_the_next_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = SessionFile("s", tmp_path), SessionFile("s", tmp_path)
    await one.record("w", "a", "exec-a")
    load = other.load

    def load_and_lag() -> SessionRecord | None:
        record = load()
        one._merge([("w", "b", "exec-b")])
        return record

    with monkeypatch.context() as patched:
        patched.setattr(other, "load", load_and_lag)
        assert await other.find("w", "b") is None
    assert await other.find("w", "b") == "exec-b"


async def test_calls_that_record_at_the_same_time_are_written_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = SessionFile("s", tmp_path)
    written: list[str] = []
    write = file._write

    def counted(text: str) -> None:
        written.append(text)
        write(text)

    monkeypatch.setattr(file, "_write", counted)
    await asyncio.gather(*(file.record("w", str(n), f"exec-{n}") for n in range(40)))
    record = SessionFile("s", tmp_path).load()
    assert record is not None
    assert record.executions == {"w": {str(n): f"exec-{n}" for n in range(40)}}
    assert len(written) < 40  # one write has the entries of several calls


async def test_entries_to_write_soon_share_the_write_that_finish_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("support.session_file._WRITE_DELAY", 3600.0)
    file = SessionFile("s", tmp_path)
    written: list[str] = []
    monkeypatch.setattr(file, "_write", written.append)
    for n in range(40):
        file.record_soon("w", str(n), f"exec-{n}")
        assert await file.find("w", str(n)) == f"exec-{n}"
    assert not written
    await file.finish()
    (text,) = written
    assert SessionRecord.model_validate_json(text).executions == {"w": {str(n): f"exec-{n}" for n in range(40)}}
    await file.finish()
    assert len(written) == 1
    assert not [one for one in threading.enumerate() if isinstance(one, threading.Timer) and not one.finished.is_set()]


async def test_finish_waits_for_a_write_that_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.session_file._WRITE_DELAY", 0.0)
    file = SessionFile("s", tmp_path)
    begun, go_on = threading.Event(), threading.Event()
    write = file._write

    def slow(text: str) -> None:
        begun.set()
        go_on.wait()
        write(text)

    monkeypatch.setattr(file, "_write", slow)
    file.record_soon("w", "a", "exec-a")
    assert await asyncio.to_thread(begun.wait, 30)
    finishing = asyncio.create_task(file.finish())
    await asyncio.sleep(0)
    assert not finishing.done()
    go_on.set()
    await finishing
    assert await SessionFile("s", tmp_path).find("w", "a") == "exec-a"


def test_program_that_ends_writes_its_last_entries(tmp_path: Path) -> None:
    program = "from support.session_file import SessionFile; SessionFile('s').record_soon('w', 'a', 'exec-a')"
    with running(["-c", program], cwd=tmp_path) as process:
        assert process.wait() == 0
    record = SessionFile("s", tmp_path).load()
    assert record is not None
    assert record.executions == {"w": {"a": "exec-a"}}


async def test_a_reader_waits_for_a_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await SessionFile("s", tmp_path).record("w", "k", "exec-1")
    monkeypatch.setattr("support.session_file._LOCK_TIMEOUT", 0.05)
    reader = SessionFile("s", tmp_path)
    with FileLock(f"{reader.path}.lock"), pytest.raises(SessionFileError, match="can't be read"):
        reader.load()
    assert await reader.find("w", "k") == "exec-1"


async def test_the_age_of_a_session_is_that_of_its_first_call(tmp_path: Path) -> None:
    await SessionFile("s", tmp_path).record("w", "a", "exec-a")
    first = SessionFile("s", tmp_path).load()
    await SessionFile("s", tmp_path).record("w", "b", "exec-b")
    second = SessionFile("s", tmp_path).load()
    assert first is not None
    assert second is not None
    assert second.created_at == first.created_at
    assert sum(map(len, second.executions.values())) == 2


async def test_only_the_owner_can_read_the_file(tmp_path: Path) -> None:
    file = SessionFile("s", tmp_path)
    await file.record("w", "key", "exec-1")
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert names(tmp_path) == [".session-s.json", ".session-s.json.lock"]


def test_two_processes_that_record_fifty_calls_each_lose_none(tmp_path: Path) -> None:
    with running(["-c", WRITER, "a"], cwd=tmp_path) as one, running(["-c", WRITER, "b"], cwd=tmp_path) as other:
        assert one.wait() == 0
        assert other.wait() == 0
    record = SessionFile("shared", tmp_path).load()
    assert record is not None
    assert record.executions["w"] == {f"{name}-{n}": f"exec-{name}-{n}" for name in "ab" for n in range(50)}
    assert names(tmp_path) == [".session-shared.json", ".session-shared.json.lock"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"created_at": 1.0, "executions": {"w": {"k": "exec-1"',
        b"\xff\xfe\x00",
        b"null",
        b"[]",
        b"{}",
        b'{"executions": {}}',
        b'{"created_at": 1.0, "executions": {"w": {"k": 5}}}',
        b'{"created_at": 1.0, "executions": {}, "more": 1}',
        b"[" * 100_000,
    ],
    ids=lambda content: repr(content[:24]),
)
async def test_corrupt_or_foreign_file_is_set_aside_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    file = SessionFile("s", tmp_path)
    file.path.write_bytes(content)
    assert await file.find("w", "k") is None
    assert "[Nexum] .session-s.json is corrupt (" in capsys.readouterr().out
    (aside,) = names(tmp_path, "*.corrupt-*")
    assert (tmp_path / aside).read_bytes() == content
    await file.record("w", "k", "exec-2")
    assert await SessionFile("s", tmp_path).find("w", "k") == "exec-2"


async def test_file_corrupted_between_two_calls_is_set_aside(tmp_path: Path) -> None:
    file = SessionFile("s", tmp_path)
    await file.record("w", "a", "exec-a")
    file.path.write_bytes(b"{")
    await file.record("w", "b", "exec-b")
    assert len(names(tmp_path, ".session-s.json.corrupt-*")) == 1
    assert json.loads(file.path.read_text())["executions"] == {"w": {"b": "exec-b"}}


async def test_unreadable_file_is_kept_and_reported_once_and_fails_no_call(
    tmp_path: Path,
) -> None:
    told: list[str] = []
    file = SessionFile("s", tmp_path, tell=told.append)
    file.path.mkdir()
    with pytest.raises(SessionFileError, match="can't be read"):
        file.load()
    for _ in range(2):
        assert await file.find("w", "key") is None
    (line,) = told
    assert line.startswith(f"[Nexum] the session file {file.path} can't be read (")
    assert line.endswith("; the server still has this session's results")
    await file.record("w", "key", "exec-1")
    assert f"{file.path} can't be written" in told[1]
    assert file.path.is_dir()
    assert await file.find("w", "key") == "exec-1"  # from memory


async def test_write_after_a_failed_read_keeps_all_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await SessionFile("s", tmp_path).record("w", "a", "exec-a")
    file = SessionFile("s", tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(file, "_read", busy)
        assert await file.find("w", "a") is None
    await file.record("w", "b", "exec-b")
    assert await file.find("w", "a") == "exec-a"


def busy() -> None:
    raise PermissionError(13, "in use")  # as Windows does for a file that another program has open


async def test_unwritable_file_fails_no_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = SessionFile("s", tmp_path)
    (tmp_path / ".session-s.json.tmp").mkdir()
    await asyncio.gather(file.record("w", "a", "exec-a"), file.record("w", "b", "exec-b"))
    assert "can't be written" in capsys.readouterr().out
    assert not file.path.exists()
