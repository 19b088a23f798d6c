"""What our HTTP servers share: bounded bodies, timeouts, JSON errors, quiet logs. The standard library's threads serve."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

READ_TIMEOUT = 30.0
"""Seconds a client may take between two pieces of its request."""
BODY_TIMEOUT = 120.0
"""Seconds a client may take for a whole body: one that sends a byte now and then must not hold a place for ever."""
MAX_CONNECTIONS = 256
"""Clients at a time, a thread each; further ones are hung up on."""
PIECE = 1 << 16


class Server(ThreadingHTTPServer):
    """A thread per connection; connections end with the process."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the client, if there is a place for it."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The client's thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no news; everything else is told on standard error."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

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
            return self._read(int(length))
        return None

    def _read(self, length: int) -> bytes | None:
        pieces, left, until = [], length, time.monotonic() + BODY_TIMEOUT
        while left and (piece := self.rfile.read1(min(left, PIECE))):
            pieces.append(piece)
            left -= len(piece)
            if left and time.monotonic() > until:
                self.refuse(408, f"the body took longer than {BODY_TIMEOUT:g} seconds")
                return None
        if left:
            self.refuse(400, "the body is shorter than its Content-Length")
            return None
        return b"".join(pieces)

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
