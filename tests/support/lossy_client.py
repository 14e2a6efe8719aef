"""A client that loses an answer, as if the connection broke after the server had sent the answer."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from nexum_engine.client import NexumClient
from nexum_engine.connection import Method
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.status import rpc_error

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class LossyClient(NexumClient):
    """A client that loses the first answer to a request of type `kind`. A poll's answer without a task is not lost."""

    def __init__(self, address: str, kind: type[Message]) -> None:
        super().__init__(address)
        self._kind = kind
        self.lost: list[Any] = []
        self._call = self._call_and_lose

    async def _call_and_lose(
        self, method: Method[Request, Answer], request: Request, *, wait: float = 0.0, patience: float = 0.0
    ) -> Answer:
        async def lose(call: Any, *args: Any, **options: Any) -> Any:
            answer = await call(*args, **options)
            is_empty = isinstance(answer, pb.PollResponse) and not answer.has_task
            if self.lost or is_empty or not isinstance(request, self._kind):
                return answer
            self.lost.append(answer)
            raise rpc_error(grpc.StatusCode.UNAVAILABLE, "the connection broke")

        losing: Any = lambda stub: partial(lose, method(stub))  # noqa: E731
        answer: Answer = await self.connection.call(losing, request, wait=wait, patience=patience)
        return answer
