"""What a call raised: made ordinary, recorded, and raised again."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
from collections.abc import Awaitable
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

T = TypeVar("T")

MAX_TEXT = 20_000  # characters; a failure is recorded, whatever it has to say

Plain = str | int | float | bool | None


class RecordedFailure(Exception):
    """A failure on record whose class this program has not loaded, or can't make; its name and text are the same."""


class Failure(BaseModel):
    """An exception, as far as JSON can hold it."""

    model_config = ConfigDict(frozen=True)

    module: str
    name: str
    text: str
    args: list[Plain] | None = None
    """What it was made with, if all of that is plain."""
    attributes: dict[str, Plain] = {}

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Capture an exception for the record."""
        kind = type(error)
        args = [_plain(one) for one in _made_with(error)]
        return cls(
            module=kind.__module__,
            name=kind.__qualname__,
            text=_text(error),
            args=None if _NOT_PLAIN in args else args,
            attributes={name: one for name, value in vars(error).items() if (one := _plain(value)) is not _NOT_PLAIN},
        )

    def again(self) -> Exception:
        """An exception of the same class with the same text, arguments and attributes, as far as they are plain.

        Where the class can't be made from its arguments, it is one of a class derived from it, or from the next of its
        bases that can be.
        """
        kind: Any = sys.modules.get(self.module)
        for part in self.name.split("."):
            kind = getattr(kind, part, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            if self.args is not None and (error := self._made_from_args(kind)) is not None:
                return error
            if (error := self._made_without_its_constructor(kind)) is not None:
                return error
            for base in kind.__mro__:
                if issubclass(base, Exception) and (error := self._derived_from(base)) is not None:
                    return error
        return self._derived_from(RecordedFailure) or RecordedFailure(self.text)

    def _made_from_args(self, kind: type[Exception]) -> Exception | None:
        with contextlib.suppress(Exception):  # a constructor of its own
            error = kind(*self.args or ())
            vars(error).update(self.attributes)
            if type(error) is kind and _text(error) == self.text:
                return error
        return None

    def _made_without_its_constructor(self, kind: type[Exception]) -> Exception | None:
        with contextlib.suppress(Exception):  # a class that holds more than Python's part of it
            error = kind.__new__(kind)
            error.args = (self.text,) if self.args is None else tuple(self.args)
            vars(error).update(self.attributes)
            if type(error) is kind and _text(error) == self.text:
                return error
        return None

    def _derived_from(self, base: type[Exception]) -> Exception | None:
        text = self.text
        body = {"__module__": self.module, "__qualname__": self.name, "__str__": lambda _: text}
        with contextlib.suppress(Exception):  # a class that nothing may be derived from, or that needs its arguments
            kind: Any = type(self.name.rpartition(".")[2], (base,), body)
            error: Exception = kind.__new__(kind)
            error.args = (text,) if self.args is None else tuple(self.args)
            vars(error).update(self.attributes)
            return error
        return None


_NOT_PLAIN: Any = object()


def _made_with(error: Exception) -> tuple[Any, ...]:
    """Its constructor's arguments: `__reduce__` knows also those that a class does not keep in `args`."""
    with contextlib.suppress(Exception):
        made = error.__reduce__()
        if isinstance(made, tuple) and made[0] is type(error) and isinstance(made[1], tuple):
            return made[1]
    return error.args


def _plain(value: object) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return _NOT_PLAIN
    if isinstance(value, str):
        return value if len(value) <= MAX_TEXT else _NOT_PLAIN
    return value if value is None or isinstance(value, (bool, int, float)) else _NOT_PLAIN


def _text(error: Exception) -> str:
    try:
        text = str(error)
    except Exception as unsaid:  # noqa: BLE001 - its own
        text = f"(its text can't be had: {type(unsaid).__name__})"
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} [cut]"


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
            raise made_ordinary(error, name) from error

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


def made_ordinary(error: BaseException, name: str) -> RuntimeError:
    """What stands in for an exception that would leave AutoGen waiting, or end the event loop."""
    return RuntimeError(f"{name} ended with {type(error).__name__}: {error}")


def is_being_cancelled() -> bool:
    """Whether somebody is cancelling this task, so that a CancelledError in it is theirs."""
    task = asyncio.current_task()
    # From Python 3.11 on it can be told; before, an ordinary error stands in for the cancellation.
    return task is not None and bool(getattr(task, "cancelling", lambda: 0)())
