"""Fingerprints of calls: a hash of each request, and a short description.

Each message of a conversation is fingerprinted once. A request's fingerprint holds only the model and the request's new
parts. The other parts are the same as in the agent's previous request. `base` is the position of that previous request.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autogen_core.models import ChatCompletionClient, FunctionExecutionResultMessage, LLMMessage, SystemMessage
from autogen_core.tools import Tool, ToolSchema
from pydantic import BaseModel

EXCERPT = 80  # characters
MAX_ARGUMENTS = 20_000  # characters; if a tool call's arguments are longer, their beginning and a hash are recorded
SETTINGS = (
    *("temperature", "top_p", "max_tokens", "max_completion_tokens", "seed", "stop", "reasoning_effort"),
    *("frequency_penalty", "presence_penalty", "logit_bias", "parallel_tool_calls", "response_format", "user"),
    "extra_body",
)
"""The client settings that change a model's replies. API keys and addresses are never recorded."""


class Conversation:
    """The requests of one agent. Each fingerprint holds the model, and the parts that the previous request lacks."""

    def __init__(self) -> None:
        self._position = ""
        self._messages: list[LLMMessage] = []
        """The messages of the last request, without the leading system messages."""
        self._contents: list[Any] = []
        """The content that each of these messages had then. A list may have grown since."""
        self._lengths: list[int] = []
        """The length that each content had then."""
        self._seen: list[_Seen] = []
        """What is known of each of these messages."""
        self._whole: dict[str, Any] = {}
        self._written = ""
        """`_whole` as JSON."""
        self._tools: list[Tool | ToolSchema] = []
        self._settings: tuple[ChatCompletionClient, str, dict[str, Any]] | None = None

    @property
    def model(self) -> str:
        """The name of the model that received the last request; empty before the first request."""
        return "" if self._settings is None else self._settings[1]

    def request(
        self,
        position: str,
        client: ChatCompletionClient,
        messages: Sequence[LLMMessage],
        tools: Sequence[Tool | ToolSchema],
        options: Mapping[str, Any],
    ) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
        """Return the new parts of a request's fingerprint, and a function that returns the whole fingerprint."""
        leading = 0
        while leading < len(messages) and isinstance(messages[leading], SystemMessage):
            leading += 1
        same = self._update(messages[leading:])
        seen = self._seen
        if self._settings is None or self._settings[0] is not client:
            self._settings = (client, *_model(client))
        _, model, settings = self._settings
        if list(tools) != self._tools or "tools" not in self._whole:
            self._tools = list(tools)
            described = {_schema(tool)["name"]: hash_of(_schema(tool)) for tool in tools}
        else:
            described = self._whole["tools"]
        whole: dict[str, Any] = {
            "model": model,
            "options": {**settings, **{name: plain(value) for name, value in options.items() if value}},
            "system": [str(message.content) for message in messages[:leading]],
            "tools": described,
        }
        new = {"model": model, **{name: value for name, value in whole.items() if self._whole.get(name) != value}}
        if self._position:
            new["base"] = self._position
        new["same"] = same
        new["messages"] = [one.fingerprint for one in seen[same:]]
        if whole != self._whole:
            self._whole, self._written = whole, _written(whole)
        new["hash"] = _hash(f"[{self._written},{_written(seen[-1].chain if seen else '')}]")
        self._position = position
        return new, lambda: {**whole, "messages": [one.fingerprint for one in seen], "hash": new["hash"]}

    def _update(self, messages: Sequence[LLMMessage]) -> int:
        """Store `messages`. Return how many messages at the beginning are unchanged since the previous request."""
        contents = [message.content for message in messages]
        lengths = [len(content) for content in contents]
        same = self._unchanged(messages, contents, lengths)
        moved = {id(message): number for number, message in enumerate(self._messages[same:], same)}
        seen = self._seen[:same]  # a new list: an earlier request may still need the old one
        for message, content, length in zip(messages[same:], contents[same:], lengths[same:], strict=True):
            number = moved.get(id(message))
            if number is not None and (content, length) == (self._contents[number], self._lengths[number]):
                fingerprint = self._seen[number].fingerprint
            else:
                fingerprint = _message(message)
            seen.append(_Seen(fingerprint, _hash(f"{seen[-1].chain if seen else ''}{fingerprint['hash']}")))
        self._messages, self._contents, self._lengths, self._seen = list(messages), contents, lengths, seen
        return same

    def _unchanged(self, messages: Sequence[LLMMessage], contents: list[Any], lengths: list[int]) -> int:
        """Return how many messages at the beginning are unchanged since the previous request."""
        known = len(self._messages)
        former = (self._messages, self._contents, self._lengths)
        # Compare whole lists first. Usually all known messages are unchanged, and comparing them one by one takes three
        # times as long: at the end of a conversation of 1,000 replies, half a millisecond for each request.
        if (list(messages[:known]), contents[:known], lengths[:known]) == former:
            return known
        each = zip(zip(*former, strict=True), zip(messages, contents, lengths, strict=True), strict=False)
        for number, (before, now) in enumerate(each):
            if before != now:
                return number
        return min(known, len(messages))


