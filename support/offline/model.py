"""The offline model: rules instead of a language model, for runs without a key and for tests.

The model searches, reads the best pages and answers with sentences quoted from the tools' results. It keeps no state
between calls: every reply follows from the messages alone, so a repeated run gets the same replies.
"""

import json
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from autogen_core import CancellationToken, FunctionCall
from autogen_core.models import (
    AssistantMessage,
    ChatCompletionClient,
    CreateResult,
    FunctionExecutionResult,
    FunctionExecutionResultMessage,
    LLMMessage,
    ModelFamily,
    ModelInfo,
    RequestUsage,
    SystemMessage,
    UserMessage,
)
from autogen_core.tools import Tool, ToolSchema
from pydantic import BaseModel, TypeAdapter, ValidationError

from support.offline.reading import choose_sentences, plan_searches, quoted
from support.tools import SearchHit

CONTEXT_WORDS = 1_000_000  # a nominal value: the offline model works by rules, and has no limit
QUOTES_ALONE = 4  # at most this many quotes in an answer about one subject
QUOTES_EACH = 2  # at most this many quotes for each subject in an answer about two or more subjects
_HITS = TypeAdapter(list[SearchHit])


@dataclass
class Turn:
    """The question and the tools' results since the user's last message."""

    question: str
    hits: dict[str, list[SearchHit]] = field(default_factory=dict)  # by query
    pages: dict[str, str] = field(default_factory=dict)  # by URL
    problems: list[str] = field(default_factory=list)
    searched: bool = False
    visited: bool = False


class OfflineModel(ChatCompletionClient):
    """A chat client that answers by rules.

    When no page covers a question, the model lists the topics that `topics` returns. If several models divide a
    question's searches among them, `share` is this model's number, from 1, and the number of models.
    """

    component_type = "model"
    component_config_schema = BaseModel

    def __init__(self, topics: Callable[[], Sequence[str]] = list, share: tuple[int, int] = (1, 1)) -> None:
        self._topics = topics
        self._share = share
        self._last = RequestUsage(prompt_tokens=0, completion_tokens=0)
        self._total = RequestUsage(prompt_tokens=0, completion_tokens=0)

    async def create(
        self,
        messages: Sequence[LLMMessage],
        *,
        tools: Sequence[Tool | ToolSchema] = (),
        tool_choice: Tool | Literal["auto", "required", "none"] = "auto",
        json_output: bool | type[BaseModel] | None = None,
        extra_create_args: Mapping[str, Any] | None = None,
        cancellation_token: CancellationToken | None = None,
    ) -> CreateResult:
        """Return the next tool calls, or the answer."""
        if json_output:
            raise ValueError("the offline model answers in prose only; it has no JSON output")
        offered = set() if tool_choice == "none" else {_name(tool) for tool in tools}
        content = self._respond(messages, offered)
        text = content if isinstance(content, str) else " ".join(call.arguments for call in content)
        self._last = RequestUsage(prompt_tokens=self.count_tokens(messages), completion_tokens=len(text.split()))
        self._total = RequestUsage(
            prompt_tokens=self._total.prompt_tokens + self._last.prompt_tokens,
            completion_tokens=self._total.completion_tokens + self._last.completion_tokens,
        )
        return CreateResult(
            finish_reason="stop" if isinstance(content, str) else "function_calls",
            content=content,
            usage=self._last,
            cached=False,
        )

    async def create_stream(
        self, messages: Sequence[LLMMessage], **options: Any
    ) -> AsyncGenerator[str | CreateResult, None]:
        """Yield the answer word by word, then the whole reply."""
        result = await self.create(messages, **options)
        if isinstance(result.content, str):
            for piece in re.findall(r"\S+\s*|\s+", result.content):
                yield piece
        yield result

    async def close(self) -> None:
        """Do nothing: this model holds no connection."""

    def actual_usage(self) -> RequestUsage:
        return self._last

    def total_usage(self) -> RequestUsage:
        return self._total

    def count_tokens(self, messages: Sequence[LLMMessage], *, tools: Sequence[Tool | ToolSchema] = ()) -> int:
        """Return the number of words in the messages. This model counts words as tokens."""
        return sum(len(_text(message).split()) for message in messages)

    def remaining_tokens(self, messages: Sequence[LLMMessage], *, tools: Sequence[Tool | ToolSchema] = ()) -> int:
        return CONTEXT_WORDS - self.count_tokens(messages, tools=tools)

    @property
    def capabilities(self) -> ModelInfo:
        """The value of `model_info`, under the deprecated name of that attribute."""
        return self.model_info

    @property
    def model_info(self) -> ModelInfo:
        return ModelInfo(
            vision=False,
            function_calling=True,
            json_output=False,
            structured_output=False,
            family=ModelFamily.UNKNOWN,
            multiple_system_messages=True,
        )

    def _respond(self, messages: Sequence[LLMMessage], offered: set[str]) -> str | list[FunctionCall]:
        turn = _read(messages)
        if not turn.searched and "web_search" not in offered:
            return _from_conversation(messages)
        queries = plan_searches(turn.question)
        number, of = self._share
        queries = queries[number - 1 :: of] or queries
        earlier = sum(1 for message in messages if isinstance(message, AssistantMessage) and _calls(message))
        if not turn.searched and queries:
            return _calls_of(earlier + 1, "web_search", [{"query": query} for query in queries])
        if not turn.visited and "visit_webpage" in offered:
            best = _pages_to_visit(turn)
            if best:
                return _calls_of(earlier + 1, "visit_webpage", [{"url": url} for url in best])
        return self._answer(turn)

    def _answer(self, turn: Turn) -> str:
        sources: dict[str, str] = {}  # each cited page's title by its URL, in the order of the citations
        paragraphs: list[str] = []
        quotes_each = QUOTES_ALONE if len(turn.hits) == 1 else QUOTES_EACH
        said: set[str] = set()
        for query, hits in turn.hits.items():
            quotes: list[str] = []
            for hit in hits:
                wanted = quotes_each - len(quotes)
                page = turn.pages.get(hit.href, "")
                found = choose_sentences(query, page, wanted, title=hit.title) if wanted else []
                for sentence in found:
                    if sentence not in said:
                        said.add(sentence)
                        sources.setdefault(hit.href, hit.title)
                        quotes.append(f'"{sentence}" [{list(sources).index(hit.href) + 1}]')
            if quotes:
                subject = f"On {query}: " if len(turn.hits) > 1 else ""
                paragraphs.append(subject + " ".join(quotes))
            elif hits:
                paragraphs.append(f"On {query}: I found no sentence to quote in the pages that I could read.")
            else:
                paragraphs.append(f"On {query}: the search found no page.")
        paragraphs += turn.problems
        if not sources:
            return self._not_covered(turn)
        listed = "\n".join(f"[{number}] {title} - {url}" for number, (url, title) in enumerate(sources.items(), 1))
        return "\n\n".join([*paragraphs, f"Sources:\n{listed}"])

    def _not_covered(self, turn: Turn) -> str:
        if turn.problems:
            return "\n\n".join(["I have no answer, because the tools failed.", *turn.problems])
        if any(turn.hits.values()):
            return "I have no answer: the search found pages, but I could quote nothing from them."
        said = "No offline page covers this question, so I have no answer to it."
        topics = self._topics()
        if not topics:
            return said
        return f"{said}\n\nThe offline pages have these topics:\n" + "\n".join(f"- {topic}" for topic in topics)


