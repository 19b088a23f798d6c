"""What our HTTP servers share: bounded bodies, timeouts, JSON errors, quiet logs. The standard library's threads serve.

Clients that send slowly, or nothing, cost nobody else anything: there is a time by which a request must have come, and where all
places are taken, the one of them that has been waited for longest gives way to a newcomer.
"""

from __future__ import annotations

import contextlib
import io
import json
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

READ_TIMEOUT = 30.0
"""Seconds a client may take for the head of a request, and between two pieces of a body or of an answer that it reads."""
BODY_TIMEOUT = 120.0
"""Seconds a client may take for a whole body."""
BODY_GRACE, SLOWEST = 10.0, 16 * 1024
"""Seconds, and bytes a second: a body may take so long, and a second more for so many bytes that have come."""
MAX_CONNECTIONS = 256
"""Clients at a time, a thread each."""
PATIENCE = 1.0
"""Seconds that a newcomer is kept for a place, before it is hung up on."""
MAX_HELD = 1024 * 1024 * 1024
"""Bytes of all bodies in memory at a time; clients that would exceed it are told to come back."""
PIECE = 1 << 16


@dataclass(slots=True, eq=False)
class Pace:
    """How a client sends: what decides who gives way."""

    since: float = field(default_factory=time.monotonic)
    """When this request began to be read."""
    received: int = 0
    """Bytes since then."""
    is_reading: bool = True
    until: float = 0.0
    """When reading ends, whatever has come."""

    def restart(self, seconds: float) -> None:
        """Another request, or its body, has `seconds` from now."""
        self.since, self.received, self.is_reading = time.monotonic(), 0, True
        self.until = self.since + seconds

    def is_slow(self, now: float) -> bool:
        """Whether it is being waited for."""
        return self.is_reading and self.received < SLOWEST * (now - self.since)


class Server(ThreadingHTTPServer):
    """A thread per connection; connections end with the process."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._lock = threading.Lock()
        self._paces: dict[Any, Pace] = {}
        self._held = 0

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the client, if there is a place for it or somebody gives way."""
        if self._places.acquire(blocking=False) or self._make_place():
            with self._lock:
                self._paces[request] = Pace()
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The client's thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._paces.pop(request, None)
            self._places.release()

    def pace(self, request: Any) -> Pace:
        """How the client behind a socket sends."""
        with self._lock:
            return self._paces[request]

    def hold(self, count: int) -> bool:
        """Take memory for bytes of a body, if there is room; negative to give it back."""
        with self._lock:
            if count > 0 and self._held + count > MAX_HELD:
                return False
            self._held += count
            return True

    def _make_place(self) -> bool:
        """Have a slow client give way, or wait a moment for one that has its answer and is leaving; whether a place was taken."""
        until, gives_way = time.monotonic() + PATIENCE, False
        while True:
            gives_way = gives_way or self._hang_up()
            left = until - time.monotonic()
            if self._places.acquire(timeout=max(0.0, min(left, PATIENCE / 20))):
                return True
            if left <= 0:
                return False

    def _hang_up(self) -> bool:
        """Hang up on the slow client that has been waited for longest; False if there is none."""
        now = time.monotonic()
        with self._lock:
            slow = [(pace.since, request, pace) for request, pace in self._paces.items() if pace.is_slow(now)]
            if not slow:
                return False
            _, request, pace = min(slow, key=lambda item: item[0])
            pace.is_reading = False  # nobody gives way twice
        with contextlib.suppress(OSError):  # it may be gone by itself
            request.shutdown(socket.SHUT_RDWR)
        return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no news; everything else is told on standard error."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Where clients find it."""
        host = str(self.server_address[0])
        return f"http://[{host}]:{self.server_address[1]}" if ":" in host else f"http://{host}:{self.server_address[1]}"


class _Wire(io.RawIOBase):
    """A client's bytes, until its time is over."""

    def __init__(self, connection: Any, pace: Pace) -> None:
        self._connection, self._pace = connection, pace

    def readable(self) -> bool:
        return True

    def readinto(self, room: Any) -> int:
        left = self._pace.until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request took too long")
        self._connection.settimeout(min(left, READ_TIMEOUT))
        count: int = self._connection.recv_into(room)
        self._pace.received += count
        return count


class Handler(BaseHTTPRequestHandler):
    """Answers with whole bodies. A refusal closes the connection: its unread body would be taken for the next request."""

    timeout = READ_TIMEOUT
    protocol_version = "HTTP/1.1"
    server_version = "mmalign"
    sys_version = ""
    always: Mapping[str, str] = {}
    """Headers of every answer."""
    server: Server

    def setup(self) -> None:
        """Read by way of `_Wire`."""
        super().setup()
        self.rfile.close()
        self.pace = self.server.pace(self.request)
        self.rfile = io.BufferedReader(_Wire(self.connection, self.pace))
        self._holds, self._is_unread = 0, False

    def handle_one_request(self) -> None:
        """One request; what its body holds is given back afterwards."""
        self.pace.restart(READ_TIMEOUT)
        try:
            super().handle_one_request()
        finally:
            self.server.hold(-self._holds)
            self._holds = 0
        if self._is_unread:
            self._read_off()

    def _read_off(self) -> None:
        """Let a refused client send on for a while. Most send the whole body before they read anything: hung up on at once, they
        would know of a broken connection and not of the refusal."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.pace.restart(READ_TIMEOUT)
            while self.rfile.read1(PIECE):
                pass

    def parse_request(self) -> bool:
        """The head has come as far as there is one."""
        known = super().parse_request()
        self.pace.is_reading = False
        if known:
            length = self.headers.get("Content-Length", "0").strip()
            self._is_unread = length.strip("0") != "" or "Transfer-Encoding" in self.headers
        return known

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
        pieces, left = [], length
        self.pace.restart(min(BODY_GRACE, BODY_TIMEOUT))
        try:
            while left and (piece := self.rfile.read1(min(left, PIECE))):
                if not self.server.hold(len(piece)):
                    self.refuse(503, "too many requests are waiting")
                    return None
                self._holds += len(piece)
                pieces.append(piece)
                left -= len(piece)
                self.pace.until = self.pace.since + min(BODY_GRACE + (length - left) / SLOWEST, BODY_TIMEOUT)
        except TimeoutError:
            self.refuse(408, "the body took too long")
            return None
        finally:
            self.pace.is_reading = False
        self._is_unread = False
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
        self.connection.settimeout(READ_TIMEOUT)
        self.send_response(code)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), **self.always, **(more or {})}
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses, in our form: methods that there are not are the client's fault."""
        self.command = getattr(self, "command", None) or "GET"
        if getattr(self, "request_version", "HTTP/0.9") == "HTTP/0.9":
            self.request_version = "HTTP/1.0"  # an answer without a status line would tell nothing
        self.refuse(405 if code == 501 else code, message or "this is no request")

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: thousands of requests are usual."""
