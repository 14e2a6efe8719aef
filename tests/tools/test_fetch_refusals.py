"""URLs of attacks, with the real address policy. Every name resolves to loopback, where a server counts connections."""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import IPv4Address, ip_address

import pytest
from web_servers import LoopbackServer, page

from nexum_engine.errors import FinalError
from support.tools.web.addresses import is_public
from support.tools.web.fetch import GuardedFetcher

ATTACKS = [
    # this computer, in every spelling
    "http://127.0.0.1:{port}/",
    "http://127.0.0.1.:{port}/",
    "http://127.1:{port}/",
    "http://127.255.255.254:{port}/",
    "http://0.0.0.0:{port}/",
    "http://0:{port}/",
    "http://2130706433:{port}/",
    "http://0x7f000001:{port}/",
    "http://0x7f.0x0.0x0.0x1:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://017700000001:{port}/",
    "http://①②⑦.⓪.⓪.①:{port}/",
    "http://127。0。0。1:{port}/",
    "http://%31%32%37.0.0.1:{port}/",
    "http:///127.0.0.1:{port}/",
    "http:\\\\127.0.0.1:{port}\\",
    "http://127.0.0.1\t:{port}/",
    "  http://127.0.0.1:{port}/  ",
    "HTTP://127.0.0.1:{port}/",
    "https://127.0.0.1:{port}/",
    "http://localhost:{port}/",
    "http://LOCALHOST.:{port}/",
    "http://ｌｏｃａｌｈｏｓｔ:{port}/",
    "http://anything.localhost:{port}/",
    "http://[::1]:{port}/",
    "http://[::]:{port}/",
    "http://[0:0:0:0:0:0:0:1]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:7f00:1]:{port}/",
    "http://[::127.0.0.1]:{port}/",
    "http://[64:ff9b::127.0.0.1]:{port}/",
    "http://[64:ff9b:1::7f00:1]:{port}/",
    "http://[2002:7f00:1::]:{port}/",
    "http://[2001:0:7f00:1::]:{port}/",
    "http://[2a00:1450::5efe:7f00:1]:{port}/",
    # names that resolve to this computer
    "http://localtest.me:{port}/",
    "http://127.0.0.1.nip.io:{port}/",
    "http://metadata.google.internal:{port}/computeMetadata/v1/",
    "http://public.test.:{port}/",
    "http://bücher.test:{port}/",
    "http://intranet:{port}/",
    # private and link-local addresses, and internal addresses of clouds
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://172.31.255.255/",
    "http://192.168.1.1/",
    "http://100.64.0.1/",
    "http://100.100.100.200/",
    "http://169.254.169.254/latest/meta-data/",
    "http://2852039166/",
    "http://[::ffff:169.254.169.254]/",
    "http://168.63.129.16/",
    "http://192.0.0.192/",
    "http://198.18.0.1/",
    "http://203.0.113.7/",
    "http://224.0.0.1/",
    "http://240.0.0.1/",
    "http://255.255.255.255/",
    "http://[fe80::1]/",
    "http://[fc00::1]/",
    "http://[fd00:ec2::254]/",
    "http://[fec0::1]/",
    "http://[ff02::1]/",
    "http://[2001:db8::1]/",
    # not an address of a page
    "file:///etc/hostname",
    "ftp://public.test/",
    "gopher://127.0.0.1:{port}/",
    "javascript:alert(1)",
    "data:text/html,x",
    "//127.0.0.1:{port}/",
    "127.0.0.1:{port}/",
    "public.test/page",
    "http://",
    "http://user@public.test:{port}/",
    "http://user:password@public.test:{port}/",
    "http://public.test@127.0.0.1:{port}/",
    "http://public.test:0/",
    "http://public.test:99999/",
    "http://public.test%00.evil:{port}/",
    "http://[fe80::1%25eth0]:{port}/",
    "http://public..test:{port}/",
    "http://.:{port}/",
    "http://" + "a" * 64 + ".test:{port}/",
    "http://public.test:{port}/" + "a" * 3000,
    "",
]


@pytest.fixture(scope="module")
def trap() -> Iterator[LoopbackServer]:
    with LoopbackServer({"/": page("secret")}) as running:
        yield running


def resolve_to_loopback(host: str) -> list[IPv4Address]:
    host.encode("idna")  # as the system's resolver does
    return [IPv4Address("127.0.0.1")]


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_address_that_is_not_public_is_refused_without_a_connection(trap: LoopbackServer, attack: str) -> None:
    before = trap.connections
    with pytest.raises(FinalError, match=r"was not (visited|read): "):
        GuardedFetcher(resolver=resolve_to_loopback, deadline=10.0).fetch(attack.format(port=trap.port))
    assert trap.connections == before


def test_the_trap_is_reached_where_the_policy_allows_it(trap: LoopbackServer) -> None:
    before = trap.connections
    guarded = GuardedFetcher(resolver=resolve_to_loopback, address_policy=lambda address: True)
    assert guarded.fetch(f"http://localtest.me:{trap.port}/").body == b"secret"
    assert trap.connections == before + 1


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file:///etc/hostname", "only http:// and https:// addresses"),
        ("ftp://public.test/", "only http:// and https:// addresses"),
        ("/page", "no scheme; write the full address, beginning with https://"),
        ("http://127.0.0.1", "127.0.0.1 is not a public address"),
        ("http://169.254.169.254", "169.254.169.254 is not a public address"),
        ("http://localhost", "its host is this computer"),
        ("http://user:password@public.test/", "user name or password"),
        ("http://public.test:0/", "its port is 0"),
    ],
)
def test_a_refusal_names_the_address_and_the_cause(url: str, words: str) -> None:
    with pytest.raises(FinalError, match=re.escape(words)) as refused:
        GuardedFetcher(resolver=resolve_to_loopback).fetch(url)
    assert url in str(refused.value)


def test_refusal_does_not_reveal_the_resolved_address() -> None:
    with pytest.raises(FinalError, match=r"localtest\.me is not a public address") as refused:
        GuardedFetcher(resolver=resolve_to_loopback).fetch("http://localtest.me/")
    assert "127.0.0.1" not in str(refused.value)


@pytest.mark.parametrize(
    "address",
    [
        *("8.8.8.8", "1.1.1.1", "93.184.216.34", "172.32.0.1", "100.128.0.1", "168.63.129.17"),
        *("2606:4700:4700::1111", "2001:4860:4860::8888", "2a00:1450:4001::1", "64:ff9b::8.8.8.8", "::ffff:8.8.8.8"),
    ],
)
def test_public_addresses_pass(address: str) -> None:
    assert is_public(ip_address(address))
