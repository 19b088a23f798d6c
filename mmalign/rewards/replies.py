"""Replies of a judge kept on disk as they arrive, so that what was asked once is never asked, and paid for, again.

One JSON line a reply, found by the hash of everything that decides it (model, address, words, limits). A line is written whole
and forced to disk before the reply is used; a last line that a crash tore off is cut away when the file is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from mmalign.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a model said to one question."""

    text: str
    cut: bool = False
    """It stopped because its limit of tokens was reached: the rest is missing."""
    error: str | None = None
    """Why there is nothing to read although the model was asked, for example ``http_400``."""


class Chat(Protocol):
    """A model that answers text with text, greedily."""

    def identity(self) -> Mapping[str, Any]:
        """Everything about the model that decides its replies, as plain values."""

    def ask(self, prompts: Sequence[str], *, max_tokens: int, keep: Callable[[int, Reply], None]) -> None:
        """Ask everything; `keep` is called with the number of a prompt and its reply as soon as that is there.

        Raises:
            RewardError: not all prompts were answered; run again later.
        """


class ReplyStore:
    """The file of replies; several threads and processes may share it.

    Args:
        path: made when the first reply comes; None keeps replies in memory alone.

    Raises:
        DataError: a line inside the file cannot be read.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[str, Reply] = {}
        self._read = 0
        self._lock = threading.Lock()
        self._between = None if path is None else FileLock(str(path) + ".lock")
        self.refresh()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Reply | None:
        return self._known.get(key)

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply; it is on disk when this returns."""
        line = json.dumps({"key": key, "text": reply.text, "cut": reply.cut, "error": reply.error}, ensure_ascii=False)
        with self._lock:
            self._known[key] = reply
            if self.path is None or self._between is None:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._between:
                self._repair()
                with self.path.open("ab") as handle:
                    handle.write(line.encode() + b"\n")
                    handle.flush()
                    os.fsync(handle.fileno())

    def refresh(self) -> None:
        """Read what others have added since the last look."""
        if self.path is None or self._between is None or not self.path.exists():
            return
        with self._lock, self._between:
            self._repair()
            with self.path.open("rb") as handle:
                handle.seek(self._read)
                data = handle.read()
            for line in data.splitlines():
                self._learn(line)
            self._read += len(data)

    def _learn(self, line: bytes) -> None:
        try:
            found = json.loads(line)
            reply = Reply(text=str(found["text"]), cut=bool(found["cut"]), error=found["error"])
            self._known[str(found["key"])] = reply
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.path}: a line is damaged ({line[:60]!r}); remove that line, and its question is asked again"
            ) from error

    def _repair(self) -> None:
        """Cut away what follows the last line end: a reply that was being written when the machine stopped."""
        if self.path is None or not self.path.exists():
            return
        with self.path.open("rb+") as handle:
            size = handle.seek(0, os.SEEK_END)
            if size == 0:
                return
            handle.seek(size - 1)
            if handle.read(1) == b"\n":
                return
            handle.seek(0)
            handle.truncate(handle.read().rfind(b"\n") + 1)


def ask_all(chat: Chat, prompts: Sequence[str], store: ReplyStore, *, max_tokens: int) -> list[Reply]:
    """One reply per prompt, in order; only what the store does not hold is asked, and equal prompts are asked once.

    Raises:
        RewardError: not all were answered. What was is in the store.
    """
    identity = json.dumps({**chat.identity(), "max_tokens": max_tokens}, sort_keys=True)
    keys = [hashlib.sha256(f"{identity}\n{prompt}".encode()).hexdigest() for prompt in prompts]
    store.refresh()
    wanted = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if store.get(key) is None}
    order = list(wanted)
    if order:
        chat.ask([wanted[key] for key in order], max_tokens=max_tokens, keep=lambda at, reply: store.put(order[at], reply))
    found = [store.get(key) for key in keys]
    return [reply if reply is not None else Reply(text="", error="no_answer") for reply in found]
