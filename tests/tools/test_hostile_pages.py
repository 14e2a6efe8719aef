"""The live web's real fetcher against hostile pages, with its real address check.

The check refuses loopback, so this test gives a public address to a network namespace: a network of its own, without a
way to the internet. In the namespace, this file runs as a program that serves the hostile pages and fetches them.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from harness import environment
from web_servers import Answer, LoopbackServer, endless, page, redirect

from nexum_engine.errors import FinalError
from support.tools.web import WebError
from support.tools.web.fetch import MAX_BYTES, MAX_REDIRECTS, GuardedFetcher
from support.tools.web.hosts import VARIABLE
from support.tools.web.live import LiveWeb

PUBLIC = "8.8.4.4"
METADATA = "169.254.169.254"  # where clouds give programs their keys
NAME = "public-looking.example"  # the namespace's hosts file gives it the address 127.0.0.1
TRAPS = {"127.0.0.1": "127.0.0.1", NAME: "127.0.0.1", METADATA: METADATA}
"""The hosts of the redirects that must be refused, and the addresses of the servers behind them."""
SHORT_DEADLINE = 0.5  # seconds
MEMORY = 20_000_000  # bytes that one fetch may use: far more than a body's limit, far less than the bomb holds
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n"


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace with a public address, the address of a cloud's metadata, and a hosts file of its own."""
    if sys.platform == "win32" or os.geteuid() != 0:
        pytest.skip("only root can make a network namespace")
    if shutil.which("ip") is None:
        pytest.skip("making a network namespace needs the program ip (package iproute2)")
    name = f"nexum-{uuid.uuid4().hex[:12]}"
    folder = Path("/etc/netns", name)  # `ip netns exec` puts the files of this folder in the place of those in /etc
    try:
        try:
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 {NAME}\n")
        except OSError as error:
            pytest.skip(f"no hosts file can be made for a network namespace: {error}")
        for command in (
            ["netns", "add", name],
            ["-n", name, "link", "set", "lo", "up"],
            ["-n", name, "addr", "add", f"{PUBLIC}/32", "dev", "lo"],
            ["-n", name, "addr", "add", f"{METADATA}/32", "dev", "lo"],
            ["netns", "exec", name, "true"],
        ):
            done = subprocess.run(["ip", *command], capture_output=True, text=True, timeout=10)
            if done.returncode != 0:
                pytest.skip(f"no network namespace can be made here: {done.stderr.strip()}")
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=10)
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # other namespaces may have files there
            folder.parent.rmdir()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has network namespaces")
def test_hostile_pages_are_refused_or_cut(namespace: str) -> None:
    program = ["ip", "netns", "exec", namespace, sys.executable, str(Path(__file__).resolve())]
    variables = environment({"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    variables.pop(VARIABLE, None)  # a list of allowed hosts would refuse the pages before the address check
    done = subprocess.run(program, env=variables, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    found = {line.pop("case"): line for line in map(json.loads, done.stdout.splitlines())}

    for outcome in found.values():
        assert outcome["memory"] < MEMORY
        assert "\n" not in outcome.get("error", "")
    good = found.pop("good")
    assert (good["text"], good["truncated"]) == ("hello", False)
    cut = found.pop("endless")
    assert (cut["size"], cut["truncated"]) == (MAX_BYTES, True)
    for host in TRAPS:
        # First the real check, then the same redirect without it, which shows that the trap can be reached.
        refused, unchecked = found.pop(host), found.pop(f"{host} unchecked")
        assert refused.get("kind") == "FinalError", f"the redirect to {host} was followed: {refused}"
        assert f"{host} is not a public address" in refused["error"]
        assert refused["connections"] == 0
        assert (unchecked["text"], unchecked["connections"]) == ("secret", 1)
    errors = {
        "bomb": ("FinalError", "compression bomb"),
        "giant-header": ("WebError", "could not be read"),
        "endless-header": ("WebError", f"longer than {SHORT_DEADLINE:g} s"),
        "loop": ("FinalError", f"redirects more than {MAX_REDIRECTS} times"),
    }
    assert found.keys() == errors.keys()
    for case, (kind, words) in errors.items():
        assert found[case].get("kind") == kind, found[case]
        assert words in found[case]["error"]
    assert found["loop"]["connections"] == MAX_REDIRECTS + 1
    assert found["endless-header"]["seconds"] < 10 * SHORT_DEADLINE


def run_cases() -> None:
    """Serve the hostile pages, fetch each of them, and print each outcome as a line of JSON."""
    answers: dict[str, Answer] = {
        "/good": page("hello"),
        "/endless": endless(HEAD + b"\r\n", b"x" * 10_000),
        "/bomb": page(gzip.compress(b"\0" * 100_000_000), content_encoding="gzip"),
        "/giant-header": endless(HEAD + b"x: ", b"x" * 10_000),
        "/endless-header": endless(HEAD + b"x: ", b"x", pause=0.05),
        "/loop": redirect("/loop"),
    }
    web = LiveWeb()
    hasty = LiveWeb(GuardedFetcher(deadline=SHORT_DEADLINE))
    unchecked = LiveWeb(GuardedFetcher(address_policy=lambda address: True))
    with ExitStack() as servers:
        server = servers.enter_context(LoopbackServer(answers, address=PUBLIC))
        for path in answers:
            report(path[1:], hasty if path == "/endless-header" else web, server, path, server)
        for host, address in TRAPS.items():
            trap = servers.enter_context(LoopbackServer({"/": page("secret")}, address=address))
            server.answers[f"/{host}"] = redirect(f"http://{host}:{trap.port}/")
            report(host, web, server, f"/{host}", trap)
            report(f"{host} unchecked", unchecked, server, f"/{host}", trap)


def report(case: str, web: LiveWeb, server: LoopbackServer, path: str, counted: LoopbackServer) -> None:
    """Fetch a page and print the outcome, with the number of connections that the fetch made to `counted`."""
    before, begin = counted.connections, time.monotonic()
    tracemalloc.start()
    outcome: dict[str, object]
    try:
        found = web.fetch(f"http://{PUBLIC}:{server.port}{path}")
        outcome = {"text": found.body[:20].decode(), "size": len(found.body), "truncated": found.truncated}
    except (FinalError, WebError) as error:
        outcome = {"kind": type(error).__name__, "error": str(error)}
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    seconds = time.monotonic() - begin
    connections = counted.connections - before
    print(json.dumps({"case": case, "memory": memory, "seconds": seconds, "connections": connections, **outcome}))


if __name__ == "__main__":
    run_cases()
