"""Loopback servers for the tests of the web tools: real sockets, planned answers, counted connections."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TypeAlias

Answer: TypeAlias = bytes | Callable[[socket.socket], None]


def response(body: bytes | str = b"", status: str = "200 OK", **headers: str) -> bytes:
    """Return a whole HTTP response. `content_type="x"` becomes the header `content-type: x`."""
    body = body.encode() if isinstance(body, str) else body
    lines = {"content_length": str(len(body)), "connection": "close", **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


def page(body: bytes | str, content_type: str = "text/plain; charset=utf-8", **headers: str) -> bytes:
    return response(body, content_type=content_type, **headers)


def redirect(location: str, status: str = "302 Found") -> bytes:
    return response(status=status, location=location)


def endless(head: bytes, piece: bytes, pause: float = 0.0) -> Callable[[socket.socket], None]:
    """Return an answer that sends pieces until the client closes the connection."""

    def answer(connection: socket.socket) -> None:
        gone = threading.Event()
        connection.sendall(head)
        with contextlib.suppress(OSError):
            while not gone.wait(pause):  # `gone` is never set: sendall raises when the client has closed the connection
                connection.sendall(piece)

    return answer


def received(connection: socket.socket) -> bytes:
    """Read a request's head, and the body that comes in the same packets: the tests send only small bodies."""
    data = b""
    while b"\r\n\r\n" not in data and (piece := connection.recv(65536)):
        data += piece
    return data


class LoopbackServer:
    """A server that answers by path. `connections` counts the connections, and `requests` holds the requests."""

    def __init__(
        self, answers: Mapping[str, Answer] | None = None, address: str = "127.0.0.1", tls: ssl.SSLContext | None = None
    ) -> None:
        self.answers = dict(answers or {})
        self.connections = 0
        self.requests: list[bytes] = []
        outer = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                outer.connections += 1
                with contextlib.suppress(OSError):
                    outer.serve(tls.wrap_socket(self.request, server_side=True) if tls else self.request)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            block_on_close = False

        self._server = Server((address, 0), Handler)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def serve(self, connection: socket.socket) -> None:
        with connection:
            request = received(connection)
            self.requests.append(request)
            path = request.split(b" ", 2)[1].decode("latin-1") if request.count(b" ") > 1 else ""
            answer = self.answers.get(path, response(status="404 Not Found"))
            if callable(answer):
                answer(connection)
            else:
                connection.sendall(answer)

    def __enter__(self) -> LoopbackServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
