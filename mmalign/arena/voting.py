"""What the page asks for, without HTTP: the next pair, a vote, an undo. Everything a browser sends is checked here."""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from mmalign import __version__
from mmalign.arena.asking import Refused, user_name
from mmalign.arena.catalogue import Catalogue
from mmalign.arena.offer import Offer
from mmalign.arena.plan import Plan, Shown
from mmalign.arena.votes import CHOICES, VoteConflict, VotesFile
from mmalign.media import MediaError

MOST_HELD = 8
"""Pairs a page may hold unanswered."""
OFFER_AFTER = 4
"""Choices of one picture before the page offers to personalise."""
_TICKET = re.compile(r"^[0-9a-f]{24}$")


@dataclass(kw_only=True)
class Voting:
    """One arena: pictures, votes and the order of pairs."""

    catalogue: Catalogue
    votes: VotesFile
    plan: Plan
    goal: int
    """Choices a person is asked for; they may go on."""
    offer: Offer
    source: str = ""
    """Where the pictures come from, for the rows."""
    _storing: threading.Lock = field(default_factory=threading.Lock)

    def next(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The next pair for a user, beside those their page still holds."""
        user = user_name(request.get("user"))
        held = request.get("holding", [])
        if not isinstance(held, list) or len(held) > MOST_HELD or not all(isinstance(key, str) for key in held):
            raise Refused(400, f"'holding' is a list of at most {MOST_HELD} pairs")
        done = {row["meta"].get("pair") for row in self.votes.of(user)}
        done |= {shown.pair for key in held if (shown := self.plan.find(key)) is not None}
        shown = self.plan.next(user, done)
        waiting = shown is None and len(self.catalogue) < self.catalogue.expected
        pair = None if shown is None else self._shown(shown)
        return {"pair": pair, "waiting": waiting, "made": len(self.catalogue), "expected": self.catalogue.expected,
                "progress": self.progress(user), "offer": self._offer(user)}  # fmt: skip

    def vote(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Write a vote. When this returns it is on the disk."""
        user, ticket, choice = user_name(request.get("user")), request.get("ticket"), request.get("choice")
        if not isinstance(ticket, str) or not _TICKET.match(ticket):
            raise Refused(400, "'ticket' is the one that came with the pair")
        if choice not in CHOICES:
            raise Refused(400, f"'choice' is one of {', '.join(CHOICES)}")
        shown = self.plan.find(request["key"]) if isinstance(request.get("key"), str) else None
        if shown is None:
            raise Refused(404, "there is no such pair; load the page again")
        seconds = request.get("seconds")
        timed = isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds < 1e6
        row = self._row(user, ticket, choice, shown, round(float(seconds), 3) if timed else None)  # type: ignore[arg-type]
        try:
            self.votes.add(row)
        except VoteConflict as error:
            raise Refused(409, "this pair was answered otherwise already") from error
        return {"confirmed": ticket, "progress": self.progress(user), "offer": self._offer(user)}

    def undo(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Take back a user's latest vote; its pair can be shown again."""
        user, ticket = user_name(request.get("user")), request.get("ticket")
        if ticket is None:
            mine = self.votes.of(user)
            ticket = mine[-1]["id"] if mine else ""
        if not isinstance(ticket, str):
            raise Refused(400, "'ticket' is that of the vote")
        try:
            row = self.votes.undo(user, ticket)
        except VoteConflict as error:
            raise Refused(409, "only the latest choice can be taken back") from error
        shown = self.plan.find(row["meta"].get("shown", "")) if row is not None else None
        pair = None if shown is None else self._shown(shown)
        return {"undone": row["id"] if row is not None else None, "pair": pair, "progress": self.progress(user)}

    def progress(self, user: str) -> dict[str, int]:
        """What a user has done, the goal, and how many pairs there are."""
        pairs = self.plan.count(user)
        return {**self.votes.tally(user).as_dict(), "goal": min(self.goal, pairs) if pairs else self.goal, "pairs": pairs}

    def _offer(self, user: str) -> dict[str, Any] | None:
        return self.offer.words(user) if self.votes.tally(user).choices >= OFFER_AFTER else None

    def _shown(self, shown: Shown) -> dict[str, Any]:
        pictures = shown.group.pictures
        return {"ticket": secrets.token_hex(12), "key": shown.key, "prompt": shown.group.prompt,
                "left": f"/media/{pictures[shown.left].key}", "right": f"/media/{pictures[shown.right].key}"}  # fmt: skip

    def _row(self, user: str, ticket: str, choice: str, shown: Shown, seconds: float | None) -> dict[str, Any]:
        """A row of pairs. A tie is p_chosen 0.5; a skip says nothing, so its weight is 0."""
        left, right = shown.group.pictures[shown.left], shown.group.pictures[shown.right]
        try:
            with self._storing:
                paths = [self.votes.store(picture.open()) for picture in (left, right)]
        except MediaError as error:
            raise Refused(410, f"a picture can no longer be read: {error}") from error
        first, second = (1, 0) if choice == "right" else (0, 1)
        return {
            "id": ticket, "prompt": shown.group.prompt, "chosen": paths[first], "rejected": paths[second],
            "p_chosen": 1.0 if choice in ("left", "right") else 0.5, "user": user, "weight": 0.0 if choice == "skip" else 1.0,
            "group": shown.group.key,
            "meta": {
                "choice": choice, "pair": shown.pair, "shown": shown.key, "left": left.origin, "right": right.origin,
                "source": self.source, "at": datetime.now(UTC).isoformat(timespec="milliseconds"), "seconds": seconds,
                "by": f"mmalign arena {__version__}",
            },
        }  # fmt: skip
