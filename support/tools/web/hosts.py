"""The hosts that NEXUM_ALLOWED_HOSTS allows."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from nexum_engine.errors import FinalError, InvalidRequest
from support.tools.web.url import parse_url

VARIABLE = "NEXUM_ALLOWED_HOSTS"


@dataclass(frozen=True)
class AllowedHosts:
    """The hosts whose pages can be visited. The default allows all public hosts."""

    names: frozenset[str] | None = None
    """Lower-case ASCII names. A name that begins with a dot stands for all hosts below it."""

    @classmethod
    def from_environment(cls) -> AllowedHosts:
        """Read the hosts from the environment variable, for example from `example.org, *.wikipedia.org`.

        Raises InvalidRequest if the variable is not a list of hosts.
        """
        text = os.environ.get(VARIABLE, "")
        return cls(frozenset(map(_name, text.split(",")))) if text else cls()

    def check(self, host: str) -> None:
        """Raise FinalError unless the host is allowed."""
        host = host.rstrip(".").lower()
        if self.names is None or host in self.names:
            return
        labels = host.split(".")
        if not any(f".{'.'.join(labels[start:])}" in self.names for start in range(1, len(labels))):
            raise FinalError(f"the host {host} is not allowed; {VARIABLE} allows only {self}")

    def __str__(self) -> str:
        return ", ".join(sorted(f"*{name}" if name.startswith(".") else name for name in self.names or ()))


def _name(entry: str) -> str:
    entry = entry.strip()
    below = entry.removeprefix("*.")
    try:
        host = urlsplit(parse_url(f"https://{below}/")).netloc
    except ValueError as error:
        raise InvalidRequest(f"{VARIABLE} has {entry!r}, which is not a host: {error}") from None
    if not below or any(char in below for char in ":/?#@*"):
        raise InvalidRequest(
            f"{VARIABLE} has {entry!r}, which is not a host: give names such as example.org, or *.example.org for all "
            "hosts below it, separated by commas"
        )
    host = host.rstrip(".")
    return f".{host}" if entry != below else host
