"""Test whether an IP address is public.

`ipaddress.is_global` is not enough: it accepts internal addresses of clouds, and addresses that wrap another address.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TypeAlias

Address: TypeAlias = IPv4Address | IPv6Address

_NOT_PUBLIC_4 = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",  # this network
            "10.0.0.0/8",  # private
            "100.64.0.0/10",  # carriers' NAT, and clouds' metadata
            "127.0.0.0/8",  # this host
            "168.63.129.16/32",  # Azure's host, inside a public range
            "169.254.0.0/16",  # link-local, and clouds' metadata
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # protocol assignments
            "192.0.2.0/24",  # documentation
            "192.88.99.0/24",  # 6to4 relays
            "192.168.0.0/16",  # private
            "198.18.0.0/15",  # benchmarks
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, and broadcast
        ),
    )
)
_PUBLIC_6 = IPv6Network("2000::/3")  # the only allocated range
_NOT_PUBLIC_6 = tuple(
    map(
        IPv6Network,
        (
            "2001::/23",  # protocol assignments, Teredo among them
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4: wraps any IPv4 address
            "3ffe::/16",  # the former test network
            "3fff::/20",  # documentation
        ),
    )
)
_NAT64 = IPv6Network("64:ff9b::/96")  # wraps any IPv4 address, for hosts without IPv4
_ISATAP = (0x00005EFE, 0x02005EFE)  # an interface id that wraps an IPv4 address


def is_public(address: Address) -> bool:
    """Return whether the address belongs to the public internet."""
    if isinstance(address, IPv4Address):
        return address.is_global and not any(address in network for network in _NOT_PUBLIC_4)
    if address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    if address in _NAT64:
        return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
    if (int(address) >> 32) & 0xFFFFFFFF in _ISATAP or address.scope_id is not None:
        return False
    return address in _PUBLIC_6 and address.is_global and not any(address in network for network in _NOT_PUBLIC_6)


def literal_address(host: str) -> Address | None:
    """Return the host of a URL as an IP address, or None if the host is a name."""
    try:
        return ip_address(host.strip("[]"))
    except ValueError:
        return None
