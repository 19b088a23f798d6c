"""A fitted PAL head on disk: `head.safetensors`, `users.safetensors` (their logits) and `card.json`.

Users are named by keyed hashes unless the fit was told otherwise: whoever holds the folder can test whether a name that they
already know is in it, but cannot read the names out of it. That is no protection for names that can be guessed.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.errors import ModelError, RewardError
from mmalign.registry import did_you_mean
from mmalign.rewards.files import load_strictly, read_json, read_state
from mmalign.rewards.pal.fitting import Population
from mmalign.rewards.pal.network import HeadShape, PalHead

HEAD, USERS, CARD = "head.safetensors", "users.safetensors", "card.json"
KIND, VERSION = "pal", 1
TOLERANCE = 1e-6
"""How far the shares of a mixture of users may be from one."""


@dataclass(kw_only=True)
class PalFolder:
    """A head with its users and where it comes from."""

    head: PalHead
    names: list[str]
    """Of the users, or their hashes; in the order of the logits' rows."""
    logits: Tensor  # [U, K] float32
    known: int
    """The first so many users were fitted together with the head and are its population; the others came later."""
    encoder: Mapping[str, Any]
    """``name``, ``path`` and ``weights`` (fingerprint) of the reward whose vectors it reads."""
    loss: str
    salt: str = ""
    """Key of the hashes; empty where names are kept."""
    facts: Mapping[str, Any]
    """Settings, data and figures of the fit: plain data."""

    def __post_init__(self) -> None:
        self._rows = {name: row for row, name in enumerate(self.names)}
        self.population = Population.of(self.logits[: self.known])

    def stored_name(self, user: str) -> str:
        """How the folder writes a user's name."""
        if not self.salt:
            return user
        return hashlib.blake2b(user.encode("utf-8", "surrogatepass"), key=bytes.fromhex(self.salt), digest_size=12).hexdigest()

    def has(self, user: str) -> bool:
        return self.stored_name(user) in self._rows

    def weights(self, user: str) -> Tensor:
        """Mixture weights ``[K]`` of a known user.

        Raises:
            RewardError: not known; names the nearest where names are kept.
        """
        row = self._rows.get(self.stored_name(user))
        if row is None:
            raise RewardError(self.unknown(user))
        return torch.softmax(self.logits[row], dim=-1)

    def unknown(self, user: str) -> str:
        """What is said about a user who is not here."""
        near = "" if self.salt else did_you_mean(user, self.names)
        return (
            f"user '{user}' is not among the {len(self.names)} users of this PAL head{near}; "
            "'mmalign rewards fit-user' adds one from a few pairs"
        )

    def mixture(self, shares: Mapping[str, float]) -> Tensor:
        """Weights ``[K]`` of a mixture of users: their weights are mixed, not their rewards.

        Raises:
            RewardError: an unknown user, a negative share, or shares that do not sum to 1.
        """
        total = sum(shares.values())
        if not shares or not abs(total - 1) <= TOLERANCE or min(shares.values()) < 0:
            raise RewardError(f"a mixture of users needs shares of at least 0 that sum to 1, got {dict(shares)}")
        return torch.stack([share * self.weights(user) for user, share in shares.items()]).sum(dim=0)

    def put(self, user: str, logits: Tensor) -> None:
        """Add a user, or replace one that was added later.

        Raises:
            RewardError: the user was fitted together with the head.
        """
        name = self.stored_name(user)
        row = self._rows.get(name)
        if row is not None and row < self.known:
            raise RewardError(f"user '{user}' was fitted together with the head and is part of its population; fit anew")
        if row is None:
            self._rows[name] = len(self.names)
            self.names.append(name)
            self.logits = torch.cat([self.logits, logits.float()[None]])
        else:
            self.logits[row] = logits.float()

    def remove(self, user: str) -> None:
        """Forget a user's logits. What a user's pairs did to the shared head stays in it.

        Raises:
            RewardError: not known, or the last of the population.
        """
        row = self._rows.get(self.stored_name(user))
        if row is None:
            raise RewardError(self.unknown(user))
        if row < self.known and self.known == 1:
            raise RewardError("the last user of the population cannot be removed: delete the folder")
        del self.names[row]
        self.logits = torch.cat([self.logits[:row], self.logits[row + 1 :]])
        self.known -= row < self.known
        self.__post_init__()

    def save(self, out: Path) -> None:
        """Write the folder; each file is whole or absent, and the card, without which nothing is read, comes last.

        Raises:
            ModelError: it cannot be written.
        """
        from safetensors.torch import save

        card = {
            "kind": KIND, "version": VERSION, "shape": self.head.shape.as_dict(), "loss": self.loss,
            "encoder": dict(self.encoder), "known": self.known, "salt": self.salt, "names": self.names,
            "fit": dict(self.facts),
        }  # fmt: skip
        head = {name: value.detach().contiguous() for name, value in self.head.state_dict().items()}
        try:
            out.mkdir(parents=True, exist_ok=True)
            _write(out / HEAD, save(head))
            _write(out / USERS, save({"logits": self.logits.contiguous()}))
            _write(out / CARD, (json.dumps(card, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise ModelError(f"{out}: cannot be written: {error}") from error

    @classmethod
    def load(cls, folder: Path) -> PalFolder:
        """Read a folder.

        Raises:
            ModelError: not a PAL head, damaged, or of a newer version.
        """
        if not (folder / CARD).is_file():
            raise ModelError(f"{folder}: no PAL head here (no {CARD}); 'mmalign rewards fit-pal' makes one")
        card = read_json(folder / CARD)
        if card.get("kind") != KIND or not isinstance(card.get("version"), int):
            raise ModelError(f"{folder / CARD}: not the card of a PAL head")
        if card["version"] > VERSION:
            raise ModelError(f"{folder}: version {card['version']} is newer than this mmalign knows ({VERSION})")
        try:
            head = PalHead(HeadShape(**card["shape"]))
            names, known = [str(name) for name in card["names"]], int(card["known"])
            loss, encoder, facts, salt = str(card["loss"]), dict(card["encoder"]), dict(card["fit"]), str(card["salt"])
            bytes.fromhex(salt)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{folder / CARD}: damaged: {error}") from error
        load_strictly(head, read_state(folder / HEAD), folder / HEAD)
        logits = read_state(folder / USERS).get("logits")
        wanted = (len(names), head.shape.prototypes)
        if logits is None or tuple(logits.shape) != wanted or not 1 <= known <= len(names) or len(set(names)) != len(names):
            found = None if logits is None else tuple(logits.shape)
            raise ModelError(f"{folder / USERS}: logits of {wanted} are needed, found {found}, {known} of them known")
        if not bool(torch.isfinite(logits).all()):
            raise ModelError(f"{folder / USERS}: logits that are not finite")
        return cls(head=head.eval(), names=names, logits=logits.float(), known=known, encoder=encoder, loss=loss, salt=salt,
                   facts=facts)  # fmt: skip


def new_salt() -> str:
    """A fresh key for hashes, hexadecimal."""
    return os.urandom(16).hex()


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
