"""The waits of a run for a person's decisions: about calls of tools, effects and the budget."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from durable_autogen.record.journal import Journal


class Questions:
    """The questions to people for whose decisions calls of a run wait."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._waits: list[tuple[str, str]] = []
        """The present waits: the address of the call that waits, and a line about what it waits for."""
        self._since = 0.0
        """When the first of these waits began, by time.monotonic()."""
        self._earlier_seconds = 0.0
        """The total length of the earlier waits."""
        self.another = asyncio.Event()
        """Set when another call begins to wait."""

    @contextmanager
    def waiting(self, address: str, what: str) -> Iterator[None]:
        """For the length of a `with`, note that the call at `address` waits for a person's decision; log `what`.

        `what` says what the call waits for and how to decide. If the run may park, it ends with Parked as soon as no
        other call of the run is in progress. The wait doesn't count as active time of the session.
        """
        self._journal.may_leave_open = True  # a tool may have asked, about a call of a worker
        if all(what != other for _, other in self._waits):  # several calls may wait for one decision
            self._journal.log.warning("%s", what)
        if not self._waits:
            self._since = time.monotonic()
        self._waits.append((address, what))
        self.another.set()
        try:
            yield
        finally:
            self._waits.remove((address, what))
            if not self._waits:
                self._earlier_seconds += time.monotonic() - self._since

    @property
    def seconds(self) -> float:
        """How long calls have waited. Waits at the same time count once."""
        return self._earlier_seconds + (time.monotonic() - self._since if self._waits else 0)

    @property
    def addresses(self) -> set[str]:
        """The addresses of the calls that wait now."""
        return {address for address, _ in self._waits}

    @property
    def lines(self) -> str:
        """What these calls wait for, and how to decide."""
        return "; ".join(dict.fromkeys(what for _, what in self._waits))
