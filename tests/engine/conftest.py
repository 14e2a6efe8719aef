"""The fixture of a server with TLS and tokens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from certificates import TOKENS
from server_thread import Secured, secured_server


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    with secured_server(tmp_path_factory.mktemp("secured"), TOKENS) as running:
        yield running
