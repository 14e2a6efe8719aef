"""A GuardedFetcher that treats one loopback address as a public one."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any

from support.tools.web.addresses import Address
from support.tools.web.fetch import GuardedFetcher

PUBLIC = IPv4Address("127.0.0.1")  # the only address that the tests' policy accepts
FORBIDDEN = IPv4Address("127.0.0.2")  # a loopback address that the policy refuses


def resolve_to(*addresses: Address) -> Any:
    return lambda host: list(addresses)


def fetcher(**settings: Any) -> GuardedFetcher:
    defaults: dict[str, Any] = {
        "resolver": resolve_to(PUBLIC),
        "address_policy": lambda address: address == PUBLIC,
        "deadline": 20.0,
    }
    return GuardedFetcher(**(defaults | settings))
