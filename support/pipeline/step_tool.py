"""A declared tool inside a step: it runs here and now, because the step is what is recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from autogen_core import CancellationToken
from autogen_core.tools import BaseTool
from pydantic import BaseModel

from nexum_engine.errors import FinalError
from support.tools import Tool, ToolContext


class StepTool(BaseTool[BaseModel, BaseModel]):
    """`passing_failures` collects what went wrong and may go better in another attempt; AutoGen swallows errors."""

    def __init__(self, declared: Tool, context: ToolContext, passing_failures: list[str]) -> None:
        # AutoGen's annotations say BaseModel, its FunctionTool passes plain types, and so do we.
        text: type[Any] = str
        super().__init__(declared.arguments, text, declared.name, declared.description)
        self._declared = declared
        self._context = context
        self._passing_failures = passing_failures

    async def run_json(
        self, args: Mapping[str, Any], cancellation_token: CancellationToken, call_id: str | None = None
    ) -> str:
        """Run the tool on the arguments as the model gave them."""
        try:
            return await self._declared.run(args, self._context)
        except FinalError:
            raise
        except asyncio.CancelledError as error:
            # AutoGen 0.7.5 waits for ever for a tool that ends as cancelled.
            raise RuntimeError(f"{self.name} was cancelled") from error
        except Exception as error:
            self._passing_failures.append(f"{self.name}: {error}")
            raise

    async def run(self, args: BaseModel, cancellation_token: CancellationToken) -> Any:
        """For callers that validate first."""
        return await self.run_json(args.model_dump(exclude_unset=True), cancellation_token)
