"""Conversion of recorded values: to JSON, and back to Python values of the same types."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import decimal
import enum
import io
import json
import pathlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from autogen_core.models import CreateResult
from autogen_core.tools import TextResultContent, ToolResult
from pydantic import BaseModel, TypeAdapter

from durable_autogen.errors import NotDurable
from durable_autogen.record.failures import class_named
from durable_autogen.record.storable import decoded, encoded, representable

_CLASS, _VALUE, _UNRECORDED = "$class", "$value", "$unrecorded"
_OWN_CLASS = "$reply"
"""The key of a reply whose class is derived from CreateResult. It stands beside the fields of CreateResult."""

_SIMPLE: dict[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    bytes: (lambda value: base64.b64encode(value).decode(), base64.b64decode),
    datetime.datetime: (datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    datetime.date: (datetime.date.isoformat, datetime.date.fromisoformat),
    datetime.time: (datetime.time.isoformat, datetime.time.fromisoformat),
    datetime.timedelta: (
        lambda value: [value.days, value.seconds, value.microseconds],
        lambda parts: datetime.timedelta(*parts),
    ),
    decimal.Decimal: (str, decimal.Decimal),
    uuid.UUID: (str, uuid.UUID),
    complex: (repr, complex),
}
"""For each type, a function that writes its values as JSON, and a function that reads them."""

_COLLECTIONS = (tuple, set, frozenset)


def written_value(value: Any) -> Any:
    """Return a value as JSON. A value whose type JSON lacks, such as a pydantic model, is tagged with its class.

    Raises ValueError if the value can't be written as JSON.
    """
    return encoded(_written(value))


def _written(value: Any) -> Any:
    kind = type(value)
    if value is None or kind in (str, bool, int, float):
        return value
    if kind is list:
        return [_written(one) for one in value]
    if kind is dict and all(type(key) is str for key in value) and not value.keys() & {_CLASS, _UNRECORDED}:
        return {key: _written(one) for key, one in value.items()}
    if isinstance(value, dict):
        return _tagged(dict, [[_written(key), _written(one)] for key, one in value.items()])
    if kind in _SIMPLE:
        return _tagged(kind, _SIMPLE[kind][0](value))
    if kind in _COLLECTIONS:
        return _tagged(kind, [_written(one) for one in value])
    if isinstance(value, enum.Enum):
        return _tagged(kind, _written(value.value))
    if isinstance(value, pathlib.PurePath):
        return _tagged(kind, str(value))
    if isinstance(value, BaseModel):
        fields = {**vars(value), **(value.__pydantic_extra__ or {})}
        return _tagged(kind, {name: _written(one) for name, one in fields.items()})
    if dataclasses.is_dataclass(value):
        return _tagged(kind, {one.name: _written(getattr(value, one.name)) for one in dataclasses.fields(value)})
    if isinstance(value, Exception):
        raise ValueError(f"a {kind.__name__} can't be recorded as a value")
    # Let pydantic write the value. Some classes, such as AutoGen's Image, define how pydantic writes their values.
    return _tagged(kind, TypeAdapter(kind).dump_python(value, mode="json"))


def _tagged(kind: type, value: Any) -> Any:
    return {_CLASS: [kind.__module__, kind.__qualname__], _VALUE: value}


def unrecorded_value(value: Any) -> Any:
    """Return a placeholder for a value that can't be recorded."""
    return {_UNRECORDED: type(value).__name__}


def value_again(written: Any, declared: Any = None) -> Any:
    """Return the value that `written_value` wrote. If its class isn't loaded, convert the value to the type `declared`.

    Raises NotDurable if the value could not be recorded.
    """
    value = decoded(written)
    if isinstance(value, dict) and _UNRECORDED in value:
        raise NotDurable(
            f"the recorded call returned a {value[_UNRECORDED]}, which could not be recorded: return a Pydantic "
            "model, a dataclass or plain values, and use a new session"
        )
    unknown: list[str] = []
    found = _again(value, unknown)
    return adapted(declared, found) if unknown else found


def adapted(declared: Any, value: Any) -> Any:
    """Return a value as the type `declared`, or unchanged if it can't be converted."""
    try:
        return TypeAdapter(declared).validate_python(value)
    except Exception:  # noqa: BLE001 - pydantic doesn't know the type, or the value doesn't match
        return value


