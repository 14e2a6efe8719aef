"""The stamps of a SQLite database: how they are stored in the file and in its write-ahead log.

SQLite doesn't check that a log belongs to a file. So the first transaction of each log stores a new **stamp** in the
table `log_stamp`, together with the log's **base**: the stamp that is in the file when the log starts. A log belongs to
a file if the file's stamp is the log's base. After a checkpoint has copied the log into the file, the file's stamp is
the log's own stamp instead.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

STAMP_BYTES = 16
_LOG_HEADER_BYTES, _FRAME_HEADER_BYTES = 32, 24


@dataclass(frozen=True)
class Stamp:
    """The contents of the table `log_stamp`."""

    own: bytes
    base: bytes
    closed: bool
    """Whether the last server closed the database."""

    @classmethod
    def decode(cls, blob: bytes) -> Stamp:
        return cls(blob[:STAMP_BYTES], blob[STAMP_BYTES : 2 * STAMP_BYTES], blob[2 * STAMP_BYTES :] == b"\x01")

    def encode(self) -> bytes:
        return self.own + self.base + bytes([self.closed])


@dataclass(frozen=True)
class Layout:
    """The page size, and the numbers of the pages that hold the tables `file_mark` and `log_stamp`."""

    page_size: int
    mark_page: int
    stamp_page: int


def layout_of(connection: sqlite3.Connection) -> Layout:
    pages = dict(
        tuple(row)
        for row in connection.execute(
            "SELECT name, rootpage FROM sqlite_schema WHERE name IN ('file_mark', 'log_stamp')"
        )
    )
    page_size = connection.execute("PRAGMA page_size").fetchone()[0]
    return Layout(page_size, pages["file_mark"], pages["log_stamp"])


def read_stamp(connection: sqlite3.Connection) -> Stamp:
    return Stamp.decode(connection.execute("SELECT stamp FROM log_stamp").fetchone()[0])


def write_stamp(connection: sqlite3.Connection, stamp: Stamp) -> None:
    connection.execute("UPDATE log_stamp SET stamp = ?", (stamp.encode(),))


def blob_in(page: bytes) -> bytes:
    """Return the BLOB in the page of a table that has one row with one short BLOB."""
    # https://www.sqlite.org/fileformat.html#b_tree_pages: byte 8 gives the position of the only cell. The cell has one
    # byte each for the payload's size, the row's number, the header's size and the type. The BLOB follows.
    cell = int.from_bytes(page[8:10], "big")
    return page[cell + 4 : cell + 2 + page[cell]] if cell < len(page) else b""


def belongs(log: Path, layout: Layout, own: bytes) -> bool:
    """Return whether the log belongs to the file with the stamp `own`.

    The log belongs to the file if `own` is the base of the log's newest stamp or, after the log was copied into the
    file, that newest stamp itself. A log without a commit belongs to any file.
    """
    # https://www.sqlite.org/fileformat.html#the_write_ahead_log
    newest: Stamp | None = None
    in_transaction: Stamp | None = None
    has_commit = False
    with log.open("rb") as file:
        header = file.read(_LOG_HEADER_BYTES)
        if int.from_bytes(header[8:12], "big") != layout.page_size:
            return not any(header)
        # Each frame of this log repeats the salts in the log's header. Frames of an earlier log may follow.
        while (frame := file.read(_FRAME_HEADER_BYTES))[8:16] == header[16:24]:
            page = file.read(layout.page_size)
            if int.from_bytes(frame[:4], "big") == layout.stamp_page:
                in_transaction = Stamp.decode(blob_in(page))
            if any(frame[4:8]):
                has_commit = True
                newest = in_transaction or newest
    return not has_commit or (newest is not None and own in (newest.own, newest.base))
