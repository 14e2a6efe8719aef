"""How what a call gave is written down, and given back to the caller of its replay as the same types."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from autogen_core.models import CreateResult
from autogen_core.tools import TextResultContent, ToolResult
from pydantic import BaseModel, TypeAdapter

from durable_autogen.record.events import decoded, encoded, representable

_ANYTHING: TypeAdapter[Any] = TypeAdapter(Any)
_CLASS, _VALUE, _ITEMS = "$class", "$value", "$items"


def written_value(value: Any, declared: Any = None) -> Any:
    """Write a value as JSON. A model or dataclass, also in a list, is written with its class, anything else as
    its declared type.

    Raises ValueError if the value has no JSON.
    """
    kind = type(value)
    if _is_typed(value):
        adapter: TypeAdapter[Any] = TypeAdapter(kind)
        dumped = adapter.dump_python(value, mode="json", warnings=False)
        return {_CLASS: [kind.__module__, kind.__qualname__], _VALUE: encoded(dumped)}
    if isinstance(value, list) and any(map(_is_typed, value)):
        return {_ITEMS: [written_value(item) for item in value]}
    if value is None or isinstance(value, (str, bool, int)):
        return value
    known = _adapter(declared)
    if known is not None:
        try:
            return encoded(known.dump_python(value, mode="json", warnings="error"))
        except ValueError:
            pass  # the tool returns something else than it declares
    return encoded(_ANYTHING.dump_python(value, mode="json"))


def value_again(written: Any, declared: Any = None) -> Any:
    """Build a value from what `written_value` wrote; plain JSON where its type can't be built."""
    if isinstance(written, dict) and _ITEMS in written:
        return [value_again(item) for item in written[_ITEMS]]
    if isinstance(written, dict) and _CLASS in written:
        module, name = written[_CLASS]
        kind: Any = sys.modules.get(module)
        for part in name.split("."):
            kind = getattr(kind, part, None)
        if isinstance(kind, type) and (issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind)):
            declared = kind
        written = written[_VALUE]
    value = decoded(written)
    adapter = _adapter(declared)
    if adapter is None:
        return value
    try:
        # By way of JSON, as it was written: there a date is a text, and a tuple a list.
        return adapter.validate_json(json.dumps(value))
    except ValueError:
        return value


def _is_typed(value: Any) -> bool:
    return isinstance(value, BaseModel) or dataclasses.is_dataclass(type(value))


def _adapter(kind: Any) -> TypeAdapter[Any] | None:
    if kind is None:
        return None
    try:
        return TypeAdapter(kind)
    except Exception:  # noqa: BLE001 - pydantic raises several errors for a type that it can't handle
        return None


# ---- Replies ---------------------------------------------------------------------------------------------------------


def written_reply(result: CreateResult) -> tuple[Any, CreateResult]:
    """Write a model's reply as JSON; return that, and the reply as its caller gets it, live and in a replay."""
    if isinstance(result.content, list):
        for call in result.content:
            arguments: Any = call.arguments
            if not isinstance(arguments, str):
                # Some servers send the arguments as an object; AutoGen and its models take a text.
                call.arguments = json.dumps(arguments, ensure_ascii=False)
    dumped = result.model_dump(mode="python", warnings=False)
    kept = representable(dumped)
    return encoded(kept), result if kept == dumped else CreateResult.model_validate(kept)


def reply_again(written: Any) -> CreateResult:
    """Build a reply from what `written_reply` wrote."""
    return CreateResult.model_validate(decoded(written))


def text_of_reply(result: CreateResult) -> str:
    """Return what a stream of the reply says: a tool call's text is its thought."""
    return result.content if isinstance(result.content, str) else result.thought or ""


def written_pieces(pieces: Sequence[str], result: CreateResult) -> list[Any]:
    """Write what a reply's stream passed on: lengths alone, if the pieces are the reply's own text."""
    if "".join(pieces) == text_of_reply(result):
        return [len(piece) for piece in pieces]
    found: list[Any] = representable(list(pieces))
    return found


def pieces_again(written: Sequence[Any], result: CreateResult) -> list[str]:
    """Return the pieces that `written_pieces` wrote."""
    text, pieces = text_of_reply(result), []
    for one in written:
        pieces.append(text[:one] if isinstance(one, int) else str(one))
        text = text[one:] if isinstance(one, int) else text
    return pieces


def is_broken(result: CreateResult) -> bool:
    """Return whether a reply is empty, or was cut off within a call's arguments."""
    if isinstance(result.content, str):
        return not result.content and not result.thought
    was_cut = result.finish_reason in ("length", "unknown")
    return not result.content or (was_cut and any(not _is_json(call.arguments) for call in result.content))


def _is_json(text: str) -> bool:
    try:
        json.loads(text or "{}")
    except RecursionError:
        return True
    except ValueError:
        return False
    return True


def failed_result(name: str, error: BaseException) -> ToolResult:
    """Build a tool's result that tells of an error."""
    text = representable(str(error) or type(error).__name__)
    return ToolResult(name=name, result=[TextResultContent(content=text)], is_error=True)
