"""Run a declared tool for a step's agent, in the step's process. The server records the step, not the tool call."""

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
    """An AutoGen tool that runs a declared tool.

    AutoGen swallows a tool's errors. So the tool also adds each error that isn't final to `transient_failures`.
    """

    def __init__(self, declared: Tool, context: ToolContext, transient_failures: list[str]) -> None:
        # AutoGen annotates the return type as a BaseModel, but AutoGen's own FunctionTool also passes plain types.
        text: type[Any] = str
        super().__init__(declared.arguments, text, declared.name, declared.description)
        self._declared = declared
        self._context = context
        self._transient_failures = transient_failures

    async def run_json(
        self, args: Mapping[str, Any], cancellation_token: CancellationToken, call_id: str | None = None
    ) -> str:
        """Run the tool with the arguments that the model gave."""
        try:
            return await self._declared.run(args, self._context)
        except FinalError:
            raise
        except asyncio.CancelledError as error:
            # Raise an error other than CancelledError: AutoGen 0.7.5 would wait forever for a cancelled tool.
            raise RuntimeError(f"{self.name} was cancelled") from error
        except Exception as error:
            self._transient_failures.append(f"{self.name}: {error}")
            raise

    async def run(self, args: BaseModel, cancellation_token: CancellationToken) -> Any:
        """Run the tool with validated arguments."""
        return await self.run_json(args.model_dump(exclude_unset=True), cancellation_token)
