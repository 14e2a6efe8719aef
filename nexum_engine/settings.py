"""Checks of what a program passes: `Settings` for models such as a policy, `checked` for the arguments of functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, validate_call

from nexum_engine.errors import InvalidRequest, first_problem

P = ParamSpec("P")
T = TypeVar("T")


class Settings(BaseModel):
    """A model whose constructor raises InvalidRequest, with one line that names the wrong argument.

    Methods such as `model_validate` raise pydantic's ValidationError. Its text has several lines.
    """

    if not TYPE_CHECKING:  # type checkers know the parameters of a model from its fields

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise InvalidRequest(f"{type(self).__name__}: {first_problem(error)}") from None

        # Otherwise, pydantic would call this constructor in `model_validate`, and lose the place of a problem.
        __init__.__pydantic_base_init__ = True


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function raise InvalidRequest, with one line that names the argument, if an argument has a wrong type."""
    names = list(inspect.signature(function).parameters)

    @cache
    def validated() -> Callable[..., T]:  # build this at the first call, because it takes 1 ms
        return validate_call(config=ConfigDict(strict=True))(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return validated()(*args, **kwargs)
        except ValidationError as error:
            place = error.errors()[0]["loc"][0]  # the number of an argument that was passed without its name
            name = [names[place]] if isinstance(place, int) else []
            raise InvalidRequest(f"{function.__name__}: {first_problem(error, *name)}") from None

    return call
