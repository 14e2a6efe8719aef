"""TLS between clients and servers, over real sockets: which clients can connect, and which errors the others get."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import FORMER, TOKENS, USE, Certificates, private_file
from harness import ROOT, logged, running
from server_thread import Secured, server_thread, use

from nexum_engine.__main__ import main
from nexum_engine.client import NexumClient
from nexum_engine.embedded import EmbeddedNexum
from nexum_engine.errors import AccessDenied, InvalidRequest, TokenRefused
from nexum_engine.owner import Owner
from nexum_engine.security import Security
from nexum_engine.worker import Binding, TaskContext, Worker
from nexum_engine.workflow import workflow

PROMPT = 5.0  # seconds
ONE = workflow("one").effect("a").build()


# ---- Each obstacle is one clear line ---------------------------------------------------------------------------------

CLIENTS = {
    "ps": ["-m", "nexum_engine", "ps"],
    "worker": [str(ROOT / "worker.py")],
}
OBSTACLES = {
    "wrong CA": "was refused (unable to get local issuer certificate): NEXUM_TLS_CA must name the file",
    "only system CAs": "was refused (unable to get local issuer certificate): NEXUM_TLS_CA must name the file",
    "expired certificate": "was refused (certificate has expired): renew it",
    "another name": "certificate is not valid for '127.0.0.2'): connect to a name that is in it",
    "server without TLS": "does not speak TLS: start it with --tls-cert and --tls-key, or unset NEXUM_TLS_CA",
    "client without TLS": "speaks TLS: set NEXUM_TLS_CA to the file with its CA certificate",
    "no token": "refuses the call: it has no token: set NEXUM_TOKEN_FILE or NEXUM_TOKEN",
    "wrong token": "refuses the call: the server doesn't know its token: set NEXUM_TOKEN_FILE or NEXUM_TOKEN",
}


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The addresses of two more servers: one with an expired certificate, and one without TLS."""
    folders = [tmp_path_factory.mktemp(name) for name in ("expired", "plain")]
    expired = Certificates(folders[0]).server_tls(expired=True)
    with server_thread(folders[0], tls=expired) as one, server_thread(folders[1]) as other:
        yield {"expired": f"localhost:{one.port}", "plain": f"localhost:{other.port}"}


def obstacle(name: str, secured: Secured, others: dict[str, str]) -> dict[str, str]:
    """Return settings with which this obstacle keeps a client from the server."""
    env = secured.env(USE)
    if name == "wrong CA":
        env["NEXUM_TLS_CA"] = secured.certificates.other_ca
    elif name == "only system CAs":
        env["NEXUM_TLS_CA"] = "system"
    elif name == "expired certificate":
        env["NEXUM_ADDRESS"] = others["expired"]
    elif name == "another name":
        env["NEXUM_ADDRESS"] = f"127.0.0.2:{secured.server.port}"
    elif name == "server without TLS":
        env["NEXUM_ADDRESS"] = others["plain"]
    elif name == "client without TLS":
        del env["NEXUM_TLS_CA"]
    elif name == "no token":
        env["NEXUM_TOKEN"] = ""
    else:
        env["NEXUM_TOKEN"] = FORMER
    return env


