"""Where a command looks: on a server or, if no server is named and none answers, in the database itself."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

from nexum_engine import jsontext
from nexum_engine.client import NexumClient
from nexum_engine.clock import SystemClock
from nexum_engine.connection import DEFAULT_ADDRESS, RECONNECT_DELAY
from nexum_engine.errors import (
    InvalidRequest,
    NotANexumServer,
    ServerNotReady,
    ServerUnavailable,
    StoreLocked,
    StoreRefused,
)
from nexum_engine.location import default_database_url
from nexum_engine.records import DeclaredTool, Execution, ExecutionStatus, PendingApproval, UnknownNode
from nexum_engine.store import Store, database_exists, executions, listing, open_store, reading, waits
from nexum_engine.store.retry import retry_execution

LOOK_PATIENCE = 3.0  # seconds to wait while a server has the database open and does not answer
PAGE = 1000
"""How many child executions to read in one call. A child execution is one that a node started."""
T = TypeVar("T")


async def on_server_or_database(
    args: argparse.Namespace, ask: Callable[[NexumClient], Awaitable[T]], read: Callable[[Store], Awaitable[T]]
) -> T:
    """Open the database that --database-url names. Without --database-url, ask a server.

    If no server is named, and no server answers, open the default database instead. Raises InvalidRequest if both a
    server and a database are named.
    """
    if args.database_url is not None:
        if args.nexum is not None:
            raise InvalidRequest("--nexum names a server and --database-url names a database: give only one of them")
        return await when_released(lambda: _use_database(read, args.database_url))
    address = os.environ.get("NEXUM_ADDRESS") if args.nexum is None else args.nexum

    async def find() -> T:
        try:
            async with NexumClient(address or None) as client:
                return await ask(client)
        except (ServerUnavailable, NotANexumServer) as error:
            if address:
                raise
            failure = error
        why = str(failure) if isinstance(failure, ServerNotReady) else f"no server on {DEFAULT_ADDRESS}"
        return await _use_database(read, default_database_url(), f"{why}, and ")

    return await when_released(find)


async def when_released(attempt: Callable[[], Awaitable[T]]) -> T:
    """Make attempts for LOOK_PATIENCE, as long as a server has the database open and can't be asked.

    Such a server is about to end, or a run has just opened the database and will answer soon.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + LOOK_PATIENCE
    while True:
        try:
            return await attempt()
        except StoreLocked:
            if loop.time() >= end:
                raise
        await asyncio.sleep(RECONNECT_DELAY)


async def _use_database(read: Callable[[Store], Awaitable[T]], url: str, tried: str = "") -> T:
    if not database_exists(url):
        raise nothing_recorded(url, tried)
    try:
        store = await open_store(url, SystemClock())
    except StoreLocked as error:
        raise StoreLocked(f"{tried}a Nexum server has {url} open: ask that server with --nexum HOST:PORT") from error
    try:
        return await read(store)
    finally:
        await store.close()


def nothing_recorded(url: str, tried: str = f"no server on {DEFAULT_ADDRESS}, and ") -> StoreRefused:
    """Return the error of a command that needs a database, if there is none."""
    return StoreRefused(f"{tried}no database at {url}: nothing recorded")


class OnServer:
    """The operations that the commands need, on a server."""

    def __init__(self, client: NexumClient) -> None:
        self._client = client
        self.cancel, self.retry = client.cancel_execution, client.retry_execution
        self.approvals, self.approve, self.reject = client.pending_approvals, client.approve, client.reject
        self.unknown, self.resolve = client.unknown, client.resolve
        self.tools, self.send, self.status = client.tools, client.send_event, client.get_status

    async def children(self, execution_id: str, before: str) -> list[Execution]:
        return await self._client.list_executions(parent=execution_id, before=before, limit=PAGE)

    async def find(self, args: argparse.Namespace) -> list[Execution]:
        return await self._client.list_executions(
            workflow_id=args.workflow, status=args.status, limit=args.limit, **_conditions(args)
        )

    async def get(self, execution_id: str) -> Execution:
        return (await self._client.get_execution(execution_id, with_attempts=True)).execution


class InDatabase:
    """The same operations, in a database that no server has open."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def find(self, args: argparse.Namespace) -> list[Execution]:
        found = await self._store.run(
            listing.list_executions, args.workflow, args.status, args.limit, **_conditions(args)
        )
        if self._store.file is None:
            return found
        # No server has the file open, so no process runs a session. But a killed run may have left its session recorded
        # as running.
        return [
            one if one.session is None else replace(one, session=replace(one.session, is_running=False))
            for one in found
        ]

    async def status(self, execution_id: str) -> ExecutionStatus:
        return (await self.get(execution_id)).status

    async def get(self, execution_id: str) -> Execution:
        return await self._store.run(reading.get_execution, execution_id, True)

    async def cancel(self, execution_id: str, *, by: str) -> None:
        await self._store.run(executions.cancel_execution, execution_id, by)

    async def children(self, execution_id: str, before: str) -> list[Execution]:
        return await self._store.run(listing.list_executions, "", "", PAGE, parent=execution_id, before=before)

    async def retry(self, execution_id: str) -> None:
        await self._store.run(retry_execution, execution_id)

    async def approvals(self) -> list[PendingApproval]:
        return await self._store.run(waits.pending_approvals)

    async def approve(self, execution_id: str, node_id: str, *, approver: str, comment: str, answer: object) -> None:
        answer_json = "" if answer is None else jsontext.dump(answer, "the answer")
        await self._store.run(waits.approve, execution_id, node_id, approver, comment, answer_json)

    async def reject(self, execution_id: str, node_id: str, *, approver: str, reason: str) -> None:
        await self._store.run(waits.reject, execution_id, node_id, approver, reason)

    async def unknown(self) -> list[UnknownNode]:
        return await self._store.run(waits.unknown_nodes)

    async def resolve(
        self,
        execution_id: str,
        node_id: str,
        *,
        resolved_by: str,
        output: object,
        not_done: bool,
        failed: str | None,
        attempt: int,
    ) -> None:
        is_done = not not_done and failed is None
        await self._store.run(
            waits.resolve,
            execution_id,
            node_id,
            resolved_by,
            output_json=jsontext.dump(output, "the result") if is_done else None,
            not_done=not_done,
            failed=failed or "",
            attempt=attempt,
        )

    async def tools(self) -> list[DeclaredTool]:
        return []  # no server runs, so no worker and no run is connected

    async def send(self, execution_id: str, name: str, payload: Any, *, idempotency_key: str) -> None:
        payload_json = jsontext.dump(payload, "the payload")
        await self._store.run(waits.send_event, execution_id, name, payload_json, idempotency_key)


Executions = OnServer | InDatabase


def _conditions(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "key_prefix": args.key,
        "since_ms": args.since,
        "until_ms": args.until,
        "attributes": dict(args.attr),
        "group_sessions": not args.all and not args.workflow,
    }
