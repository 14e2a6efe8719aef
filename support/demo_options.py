"""The options of demo.py."""

from __future__ import annotations

import argparse
from contextlib import suppress

from nexum_engine.options import count
from support.options import add_nexum_option

MAX_DOLLARS = 1_000_000


def build_parser(description: str, question: str) -> argparse.ArgumentParser:
    """Return the parser of the demo's command line. `question` is the default question."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Models: GEMINI_API_KEY, OPENAI_API_KEY or ANTHROPIC_API_KEY chooses the vendor, and NEXUM_MODEL the "
        "model. To use any OpenAI-compatible server, set OPENAI_BASE_URL and NEXUM_MODEL. Without a key, the demo "
        "answers offline.",
    )
    parser.add_argument("question", nargs="?", help=f"default: {question}")
    parser.add_argument("--team", action="store_true", help="ask two researchers at once, and a writer after them")
    session = parser.add_mutually_exclusive_group()
    session.add_argument(
        "--session-id",
        metavar="ID",
        help="continue or begin this session (default: an id from question, model and --team)",
    )
    session.add_argument("--new-session", action="store_true", help="begin a session with a new id")
    parser.add_argument(
        "--crash-after-step", type=count(), metavar="N", help="kill this process after N tool calls that it executed"
    )
    parser.add_argument(
        "--on-drift",
        choices=("stop", "continue"),
        default="stop",
        help="if the session has recorded another question, model or program: stop (the default), or continue live",
    )
    parser.add_argument(
        "--budget",
        type=_dollars,
        metavar="USD",
        help="what the models may cost; at the limit, the session waits (python -m durable_autogen budget)",
    )
    parser.add_argument("--sessions", action="store_true", help="list the sessions (python -m durable_autogen ls)")
    parser.add_argument(
        "--fork",
        metavar="SESSION@N",
        help="begin --session-id with the first N calls of SESSION (python -m durable_autogen show SESSION); "
        "a question is added as the user's next message",
    )
    parser.add_argument(
        "--ask",
        action="store_true",
        help="ask before each visit_webpage: in this terminal, or decide with python -m nexum_engine approve, even "
        "while the demo doesn't run",
    )
    parser.add_argument("--offline", action="store_true", help="answer without a model key and without the web")
    add_nexum_option(parser, embedded=True)
    return parser


def _dollars(text: str) -> float:
    with suppress(ValueError):
        if 0 <= (dollars := float(text)) <= MAX_DOLLARS:  # not true for "nan"
            return dollars
    raise argparse.ArgumentTypeError(f"{text!r} is not an amount of US dollars, such as 2.00")
