"""Fetch a page from the public internet only, within bounds of time and bytes.

The fetcher ignores proxies from the environment: a proxy would connect to unchecked addresses.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urldefrag, urljoin

import httpcore2

from nexum_engine.errors import FinalError
from support.tools.clean_text import shortened
from support.tools.web import Page, WebError
from support.tools.web.addresses import is_public
from support.tools.web.charset import kind_of
from support.tools.web.connector import AddressPolicy, CheckedBackend, FetchDeadline, Resolver, system_resolver
from support.tools.web.decompress import ACCEPTED_ENCODINGS, read_body
from support.tools.web.hosts import AllowedHosts
from support.tools.web.url import checked_url, parse_url

DEADLINE = 30.0  # seconds from the first DNS look-up to the last byte
MAX_BYTES = 2 * 1024 * 1024  # the limit of a body's size, both compressed and decompressed
MAX_REDIRECTS = 5

ALL_HOSTS = AllowedHosts()
_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = {
    "User-Agent": "Mozilla/5.0 (compatible; nexum-visit-webpage)",
    "Accept": "text/html, application/xhtml+xml, text/plain;q=0.9, application/json;q=0.9, */*;q=0.5",
    "Accept-Encoding": ACCEPTED_ENCODINGS,
    "Accept-Language": "en, *;q=0.5",
    "Connection": "close",
}


class GuardedFetcher:
    """A fetcher of public pages on `hosts` only.

    Only code can replace the resolver and the address policy. No environment variable and no option does that.
    """

    def __init__(
        self,
        *,
        hosts: AllowedHosts = ALL_HOSTS,
        resolver: Resolver = system_resolver,
        address_policy: AddressPolicy = is_public,
        ssl_context: ssl.SSLContext | None = None,
        deadline: float = DEADLINE,
        max_bytes: int = MAX_BYTES,
        max_redirects: int = MAX_REDIRECTS,
    ) -> None:
        self._hosts = hosts
        self._resolver = resolver
        self._address_policy = address_policy
        self._ssl_context = ssl_context or httpcore2.default_ssl_context()
        self._deadline = deadline
        self._max_bytes = max_bytes
        self._max_redirects = max_redirects

    def fetch(self, url: str) -> Page:
        """Follow redirects from the address and return the last response. Don't read a body that is not text."""
        first = current = checked_url(url)
        deadline = FetchDeadline(self._deadline)
        with _errors_in_words(first, deadline):
            for _ in range(self._max_redirects + 1):
                answer = self._request(current, deadline)
                if isinstance(answer, Page):
                    return answer
                current = _redirected(current, answer)
        raise FinalError(f"{shortened(first)} was not read: it redirects more than {self._max_redirects} times")

    def _request(self, url: str, deadline: FetchDeadline) -> Page | bytes:
        """Return the page at the address, or the location to which the server redirects."""
        backend = CheckedBackend(self._hosts, self._resolver, self._address_policy, deadline)
        target = urldefrag(url).url
        with (
            httpcore2.ConnectionPool(ssl_context=self._ssl_context, network_backend=backend) as connections,
            connections.stream("GET", target, headers=_HEADERS) as response,
        ):
            headers = {name.lower(): value for name, value in response.headers}
            location: bytes | None = headers.get(b"location")
            if response.status in _REDIRECTS and location is not None:
                return location
            content_type = headers.get(b"content-type", b"").decode("latin-1")
            body, truncated = b"", False
            if 200 <= response.status < 300 and kind_of(content_type) is not None:
                encoding = headers.get(b"content-encoding", b"").decode("latin-1")
                body, truncated = read_body(response.iter_stream(), encoding, self._max_bytes)
            return Page(url, response.status, content_type, body, truncated)


def _redirected(current: str, location: bytes) -> str:
    try:
        target = location.decode()
    except UnicodeDecodeError:
        target = location.decode("latin-1")  # the charset of headers in older versions of HTTP
    try:
        return parse_url(urljoin(current, target.strip()))
    except ValueError as error:
        raise FinalError(f"it redirects to {shortened(target)}, which was not visited: {error}") from None


@contextmanager
def _errors_in_words(url: str, deadline: FetchDeadline) -> Iterator[None]:
    """Turn each failure into an error that names the address: a WebError if a retry may succeed, else a FinalError."""
    name = shortened(url)
    try:
        yield
    except FinalError as error:
        raise FinalError(f"{name} was not read: {error}") from error
    except WebError as error:
        raise WebError(f"{name} could not be read: {error}") from error
    except httpcore2.TimeoutException as error:
        raise WebError(f"{name} could not be read: it took longer than {deadline.seconds:g} s") from error
    except httpcore2.ConnectError as error:
        raise WebError(f"{name} could not be read: connecting failed ({error})") from error
    except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
        raise WebError(f"{name} could not be read: {error or type(error).__name__}") from error
