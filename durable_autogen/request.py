"""What an agent asked for, in a form that two runs can compare: what differs is said in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from autogen_core.models import ChatCompletionClient, LLMMessage, SystemMessage
from autogen_core.tools import Tool, ToolSchema
from pydantic import BaseModel

EXCERPT = 80  # characters
SETTINGS = (
    *("temperature", "top_p", "max_tokens", "max_completion_tokens", "seed", "stop", "reasoning_effort"),
    *("frequency_penalty", "presence_penalty", "logit_bias", "parallel_tool_calls", "response_format", "user"),
    "extra_body",
)
"""Of a client's configuration, what changes its replies. Keys and addresses are nobody's business."""


def describe_model_call(
    client: ChatCompletionClient,
    messages: Sequence[LLMMessage],
    tools: Sequence[Tool | ToolSchema],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """The call as it is recorded beside its reply."""
    model, settings = _model(client)
    leading = 0
    while leading < len(messages) and isinstance(messages[leading], SystemMessage):
        leading += 1
    request: dict[str, Any] = {
        "model": model,
        "options": {**settings, **{name: _plain(value) for name, value in options.items() if value}},
        "system": [str(message.content) for message in messages[:leading]],
        "tools": {_schema(tool)["name"]: _hash(_schema(tool)) for tool in tools},
        "messages": [_message(message) for message in messages[leading:]],
    }
    return {"hash": _hash(request), **request}


def describe_arguments(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call as it is recorded beside its result."""
    request = {"tool": name, "arguments": _plain(arguments)}
    return {"hash": _hash(request), **request}


def describe_turn(said: str) -> dict[str, Any]:
    """What an agent said in its turn, as it is recorded in the place of that."""
    return {"hash": _hash(said), "said": _excerpt(said)}


def differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, one line each; none if both are the same."""
    if recorded.get("hash") == now.get("hash"):
        return []
    found = [
        *_texts("the system message", recorded.get("system"), now.get("system")),
        *_tools(recorded.get("tools") or {}, now.get("tools") or {}),
        *_values("the model", recorded.get("model"), now.get("model")),
        *_options(recorded.get("options") or {}, now.get("options") or {}),
        *_messages(recorded.get("messages") or [], now.get("messages") or []),
        *_values("the tool", recorded.get("tool"), now.get("tool")),
        *_values("the arguments", recorded.get("arguments"), now.get("arguments")),
        *_texts("the question", recorded.get("task"), now.get("task")),
        *_values("the team", recorded.get("team"), now.get("team")),
        *_values("what it said", recorded.get("said"), now.get("said")),
        *_values("the prompt", recorded.get("prompt"), now.get("prompt")),
    ]
    return found or ["something that is not kept in words"]


def hashed(request: Mapping[str, Any]) -> dict[str, Any]:
    """Any other request, with its hash."""
    return {"hash": _hash(request), **request}


def _model(client: ChatCompletionClient) -> tuple[str, dict[str, Any]]:
    """The model's name and settings, as far as the client tells them."""
    try:
        config = client.dump_component().config
    except Exception:  # noqa: BLE001 - many clients have no configuration to dump, each for a reason of its own
        config = {}
    # What AutoGen's OpenAI client sends, and leaves out of its configuration.
    sent = getattr(client, "_create_args", None)
    config = {**(sent if isinstance(sent, dict) else {}), **config}
    name = config.get("model") or getattr(client, "model", None) or type(client).__name__
    return str(name), {key: _plain(config[key]) for key in SETTINGS if config.get(key) is not None}


def _schema(tool: Tool | ToolSchema) -> ToolSchema:
    return tool.schema if isinstance(tool, Tool) else tool


def _message(message: LLMMessage) -> dict[str, str]:
    dumped = message.model_dump(mode="json")
    content = dumped["content"]
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return {
        "from": f"{type(message).__name__} of {dumped.get('source', 'the tools')}",
        "hash": _hash(dumped),
        "text": _excerpt(text),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, type) and issubclass(value, BaseModel):
        return value.model_json_schema()
    if isinstance(value, Tool):
        return value.name
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def _hash(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _excerpt(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= EXCERPT else f"{line[: EXCERPT - 3]}..."


def _values(what: str, recorded: object, now: object) -> list[str]:
    return [] if recorded == now else [f"{what} was {_shown(recorded)}, now it is {_shown(now)}"]


def _shown(value: object) -> str:
    return "none" if value in (None, [], {}) else _excerpt(value if isinstance(value, str) else json.dumps(value))


def _texts(what: str, recorded: Sequence[str] | None, now: Sequence[str] | None) -> list[str]:
    if recorded == now:
        return []
    one, other = "\n".join(recorded or ()), "\n".join(now or ())
    at = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    begin = max(0, at - EXCERPT // 4)
    lead = "..." if begin else ""
    was, is_now = (f"{lead}{_excerpt(text[begin:])}" if text else "none" for text in (one, other))
    return [f"{what} was {was!r}, now it is {is_now!r} (they part at character {at + 1})"]


def _tools(recorded: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    parts = [
        *(f"{name} is gone" for name in recorded if name not in now),
        *(f"{name} is new" for name in now if name not in recorded),
        *(
            f"{name} has another description or other parameters"
            for name in now
            if recorded.get(name, now[name]) != now[name]
        ),
    ]
    if not parts and list(recorded) != list(now):
        parts = [f"their order was {', '.join(recorded)}, now it is {', '.join(now)}"]
    return [f"the tools: {'; '.join(parts)}"] if parts else []


def _options(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = sorted({*recorded, *now})
    return [line for name in names for line in _values(f"the option {name}", recorded.get(name), now.get(name))]


def _messages(recorded: Sequence[Mapping[str, str]], now: Sequence[Mapping[str, str]]) -> list[str]:
    for number, (one, other) in enumerate(zip(recorded, now, strict=False), 1):
        if one["hash"] != other["hash"]:
            return [
                f"the messages, from number {number} on: it was {one['text']!r} ({one['from']}), "
                f"now it is {other['text']!r} ({other['from']})"
            ]
    if len(recorded) != len(now):
        return [f"the messages: there were {len(recorded)}, now there are {len(now)}"]
    return []
