"""A declared tool as AutoGen sees it: a call goes to Nexum, a worker runs it, the recorded result comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from autogen_core import CancellationToken
from autogen_core.tools import BaseTool
from pydantic import BaseModel

from durable_autogen.record.events import WorkerResult
from durable_autogen.worker_calls import call_notes, call_scope
from submit_task import Origin, Session, ToolResult
from support.tools import Tool


class DurableTool(BaseTool[BaseModel, BaseModel]):
    """One tool of one session. `on_result` is called when a result is recorded and before AutoGen gets it."""

    def __init__(
        self,
        declared: Tool,
        session: Session,
        *,
        timeout: float = 300,
        on_result: Callable[[ToolResult], None] | None = None,
    ) -> None:
        # AutoGen's annotations say BaseModel, its FunctionTool passes plain types, and so do we.
        text: type[Any] = str
        super().__init__(declared.arguments, text, declared.name, declared.description)
        self._session = session
        self._timeout = timeout
        self._on_result = on_result

    async def run_json(
        self, args: Mapping[str, Any], cancellation_token: CancellationToken, call_id: str | None = None
    ) -> str:
        """Submit the arguments as the model gave them: the worker checks them, and they are the call's identity."""
        notes = call_notes.get()
        try:
            result = await self._session.call(self.name, args, timeout=self._timeout, scope=call_scope.get())
        except BrokenPipeError as error:
            if notes is not None:
                notes.stop = error
            raise
        except asyncio.CancelledError as error:
            # AutoGen 0.7.5 waits for ever for a tool that ends as cancelled.
            raise RuntimeError(f"the wait for {self.name} was cancelled; the call itself continues") from error
        if notes is not None:
            notes.worker = WorkerResult(execution_id=result.execution_id, was_recorded=result.origin is Origin.CACHED)
        if self._on_result is not None:
            self._on_result(result)
        return result.text

    def replayed(self, text: str, worker: WorkerResult) -> str:
        """Take the recorded result; return the line that tells of it."""
        if self._on_result is not None:
            self._on_result(ToolResult(text, Origin.CACHED, worker.execution_id))
        return f"[Nexum] {worker.execution_id[:16]}... ({self.name}) already COMPLETED (cached) ✓"

    async def run(self, args: BaseModel, cancellation_token: CancellationToken) -> Any:
        """Run it for callers that validate first."""
        return await self.run_json(args.model_dump(exclude_unset=True), cancellation_token)
