"""The check of a database file: SQLite's own checks, and the engine's invariants. The file is only read."""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from itertools import groupby, islice
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock, Timeout

from nexum_engine.errors import InvalidRequest, StoreLocked, StoreRefused
from nexum_engine.scheduling import DONE
from nexum_engine.store.base import Checked
from nexum_engine.store.db import load_queries
from nexum_engine.store.sqlite_connection import check_file, is_current
from nexum_engine.store.sqlite_file import DatabaseFile, lock_file_of, log_of
from nexum_engine.workflow import NodeDefinition, parse_ir

MAX_OF_A_KIND = 20
"""How many findings of one kind are reported. A note follows if there are more."""


def check(file: Path) -> Checked:
    """Check a database that no server has open, or a backup. The file and its log stay as they are.

    A log beside the file is read, too. Raises StoreRefused if the file is not a Nexum database that this version can
    open, and StoreLocked if a server has it open.
    """
    check_file(file)
    if not file.exists():
        raise StoreRefused(f"there is no database {file}")
    held = _lock_if_any(file)
    try:
        has_log = log_of(file).exists() and log_of(file).stat().st_size > 0
        if not has_log and is_current(file):
            return _check_closed(file)
        # Check a copy, so that the original doesn't change: SQLite writes to the files if it reads the log, and if the
        # schema is updated.
        with tempfile.TemporaryDirectory(prefix="nexum-check-") as folder:
            copy = Path(folder) / "copy.db"
            shutil.copyfile(file, copy)
            if has_log:
                shutil.copyfile(log_of(file), log_of(copy))
            try:
                DatabaseFile.open(copy).close()
            except StoreRefused as error:
                return Checked(0, (str(error).replace(str(copy), str(file)),))
            return _check_closed(copy)
    finally:
        if held is not None:
            held.release()


def _lock_if_any(file: Path) -> FileLock | None:
    """Take the database's lock file, if it has one, so that no server can start and change the database meanwhile."""
    path = lock_file_of(file)
    if not path.exists():
        return None
    held = FileLock(path, mode=0o600)
    try:
        held.acquire(timeout=0)
    except Timeout as error:
        raise StoreLocked(
            f"database {file} is in use, and its server does not answer: stop that server, or try again"
        ) from error
    except OSError:
        return None  # for instance, the folder is read-only: then no server can open the database, either
    return held


def _check_closed(file: Path) -> Checked:
    connection = sqlite3.connect(f"file:{quote(str(file.absolute()))}?immutable=1", uri=True)
    connection.row_factory = sqlite3.Row
    findings: list[str] = []
    executions = 0
    try:
        for kind in _findings(connection):
            findings += _some(kind)
        executions = connection.execute("SELECT count(*) FROM executions").fetchone()[0]
    except sqlite3.DatabaseError as error:
        findings.append(f"the file is damaged, and the rest of it was not checked: {error}")
    finally:
        connection.close()
    return Checked(executions, tuple(findings))


def _some(findings: Iterator[str]) -> list[str]:
    found = list(islice(findings, MAX_OF_A_KIND))
    more = sum(1 for _ in findings)
    return [*found, f"... and {more:,} more of this kind"] if more else found


def _findings(connection: sqlite3.Connection) -> Iterator[Iterator[str]]:
    damage = [row[0] for row in connection.execute(f"PRAGMA integrity_check({MAX_OF_A_KIND})")]
    yield iter(line for line in damage if line != "ok")
    yield (
        f"row {row[1] if row[1] is not None else '?'} of {row[0]} refers to a row of {row[2]} that is missing"
        for row in connection.execute("PRAGMA foreign_key_check")
    )
    for query in load_queries("checks.sql").values():
        yield (str(row["what"]) for row in connection.execute(query))
    yield _payloads(connection)
    yield _definitions(connection)


def _payloads(connection: sqlite3.Connection) -> Iterator[str]:
    """Yield a line for each input and output that isn't JSON."""
    for row in connection.execute("SELECT execution_id, input_json FROM executions"):
        if not _is_json(row["input_json"]):
            yield f"the input of execution {row['execution_id']} is not JSON"
    rows = connection.execute(
        "SELECT execution_id, node_id, output_json FROM nodes JOIN executions ON sequence = node / 1000 "
        "WHERE output_json IS NOT NULL"
    )
    for row in rows:
        if not _is_json(row["output_json"]):
            yield f"the output of node {row['node_id']} of execution {row['execution_id']} is not JSON"


def _is_json(text: str) -> bool:
    # Don't use jsontext.parse: the output of a MAP node may be larger, and nested more deeply, than it allows.
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _definitions(connection: sqlite3.Connection) -> Iterator[str]:
    """Yield a line for each execution whose nodes are not the nodes of its version, or are in an impossible state."""
    definitions: dict[tuple[str, str], Mapping[str, NodeDefinition]] = {}
    for row in connection.execute("SELECT workflow_id, version_hash, ir_json FROM workflow_versions"):
        try:
            nodes = parse_ir(row["ir_json"])
        except InvalidRequest as error:
            yield f"version {row['version_hash']} of workflow {row['workflow_id']} can't run: {error}"
            continue
        key = row["workflow_id"], row["version_hash"]
        definitions[key] = nodes
    rows = connection.execute(
        "SELECT sequence, execution_id, workflow_id, executions.version_hash, executions.status AS execution_status, "
        "node, node_id, nodes.status, dependencies, child_index FROM executions "
        "LEFT JOIN nodes ON node BETWEEN 1000 * sequence AND 1000 * sequence + 999 ORDER BY sequence, node"
    )
    for _, members in groupby(rows, key=lambda row: row["sequence"]):
        yield from _nodes(list(members), definitions)


def _nodes(
    rows: list[sqlite3.Row], definitions: Mapping[tuple[str, str], Mapping[str, NodeDefinition]]
) -> Iterator[str]:
    first = rows[0]
    execution = f"execution {first['execution_id']}"
    if first["node"] is None:
        yield f"{execution} has no nodes"
        return
    stored: dict[str, tuple[str, ...]] = {}
    for position, row in enumerate(rows):
        if row["node"] != 1000 * first["sequence"] + position:
            yield f"node {row['node_id']} of {execution} has the number {row['node']}, which is not its position"
        try:
            stored[row["node_id"]] = tuple(json.loads(row["dependencies"]))
        except (ValueError, TypeError):
            yield f"the dependencies of node {row['node_id']} of {execution} are not a list: {row['dependencies']}"
            return
    defined = definitions.get((first["workflow_id"], first["version_hash"]))
    if first["child_index"] is not None or defined is None:
        return  # the node of a MAP node's item is not a node of the workflow
    if len(stored) != len(rows) or stored != {name: node.dependencies for name, node in defined.items()}:
        yield f"the nodes of {execution} are not those of its version {first['version_hash']}"
        return
    states = {row["node_id"]: row["status"] for row in rows}
    for name, state in states.items():
        deciders = {router.node_id for router in defined.values() if name in router.targets}
        done = all(states.get(before) in DONE for before in {*stored[name], *deciders})
        if state in ("READY", "RUNNING", "WAITING", "COMPLETED", "SKIPPED") and not done:
            yield f"node {name} of {execution} is {state}, but a node that it waits for has no result"
        elif state == "PENDING" and done and first["execution_status"] == "RUNNING":
            yield f"node {name} of {execution} is PENDING, although it waits for nothing"
