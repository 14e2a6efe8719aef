"""Check the arguments that a model sends. A value of the wrong type is converted if the conversion loses nothing."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

M = TypeVar("M", bound=BaseModel)

# The rounds of conversion. A string that holds JSON takes one round. If that JSON holds another string with JSON, that
# string takes another round.
MAX_ROUNDS = 5

_WHOLE = re.compile(r"\s*[+-]?[0-9]{1,18}(?:\.0{1,18})?\s*")
_DECIMAL = re.compile(r"\s*[+-]?[0-9]{1,15}(?:\.[0-9]{1,15})?\s*")
_MOST_EXACT = 2**53  # above this, a float may differ from the number that was written


def validate_leniently(model: type[M], text: bytes) -> M:
    """Return the JSON object as an instance of a strict model. Raises ValidationError.

    These values are converted: 5.0 and "5" to an integer, "0.5" to a number, "true" to a boolean, a JSON text to the
    list or object that it holds, and null to the default of a parameter.
    """
    for _ in range(MAX_ROUNDS):
        try:
            return model.model_validate_json(text)
        except ValidationError as invalid:
            arguments = json.loads(text)
            repaired = [_repair(model, arguments, error) for error in invalid.errors(include_url=False)]
            if not any(repaired):
                raise
            text = json.dumps(arguments, allow_nan=False).encode()
    return model.model_validate_json(text)


def _repair(model: type[BaseModel], arguments: Any, error: ErrorDetails) -> bool:
    """In `arguments`, convert the value that caused the error. Return whether the value could be converted."""
    *path, last = error["loc"] or ("",)
    try:
        for step in path:
            arguments = arguments[step]
        value = arguments[last]
        if value is None and not path and not model.model_fields[str(last)].is_required():
            del arguments[last]
        else:
            arguments[last] = _converted(value, error["type"])
    except (LookupError, TypeError, ValueError, RecursionError):
        # Either the conversion would lose something, or the error gives no path to the value, as in a union.
        return False
    return True


def _converted(value: object, error: str) -> object:
    match error, value:
        case "int_type", float() if value.is_integer() and abs(value) <= _MOST_EXACT:
            return int(value)
        case "int_type", str() if _WHOLE.fullmatch(value):
            return int(value.partition(".")[0])
        case "float_type", str() if _DECIMAL.fullmatch(value):
            return float(value)
        case "bool_type", str() if value.strip().lower() in ("true", "false"):
            return value.strip().lower() == "true"
        case (("list_type" | "tuple_type" | "set_type" | "dict_type" | "model_type"), str()):
            return json.loads(value)
    raise ValueError
