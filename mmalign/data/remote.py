"""Tables and sources behind an address (``s3://``, ``gs://``, ``memory://``, ...): mirrored here, and results sent back.

Everything that reads tables maps files into memory, so what is at an address is first copied to a folder of this machine
(``MMALIGN_CACHE``, by default ``~/.cache/mmalign``); a file that did not change is copied once. What a check adds beside a
table is sent back by `publish`: objects appear whole or not at all, so shards on several machines may share a table this way as
they share a folder. Needs fsspec, and the library of the store (s3fs, gcsfs, adlfs) where it has one of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Final

from mmalign.data.files import atomic_file, canonical_hash, write_json
from mmalign.data.progress import progress_bar
from mmalign.errors import DataError

RECORD: Final = ".mirror.json"
TAGS: Final = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "created")
"""Names that stores have for what changes with a file's content."""
_ADDRESS = re.compile(r"^([a-z][a-z0-9+.-]+):/(/?)(.*)$", re.DOTALL)
"""A scheme of two letters or more (one is a drive), and one slash or two: a path object keeps only one."""


def is_remote(path: str | Path) -> bool:
    """Whether a path is an address in a store."""
    return _ADDRESS.match(str(path)) is not None


def address(path: str | Path) -> str:
    """An address in full, also of a path object, which folds its slashes."""
    found = _ADDRESS.match(str(path))
    if found is None:
        raise DataError(f"{path}: not an address; expected SCHEME://PLACE")
    scheme, _, rest = found.groups()
    return f"file:///{rest.lstrip('/')}" if scheme == "file" else f"{scheme}://{rest.lstrip('/')}"


def local_path(path: str | Path, *, progress: bool = False) -> Path:
    """The path itself, or the mirror of what is at an address.

    Raises:
        DataError: nothing there, or the store cannot be read.
    """
    return mirror(path, progress=progress) if is_remote(path) else Path(path)


def mirror_folder(path: str | Path) -> Path:
    """Where the mirror of an address is, or will be."""
    root = Path(os.environ.get("MMALIGN_CACHE") or Path.home() / ".cache" / "mmalign")
    url = address(path).rstrip("/")
    return root / "remote" / canonical_hash(url)[:24] / PurePosixPath(url).name


def mirror(path: str | Path, *, progress: bool = False) -> Path:
    """Copy what is new or changed at an address to its mirror; returns the mirror (a folder, or one file).

    Files that vanished there vanish from the mirror; what was made here beside them stays.

    Raises:
        DataError: nothing there, or the store cannot be read.
    """
    url, target = address(path), mirror_folder(path)
    fs, root = _store(url)
    with _named(url):
        fs.invalidate_cache()
        if fs.isfile(root):
            found = {"": fs.info(root)}
        else:
            found = {_relative(root, name): info for name, info in fs.find(root, detail=True).items()}
    if not found:
        raise DataError(f"{url}: nothing there")
    there, here = _read(target)
    changed = [name for name, info in found.items() if there.get(name) != _mark(info) or not _local(target, name).exists()]
    with progress_bar(f"Fetching {target.name}", len(changed), enabled=progress) as advance:
        for name in changed:
            file = _local(target, name)
            with _named(f"{url}/{name}"), fs.open(found[name]["name"], "rb") as source, atomic_file(file) as handle:
                shutil.copyfileobj(source, handle, 4 << 20)
            there[name], here[name] = _mark(found[name]), _stamp(file)
            advance(1)
    for name in [name for name in there if name not in found]:
        _local(target, name).unlink(missing_ok=True)
        there.pop(name)
        here.pop(name, None)
    write_json(_record(target), {"there": there, "here": here})
    return target


