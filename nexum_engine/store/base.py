"""The store as the server sees it: one method, one transition, one transaction."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import TypeVar

from nexum_engine.model import Compatibility, Execution, WorkflowVersion
from nexum_engine.store import executions, leases, tasks
from nexum_engine.store.db import Db
from nexum_engine.store.outcomes import Changed, Claim, Started, Swept

T = TypeVar("T")


class Store(ABC):
    """The transitions of `executions`, `tasks` and `leases`, bound to a database.

    Calling a method submits the transition; transitions run in the order of submission. Awaiting what it returns waits
    until it is durable. It raises the transition's own error, or StoreUnavailable when the outcome is unknown.
    A dialect supplies `submit`, `opened_as`, `failed` and `close`.
    """

    @property
    @abstractmethod
    def opened_as(self) -> str:
        """The database, for a person: an absolute path, or a URL without its password."""

    @property
    @abstractmethod
    def failed(self) -> asyncio.Future[str]:
        """Resolves, with the reason, when the database can't be trusted any more and the server has to stop."""

    on_unknown: Callable[[], None] | None = None
    """Called when the outcome of transactions is unknown: whoever waits for one should look again."""

    @abstractmethod
    def submit(self, transition: Callable[[Db], T]) -> Awaitable[T]:
        """Run one transition in one transaction."""

    @abstractmethod
    async def close(self) -> None:
        """Finish what was submitted and release the database."""

    def register_workflow(self, workflow_id: str, version_hash: str, ir_json: str) -> Awaitable[Compatibility]:
        return self.submit(lambda db: executions.register_workflow(db, workflow_id, version_hash, ir_json))

    def workflow_versions(self, workflow_id: str) -> Awaitable[list[WorkflowVersion]]:
        return self.submit(lambda db: executions.workflow_versions(db, workflow_id))

    def start_execution(
        self, workflow_id: str, version_hash: str, input_json: str, idempotency_key: str = ""
    ) -> Awaitable[Started]:
        return self.submit(
            lambda db: executions.start_execution(db, workflow_id, version_hash, input_json, idempotency_key)
        )

    def get_execution(self, execution_id: str, with_attempts: bool = False) -> Awaitable[Execution]:
        return self.submit(lambda db: executions.get_execution(db, execution_id, with_attempts))

    def start_owned(
        self,
        workflow_id: str,
        version_hash: str,
        input_json: str,
        idempotency_key: str,
        owner: str,
        lease_ms: int,
        streamed: bool,
        held_task_id: str = "",
        output_json: str = "",
    ) -> Awaitable[Started]:
        return self.submit(
            lambda db: tasks.start_owned(
                db,
                workflow_id,
                version_hash,
                input_json,
                idempotency_key,
                owner,
                lease_ms,
                streamed,
                held_task_id,
                output_json,
            )
        )

    def list_executions(
        self,
        workflow_id: str,
        status: str,
        limit: int,
        *,
        key_prefix: str = "",
        before: str = "",
        with_nodes: bool = False,
    ) -> Awaitable[list[Execution]]:
        return self.submit(
            lambda db: executions.list_executions(
                db, workflow_id, status, limit, key_prefix=key_prefix, before=before, with_nodes=with_nodes
            )
        )

    def output_bytes(self, execution_id: str) -> Awaitable[int]:
        return self.submit(lambda db: executions.output_bytes(db, execution_id))

    def cancel_execution(self, execution_id: str) -> Awaitable[Changed]:
        return self.submit(lambda db: executions.cancel_execution(db, execution_id))

    def claim(
        self,
        worker_id: str,
        version_hashes: tuple[str, ...],
        max_bytes: int,
        lease_ms: int,
        streamed: bool,
        unanswered: str = "",
    ) -> Awaitable[Claim]:
        return self.submit(
            lambda db: tasks.claim(db, worker_id, version_hashes, max_bytes, lease_ms, streamed, unanswered)
        )

    def complete_task(self, task_id: str, output_json: str) -> Awaitable[Changed]:
        return self.submit(lambda db: tasks.complete_task(db, task_id, output_json))

    def fail_task(self, task_id: str, error: str, final: bool) -> Awaitable[Changed]:
        return self.submit(lambda db: tasks.fail_task(db, task_id, error, final))

    def release(self, task_id: str, reason: str) -> Awaitable[Changed]:
        return self.submit(lambda db: tasks.release(db, task_id, reason))

    def renew(self, worker_id: str, task_ids: tuple[str, ...], lease_ms: int) -> Awaitable[None]:
        return self.submit(lambda db: leases.renew(db, worker_id, task_ids, lease_ms))

    def disconnect(self, worker_id: str, grace_ms: int) -> Awaitable[None]:
        return self.submit(lambda db: leases.disconnect(db, worker_id, grace_ms))

    def restart(self, grace_ms: int, unstreamed_ms: int) -> Awaitable[None]:
        return self.submit(lambda db: leases.restart(db, grace_ms, unstreamed_ms))

    def sweep(self, since_ms: int) -> Awaitable[Swept]:
        return self.submit(lambda db: leases.sweep(db, since_ms))
