"""The result of a transition that was submitted to a store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")


class Submitted(Generic[T]):
    """A submitted transition. Await it to get the transition's result. Several callers may await it.

    If a caller is cancelled, the transition runs all the same, and the other callers get its result.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._callers: list[asyncio.Future[None]] = []
        """A future for each caller that waits, so that the cancellation of one caller doesn't cancel the others."""
        self._effects: list[Callable[[T], None]] = []
        self._outcome: T | BaseException | None = None
        self._is_settled = False

    def when_stored(self, effect: Callable[[T], None]) -> None:
        """Call `effect` with the result when it is stored: before a caller continues, and even if no caller is left.

        If the transition fails, `effect` is not called. Call this right after the submission.
        """
        self._effects.append(effect)

    @property
    def is_abandoned(self) -> bool:
        """Whether callers have awaited the result, and all of them were cancelled."""
        return bool(self._callers) and all(caller.cancelled() for caller in self._callers)

    def settle(self, outcome: T | BaseException) -> None:
        """Give the callers the transition's result, or its error."""
        self._outcome, self._is_settled = outcome, True
        for caller in self._callers:
            if not caller.done():
                caller.set_result(None)
        if isinstance(outcome, BaseException):
            return
        for effect in self._effects:
            try:
                effect(outcome)
            except Exception as error:  # noqa: BLE001 - the effects of other transitions must follow
                what = "a stored transition could not be acted on"
                self._loop.call_exception_handler({"message": what, "exception": error})

    def __await__(self) -> Generator[Any, None, T]:
        if not self._is_settled:
            caller = self._loop.create_future()
            self._callers.append(caller)
            yield from caller
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return cast(T, self._outcome)
