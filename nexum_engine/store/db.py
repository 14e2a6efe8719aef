"""What a transition sees of a database: named queries inside one transaction, at one moment."""

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
        """The moment of the transaction."""
        ...

    def all(self, query: str, **parameters: object) -> list[Row]:
        """The rows of the query of this name."""
        ...

    def one(self, query: str, **parameters: object) -> Row | None:
        """Its first row."""
        ...

    def run(self, query: str, **parameters: object) -> int:
        """Run a statement; how many rows it changed."""
        ...


def load_queries() -> dict[str, str]:
    """The statements of queries.sql by name."""
    text = (files("nexum_engine.store") / "queries.sql").read_text(encoding="utf-8")
    parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))
