"""Conversion of a call's exceptions to JSON and back."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError
from pydantic_core.core_schema import ErrorType

from durable_autogen.record.storable import decoded, encoded, representable

MAX_TEXT = 1_000_000
"""The longest text of an error, in characters. A longer one is cut. An error's arguments share this limit, too.

More than this fits into no model's context, and the record of an error must not be larger than a result may be.
"""
MAX_ATTRIBUTE = 20_000  # characters; a longer attribute is left out
MAX_GROUP = 100  # exceptions; of a larger ExceptionGroup, only the first ones are recorded


class RecordedFailure(Exception):
    """A recorded failure whose class this program hasn't loaded or can't build."""


class Failure(BaseModel):
    """An exception in a form that JSON can hold."""

    model_config = ConfigDict(frozen=True)

    module: str
    name: str
    text: str
    args: list[Any] | None = None
    """The constructor's arguments, each as `encoded` writes it; None if it can't write all of them."""
    attributes: dict[str, Any] = {}
    """The attributes that `encoded` can write."""
    validation: list[dict[str, Any]] | None = None
    """The list of errors in a pydantic ValidationError. Such an exception is built from this list, not from `args`."""
    group: list[Failure] | None = None
    """The exceptions in an ExceptionGroup. `args` then holds only the group's message."""

    @classmethod
    def of(cls, error: Exception, max_text: int = MAX_TEXT) -> Failure:
        """Return an exception as a Failure. The exceptions in an ExceptionGroup share `max_text`."""
        kind = type(error)
        group = _group(error)
        made_with = _made_with(error) if group is None else [getattr(error, "message", "")]
        args = [_storable(one, max_text // len(made_with)) for one in made_with]
        attributes = {name: _storable(value, MAX_ATTRIBUTE) for name, value in vars(error).items()}
        return cls(
            module=kind.__module__,
            name=kind.__qualname__,
            text=_text(error, max_text),
            args=None if _NOT_STORABLE in args else args,
            attributes={name: one for name, one in attributes.items() if one is not _NOT_STORABLE},
            validation=_validation_errors(error, max_text),
            group=None if group is None else [cls.of(one, max_text // len(group)) for one in group],
        )

    def again(self) -> Exception:
        """Return the recorded exception, with its class, its text, and the arguments and attributes on record.

        If the class can't be instantiated, return an instance of a new subclass of it. If the class allows no subclass,
        use the nearest base class that allows one.
        """
        kind: Any = class_named(self.module, self.name, Exception)
        ways: list[Callable[[], Exception]] = [] if self.validation is None else [self._validation_error]
        if kind is not None and issubclass(kind, Exception):
            if self.args is not None:
                ways.append(lambda: self._if_same(kind(*self._args()), kind))
            ways.append(lambda: self._if_same(self._without_constructor(kind), kind))
            ways += [partial(self._derived_from, base) for base in kind.__mro__ if issubclass(base, Exception)]
        ways.append(partial(self._derived_from, RecordedFailure))
        for way in ways:
            with contextlib.suppress(Exception):  # the constructor may take other arguments, or refuse a subclass
                return way()
        return RecordedFailure(self.text)

    def _validation_error(self) -> Exception:
        details: list[Any] = [
            {
                "type": one["type"]
                if one["type"] in _KNOWN_ERRORS
                else PydanticCustomError(one["type"], "{text}", {"text": one["msg"]}),
                **{name: one[name] for name in ("input", "ctx") if name in one},
                "loc": tuple(one["loc"]),
            }
            for one in self.validation or ()
        ]
        title = (self.text.partition(" for ")[2] or "input").partition("\n")[0]
        return ValidationError.from_exception_data(title, details)

    def _if_same(self, error: Exception, kind: type[Exception]) -> Exception:
        """Return `error` with the recorded attributes. Raises ValueError if its class or its text differs."""
        vars(error).update(self._attributes())
        if type(error) is not kind or _text(error) != self.text:
            raise ValueError(f"{kind.__name__} made another error")
        return error

    def _derived_from(self, base: type[Exception]) -> Exception:
        text = self.text
        body = {"__module__": self.module, "__qualname__": self.name, "__str__": lambda _: text}
        error = self._without_constructor(type(self.name.rpartition(".")[2], (base,), body))
        vars(error).update(self._attributes())
        return error

    def _without_constructor(self, kind: Any) -> Exception:
        # An ExceptionGroup gets its members from __new__.
        is_group = self.group is not None and getattr(kind, "exceptions", None) is not None
        error: Exception = kind.__new__(kind, *self._args()) if is_group else kind.__new__(kind)
        error.args = (self.text,) if self.args is None else self._args()
        return error

    def _args(self) -> tuple[Any, ...]:
        """Return the constructor's arguments."""
        members = [] if self.group is None else [[one.again() for one in self.group]]
        return (*map(decoded, self.args or ()), *members)

    def _attributes(self) -> dict[str, Any]:
        return {name: decoded(value) for name, value in self.attributes.items()}


def class_named(module: str, name: str, base: type) -> type | None:
    """Return a loaded class by its name, or None.

    A class that is defined in a function is searched for among the subclasses of `base`.
    """
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if isinstance(found, type):
        return found
    if "<locals>" not in name and "[" not in name:
        return None
    matching = [one for one in with_subclasses(base) if (one.__module__, one.__qualname__) == (module, name)]
    # Take the newest class: a function that defines a class makes a new one each time it runs.
    return matching[-1] if matching else None


def with_subclasses(base: type) -> list[type]:
    """Return a class and all classes that are derived from it."""
    found: dict[type, None] = {}
    ahead = [base]
    while ahead:
        one = ahead.pop()
        if one not in found:
            found[one] = None
            ahead += type.__subclasses__(one)
    return list(found)


_NOT_STORABLE: Any = object()
_KNOWN_ERRORS = set(get_args(ErrorType))


def _validation_errors(error: Exception, max_text: int) -> list[dict[str, Any]] | None:
    if not isinstance(error, ValidationError):
        return None
    with contextlib.suppress(Exception):  # pydantic may be unable to write the invalid input as JSON
        found: list[dict[str, Any]] = json.loads(error.json(include_url=False))
        return found if len(json.dumps(found)) <= max_text else None
    return None


def _made_with(error: Exception) -> tuple[Any, ...]:
    """Return the arguments that an exception was built with.

    Take the arguments from `__reduce__` if possible: `args` may lack some of them.
    """
    with contextlib.suppress(Exception):
        made = error.__reduce__()
        if isinstance(made, tuple) and made[0] is type(error) and isinstance(made[1], tuple):
            return made[1]
    return error.args


def _group(error: Exception) -> Sequence[Exception] | None:
    """Return the exceptions in an ExceptionGroup. Return None for another exception."""
    # Python 3.10 has no ExceptionGroup, but anyio and others use the class of the package `exceptiongroup` there.
    if not any(one.__name__ == "BaseExceptionGroup" for one in type(error).__mro__):
        return None
    members: Sequence[Exception] = getattr(error, "exceptions", ())
    return members[:MAX_GROUP]


def _storable(value: object, max_text: int) -> Any:
    """Return a value in the form in which it is recorded.

    Return `_NOT_STORABLE` if `decoded` can't restore the value, or if the value has more than `max_text` characters.
    """
    with contextlib.suppress(Exception):  # an object refuses to be written, and its `==` may raise anything
        written = encoded(value)
        text = written if isinstance(written, str) else json.dumps(written, ensure_ascii=False)
        if decoded(written) == value and len(text) <= max_text and representable(text) == text:
            return written
    return _NOT_STORABLE


def _text(error: Exception, max_text: int = MAX_TEXT) -> str:
    try:
        text: str = representable(str(error))
    except Exception as unsaid:  # noqa: BLE001 - the program's __str__ may raise anything
        text = f"(its text can't be read: {type(unsaid).__name__})"
    return text if len(text) <= max_text else f"{text[:max_text]} [cut]"
