"""What our HTTP servers share: bounded bodies, timeouts, JSON errors, quiet logs. The standard library's threads serve."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

READ_TIMEOUT = 30.0
"""Seconds a client may take between two pieces of its request."""


class Server(ThreadingHTTPServer):
    """A thread per connection; connections end with the process."""

    daemon_threads = True
    request_queue_size = 128

    @property
    def url(self) -> str:
        """Where clients find it."""
        host = str(self.server_address[0])
        return f"http://[{host}]:{self.server_address[1]}" if ":" in host else f"http://{host}:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """Answers with whole bodies. A refusal closes the connection: its unread body would be taken for the next request."""

    timeout = READ_TIMEOUT
    protocol_version = "HTTP/1.1"
    server_version = "mmalign"
    sys_version = ""
    always: Mapping[str, str] = {}
    """Headers of every answer."""

    def body(self, limit: int) -> bytes | None:
        """The request's body, or None after it was refused (no length, longer than `limit` bytes, or cut short)."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or self.headers.get("Transfer-Encoding") is not None:
            self.refuse(411, "Content-Length is required")
        elif len(length) > 12 or int(length) > limit:
            self.refuse(413, f"the body may have {limit} bytes")
        else:
            data = self.rfile.read(int(length))
            if len(data) == int(length):
                return data
            self.refuse(400, "the body is shorter than its Content-Length")
        return None

    def refuse(self, code: int, message: str) -> None:
        """Answer with an error, and close."""
        self.close_connection = True
        self.answer(code, json.dumps({"error": message}).encode())

    def answer(self, code: int, body: bytes, *, kind: str = "application/json", more: Mapping[str, str] | None = None) -> None:
        """Answer with a body of some media type."""
        self.send_response(code)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), **self.always, **(more or {})}
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: thousands of requests are usual."""
