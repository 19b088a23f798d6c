"""Users and their embeddings in a folder of their own: ``users.json`` and ``users-<content>.safetensors``.

Names are not written: an entry is found by a keyed hash of the name (HMAC-SHA256 with a random key that lies beside it). That
keeps names out of files and logs; it does not hide a name from somebody who has the folder and a list of names to try.
An entry says which pairs it came from by hashes of their content. Removing a user rewrites both files without them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.errors import ConfigError, ModelError
from mmalign.registry import did_you_mean

INDEX, LOCK = "users.json", ".users.lock"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class UserEntry:
    """What is known of a user."""

    key: str
    """Keyed hash of the name."""
    kind: str
    """trained: seen in training; encoded: read from pairs; fitted: an embedding learned from pairs."""
    pairs: tuple[str, ...] = ()
    """Hashes of the pairs that the embedding came from."""
    name: str | None = None
    """Only where names are kept."""


class _Replaced(Exception):
    """The tensors that an index names are gone."""


@dataclass(kw_only=True)
class _Content:
    salt: str
    names: bool = False
    encoder: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, UserEntry] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


class UserStore:
    """The users of a folder. Every change is on disk, whole, when its call returns."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @classmethod
    def create(cls, folder: str | Path, *, encoder: Mapping[str, Any], keep_names: bool = False) -> UserStore:
        """The store of a folder, made if it is not there.

        Args:
            encoder: what identifies embeddings of one kind; mixing kinds is refused.
            keep_names: write names beside their hashes.

        Raises:
            ModelError: a store is there for embeddings of another kind.
        """
        store = cls(folder)
        with store._changing(create=True) as content:
            if content.encoder and content.encoder != dict(encoder):
                raise ModelError(
                    f"{folder}: its users were embedded by another encoder or run; remove the folder, or use another one"
                )
            content.encoder, content.names = dict(encoder), content.names or keep_names
        return store

    def __len__(self) -> int:
        return len(self._read().entries)

    def key(self, name: str) -> str:
        """How a name is written in the files."""
        return _key(self._read().salt, name)

    def entries(self) -> list[UserEntry]:
        """All users, in the order in which they came."""
        return list(self._read().entries.values())

    def add(
        self, name: str, embedding: Tensor, *, kind: str, pairs: Sequence[str] = (), replace: bool = True
    ) -> UserEntry:
        """Write a user's embedding. float32 ``[rows, dim]``

        Raises:
            ConfigError: no name, or the user is there and `replace` is False.
            ModelError: an embedding of another shape than the others, or not finite.
        """
        return self.add_all({name: (embedding, tuple(pairs))}, kind=kind, replace=replace)[0]

    def add_all(
        self, users: Mapping[str, tuple[Tensor, Sequence[str]]], *, kind: str, replace: bool = True
    ) -> list[UserEntry]:
        """Write several users at once: name -> (embedding, hashes of its pairs)."""
        made = []
        with self._changing() as content:
            for name, (embedding, pairs) in users.items():
                if not name.strip():
                    raise ConfigError("a user needs a name")
                key = _key(content.salt, name)
                if key in content.entries and not replace:
                    raise ConfigError(f"the user '{name}' is there already; remove them first, or replace them")
                value = embedding.detach().float().cpu().contiguous()
                like = next(iter(content.tensors.values()), value)
                if value.shape != like.shape or not bool(torch.isfinite(value).all()):
                    raise ModelError(
                        f"the embedding of '{name}' is {list(value.shape)}, others are {list(like.shape)}; all must be alike, "
                        f"and finite"
                    )
                entry = UserEntry(key=key, kind=kind, pairs=tuple(pairs), name=name if content.names else None)
                content.entries[key], content.tensors[key] = entry, value
                made.append(entry)
        return made

    def remove(self, name: str) -> UserEntry:
        """Take a user out of both files; `name` may be the key as `entries` shows it.

        Raises:
            ConfigError: no such user.
        """
        with self._changing() as content:
            key = self._find(content, name)
            del content.tensors[key]
            return content.entries.pop(key)

    def get(self, name: str) -> Tensor:
        """A user's embedding, by name or key. ``[rows, dim]``

        Raises:
            ConfigError: no such user: nobody's place is taken by a zero.
        """
        content = self._read()
        return content.tensors[self._find(content, name)]

    def export(self, path: str | Path, names: Sequence[str] = ()) -> Path:
        """Write some users (default: all) as one safetensors file: keys -> embeddings, what is known of them in its header.

        Raises:
            ConfigError: an unknown user, or nobody to export.
        """
        from safetensors.torch import save_file

        content = self._read()
        keys = [self._find(content, name) for name in names] or sorted(content.entries)
        if not keys:
            raise ConfigError(f"{self.folder}: no users to export")
        told = [asdict(content.entries[key]) for key in keys]
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        header = {"mmalign_users": json.dumps({"version": VERSION, "encoder": content.encoder, "users": told})}
        save_file({key: content.tensors[key] for key in keys}, target, metadata=header)
        return target

    def copy_to(self, folder: str | Path) -> UserStore:
        """Write the same users, under the same keys, into another folder, replacing a store there."""
        content = self._read()
        with _locked(Path(folder)):
            _write(Path(folder), content)
        return UserStore(folder)

    @property
    def encoder(self) -> Mapping[str, Any]:
        """What identifies the embeddings."""
        return self._read().encoder

    # Files

    @staticmethod
    def _find(content: _Content, name: str) -> str:
        key = name if name in content.entries else _key(content.salt, name)
        if key not in content.entries:
            known = [entry.name for entry in content.entries.values() if entry.name]
            hint = did_you_mean(name, known) if known else ""
            raise ConfigError(
                f"no user '{name}' here ({len(content.entries)} users){hint}; add them with "
                f"'mmalign users add RUN {name} --pairs FILE'"
            )
        return key

    def _read(self) -> _Content:
        for _ in range(3):
            try:
                return self._read_once()
            except _Replaced:
                continue  # another process wrote between the two files
        raise ModelError(f"{self.folder}: its tensors are missing; restore both files from one copy")

    def _read_once(self) -> _Content:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        index = self.folder / INDEX
        try:
            found = json.loads(index.read_text(encoding="utf-8"))
            if found["version"] > VERSION:
                raise ModelError(f"{index}: version {found['version']} is newer than this mmalign knows")
            entries = {one["key"]: UserEntry(**{**one, "pairs": tuple(one["pairs"])}) for one in found["users"]}
            if entries and not (self.folder / found["tensors"]).is_file():
                raise _Replaced
            tensors = load_file(self.folder / found["tensors"]) if entries else {}
            if set(tensors) != set(entries):
                raise ModelError(f"{self.folder}: {INDEX} and {found['tensors']} do not fit; restore both from one copy")
            return _Content(
                salt=found["salt"], names=found["names"], encoder=found["encoder"], entries=entries, tensors=tensors
            )
        except FileNotFoundError as error:
            raise ConfigError(f"{self.folder}: no users there ({Path(error.filename or index).name} is missing)") from error
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ModelError(f"{index}: cannot be read: {error}") from error

    @contextmanager
    def _changing(self, create: bool = False) -> Iterator[_Content]:
        """The content, to be changed in the block and then written whole; processes take turns."""
        if not create and not (self.folder / INDEX).is_file():
            raise ConfigError(f"{self.folder}: no users there ({INDEX} is missing)")
        with _locked(self.folder):
            fresh = not (self.folder / INDEX).is_file()
            # The key must not be guessable, so it is the one random thing that no seed decides.
            content = _Content(salt=secrets.token_hex(16)) if fresh else self._read()
            yield content
            _write(self.folder, content)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Processes that change one store take turns."""
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK):
        yield


def _write(folder: Path, content: _Content) -> None:
    """Both files. The tensors are named after their content and the index is renamed last: a reader sees old or new."""
    from safetensors.torch import save_file

    before = {path.name for path in folder.glob("users*.safetensors")}
    name = ""
    if content.tensors:
        digest = hashlib.sha256(b"".join(_bytes(key, content.tensors[key]) for key in sorted(content.tensors)))
        name = f"users-{digest.hexdigest()[:16]}.safetensors"
        temporary = folder / f".{name}.tmp"
        save_file(content.tensors, temporary)
        os.replace(temporary, folder / name)
    told = {
        "version": VERSION, "salt": content.salt, "names": content.names, "encoder": content.encoder, "tensors": name,
        "users": [asdict(entry) for entry in content.entries.values()],
    }  # fmt: skip
    temporary = folder / f".{INDEX}.tmp"
    temporary.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / INDEX)
    for old in before - {name}:
        (folder / old).unlink(missing_ok=True)


def _key(salt: str, name: str) -> str:
    return hmac.new(bytes.fromhex(salt), name.encode(), hashlib.sha256).hexdigest()[:32]


def _bytes(key: str, value: Tensor) -> bytes:
    return key.encode() + value.numpy().tobytes()
