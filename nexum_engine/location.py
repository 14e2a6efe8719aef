"""The path of the database that a URL names, and the address of the server that has the database open.

A server writes its address and the name of its process into a file beside its database as soon as it listens, and
removes the file when it ends. A killed server leaves the file behind. The next server learns from the file which
process was killed. Another server may then listen on the address, so a client checks which database that server has
open.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import time
import uuid
from functools import cache
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote

from nexum_engine.errors import StoreError, StoreRefused
from nexum_engine.streams import NO_WORKING_FOLDER

DEFAULT_FOLDER = ".nexum"
DEFAULT_DATABASE_URL = f"sqlite:///{DEFAULT_FOLDER}/local.db"
_REPLACE_TRIES, _REPLACE_INTERVAL = 20, 0.01  # tries to replace an address file, and seconds between two tries
MAX_ADDRESS_BYTES = 1000
_PG_VARIABLES = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGUSER", "PGOPTIONS", "PGSERVICE", "PGSERVICEFILE")
"""The environment variables from which PostgreSQL takes what the URL of a database doesn't say."""
_ADDRESS = re.compile(r"(127\.\d+\.\d+\.\d+|\[::1\]):[1-9]\d{0,4}")


def default_database_url() -> str:
    """Return the URL of the default database: DATABASE_URL, else the database in this folder."""
    return os.environ.get("DATABASE_URL") or DEFAULT_DATABASE_URL


def database_path(database_url: str) -> Path:
    """Return the absolute path that a SQLite URL names: `sqlite:///relative`, `sqlite:////absolute`,
    `sqlite:///C:/path`, or a published server's `sqlite://relative?mode=rwc`.

    Raises StoreRefused for other URLs, and StoreError if the path is relative to a working folder that was deleted.
    """
    if database_url.startswith(("postgresql:", "postgres:")):
        raise StoreRefused(
            "the database is in PostgreSQL, and this command is for database files: use pg_dump for a backup, "
            "pg_restore to restore one, and pg_amcheck for a check"
        )
    rest, _, query = database_url.removeprefix("sqlite:").partition("?")
    unknown = [name for name, value in parse_qsl(query, keep_blank_values=True) if (name, value) != ("mode", "rwc")]
    name = unquote(rest.removeprefix("//"))
    # Drop the third slash: it separates the empty host from the path.
    name = name[1:] if name.startswith("/") else name
    if not rest.startswith("//") or unknown or not name or ":memory:" in name or "\0" in name:
        raise StoreRefused(
            f"database URL {database_url!r} is not supported: use sqlite:///path, a file on this machine"
        )
    return absolute(name)


def absolute(name: str | Path) -> Path:
    """Return the absolute path of a database or a backup.

    Raises StoreError if this process's working folder was deleted, and StoreRefused if the path is not text in UTF-8:
    servers and clients tell each other the path, and their messages can't hold other paths.
    """
    try:
        path = Path(name).absolute()
        str(path).encode()
    except FileNotFoundError as error:
        raise StoreError(NO_WORKING_FOLDER) from error
    except UnicodeEncodeError as error:
        raise StoreRefused(
            f"the path {str(path)!a} is not text in UTF-8: rename the folder, or set DATABASE_URL to a file elsewhere"
        ) from error
    return path


def database_url(path: Path) -> str:
    """Return the URL of a database file."""
    return f"sqlite:///{quote(str(path))}"


def own_database() -> Path | None:
    """Return the file of the default database; None if DATABASE_URL doesn't name a file on this machine."""
    url = default_database_url()
    if not url.startswith("sqlite:"):
        return None
    with contextlib.suppress(StoreRefused):
        return database_path(url)
    return None


def place_of(database: str | Path) -> bytes:
    """Return the place of a database: the number of its folder in the file system, and the file's name.

    Paths that lead to the same file through links have the same place. Equal paths may have different places:
    containers that share a network can have different files at the same path. The place is empty if the folder doesn't
    exist.
    """
    try:
        path = os.path.realpath(database)
        folder = os.stat(os.path.dirname(path))
    except (OSError, ValueError):  # ValueError: a zero byte in the path
        return b""
    # On Windows, versions of Python give a folder different numbers.
    place = os.path.normcase(path) if os.name == "nt" else f"{folder.st_dev}:{folder.st_ino}:{os.path.basename(path)}"
    return os.fsencode(place)


def place_of_url(url: str) -> bytes:
    """Return the place of a database that isn't a file on this machine, such as one in PostgreSQL.

    The password doesn't count. The user does: each may have a schema of its own. Environment variables of PostgreSQL
    count, too, because they complete the URL.
    """
    named = re.sub(r"^(\w+://[^/?#:@]*):[^/?#]*@", r"\1@", url)
    parts = [named, *(os.environ.get(name, "") for name in _PG_VARIABLES)]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).digest()


def address_file(database: Path) -> Path:
    """Return the path of the database's address file, which contains the address of the database's server.

    If `database` is a link, the file is beside the link's target.
    """
    return Path(f"{os.path.realpath(database)}.address")


def read_address(database: Path) -> str | None:
    """Return the address in the database's address file; None if there is no file, or no address in it."""
    address = _read_lines(database)[0]
    return address if _ADDRESS.fullmatch(address) else None


def read_process(database: Path) -> str:
    """Return the process that the database's address file names (see `process_name`); empty if it names none."""
    return _read_lines(database)[1]


def last_server(database: Path) -> str:
    """Return in words which server the database's address file names; empty if it names none."""
    address = read_address(database)
    found = re.fullmatch(r"([\w.-]+)-([0-9]+)-[0-9a-f]+-", read_process(database))
    if address is None or found is None:
        return ""
    host, pid = found.groups()
    where = "" if host == socket.gethostname() else ", another machine or container"
    return f"process {pid} of {host}{where}, on {address}"


def _read_lines(database: Path) -> tuple[str, str]:
    """Return the two lines of the database's address file; empty lines if there is no such file."""
    try:
        with address_file(database).open("rb") as file:
            lines = file.read(MAX_ADDRESS_BYTES).decode().splitlines()
    except (OSError, ValueError):  # ValueError: the path has a zero byte, or the file isn't text
        lines = []
    address, process, *rest = (*lines, "", "")
    return ("", "") if any(rest) else (address, process)


def process_name() -> str:
    """Return a unique name of this process. The ids of its workers and owners begin with it."""
    return f"{socket.gethostname()}-{os.getpid()}-{_random(os.getpid())}-"


@cache
def _random(pid: int) -> str:
    """Return characters that tell this process from others with its `pid`: in containers, many processes have pid 1."""
    return uuid.uuid4().hex[:6]


def write_address(database: Path, address: str) -> None:
    """Write the database's address file atomically, with the name of this process. Raises OSError.

    The caller must hold the database's lock.
    """
    path = address_file(database)
    new = path.with_name(f"{path.name}.new")
    new.write_text(f"{address}\n{process_name()}\n", encoding="utf-8")
    for tries in range(1, _REPLACE_TRIES + 1):
        try:
            new.replace(path)
            return
        except PermissionError:  # Windows raises this while a client reads the old file
            if tries == _REPLACE_TRIES:
                raise
            time.sleep(_REPLACE_INTERVAL)


def remove_address(database: Path, address: str) -> None:
    """Remove the database's address file if it still contains `address`. Ignore an error of the file system."""
    if read_address(database) == address:
        with contextlib.suppress(OSError):
            address_file(database).unlink()
