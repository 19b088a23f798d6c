"""Users on disk: found by name, written without it, gone when removed."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from mmalign.errors import ConfigError, ModelError
from mmalign.models.users.store import INDEX, UserStore

ENCODER = {"encoder": "clip"}


def made(folder: Path, **words: bool) -> UserStore:
    store = UserStore.create(folder, encoder=ENCODER, **words)
    store.add("alice", torch.tensor([[1.0, 2.0]]), kind="encoded", pairs=["p1", "p2"])
    store.add("bob", torch.tensor([[3.0, 4.0]]), kind="trained")
    return store


def content(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_names_are_not_on_disk_and_users_are_found_by_them(tmp_path: Path) -> None:
    made(tmp_path)
    assert b"alice" not in content(tmp_path) and b"bob" not in content(tmp_path)
    again = UserStore(tmp_path)
    assert again.get("alice").tolist() == [[1.0, 2.0]] and len(again) == 2
    entry = again.entries()[0]
    assert (entry.kind, entry.pairs, entry.name) == ("encoded", ("p1", "p2"), None)
    assert entry.key == again.key("alice") and again.get(entry.key).tolist() == [[1.0, 2.0]]
    other = made(tmp_path / "other")
    assert other.key("alice") != again.key("alice"), "the same name must not be linked across stores"


def test_names_are_kept_where_that_was_asked_for(tmp_path: Path) -> None:
    store = made(tmp_path, keep_names=True)
    assert [entry.name for entry in store.entries()] == ["alice", "bob"]
    with pytest.raises(ConfigError, match="no user 'alise' here .*did you mean 'alice'"):
        store.get("alise")


def test_a_removed_user_is_in_no_file(tmp_path: Path) -> None:
    store = made(tmp_path)
    key = store.key("alice")
    exported = store.export(tmp_path / "out" / "all.safetensors")
    from safetensors import safe_open

    with safe_open(exported, framework="pt") as file:
        assert set(file.keys()) == {key, store.key("bob")} and "alice" not in str(file.metadata())
    exported.unlink()
    assert store.remove("alice").key == key
    assert key.encode() not in content(tmp_path)
    assert torch.tensor([[1.0, 2.0]]).numpy().tobytes() not in content(tmp_path)
    assert len(list(tmp_path.glob("users-*.safetensors"))) == 1
    with pytest.raises(ConfigError, match="no user 'alice' here"):
        store.get("alice")
    store.remove("bob")
    assert len(store) == 0 and not list(tmp_path.glob("users-*.safetensors"))
    with pytest.raises(ConfigError, match="no users to export"):
        store.export(tmp_path / "none.safetensors")


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    store = made(tmp_path)
    with pytest.raises(ModelError, match=r"the embedding of 'eve' is \[2\], others are \[1, 2\]"):
        store.add("eve", torch.zeros(2), kind="encoded")
    with pytest.raises(ModelError, match="finite"):
        store.add("eve", torch.tensor([[float("nan"), 0.0]]), kind="encoded")
    with pytest.raises(ConfigError, match="is there already"):
        store.add("bob", torch.zeros(1, 2), kind="encoded", replace=False)
    with pytest.raises(ConfigError, match="needs a name"):
        store.add(" ", torch.zeros(1, 2), kind="encoded")
    with pytest.raises(ModelError, match="another encoder"):
        UserStore.create(tmp_path, encoder={"encoder": "vlm"})
    assert store.get("bob").tolist() == [[3.0, 4.0]] and len(store) == 2


def test_broken_and_absent_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no users there"):
        UserStore(tmp_path / "none").entries()
    with pytest.raises(ConfigError, match="no users there"):
        UserStore(tmp_path / "none").remove("alice")
    store = made(tmp_path)
    next(tmp_path.glob("users-*.safetensors")).unlink()
    with pytest.raises(ModelError, match="tensors are missing"):
        store.get("alice")
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        store.get("alice")
    (tmp_path / INDEX).write_text(json.dumps({"version": 99}))
    with pytest.raises(ModelError, match="newer than this mmalign"):
        store.get("alice")


def test_users_added_at_once_by_several_threads_are_all_there(tmp_path: Path) -> None:
    store = UserStore.create(tmp_path, encoder=ENCODER)
    threads = [
        threading.Thread(
            target=UserStore(tmp_path).add, args=(f"user {n}", torch.full((1, 2), float(n))), kwargs={"kind": "encoded"}
        )
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [store.get(f"user {n}")[0, 0].item() for n in range(8)] == list(range(8))


def test_a_copy_knows_the_same_people(tmp_path: Path) -> None:
    store = made(tmp_path / "a")
    copy = store.copy_to(tmp_path / "b")
    assert copy.get("alice").tolist() == [[1.0, 2.0]] and copy.key("bob") == store.key("bob")
