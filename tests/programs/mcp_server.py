"""An MCP server with a tool, a prompt and a resource. It logs their calls: `mcp_server.py LOG [TRANSPORT PORT]`."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

from mcp.server.fastmcp import FastMCP


def note(text: str, copies: int = 1) -> str:
    """Write the text down."""
    with Path(sys.argv[1]).open("a", encoding="utf-8") as log:
        log.write(f"{text}\n" * copies)
    if text == "bad":
        raise ValueError(f"refused {uuid.uuid4()}")
    return f"noted {text} {uuid.uuid4()}"


def greeting(who: str) -> str:
    """Greet."""
    return note(f"greeting-{who}")


def today() -> str:
    """Return today's note."""
    return note("today")


if __name__ == "__main__":
    server = FastMCP("tests")
    server.add_tool(note)
    server.prompt()(greeting)
    server.resource("note://today")(today)
    if len(sys.argv) > 2:
        server.settings.port = int(sys.argv[3])
        server.run(transport="sse" if sys.argv[2] == "sse" else "streamable-http")
    else:
        server.run()
