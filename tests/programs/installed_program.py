"""A durable run that needs only the installed package: `installed_program.py SESSION NEXUM`, in an empty folder.

Each call of its model adds a line to the file `calls`. The program prints the last message.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import (
    ChatCompletionClient,
    CreateResult,
    LLMMessage,
    ModelCapabilities,
    ModelInfo,
    RequestUsage,
)

from durable_autogen import run_durable


def count_call() -> int:
    """Add a line to the file `calls`; return its number of lines."""
    with Path("calls").open("a+") as file:
        file.write("called\n")
        file.seek(0)
        return len(file.readlines())


class Counting(ChatCompletionClient):
    """A model whose reply is the number of the call."""

    async def create(self, messages: Sequence[LLMMessage], **_: Any) -> CreateResult:
        return CreateResult(
            content=f"reply {count_call()}", finish_reason="stop", usage=self.actual_usage(), cached=False
        )

    async def create_stream(self, messages: Sequence[LLMMessage], **_: Any) -> AsyncGenerator[str | CreateResult, None]:
        yield await self.create(messages)

    async def close(self) -> None:
        pass

    def actual_usage(self) -> RequestUsage:
        return RequestUsage(prompt_tokens=1, completion_tokens=1)

    def total_usage(self) -> RequestUsage:
        return self.actual_usage()

    def count_tokens(self, messages: Sequence[LLMMessage], **_: Any) -> int:
        return 1

    def remaining_tokens(self, messages: Sequence[LLMMessage], **_: Any) -> int:
        return 1

    @property
    def capabilities(self) -> ModelCapabilities:
        return ModelCapabilities(vision=False, function_calling=False, json_output=False)

    @property
    def model_info(self) -> ModelInfo:
        return ModelInfo(
            vision=False, function_calling=False, json_output=False, structured_output=False, family="unknown"
        )


async def main(session: str, nexum: str) -> None:
    result = await run_durable(
        lambda: AssistantAgent("clerk", Counting()), task="Say something.", session_id=session, nexum=nexum
    )
    print(result.messages[-1].to_text())


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
