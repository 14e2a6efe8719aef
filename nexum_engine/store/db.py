"""The database as a transition sees it: named queries inside one transaction, at one moment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Protocol

Row = Mapping[str, Any]


class Db(Protocol):
    """One open transaction."""

    @property
    def now_ms(self) -> int:
        """The time of the transaction."""
        ...

    def all(self, query: str, **parameters: object) -> list[Row]:
        """Return the rows of a query, by its name in queries.sql."""
        ...

    def one(self, query: str, **parameters: object) -> Row | None:
        """Return the first row of a query; None if there is none."""
        ...

    def run(self, query: str, **parameters: object) -> int:
        """Run a statement; return how many rows it changed."""
        ...


def load_queries() -> dict[str, str]:
    """Return the statements of queries.sql by name."""
    text = (files("nexum_engine.store") / "queries.sql").read_text(encoding="utf-8")
    parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))