def _read(messages: Sequence[LLMMessage]) -> Turn:
    last = max((at for at, message in enumerate(messages) if isinstance(message, UserMessage)), default=-1)
    turn = Turn(question=_text(messages[last]) if last >= 0 else "")
    asked: dict[str, dict[str, Any]] = {}
    for message in messages[last + 1 :]:
        if isinstance(message, AssistantMessage):
            asked.update({call.id: _arguments(call) for call in _calls(message)})
        elif isinstance(message, FunctionExecutionResultMessage):
            for result in message.content:
                _take(turn, asked.get(result.call_id, {}), result)
    return turn


def _take(turn: Turn, arguments: Mapping[str, Any], result: FunctionExecutionResult) -> None:
    if result.name == "web_search":
        turn.searched = True
        query = str(arguments.get("query", turn.question))
        turn.hits.setdefault(query, [])
        try:
            if not result.is_error:
                turn.hits[query] = _HITS.validate_json(result.content)
                return
        except ValidationError:
            pass
        turn.problems.append(f"The search for {query} failed: {_first_line(result.content)}")
        del turn.hits[query]
    elif result.name == "visit_webpage":
        turn.visited = True
        url = str(arguments.get("url", ""))
        if result.is_error or not result.content.strip():
            turn.problems.append(f"{url} could not be read: {_first_line(result.content) or 'it was empty'}")
        else:
            turn.pages[url] = result.content


def _pages_to_visit(turn: Turn) -> list[str]:
    """Return the addresses to visit: the best hit of each search, or the two best hits if there was only one search."""
    each = 2 if len(turn.hits) == 1 else 1
    return list(dict.fromkeys(hit.href for hits in turn.hits.values() for hit in hits[:each]))


def _from_conversation(messages: Sequence[LLMMessage]) -> str:
    """Answer without tools, as a team's writer does. The first message is the question; quote from the others."""
    said = [message for message in messages if not isinstance(message, SystemMessage)]
    question = _text(said[0]) if said else ""
    material = [sentence for message in said[1:] for sentence in quoted(_text(message))]
    text = "\n\n".join(material or [_text(message) for message in said[1:]])
    limit = QUOTES_EACH * max(1, len(plan_searches(question)))
    chosen = list(dict.fromkeys(choose_sentences(question, text, limit)))
    if not chosen:
        return "I was given no tools, and the conversation holds nothing that I could answer from."
    return "From the conversation: " + " ".join(f'"{sentence}"' for sentence in chosen)


def _calls_of(round_number: int, tool: str, arguments: Sequence[Mapping[str, str]]) -> list[FunctionCall]:
    return [
        FunctionCall(id=f"call_{round_number}_{number}", name=tool, arguments=json.dumps(each, ensure_ascii=False))
        for number, each in enumerate(arguments, 1)
    ]


def _calls(message: AssistantMessage) -> list[FunctionCall]:
    return [] if isinstance(message.content, str) else message.content


def _arguments(call: FunctionCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.arguments)
    except ValueError:
        return {}
    return arguments if isinstance(arguments, dict) else {}


def _name(tool: Tool | ToolSchema) -> str:
    return tool["name"] if isinstance(tool, dict) else tool.name


def _text(message: LLMMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    parts: list[str] = []
    for part in message.content:
        if isinstance(part, str):
            parts.append(part)
        elif isinstance(part, FunctionCall):
            parts.append(part.arguments)
        elif isinstance(part, FunctionExecutionResult):
            parts.append(part.content)
    return "\n".join(parts)


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:300]