@dataclass(frozen=True, slots=True)
class _Seen:
    """A fingerprinted message."""

    fingerprint: dict[str, str]
    chain: str
    """The hash of all messages up to and including this one."""


def call_fingerprint(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call's fingerprint."""
    try:
        written = plain(arguments)
        text = json.dumps(written, sort_keys=True, ensure_ascii=False)
    except (RecursionError, ValueError):
        text = repr(arguments)
    # Store the arguments as text, because they may be nested more deeply than recorded JSON may be.
    shown = text if len(text) <= MAX_ARGUMENTS else f"{text[:MAX_ARGUMENTS]}..."
    return {"hash": hash_of([name, text]), "tool": name, "arguments": shown}


def turn_fingerprint(said: str) -> dict[str, Any]:
    """Return the fingerprint of the text that an agent said in its turn."""
    return {"hash": hash_of(said), "said": excerpt(said)}


def fingerprint_of(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return a fingerprint: the request and its hash."""
    return {"hash": hash_of(request), **request}


def _model(client: ChatCompletionClient) -> tuple[str, dict[str, Any]]:
    """Return the model's name and settings, as far as the client shows them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # AutoGen warns the author of the client, who can't act on it here
            config = client.dump_component().config
    except Exception:  # noqa: BLE001 - clients without a configuration raise different errors
        config = {}
    # Read also the settings that AutoGen's OpenAI client sends: the client's configuration lacks some of them.
    sent = getattr(client, "_create_args", None)
    config = {**(sent if isinstance(sent, dict) else {}), **config}
    name = config.get("model") or getattr(client, "model", None) or type(client).__name__
    return str(name), {key: plain(config[key]) for key in SETTINGS if config.get(key) is not None}


def _schema(tool: Tool | ToolSchema) -> ToolSchema:
    # Don't ask for `isinstance(tool, Tool)`: this would look up every member of that protocol, and compute the schema.
    return tool if isinstance(tool, dict) else tool.schema


def _message(message: LLMMessage) -> dict[str, str]:
    if isinstance(message, FunctionExecutionResultMessage):
        # Hash the whole result and show only its beginning: a result may be long.
        results = [[one.name, one.call_id, one.is_error, _hash(one.content)] for one in message.content]
        shown = json.dumps([one.content[: 2 * EXCERPT] for one in message.content], ensure_ascii=False)
        return {"from": "tool results", "hash": hash_of(results), "text": excerpt(shown)}
    dumped = message.model_dump(mode="json")
    content = dumped["content"]
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return {
        "from": f"{type(message).__name__} of {dumped.get('source', 'the program')}",
        "hash": hash_of(dumped),
        "text": excerpt(text),
    }


def plain(value: Any) -> Any:
    """Return a value as plain JSON: a model as an object, a tool as its name, and any other unknown value as a text."""
    return json.loads(json.dumps(value, default=_of_another_type, sort_keys=True))


def _of_another_type(value: object) -> Any:
    if isinstance(value, type) and issubclass(value, BaseModel):
        return value.model_json_schema()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return value.name if isinstance(value, Tool) else str(value)


def hash_of(value: object) -> str:
    """Return the hash of a JSON-like value."""
    return _hash(_written(value))


def _written(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def excerpt(text: str, limit: int = EXCERPT) -> str:
    """Return a text as one line of at most `limit` characters."""
    line = " ".join(text[: 20 * limit].split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."
