"""Choose the session of a demo run, announce the session, and look up its recorded question."""

from __future__ import annotations

import hashlib
import logging
import time

from nexum_engine.report import age
from support.console import say
from support.models import ModelChoice
from support.session_file import SessionFile


def derived_session_id(question: str, model: ModelChoice, *, team: bool) -> str:
    """Return the session id that is derived from the question, the model, and whether a team answers."""
    kind = "\nteam" if team else ""
    return hashlib.sha256(f"{question}\n{model.slug}{kind}".encode()).hexdigest()[:12]


def announce_session(session_id: str) -> None:
    """Print whether the session is new or continues an earlier run."""
    record = SessionFile(session_id).load()
    if record is None:
        say(f"[demo] Session: {session_id} (new; continue it with --session-id {session_id})")
    else:
        begun = age(round((time.time() - record.created_at) * 1000))
        say(f"[demo] Session: {session_id}, begun {begun}: continuing it (--new-session starts afresh)")


async def recorded_question(session_id: str, question: str, fork_of: str | None, nexum: str, *, default: str) -> str:
    """Return the session's recorded question, or `default`. If `fork_of` names a session, first fork that session."""
    from durable_autogen import fork_session, fork_source, question_of
    from nexum_engine.client import NexumClient

    async with NexumClient(nexum) as client:
        if fork_of:
            source, count = fork_source(fork_of)
            await fork_session(client, source, count, session_id, question)
            said = f"; the user says: {question}" if question else ""
            say(f"[demo] Forked from the first {count} call(s) of {source}{said}")
        recorded = await question_of(client, session_id)
    why = "Forked" if question else "No question given"
    whose = "this demo" if recorded is None else "the session"
    say(f"[demo] {why}; asking {whose}'s own: {recorded or default}")
    return recorded or default


def count_only_model_calls(record: logging.LogRecord) -> bool:
    """Reword a session's counts, as a filter of its logger: leave out the tool calls, which the demo counts itself.

    The two counts differ after a crash. A result that only the worker had recorded is live for the session, and cached
    for the demo.
    """
    live, replayed = getattr(record, "live", None), getattr(record, "replayed", None)
    if live is not None and replayed is not None:
        counts = (
            f"{count.get('model calls', 0)} {what} ({count.get('tokens', 0):,} tokens)"
            for count, what in ((live, "executed"), (replayed, "cached"))
        )
        record.msg, record.args = f"Model calls: {', '.join(counts)}", ()
    return True
