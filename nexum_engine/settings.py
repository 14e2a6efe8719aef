"""`Settings`: the base class of the pydantic models that a program builds itself, such as a policy or a budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from nexum_engine.errors import InvalidRequest, first_problem


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
