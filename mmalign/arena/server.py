"""The arena over HTTP, for browsers on this machine.

Only requests that a page of this server could have made are answered: the Host must be this server under a name that cannot be
rebound, the Origin (which browsers always send along with a POST) must be that host, and bodies are small JSON. Nothing is
loaded from elsewhere and no address holds a path.
"""

from __future__ import annotations

import ipaddress
import json
import threading
from collections.abc import Collection, Mapping
from importlib import resources
from typing import Any

from mmalign.arena.asking import Refused
from mmalign.arena.catalogue import servable
from mmalign.arena.voting import Voting
from mmalign.errors import MmalignError
from mmalign.media import MediaError
from mmalign.serving import Handler, Server

MAX_BODY = 16 * 1024
MAX_AT_ONCE = 64
"""Connections answered at once; more are told to come back."""
PAGE = {"/": ("index.html", "text/html; charset=utf-8"), "/arena.css": ("arena.css", "text/css; charset=utf-8"),
        "/arena.js": ("arena.js", "text/javascript; charset=utf-8"), "/icon.svg": ("icon.svg", "image/svg+xml")}  # fmt: skip
POLICY = (
    "default-src 'none'; img-src 'self'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


class ArenaServer(Server):
    """Serves one `Voting`.

    Args:
        address: host and port; port 0 picks a free one.
        names: host names, besides those of this machine itself, under which browsers may find it.
    """

    def __init__(self, voting: Voting, address: tuple[str, int], *, names: Collection[str] = ()) -> None:
        self.voting = voting
        self.names = {name.lower() for name in names}
        self.room = threading.BoundedSemaphore(MAX_AT_ONCE)
        super().__init__(address, _Handler)
        self.loopback = _is_loopback(str(self.server_address[0]))
        self.files = {path: (_page_file(name), kind) for path, (name, kind) in PAGE.items()}

    def knows_host(self, header: str) -> bool:
        """Whether a Host header is this server's own address. A name is taken only where it was stated, so that no name that
        somebody else points here reaches it."""
        host, port = _split_host(header)
        if port != self.server_address[1] and not (port is None and self.server_address[1] == 80):
            return False
        if host == "localhost" or host in self.names:
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return address.is_loopback or not self.loopback


class _Handler(Handler):
    server: ArenaServer
    always: Mapping[str, str] = {
        "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin",
        "X-Frame-Options": "DENY",
    }  # fmt: skip

    def do_GET(self) -> None:
        with _Room(self) as free:
            if free and self._from_us():
                self._get(self.path.partition("?")[0])

    do_HEAD = do_GET

    def do_POST(self) -> None:
        with _Room(self) as free:
            if not free or not self._from_us():
                return
            voting = self.server.voting
            actions = {"/api/next": voting.next, "/api/vote": voting.vote, "/api/undo": voting.undo,
                       "/api/personalise": voting.offer.start, "/api/personalised": voting.offer.state}  # fmt: skip
            action = actions.get(self.path)
            if action is None:
                self.refuse(404, "there is nothing here")
                return
            if self.headers.get_content_type() != "application/json":
                self.refuse(415, "the body is JSON")
                return
            body = self.body(MAX_BODY)
            if body is not None:
                self._act(action, body)

    def _act(self, action: Any, body: bytes) -> None:
        try:
            request = json.loads(body)
            if not isinstance(request, dict):
                raise ValueError
            json.dumps(request, ensure_ascii=False).encode("utf-8")  # halves of surrogate pairs end here
        except (ValueError, RecursionError):
            self.refuse(400, "the body is not a JSON object")
            return
        try:
            said = action(request)
        except Refused as error:
            self.refuse(error.code, str(error))
        except (MmalignError, OSError) as error:  # a full disk, a folder that is gone: the page keeps the vote and asks again
            self.refuse(503, str(error))
        else:
            self._json(said)

    def _get(self, path: str) -> None:
        if path in self.server.files:
            data, kind = self.server.files[path]
            self.answer(200, data, kind=kind, more={"Cache-Control": "no-cache"})
        elif path.startswith("/media/"):
            self._media(path.removeprefix("/media/"))
        else:
            self.refuse(404, "there is nothing here")

    def _media(self, key: str) -> None:
        voting = self.server.voting
        picture = voting.catalogue.picture(key) or voting.offer.picture(key)
        if picture is None:
            self.refuse(404, "there is no such picture")
            return
        try:
            data, kind = servable(picture.open(), picture.origin)
        except (MediaError, MmalignError, OSError):
            self.refuse(410, "the picture can no longer be read")
            return
        self.answer(200, data, kind=kind, more={"Cache-Control": "private, max-age=3600"})

    def _from_us(self) -> bool:
        """Refuse what no page of this server would send."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not self.server.knows_host(hosts[0]):
            self.refuse(403, "this host name is not known here; open the address that the arena printed")
            return False
        origin = self.headers.get("Origin")
        if origin is not None and origin.lower() != f"http://{hosts[0].lower()}":
            self.refuse(403, "another site may not ask here")
            return False
        if self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            self.refuse(403, "another site may not ask here")
            return False
        return True

    def _json(self, value: Any) -> None:
        self.answer(200, json.dumps(value, ensure_ascii=False).encode(), more={"Cache-Control": "no-store"})


class _Room:
    """A place among those answered at once; without one the request is refused."""

    def __init__(self, handler: _Handler) -> None:
        self.handler, self.got = handler, False

    def __enter__(self) -> bool:
        self.got = self.handler.server.room.acquire(blocking=False)
        if not self.got:
            self.handler.refuse(503, "too many requests at once")
        return self.got

    def __exit__(self, *_: object) -> None:
        if self.got:
            self.handler.server.room.release()


def _is_loopback(host: str) -> bool:
    return host == "localhost" or ipaddress.ip_address(host).is_loopback


def _split_host(header: str) -> tuple[str, int | None]:
    """Host and port of a Host header; an IPv6 address loses its brackets."""
    text = header.strip().lower()
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":") if rest.startswith(":") else ""
    else:
        host, _, port = text.partition(":")
    return host, int(port) if port.isdecimal() and len(port) < 6 else (None if not port else -1)


def _page_file(name: str) -> bytes:
    return resources.files("mmalign.arena").joinpath("page", name).read_bytes()
