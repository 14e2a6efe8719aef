"""A process that does the work of the executions it starts: it owns them, and no worker is ever handed their nodes.

    async with Owner(client) as owner:
        owned = await owner.start(WORKFLOW, {"n": 1}, idempotency_key="n-1")
        if owned.task is not None:                      # else it ended before: owned.ended has its result
            await owner.complete(owned.task, {"done": True})

What an owner started and did not finish when it died, the next one to start the same key takes over.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
from pydantic import BaseModel

from nexum_engine import jsontext
from nexum_engine.client import NexumClient, Started
from nexum_engine.errors import ServerError, WorkflowNotFound
from nexum_engine.model import Task
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.workflow import Workflow

CONNECT_TIMEOUT = 30.0  # seconds
FIRST_ACK_TIMEOUT = 3.0  # seconds until a stream that says nothing is opened again
RECONNECT_DELAY = 0.1  # seconds
FIRST_BEAT_INTERVAL = 10.0  # seconds, until the server names its lease
PATIENCE = 300.0  # seconds to try while no server answers

logger = logging.getLogger(__name__)


class Owner:
    """Connected for the length of an `async with`. Raises ServerError if the server knows no owners."""

    def __init__(self, client: NexumClient) -> None:
        self.owner_id = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._client = client
        self._held: set[str] = set()
        self._connected = asyncio.Event()
        self._beat_now = asyncio.Event()
        self._beat_interval = FIRST_BEAT_INTERVAL
        self._closing = False
        self._stream: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Owner:
        self._stream = asyncio.create_task(self._stay_connected(), name="owner stream")
        connecting = asyncio.ensure_future(self._connected.wait())
        try:
            await asyncio.wait({self._stream, connecting}, timeout=CONNECT_TIMEOUT, return_when="FIRST_COMPLETED")
            if self._stream.done():
                self._stream.result()
            if not self._connected.is_set():
                raise ServerError(f"no Nexum server on {self._client.address} took up the connection of an owner")
        except BaseException:
            await self.__aexit__()
            raise
        finally:
            connecting.cancel()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        self._beat_now.set()
        if self._stream is not None:
            self._stream.cancel()
            await asyncio.gather(self._stream, return_exceptions=True)

    async def start(self, workflow: Workflow, input: BaseModel | Mapping[str, Any], *, idempotency_key: str) -> Started:
        """Start the key's execution as its owner, take over what a dead owner left of it, or find its result.

        Raises Conflict, which names the owner, while another one has it.
        """

        async def start() -> Started:
            return await self._client.start_execution(
                workflow, input, idempotency_key=idempotency_key, owner=self.owner_id, patience=PATIENCE
            )

        try:
            started = await start()
        except WorkflowNotFound:
            await self._client.register_workflow(workflow, patience=PATIENCE)
            started = await start()
        if started.task is not None:
            self._held.add(started.task.task_id)
            self._beat_now.set()
        elif not started.status.ended:
            # It ignored what it doesn't know and has queued the node for workers.
            await self._client.cancel_execution(started.execution_id)
            raise ServerError(
                f"the server on {self._client.address} knows no owned executions: use this project's own server"
            )
        return started

    async def complete(self, task: Task, output: BaseModel | Mapping[str, Any]) -> None:
        """Record the result. Raises StaleTask if another owner has taken over."""
        value = output.model_dump(mode="json") if isinstance(output, BaseModel) else output
        await self._client.complete_task(task.task_id, jsontext.dump(value, "the result"), patience=PATIENCE)
        self._held.discard(task.task_id)

    async def fail(self, task: Task, error: str, *, patience: float = PATIENCE) -> None:
        """Record that it has no result; the next start of the key begins anew."""
        self._held.discard(task.task_id)
        await self._client.fail_task(task.task_id, error, final=True, patience=patience)

    async def _stay_connected(self) -> None:
        while True:
            answered = asyncio.Event()
            beating = asyncio.create_task(self._beat(answered), name="owner beats")
            first = asyncio.ensure_future(answered.wait())
            try:
                await asyncio.wait({beating, first}, timeout=FIRST_ACK_TIMEOUT, return_when="FIRST_COMPLETED")
                if answered.is_set():
                    await asyncio.wait({beating})
                if beating.done():
                    beating.result()
                else:
                    logger.warning("the server did not answer the owner's first beat: connecting again")
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    raise ServerError(
                        f"the server on {self._client.address} knows no owned executions: use this project's own server"
                    ) from error
            finally:
                first.cancel()
                beating.cancel()
                await asyncio.gather(beating, return_exceptions=True)
            await asyncio.sleep(RECONNECT_DELAY)

    async def _beat(self, answered: asyncio.Event) -> None:
        async for ack in self._client.worker_stream(self._beats()):
            self._beat_interval = ack.lease_ms / 3000
            self._connected.set()
            answered.set()

    async def _beats(self) -> AsyncIterator[pb.WorkerBeat]:
        while not self._closing:
            self._beat_now.clear()
            yield pb.WorkerBeat(worker_id=self.owner_id, task_ids=sorted(self._held))
            try:
                await asyncio.wait_for(self._beat_now.wait(), self._beat_interval)
            except (asyncio.TimeoutError, TimeoutError):
                continue
