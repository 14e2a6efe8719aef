"""NEXUM_ALLOWED_HOSTS: which pages can be visited, also after redirects."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import ROOT
from loopback_fetcher import fetcher
from processes import run_script
from web_servers import LoopbackServer, page, redirect

from nexum_engine.errors import FinalError, InvalidRequest
from support.tools.web.hosts import AllowedHosts
from support.tools.web.live import LiveWeb


def allowed(text: str, monkeypatch: pytest.MonkeyPatch) -> AllowedHosts:
    monkeypatch.setenv("NEXUM_ALLOWED_HOSTS", text)
    return AllowedHosts.from_environment()


@pytest.mark.parametrize(
    ("text", "host", "is_allowed"),
    [
        ("", "anything.test", True),
        ("a.test", "a.test", True),
        ("a.test", "A.TEST.", True),
        ("A.Test. , b.test", "a.test", True),
        ("a.test,b.test", "c.test", False),
        ("a.test", "www.a.test", False),
        ("a.test", "nota.test", False),
        ("a.test", "a.test.evil.test", False),
        ("*.a.test", "www.a.test", True),
        ("*.a.test", "x.www.a.test", True),
        ("*.a.test", "a.test", False),
        ("*.a.test", "evila.test", False),
        ("bücher.test", "xn--bcher-kva.test", True),
        ("8.8.8.8", "8.8.8.8", True),
    ],
)
def test_host_is_allowed_by_name(text: str, host: str, is_allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = allowed(text, monkeypatch)
    if is_allowed:
        hosts.check(host)
    else:
        with pytest.raises(FinalError, match="is not allowed; NEXUM_ALLOWED_HOSTS allows only"):
            hosts.check(host)


@pytest.mark.parametrize(
    "text", [",", "a.test,", "https://a.test", "a.test:80", "a.test/x", "*", "a.*.test", "a b", "u@a.test"]
)
def test_wrong_list_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUM_ALLOWED_HOSTS", text)
    with pytest.raises(InvalidRequest, match=r"NEXUM_ALLOWED_HOSTS has '.*', which is not a host"):
        LiveWeb()


def test_other_host_and_redirect_to_it_are_refused_before_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved: list[str] = []

    def resolver(host: str) -> list[object]:
        resolved.append(host)
        return fetcher()._resolver(host)  # type: ignore[return-value]

    visitor = fetcher(hosts=allowed("a.test", monkeypatch), resolver=resolver)
    with LoopbackServer({"/": page("text")}) as server:
        server.answers["/away"] = redirect(f"http://b.test:{server.port}/")
        assert visitor.fetch(f"http://a.test:{server.port}/").body == b"text"
        for address in (f"http://b.test:{server.port}/", f"http://a.test:{server.port}/away"):
            with pytest.raises(FinalError) as refused:
                visitor.fetch(address)
            words = "was not read: the host b.test is not allowed; NEXUM_ALLOWED_HOSTS allows only a.test"
            assert str(refused.value) == f"{address!r} {words}"
        assert server.connections == 2
    assert set(resolved) == {"a.test"}


def test_worker_names_a_wrong_list(tmp_path: Path) -> None:
    code, output = run_script(
        [str(ROOT / "worker.py"), "--nexum", "localhost:1"], tmp_path, {"NEXUM_ALLOWED_HOSTS": "*"}
    )
    assert (code, len(output.splitlines())) == (2, 1)
    assert output.startswith("error: NEXUM_ALLOWED_HOSTS has '*', which is not a host")
