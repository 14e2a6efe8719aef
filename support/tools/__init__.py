"""The tools that an agent can call, each declared once. Agent and worker both read this list.

To add a third tool, declare a function:

    @tool(time_limit=10)
    def word_count(text: str) -> str:
        \"\"\"Count the words of a text.\"\"\"
        return str(len(text.split()))

The model sees the name, the docstring and the type hints. Arguments are checked against the hints, and converted where
nothing is lost: "5" is 5. A parameter `*, call: ToolContext` is hidden from the model: it holds the call's idempotency
key, its attempt and the web. Raise `FinalError` for an error that a retry can't fix. Any other error is retried, up to
four attempts in all.
"""

from __future__ import annotations

import json
from typing import Annotated

from pydantic import Field

from nexum_engine.errors import FinalError
from support.tools.declare import NO_POLICY, TOOLS, Tool, ToolContext, ToolTimeout, find_tool, tool
from support.tools.web import Page, SearchHit, Web, WebError
from support.tools.web.converter import Converters
from support.tools.web.url import checked_url

__all__ = [
    "NO_POLICY",
    "TOOLS",
    "Page",
    "SearchHit",
    "Tool",
    "ToolContext",
    "ToolTimeout",
    "Web",
    "WebError",
    "find_tool",
    "tool",
    "visit_webpage",
    "web_search",
]


@tool(time_limit=60)
def web_search(
    query: str,
    max_results: Annotated[int, Field(ge=1, le=20, description="How many results to return at most")] = 5,
    *,
    call: ToolContext,
) -> str:
    """Search the web with DuckDuckGo.

    Returns a JSON list of results, each with title, href (the address) and body (an excerpt). Read a promising result
    with visit_webpage before relying on it.
    """
    if not query.strip():
        raise FinalError("web_search: the query is empty; give the words to search for")
    hits = call.web.search(query.strip(), max_results)
    return json.dumps([hit.model_dump() for hit in hits[:max_results]], ensure_ascii=False)


_CONVERTERS = Converters()


@tool(time_limit=90)  # 30 s to fetch the page, 20 s to wait for a converter, 30 s to convert
def visit_webpage(url: str, *, call: ToolContext) -> str:
    """Read a public web page and return its content as Markdown, without navigation and scripts.

    Give a full http:// or https:// address, for instance the href of a search result. Long pages are cut, with a note
    at the end that says so.
    """
    return _CONVERTERS.convert(call.web.fetch(checked_url(url)))
