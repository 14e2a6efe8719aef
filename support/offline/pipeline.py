"""The offline models of the pipeline's agents. Each replies by rules, in the form that the step's prompt requests.

The models read only the messages: the query, the tools' results, or the step's JSON.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from autogen_core import FunctionCall
from autogen_core.models import LLMMessage, UserMessage

from support.offline.model import OfflineModel, Turn
from support.offline.reading import best_passage, choose_sentences, coverage

QUOTES_OF_PAGE = 3  # quote at most this many sentences of one page
PASSAGE_LENGTH = 300  # if no sentence of a page matches the query, quote at most this many characters of the page
SUPPORTED = 0.5  # a quote supports a statement if it holds at least this share of the statement's content words


class OfflineResearcher(OfflineModel):
    """The researcher's model. It searches and reads as the demo's offline model does, but answers with claims."""

    def _answer(self, turn: Turn) -> str:
        claims: dict[str, dict[str, str]] = {}  # each claim by its statement, so that no statement comes twice
        for query, hits in turn.hits.items():
            for hit in hits:
                page = turn.pages.get(hit.href, "")
                quotes = choose_sentences(query, page, QUOTES_OF_PAGE, title=hit.title)
                if page and not quotes and not claims:
                    quotes = [best_passage(query, page, PASSAGE_LENGTH)]
                for quote in quotes:
                    statement = _uncited(quote)
                    claims.setdefault(statement, {"statement": statement, "url": hit.href, "quote": quote})
        note = "" if claims else self._not_covered(turn)
        return json.dumps({"claims": list(claims.values()), "note": note}, ensure_ascii=False)


class _Writer(OfflineModel):
    """A model without tools. It answers the JSON in the last message by a rule."""

    def __init__(self, rule: Callable[[Mapping[str, Any]], str]) -> None:
        super().__init__()
        self._rule = rule

    def _respond(self, messages: Sequence[LLMMessage], offered: set[str]) -> str | list[FunctionCall]:
        asked = next((one.content for one in reversed(messages) if isinstance(one, UserMessage)), "")
        return self._rule(json.loads(asked if isinstance(asked, str) else ""))


def pipeline_model(step: str, topics: Callable[[], Sequence[str]] = list) -> OfflineModel:
    """Return the model of a step's agent. The researcher lists the `topics` when no page covers a query."""
    if step == "research":
        return OfflineResearcher(topics)
    return _Writer({"validate": _judge, "summarize": _summarize, "report": _report}[step])


def _judge(asked: Mapping[str, Any]) -> str:
    """Return the verdicts. A quote supports a statement if the quote holds most of the statement's words."""
    verdicts = []
    for claim in asked["claims"]:
        supported = coverage(claim["statement"], claim["quote"]) >= SUPPORTED
        reason = "" if supported else "they share too few words"
        verdicts.append({"number": claim["number"], "supported": supported, "reason": reason})
    return json.dumps({"verdicts": verdicts})


def _summarize(asked: Mapping[str, Any]) -> str:
    """Return one paragraph for each source, with the unchanged statements from that source."""
    paragraphs: dict[int, list[str]] = {}
    for claim in asked["claims"]:
        paragraphs.setdefault(claim["source"], []).append(f"{claim['statement']} [{claim['source']}]")
    return "\n\n".join(" ".join(sentences) for sentences in paragraphs.values())


def _report(asked: Mapping[str, Any]) -> str:
    return f"# {_uncited(asked['query'])}\n\n{asked['summary']}"


def _uncited(text: str) -> str:
    """Return the text on one line, without numbers in brackets: those would count as citations."""
    return " ".join(re.sub(r"\[\d+(?:\s*,\s*\d+)*\]", "", text).split())