def publish(folder: Path, path: str | Path, *, only: Sequence[str] = (), progress: bool = False) -> int:
    """Send files of a folder to an address: those that are new here or were made anew. Returns how many.

    Hidden files stay, and files that were fetched from there and not touched are not sent again.

    Args:
        only: send what is below these sub-folders alone.

    Raises:
        DataError: the store cannot be written.
    """
    url = address(path).rstrip("/")
    fs, root = _store(url)
    there, here = _read(folder)
    sent = 0
    names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    if only:
        names = [name for name in names if name.split("/")[0] in only]
    with progress_bar(f"Sending {folder.name}", len(names), enabled=progress) as advance:
        for name in names:
            advance(1)
            mark = _stamp(folder / name)
            if here.get(name) == mark:
                continue
            with _named(f"{url}/{name}"):
                fs.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
                fs.put_file(str(folder / name), f"{root}/{name}")
                fs.invalidate_cache()
                there[name], here[name] = _mark(fs.info(f"{root}/{name}")), mark
            sent += 1
    write_json(_record(folder), {"there": there, "here": here})
    return sent


def remove(path: str | Path, below: str) -> None:
    """Remove what jobs of ours left at an address below a name, e.g. ``check/parts-``; with '' all of it. Nothing else goes."""
    url = address(path).rstrip("/")
    fs, root = _store(url)
    with _named(url):
        if not below:
            if fs.exists(root):
                fs.rm(root, recursive=True)
            return
        for name in fs.find(root):
            if _relative(root, name).startswith(below):
                fs.rm(name)


def exists(path: str | Path) -> bool:
    """Whether anything is at an address."""
    fs, root = _store(address(path))
    with _named(address(path)):
        fs.invalidate_cache()
        return bool(fs.exists(root))


def names_at(path: str | Path) -> set[str]:
    """Names of all files below an address, relative to it; none where nothing is there."""
    url = address(path).rstrip("/")
    fs, root = _store(url)
    fs.invalidate_cache()
    try:
        return {_relative(root, name) for name in fs.find(root)}
    except FileNotFoundError:
        return set()
    except Exception as error:  # every store has errors of its own
        raise DataError(f"{url}: {type(error).__name__}: {error}") from error


def text_at(path: str | Path) -> str | None:
    """The text of one file at an address; None where it is not there.

    Raises:
        DataError: the store cannot be read.
    """
    url = address(path)
    fs, root = _store(url)
    fs.invalidate_cache()
    try:
        return bytes(fs.cat_file(root)).decode()
    except FileNotFoundError:
        return None
    except Exception as error:
        raise DataError(f"{url}: {type(error).__name__}: {error}") from error


@contextmanager
def results_at(out: str | Path) -> Iterator[Path]:
    """A folder to write a new table to; for an address, one of this machine whose content is sent there at the end.

    Raises:
        DataError: something is at the address, or it cannot be written.
    """
    if not is_remote(out):
        yield Path(out)
        return
    if exists(out):
        raise DataError(f"{address(out)}: already exists; remove it or choose another name")
    folder = mirror_folder(out)
    yield folder
    if folder.exists():
        publish(folder, out)


def _store(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise DataError(f"{url}: {error}; install the library that reads this kind of store") from error
    return fs, str(root).rstrip("/")


@contextmanager
def _named(url: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{url}: nothing there") from error
    except Exception as error:  # every store has errors of its own
        raise DataError(f"{url}: {type(error).__name__}: {error}") from error


def _relative(root: str, name: str) -> str:
    return name.removeprefix(root).lstrip("/")


def _local(target: Path, name: str) -> Path:
    """A file of the mirror; names that climb out of it are refused.

    Raises:
        DataError: such a name.
    """
    if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
        raise DataError(f"{name}: a name in the store that leaves its folder")
    return target / name if name else target


def _mark(info: dict[str, Any]) -> list[Any]:
    """What changes when a file there does: size, and the store's tag or time."""
    tag = next((info[key] for key in TAGS if info.get(key)), "")
    return [info.get("size"), str(tag)]


def _stamp(file: Path) -> list[int]:
    """What changes when a file here does."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _record(target: Path) -> Path:
    return (target if target.is_dir() else target.parent) / RECORD


def _read(target: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Per file of the mirror, its mark there and its stamp here; a lost record only means fetching again."""
    try:
        found = json.loads(_record(target).read_text(encoding="utf-8"))
        return dict(found["there"]), dict(found["here"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}, {}