def _again(written: Any, unknown: list[str]) -> Any:
    """Return a written value. If a class isn't loaded, add its name to `unknown`, and return the value's contents."""

    def again(one: Any) -> Any:
        return _again(one, unknown)

    if isinstance(written, list):
        return [again(one) for one in written]
    if not isinstance(written, dict):
        return written
    if _CLASS not in written:
        return {key: again(one) for key, one in written.items()}
    (module, name), value = written[_CLASS], written[_VALUE]
    kind = class_named(module, name, BaseModel)
    if kind is None:
        unknown.append(name)
        return {key: again(one) for key, one in value.items()} if isinstance(value, dict) else value
    if kind is dict:
        return {again(key): again(one) for key, one in value}
    if kind in _SIMPLE:
        return _SIMPLE[kind][1](value)
    if kind in _COLLECTIONS:
        return kind(again(one) for one in value)
    if issubclass(kind, enum.Enum):
        return kind(again(value))
    if issubclass(kind, pathlib.PurePath):
        return kind(value)
    if issubclass(kind, BaseModel):
        return _model(kind, {key: again(one) for key, one in value.items()})
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, {key: again(one) for key, one in value.items()})
    return TypeAdapter(kind).validate_json(json.dumps(value))


def _model(kind: type[BaseModel], values: Mapping[str, Any]) -> BaseModel:
    # Recorded values are valid, and validation would need field aliases and may change values. So validate only if the
    # class lacks a recorded field.
    found = kind.model_construct(**values)
    if set(values) - set(kind.model_fields) and kind.model_config.get("extra") != "allow":
        return kind.model_validate(values)
    return found


def _dataclass(kind: Any, values: Mapping[str, Any]) -> Any:
    found = object.__new__(kind)
    for name, value in values.items():
        object.__setattr__(found, name, value)
    return found


# ---- Replies ---------------------------------------------------------------------------------------------------------


def written_reply(result: CreateResult) -> tuple[Any, CreateResult]:
    """Return a model's reply as JSON, and the reply that the caller gets. A replay returns an equal reply."""
    if isinstance(result.content, list):
        for call in result.content:
            arguments: Any = call.arguments
            if not isinstance(arguments, str):
                # Write the arguments as text. Some servers send an object, and AutoGen needs a text.
                call.arguments = json.dumps(arguments, ensure_ascii=False)
    dumped = result.model_dump(mode="python", warnings=False, include=set(CreateResult.model_fields))
    kept = representable(dumped)
    written = encoded(kept)
    if type(result) is not CreateResult:
        with contextlib.suppress(Exception):  # a field of the client's own class may hold a value that JSON can't hold
            written[_OWN_CLASS] = representable(written_value(result))
    return written, result if kept == dumped else reply_again(written)


def reply_again(written: Any) -> CreateResult:
    """Return the reply that `written_reply` wrote."""
    found = value_again(written[_OWN_CLASS]) if _OWN_CLASS in written else None
    return found if isinstance(found, CreateResult) else CreateResult.model_validate(decoded(written))


def text_of_reply(result: CreateResult) -> str:
    """Return a reply's text; for a reply with tool calls, its thought."""
    return result.content if isinstance(result.content, str) else result.thought or ""


def written_pieces(pieces: Sequence[Any], result: CreateResult) -> list[Any]:
    """Return a stream's pieces as JSON. If the joined pieces equal the reply's text, return only their lengths."""
    if all(isinstance(piece, str) for piece in pieces) and "".join(pieces) == text_of_reply(result):
        return [len(piece) for piece in pieces]
    return [written_piece(piece) for piece in pieces]


def written_piece(piece: Any) -> Any:
    """Return a piece of a stream as JSON. It is a text, unless the client streams values of its own."""
    if isinstance(piece, str):
        return representable(str(piece))
    if isinstance(piece, int):  # in `written_pieces`, a number is the length of a text
        return _tagged(type(piece), piece)
    try:
        return representable(written_value(piece))
    except Exception:  # noqa: BLE001 - the client's own class can't be written as JSON
        return unrecorded_value(piece)


def pieces_again(written: Sequence[Any], result: CreateResult) -> list[Any]:
    """Return the pieces that `written_pieces` wrote."""
    text = io.StringIO(text_of_reply(result))
    return [text.read(one) if isinstance(one, int) else value_again(one) for one in written]


def is_broken(result: CreateResult) -> bool:
    """Return whether a reply is empty, or was cut off within a tool call's arguments."""
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
    """Return a tool's result that holds an error."""
    text = representable(str(error) or type(error).__name__)
    return ToolResult(name=name, result=[TextResultContent(content=text)], is_error=True)


def without_classes(written: Any) -> Any:
    """Return `written` without the names of classes, so that a person can read it."""
    if isinstance(written, list):
        return [without_classes(one) for one in written]
    if isinstance(written, dict):
        if written.keys() == {_CLASS, _VALUE}:
            return without_classes(written[_VALUE])
        return {key: without_classes(one) for key, one in written.items()}
    return written
