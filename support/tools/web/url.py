"""Check the form of a web address. The connector checks the host's IP address when it connects."""

from __future__ import annotations

import re

from pydantic import HttpUrl, TypeAdapter, ValidationError

from nexum_engine.errors import FinalError
from support.tools.clean_text import shortened

_AROUND = ' \t\r\n<>"`'  # characters that models put around an address; no address begins or ends with them
_HOST_AT_START = re.compile(r"[\w-]+(?:\.[\w-]+)*\.[^\W\d_]{2,}\.?(?::\d+)?(?:[/?#]|$)")
_HTTP_URL = TypeAdapter(HttpUrl)


def parse_url(text: str) -> str:
    """Return the address as a browser reads it, with a lower-case ASCII host and an encoded path. Raises ValueError."""
    text = text.strip()
    try:
        url = _HTTP_URL.validate_python(text)
    except ValidationError as invalid:
        error = invalid.errors(include_url=False)[0]
        match error["type"]:
            case "url_scheme":
                raise ValueError("only http:// and https:// addresses can be visited") from None
            case "url_parsing" if "relative" in error["msg"]:
                raise ValueError("it has no scheme; write the full address, beginning with https://") from None
            case _:
                raise ValueError(f"it is not a web address ({error['msg']})") from None
    if url.username is not None or url.password is not None:
        raise ValueError("it holds a user name or password; write it without")
    if url.port == 0:
        raise ValueError("its port is 0")
    host = (url.host or "").rstrip(".")
    if not host or ".." in host or host.startswith("."):
        raise ValueError("it has no valid host name")
    if host == "localhost" or host.endswith(".localhost"):
        raise ValueError("its host is this computer; only public addresses can be visited")
    return str(url)


def checked_url(text: str) -> str:
    """Return an address from a model, rewritten by `parse_url`. Raises FinalError if the address is not valid.

    Accept `<https://example.org>`, and `example.org/path` as an https address.
    """
    address = text.strip(_AROUND)
    if _HOST_AT_START.match(address):
        address = f"https://{address}"
    try:
        return parse_url(address)
    except ValueError as error:
        raise FinalError(f"{shortened(text)} was not visited: {error}") from None