@pytest.mark.every_python
@pytest.mark.parametrize("name", OBSTACLES)
async def test_client_names_the_obstacle_and_the_next_step(
    name: str, secured: Secured, others: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = use(monkeypatch, obstacle(name, secured, others))
    began = time.monotonic()
    async with NexumClient(address) as client:
        # `patience` must not make the client retry what a retry can't fix.
        with pytest.raises(AccessDenied) as caught:
            await client.ping(patience=60)
        with pytest.raises(AccessDenied):
            await anext(client.backup(tmp_path / "copy.db"))
        with pytest.raises(AccessDenied):
            async with Owner(client):
                pass
        with pytest.raises(AccessDenied):
            await Worker(client, [Binding(ONE, {"a": never})]).run(asyncio.Event())
    assert OBSTACLES[name] in str(caught.value)
    assert address in str(caught.value)
    assert time.monotonic() - began < 3 * PROMPT


async def never(task: TaskContext) -> None:
    raise AssertionError("no task may come")


@pytest.mark.parametrize(
    ("program", "name"),
    [("worker", "wrong CA"), ("ps", "expired certificate"), ("worker", "no token")],
)
def test_program_ends_with_one_line(
    program: str, name: str, secured: Secured, others: dict[str, str], tmp_path: Path
) -> None:
    with running(CLIENTS[program], cwd=tmp_path, env=obstacle(name, secured, others)) as process:
        assert process.wait(20) == 2
    (line,) = process.lines
    assert line.startswith("error: ")
    assert OBSTACLES[name] in line


def test_token_is_not_sent_in_plaintext_to_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUM_TOKEN", USE)
    for address in ("192.0.2.1:5", "example.com:5", "localhost:5,example.com:5", "[2001:db8::1]:5"):
        with pytest.raises(InvalidRequest, match="in plaintext: set NEXUM_TLS_CA"):
            NexumClient(address)
    for address in ("localhost:5", "127.0.0.1:5,127.9.9.9:6", "[::1]:5"):
        NexumClient(address)


async def test_token_is_not_sent_to_a_server_that_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUM_TOKEN", USE)
    monkeypatch.delenv("NEXUM_ADDRESS", raising=False)
    with server_thread(tmp_path):
        async with NexumClient(str(tmp_path / "nexum.db")) as client:
            await client.ping()
            assert client.connection.route().security is None


async def test_run_sends_no_token_to_a_server_on_the_default_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secured: Secured
) -> None:
    for name in ("NEXUM_ADDRESS", "DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NEXUM_TOKEN", USE)
    monkeypatch.setenv("NEXUM_TLS_CA", str(secured.certificates.ca))
    (tmp_path / "own").mkdir()
    monkeypatch.chdir(tmp_path / "own")
    with server_thread(tmp_path) as server:
        for module in ("connection", "host"):
            monkeypatch.setattr(f"nexum_engine.{module}.DEFAULT_ADDRESS", server.address)
        async with EmbeddedNexum(None) as nexum, NexumClient(nexum.address) as client:
            await client.ping()
            route = client.connection.route()
            assert (route.target, route.security) == (server.address, Security())


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"NEXUM_TLS_CA": "{missing}"}, "NEXUM_TLS_CA {missing} can't be read: No such file"),
        ({"NEXUM_TLS_CA": "{key}"}, "NEXUM_TLS_CA names a file without certificates in PEM format"),
        ({"NEXUM_TLS_CA": "{ca}", "NEXUM_TLS_CERT": "{cert}"}, "NEXUM_TLS_CERT and NEXUM_TLS_KEY belong together"),
        ({"NEXUM_TLS_CERT": "{cert}", "NEXUM_TLS_KEY": "{key}"}, "NEXUM_TLS_CERT needs TLS: set NEXUM_TLS_CA"),
        (
            {"NEXUM_TLS_CA": "{ca}", "NEXUM_TLS_CERT": "{ca}", "NEXUM_TLS_KEY": "{key}"},
            "NEXUM_TLS_CERT {ca} and the key",
        ),
        (
            {"NEXUM_TLS_CA": "{ca}", "NEXUM_TLS_CERT": "{cert}", "NEXUM_TLS_KEY": "{ca}"},
            "NEXUM_TLS_KEY {ca} is open to",
        ),
        ({"NEXUM_TOKEN": "x", "NEXUM_TOKEN_FILE": "{key}"}, "NEXUM_TOKEN and NEXUM_TOKEN_FILE are both set"),
        ({"NEXUM_TOKEN_FILE": "{key}"}, "NEXUM_TOKEN_FILE {key} is not one token"),
        ({"NEXUM_TOKEN_FILE": "{ca}"}, "NEXUM_TOKEN_FILE {ca} is open to other users"),
        ({"NEXUM_TOKEN": "two words"}, "NEXUM_TOKEN is not one token"),
    ],
)
def test_wrong_setting_of_a_client_is_named(
    env: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.platform == "win32" and "is open to" in message:
        pytest.skip("Windows has no file modes")
    certificates = Certificates(tmp_path)
    certificate, key = certificates.issue("client", "client")
    Path(certificates.ca).chmod(0o644)
    names = {"missing": str(tmp_path / "missing"), "ca": certificates.ca, "cert": certificate, "key": key}
    for name, value in env.items():
        monkeypatch.setenv(name, value.format(**names))
    with pytest.raises(InvalidRequest) as caught:
        NexumClient("localhost:5")
    assert str(caught.value).startswith(message.format(**names))


# ---- The server's certificates ---------------------------------------------------------------------------------------


async def test_client_certificate_is_required_if_the_server_names_its_ca(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificates = Certificates(tmp_path)
    with server_thread(tmp_path, tls=certificates.server_tls(client_ca=certificates.other_ca)) as server:
        address = f"localhost:{server.port}"
        monkeypatch.setenv("NEXUM_TLS_CA", certificates.ca)
        async with NexumClient(address) as client:
            with pytest.raises(AccessDenied, match=r"wants a client certificate: set NEXUM_TLS_CERT"):
                await client.ping()
        for by, is_accepted in (("ours", False), ("other", True)):
            certificate, key = certificates.issue(by, "client", by=by)
            monkeypatch.setenv("NEXUM_TLS_CERT", certificate)
            monkeypatch.setenv("NEXUM_TLS_KEY", key)
            async with NexumClient(address) as client:
                if is_accepted:
                    await client.ping()
                else:
                    with pytest.raises(AccessDenied, match="refuses this client's certificate"):
                        await client.ping()


async def test_changed_certificate_is_used_for_new_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificates = Certificates(tmp_path)
    errors: list[str] = []
    with server_thread(tmp_path, tls=certificates.server_tls()) as server:
        monkeypatch.setenv("NEXUM_TLS_CA", certificates.ca)
        async with NexumClient(f"localhost:{server.port}") as client:
            await client.ping()
        certificates.server_tls(by="other")
        if sys.platform != "win32":
            # Give the key's file a wrong mode, and correct the mode after the server has reported it. The server must
            # notice the correction, although it changes neither the file's text nor its time.
            key = tmp_path / "server.key"
            key.chmod(0o644)
            with logged(errors, "nexum_engine.server.tls"):
                async with NexumClient(f"localhost:{server.port}") as client:
                    await client.ping()
            assert f"run chmod 600 {key}" in errors[0]
            key.chmod(0o600)
        monkeypatch.setenv("NEXUM_TLS_CA", certificates.other_ca)
        async with NexumClient(f"localhost:{server.port}") as client:
            await client.ping()


async def test_forked_process_speaks_tls_and_sends_its_token(secured: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a forked process, a client uses another kind of channel. The test sets the flag for it instead of forking."""
    address = use(monkeypatch, secured.env(USE))
    monkeypatch.setattr("nexum_engine.channel._is_forked", True)
    async with NexumClient(address) as client:
        await client.ping()
        monkeypatch.setenv("NEXUM_TOKEN", FORMER)
        async with NexumClient(address) as other:
            with pytest.raises(TokenRefused):
                await other.ping()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--listen", "0.0.0.0:0", "{tls}"], "refusing to listen on 0.0.0.0:0: without TLS and tokens"),
        (["--listen", "0.0.0.0:0", "--tokens", "{tokens}"], "refusing to listen on 0.0.0.0:0: without TLS and tokens"),
        (
            ["--listen", "localhost.:0", "{tls}", "--tokens", "{tokens}"],
            "refusing to listen on localhost.:0: give an IP",
        ),
        (["--tls-cert", "{cert}"], "TLS needs both --tls-cert and --tls-key"),
        (["--tls-client-ca", "{cert}"], "TLS needs both --tls-cert and --tls-key"),
        (["--tls-cert", "{cert}", "--tls-key", "{tokens}"], "are not a certificate and its key in PEM format"),
        (["--tls-cert", "{cert}", "--tls-key", "{cert}"], "the key {cert} is open to other users"),
        (["--tls-cert", "missing", "--tls-key", "{key}"], "the certificate missing can't be read: No such file"),
        (["{tls}", "--tls-client-ca", "{tokens}"], "--tls-client-ca names a file without certificates in PEM format"),
        (["--tokens", "missing"], "the token file missing can't be read: No such file"),
    ],
)
def test_server_names_a_wrong_setting(
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if sys.platform == "win32" and "is open to" in message:
        pytest.skip("Windows has no file modes")
    monkeypatch.setattr("nexum_engine.signals.stop_event", asyncio.Event)
    certificates = Certificates(tmp_path)
    certificate, key = certificates.issue("server", "localhost")
    Path(certificate).chmod(0o644)
    names = {"cert": certificate, "key": key, "tokens": private_file(tmp_path / "tokens", TOKENS)}
    arguments = []
    for option in options:
        arguments += ["--tls-cert", certificate, "--tls-key", key] if option == "{tls}" else [option.format(**names)]
    assert main([*arguments, "--database-url", f"sqlite:///{tmp_path / 'nexum.db'}"]) == 1
    assert message.format(**names) in capsys.readouterr().err


def test_server_reads_its_settings_from_the_environment(tmp_path: Path) -> None:
    certificate, key = Certificates(tmp_path).issue("server", "localhost")
    env = {
        "NEXUM_SERVER_TLS_CERT": certificate,
        "NEXUM_SERVER_TLS_KEY": key,
        "NEXUM_SERVER_TOKENS": private_file(tmp_path / "tokens", TOKENS),
    }
    with running(["-m", "nexum_engine", "--listen", "0.0.0.0:0"], cwd=tmp_path, env=env) as process:
        process.wait_for("Nexum engine")
