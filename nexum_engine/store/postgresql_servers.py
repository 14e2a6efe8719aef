"""The other servers on a PostgreSQL database: which of them are alive, and the news that servers send each other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
from psycopg import sql

from nexum_engine.clock import Clock
from nexum_engine.event_loop import call_in
from nexum_engine.store.postgresql_connection import Connection, connect, line_of, shut_down
from nexum_engine.store.postgresql_queries import dialect
from nexum_engine.store.results import Changes, News

logger = logging.getLogger(__name__)

BEAT_SECONDS, ALIVE_SECONDS = 1.0, 3.0
"""How often a server says that it is alive, and how long it then counts as alive.

Each time, the server also looks for changes of other servers that it has missed.
"""
RECONNECT_PAUSE = 0.1
"""How many seconds a server waits before it connects again. It is short: until a server whose connections were cut has
connected again, a server that starts takes it for ended, and hands out its workers' tasks again."""
NEWS_SECONDS = 60.0
"""How long a server still sends news after the last sign that another server is alive."""
TAKEN_OVER_GRACE_MS = 1500
"""How much time the workers of a dead server get to connect to another server."""
MAX_PAYLOAD = 7900  # bytes: PostgreSQL allows 8000


class OtherServers:
    """A thread with its own connection. It tells other servers that this server is alive, and receives their news."""

    def __init__(
        self,
        url: str,
        server: int,
        channel: str,
        clock: Clock,
        *,
        on_news: Callable[[News], object],
        on_alive: Callable[[], object],
        on_gap: Callable[[], object],
    ) -> None:
        """Start the thread.

        On the event loop, the thread calls `on_news` with news, and `on_gap` if it may have missed earlier news. In the
        thread itself, it calls `on_alive` whenever there is a sign that another server is alive.
        """
        self._url, self._server, self._channel, self._clock = url, server, channel, clock
        self._on_news, self._on_alive, self._on_gap = on_news, on_alive, on_gap
        self._queries = dialect()
        self._loop = asyncio.get_running_loop()
        self._stopping = threading.Event()
        self._connection: Connection | None = None
        self._thread = threading.Thread(target=self._run, name="nexum-news", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Tell the other servers that this server ends, and end the thread."""
        self._stopping.set()
        with contextlib.suppress(psycopg.Error), connect(self._url) as connection:
            send(connection, self._channel, self._server, self._clock.now_ms(), News())  # this wakes the thread
        self._thread.join(2 * BEAT_SECONDS)
        if (waiting := self._connection) is not None:  # PostgreSQL doesn't answer
            shut_down(waiting)
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                with connect(self._url) as self._connection:
                    self._listen(self._connection)
            except psycopg.Error as error:
                logger.debug("no news from other servers: %s", line_of(error))
                self._stopping.wait(RECONNECT_PAUSE)
            finally:
                self._connection = None

    def _listen(self, connection: Connection) -> None:
        queries, me = self._queries, {"server": self._server, "seconds": ALIVE_SECONDS}
        hold_server(connection, self._server)
        connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(self._channel)))
        # Send empty news: from now on the other servers send their news, even before they next count the live servers.
        send(connection, self._channel, self._server, self._clock.now_ms(), News())
        call_in(self._loop, self._on_gap)
        beaten = steady_since = -ALIVE_SECONDS
        while not self._stopping.is_set():
            if time.monotonic() >= beaten + BEAT_SECONDS:
                previous, beaten = beaten, time.monotonic()
                row = connection.execute(queries["beat"], me).fetchone()
                if row is not None and row["others"]:
                    self._on_alive()
                now_ms = self._clock.now_ms()
                # If the database didn't answer for a while, no server could say that it is alive. So give the other
                # servers the time to say so, before they count as dead.
                if time.monotonic() >= previous + ALIVE_SECONDS:
                    steady_since = time.monotonic()
                if time.monotonic() >= steady_since + ALIVE_SECONDS:
                    connection.execute(queries["take_over"], {"lease_expires_ms": now_ms + TAKEN_OVER_GRACE_MS})
                connection.execute(queries["forget_dead"])
                call_in(self._loop, self._on_news, News(due_ms=now_ms, anything=True))
            for note in connection.notifies(timeout=max(0.0, beaten + BEAT_SECONDS - time.monotonic()), stop_after=1):
                sender, sent_ms, news = _received(note.payload)
                if sender != self._server:
                    # Let the clock follow the sender's: a task that is due at the sender must be due here, too.
                    self._clock.follow(sent_ms, max(sent_ms, self._clock.now_ms()))
                    self._on_alive()
                    call_in(self._loop, self._on_news, news)
        connection.execute(queries["leave"], me)


def hold_server(connection: Connection, server: int) -> None:
    """Show the other servers that this server's process has not ended, for as long as the connection is open."""
    connection.execute(dialect()["hold_server"], {"server": server})


def channel_of(connection: Connection) -> str:
    """Return the name under which the servers of this schema send news."""
    row = connection.execute("SELECT current_schema() AS name").fetchone()
    return f"nexum_{'' if row is None else row['name']}"[:60]


def news_of(outcomes: list[Any]) -> News | None:
    """Return what the other servers must know of a transaction, or None if they need to know nothing."""
    changes = [one if isinstance(one, Changes) else getattr(one, "changed", None) for one in outcomes]
    # Leave out the ended items: few callers wait for them, and the other servers look for missed ends every second.
    found = [one for one in changes if isinstance(one, Changes) and (one.ready or one.ended or one.due_ms is not None)]
    if not found:
        return None
    due = [one.due_ms for one in found if one.due_ms is not None]
    return News(
        tuple(ready.version_hash for one in found for ready in one.ready),
        tuple(ended.execution_id for one in found for ended in one.ended),
        min(due, default=None),
    )


def send(connection: Connection, channel: str, server: int, now_ms: int, news: News) -> None:
    """Send news to the servers that listen. PostgreSQL delivers the news when the transaction is committed."""
    text = json.dumps([server, now_ms, news.ready, news.ended, news.due_ms])
    if len(text) > MAX_PAYLOAD:
        text = json.dumps([server, now_ms, [], [], None])
    connection.execute("SELECT pg_notify(%s, %s)", (channel, text))


def _received(payload: str) -> tuple[int, int, News]:
    """Return the number of the server that sent news, the server's time when it sent them, and the news."""
    sender, sent_ms, ready, ended, due_ms = json.loads(payload)
    return sender, sent_ms, News(tuple(ready), tuple(ended), due_ms, anything=not (ready or ended or due_ms))
