"""An OpenAI-compatible HTTP server on loopback, for tests. It logs its requests.

with OpenAIServer([Reply(calls=[("web_search", {"query": "x"})]), Reply("done")]) as server:
    ...  # server.base_url, server.requests
"""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Reply:
    """A model's reply: a text, or tool calls."""

    text: str = ""
    calls: Sequence[tuple[str, dict[str, Any]]] = ()
    status: int = 200
    location: str = ""  # for a redirect


@dataclass(frozen=True)
class Request:
    """A request to the server; header names are in lower case."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


Responder = Callable[[dict[str, Any]], Reply]


@dataclass
class OpenAIServer:
    """A server that answers from a script (its last entry repeats), or with a function of the request's body."""

    replies: Sequence[Reply] | Responder = (Reply("ok"),)
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> "OpenAIServer":
        owner = self
        self._lock = threading.Lock()

        class Handler(_Handler):
            server_state = owner

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    @property
    def keys(self) -> set[str]:
        """The Authorization headers of all requests."""
        return {request.headers.get("authorization", "") for request in self.requests}

    def take(self, request: Request) -> tuple[int, Reply]:
        """Log a request; return its number, from 1, and its reply."""
        with self._lock:
            self.requests.append(request)
            number = len(self.requests)
        if callable(self.replies):
            return number, self.replies(request.body)
        return number, self.replies[min(number, len(self.replies)) - 1]


class _Handler(BaseHTTPRequestHandler):
    server_state: OpenAIServer

    def do_POST(self) -> None:
        with suppress(ConnectionError):  # the client was killed
            self._answer()

    def _answer(self) -> None:
        length = int(self.headers.get("content-length", "0"))
        raw = self.rfile.read(length)
        if len(raw) < length:
            raise ConnectionAbortedError("the client ended before its request did")
        headers = {name.lower(): value for name, value in self.headers.items()}
        body: dict[str, Any] = json.loads(raw)
        number, reply = self.server_state.take(Request(self.path, headers, body))
        if reply.status != 200:
            self._send_json(reply.status, {"error": {"message": "scripted failure"}}, reply.location)
        elif body.get("stream"):
            self._send_stream(list(_chunks(number, body, reply)))
        else:
            self._send_json(200, _completion(number, body, reply))

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: `requests` is the log."""

    def _send_json(self, status: int, content: dict[str, Any], location: str = "") -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        if location:
            self.send_header("location", location)
        self.end_headers()
        self.wfile.write(data)

    def _send_stream(self, chunks: Sequence[dict[str, Any]]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()  # no content-length: in HTTP/1.0, closing the connection ends the body
        for chunk in chunks:
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")


def _tool_calls(number: int, reply: Reply) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{number}_{at}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)},
        }
        for at, (name, arguments) in enumerate(reply.calls, 1)
    ]


def _usage(body: dict[str, Any], reply: Reply) -> dict[str, int]:
    prompt, completion = len(json.dumps(body["messages"]).split()), len(reply.text.split()) + len(reply.calls)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _completion(number: int, body: dict[str, Any], reply: Reply) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.text or None}
    if reply.calls:
        message["tool_calls"] = _tool_calls(number, reply)
    return {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "created": 0,
        "model": f"{body['model']}-as-served",
        "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls" if reply.calls else "stop"}],
        "usage": _usage(body, reply),
    }


def _chunks(number: int, body: dict[str, Any], reply: Reply) -> Iterator[dict[str, Any]]:
    def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{number}",
            "object": "chat.completion.chunk",
            "created": 0,
            "model": f"{body['model']}-as-served",
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        }

    yield chunk({"role": "assistant"})
    for word in reply.text.split(" ") if reply.text else []:
        yield chunk({"content": word + " "})
    for at, call in enumerate(_tool_calls(number, reply)):
        arguments = call["function"]["arguments"]
        half = len(arguments) // 2  # send the arguments in pieces, as vendors' servers do
        yield chunk({"tool_calls": [{**call, "index": at, "function": {**call["function"], "arguments": ""}}]})
        for piece in (arguments[:half], arguments[half:]):
            yield chunk({"tool_calls": [{"index": at, "function": {"arguments": piece}}]})
    yield chunk({}, "tool_calls" if reply.calls else "stop")
    if (body.get("stream_options") or {}).get("include_usage"):
        yield {**chunk({}), "choices": [], "usage": _usage(body, reply)}
