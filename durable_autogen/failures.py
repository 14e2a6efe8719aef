"""What a call raised: made ordinary, recorded, and raised again."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

T = TypeVar("T")


class RecordedFailure(Exception):
    """A failure on record whose class this program has not loaded; its text is the same."""


class Failure(BaseModel):
    """An exception, as far as JSON can hold it."""

    model_config = ConfigDict(frozen=True)

    module: str
    name: str
    text: str
    attributes: dict[str, str | int | float | bool | None] = {}

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """As it is recorded."""
        plain = {
            name: value
            for name, value in vars(error).items()
            if not name.startswith("__") and (value is None or isinstance(value, (str, int, float, bool)))
        }
        kind = type(error)
        return cls(module=kind.__module__, name=kind.__qualname__, text=str(error), attributes=plain)

    def again(self) -> Exception:
        """An exception of the same class, text and plain attributes, without what its constructor would do."""
        found: Any = sys.modules.get(self.module)
        for part in self.name.split("."):
            found = getattr(found, part, None)
        if not (isinstance(found, type) and issubclass(found, Exception)):
            return RecordedFailure(self.text)
        try:
            error = found.__new__(found)
            error.args = (self.text,)
            vars(error).update(self.attributes)
            same = str(error) == self.text
        except Exception:  # noqa: BLE001 - a class that needs its constructor
            same = False
        return error if same else RecordedFailure(self.text)


def is_in(failure: Failure, error: BaseException) -> bool:
    """Whether the error came from that failure: AutoGen passes its text on, others the exception itself."""
    seen: BaseException | None = error
    words = failure.text or failure.name
    while seen is not None:
        if words in str(seen) or type(seen).__qualname__ == words:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


async def ordinary(call: Awaitable[T], name: str) -> T:
    """Await it; whatever ends it is an ordinary error, unless it is this task that is being cancelled.

    AutoGen waits for ever for a tool that ends as cancelled, and SystemExit and its like would end the event loop.
    """

    async def contained() -> T:
        try:
            return await call
        except (Exception, asyncio.CancelledError):
            raise
        except BaseException as error:
            raise RuntimeError(f"{name} ended with {type(error).__name__}: {error}") from error

    running = asyncio.ensure_future(contained())
    try:
        await asyncio.wait({running})
    except asyncio.CancelledError:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        raise
    if running.cancelled():
        raise RuntimeError(f"{name} ended with CancelledError")
    return running.result()
