"""What the page offers after a few choices: pictures for this person, made here when a run was named, else the command."""

from __future__ import annotations

import hashlib
import shlex
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmalign.arena.asking import Refused, user_name
from mmalign.arena.catalogue import Picture
from mmalign.errors import MmalignError
from mmalign.media import read_bytes
from mmalign.types import ImageRef

Work = Callable[[str], list[tuple[str, Path]]]
"""Makes pictures for a user and returns (prompt, file) of each; raises MmalignError."""


@dataclass(kw_only=True)
class Offer:
    """The offer of one arena.

    Args:
        votes: the folder of votes.
        run: the personalised run, where one was named.
        prompts: prompt file for its pictures.
        work: makes the pictures; None: the page shows the command only.
    """

    votes: Path
    run: Path | None = None
    prompts: Path | None = None
    work: Work | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _states: dict[str, dict[str, Any]] = field(default_factory=dict)
    _pictures: dict[str, Picture] = field(default_factory=dict)

    def words(self, user: str) -> dict[str, Any]:
        """What the page shows: the command, and whether it can be done here."""
        run = shlex.quote(str(self.run)) if self.run is not None else "RUN"
        prompts = shlex.quote(str(self.prompts)) if self.prompts is not None else "prompts.txt"
        name = shlex.quote(user)
        return {
            "command": f"mmalign personalize {run} --pairs {shlex.quote(str(self.votes))} --user {name} --prompts {prompts}",
            "here": self.work is not None,
        }

    def start(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Begin to make pictures for a user, one user at a time; asked again while it runs, it goes on."""
        user = user_name(request.get("user"))
        if self.work is None:
            raise Refused(409, "no run was named when the arena was started (--run)")
        with self._lock:
            if self._states.get(user, {}).get("state") == "working":
                return self._states[user]
            if any(state["state"] == "working" for state in self._states.values()):
                raise Refused(503, "pictures for somebody else are being made; try again in a moment")
            self._states[user] = {"state": "working", "pictures": []}
        threading.Thread(target=self._make, args=(user,), daemon=True).start()
        return self._states[user]

    def state(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """How far it is: ``none``, ``working``, ``done`` with the pictures' addresses, or ``failed`` with the reason."""
        return self._states.get(user_name(request.get("user")), {"state": "none", "pictures": []})

    def picture(self, key: str) -> Picture | None:
        return self._pictures.get(key)

    def _make(self, user: str) -> None:
        try:
            made = self.work(user) if self.work is not None else []
            shown = []
            for prompt, file in made:
                key = "p" + hashlib.blake2b(str(file).encode(), digest_size=12).hexdigest()
                self._pictures[key] = Picture(key, file.name, _opener(file))
                shown.append({"prompt": prompt, "url": f"/media/{key}"})
            self._states[user] = {"state": "done", "pictures": shown}
        except MmalignError as error:
            self._states[user] = {"state": "failed", "pictures": [], "reason": str(error)}
        except Exception as error:  # a thread's last resort: the page must hear that it ended
            self._states[user] = {"state": "failed", "pictures": [], "reason": f"{type(error).__name__}: {error}"}


def _opener(file: Path) -> Callable[[], bytes]:
    return lambda: read_bytes(ImageRef(path=str(file), label=file.name))[0]
