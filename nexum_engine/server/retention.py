"""Retention in a running server: pruning in small steps beside other calls, and the option `--keep`."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict, replace

from nexum_engine.errors import StoreUnavailable
from nexum_engine.records import Pruned
from nexum_engine.store import Store, retention
from nexum_engine.store.retention import Verdicts

REST, IDLE_REST = 9, 1
"""How long pruning rests after a transaction, as a multiple of the transaction's duration.

The first number is for a server that gets other calls meanwhile, the second for a server that gets none.
"""
PART_SECONDS = 1.0
"""How long one call of Prune works. This time must be short, because clients wait only 10 s for an answer."""
MAX_REST = 4.0
"""The longest rest in seconds because of other calls: a transaction may take long, and the client waits meanwhile."""
MAX_VERDICTS = 10_000
"""How many verdicts are kept from one call of Prune to the next."""
INTERVAL = 3600.0
"""With `--keep`, the longest time in seconds between two prunings."""
QUICK_BYTES, REQUESTED_BYTES = 32_000_000, 1_000_000_000
"""The database is compacted only if at most this many bytes are in use.

The first number is for compactions that the server makes on its own, the second for those that `--compact` asks for.
During a compaction, the server answers no calls. A compaction takes about a second for each 100 MB.
"""

logger = logging.getLogger(__name__)


class Retention:
    """The pruning of a server's database."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._keeping: asyncio.Task[None] | None = None
        self._unfinished: tuple[int, bool, int | None] | None = None
        """The latest call that left something to prune: its `older_than_ms` and `dry_run`, and where to continue."""
        self._verdicts: Verdicts = {}
        """The verdicts of that call."""

    def start(self, keep_ms: int) -> None:
        """Delete, now and from time to time, the executions that ended more than `keep_ms` ago."""
        self._keeping = asyncio.create_task(self._keep(keep_ms), name="retention")

    async def stop(self) -> None:
        """Stop deleting."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)

    async def prune(
        self, older_than_ms: int, *, session: str = "", after: int = 0, dry_run: bool = False, compact: bool = False
    ) -> Pruned:
        """Prune for about PART_SECONDS. When nothing is left to prune, release free space to the disk."""
        loop = asyncio.get_running_loop()
        end = loop.time() + PART_SECONDS
        total = Pruned()
        verdicts = self._verdicts if self._unfinished == (older_than_ms, dry_run, after) else {}
        while True:
            begun, submitted = loop.time(), self._store.submitted
            total += await self._store.run_alone(
                retention.prune, older_than_ms, session=session, after=after, dry_run=dry_run, verdicts=verdicts
            )
            if total.after is None or loop.time() >= end:
                break
            after = total.after
            took = loop.time() - begun
            await asyncio.sleep(IDLE_REST * took)
            if self._store.submitted > submitted + 1:
                await asyncio.sleep(min((REST - IDLE_REST) * took, MAX_REST))
        self._unfinished, self._verdicts = None, {}
        if total.after is not None and len(verdicts) <= MAX_VERDICTS:
            # If many keys have the same beginning, it takes long to find out whether they belong to a session.
            self._unfinished, self._verdicts = (older_than_ms, dry_run, total.after), verdicts
        if total.after is not None or dry_run:
            return total
        max_bytes = REQUESTED_BYTES if compact else QUICK_BYTES
        return replace(total, **asdict(await self._store.compact(max_bytes=max_bytes, always=compact)))

    async def _keep(self, keep_ms: int) -> None:
        while True:
            try:
                pruned = await self.prune(keep_ms)
                while pruned.after is not None:
                    pruned += await self.prune(keep_ms, after=pruned.after)
                if pruned.executions:
                    logger.info("pruned %d executions", pruned.executions)
            except Exception as error:
                if self._store.failed.done():
                    return  # the server stops, and says why
                fault = None if isinstance(error, StoreUnavailable) else error
                logger.warning("could not delete old executions (--keep); retrying later", exc_info=fault)
            await asyncio.sleep(min(INTERVAL, max(keep_ms / 1000 / 10, 1)))
