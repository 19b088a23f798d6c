"""Tables in stores: mirrored, changed files fetched again, results sent back, user files left alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from typer.testing import CliRunner

from mmalign.cli.application import app
from mmalign.data import CheckPolicy, import_table, open_table, remote
from mmalign.data.checking import check_any
from mmalign.data.files import file_hash
from mmalign.errors import DataError
from tests.data.making import make_jsonl, make_pairs, pickapic_cases, write_pickapic


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMALIGN_CACHE", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def store() -> Iterator[fsspec.AbstractFileSystem]:
    """A store in memory, emptied before and after."""
    fs = fsspec.filesystem("memory")
    for name in list(fs.store):
        fs.store.pop(name)
    yield fs
    fs.store.clear()


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result.output


def test_addresses() -> None:
    assert remote.is_remote("s3://bucket/x") and remote.is_remote(Path("s3://bucket/x")) and remote.is_remote("memory://x")
    assert not any(map(remote.is_remote, ("x", "/tmp/x", "C:/x", "C:\\x", "./a:b/c", "data/s3:/x")))
    assert remote.address(Path("s3://bucket/a/b")) == "s3://bucket/a/b"
    assert remote.address(Path("file:///tmp/x")) == "file:///tmp/x"


def test_a_table_is_fetched_once_and_again_where_it_changed(tmp_path: Path, store: fsspec.AbstractFileSystem) -> None:
    make_pairs(tmp_path / "table", 5)
    store.put(str(tmp_path / "table"), "/bucket/table", recursive=True)
    table = open_table("memory://bucket/table")
    assert len(table) == 5 and table.fingerprint == open_table(tmp_path / "table").fingerprint
    part = next(table.path.glob("*.parquet"))
    before = part.stat().st_mtime_ns
    assert open_table("memory://bucket/table").path == table.path and part.stat().st_mtime_ns == before
    shutil.rmtree(tmp_path / "table")
    make_pairs(tmp_path / "table", 6)
    for file in (tmp_path / "table").iterdir():
        store.put_file(str(file), f"/bucket/table/{file.name}")
    assert len(open_table("memory://bucket/table")) == 6
    store.rm("/bucket/table", recursive=True)
    with pytest.raises(DataError, match="memory://bucket/table: nothing there"):
        open_table("memory://bucket/table")


def test_a_jsonl_table_with_its_pictures(tmp_path: Path, store: fsspec.AbstractFileSystem) -> None:
    make_jsonl(tmp_path / "t", 4)
    store.put(str(tmp_path / "t"), "/bucket/t", recursive=True)
    folder = remote.mirror("memory://bucket/t")
    assert len(check_any(folder / "pairs.jsonl", policy=CheckPolicy(), workers=1, progress=False).rows) == 4


def test_import_and_check_through_the_commands(tmp_path: Path, store: fsspec.AbstractFileSystem) -> None:
    source = write_pickapic(tmp_path / "source.parquet", pickapic_cases())
    store.put(str(source), "/in/source.parquet")
    import_table(source, tmp_path / "here", progress=False)
    run("data", "import", "memory://in/source.parquet", "--out", "memory://out/table", code=3)
    names = {name.removeprefix("/out/table/") for name in store.find("/out/table")}
    assert "part-00000.parquet" in names and "import/quarantine.jsonl" in names and not any("/." in name for name in names)
    hashes = {name: store.checksum(name) for name in store.find("/out/table")}
    run("data", "check", "memory://out/table", "--max-bad-fraction", 1, code=3)
    check_any(tmp_path / "here", policy=CheckPolicy(max_bad_fraction=1.0), workers=1, progress=False)
    there = json.loads(store.cat("/out/table/check/report.json"))
    here = json.loads((tmp_path / "here" / "check" / "report.json").read_text())
    assert there["reasons"] == here["reasons"] and there["fingerprint"] == here["fingerprint"]
    assert {name: store.checksum(name) for name in hashes} == hashes, "what was there is as it was"
    with pytest.raises(DataError, match="already exists"), remote.results_at("memory://out/table"):
        pass
    # From another machine: the stored check is what training with data.check: required asks for.
    shutil.rmtree(remote.mirror_folder("memory://out/table"))
    from mmalign.data import usable_rows

    table = open_table("memory://out/table")
    assert len(usable_rows(table, check="required", policy=CheckPolicy(max_bad_fraction=1.0)).rows) == here["used"]


def test_shards_on_machines_that_share_a_store_alone(
    tmp_path: Path, store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmalign.data import checkparts

    monkeypatch.setattr(checkparts, "ROWS_PER_PART", 2)
    make_pairs(tmp_path / "table", 7)
    store.put(str(tmp_path / "table"), "/b/table", recursive=True)
    for machine, left in ((0, True), (1, False)):
        monkeypatch.setenv("MMALIGN_CACHE", str(tmp_path / f"machine-{machine}"))
        said = run("data", "check", "memory://b/table", "--shard", f"{machine}/2")
        assert ("left to other shards" in said) == left
    assert json.loads(store.cat("/b/table/check/report.json"))["used"] == 7


def test_a_file_store_and_a_run(tmp_path: Path, tiny_folder: object) -> None:
    table = make_pairs(tmp_path / "bucket" / "table", 4)
    before = {path: file_hash(path) for path in table.rglob("*") if path.is_file()}
    (tmp_path / "e.yaml").write_text(
        f"method: {{name: diffusion_dpo}}\nmodel: {{name: sd, path: {tiny_folder('sd1')}}}\n"  # type: ignore[operator]
        f"data: {{manifest: 'file://{table}', resolution: 32}}\noptim: {{lr: 1e-4, steps: 1, batch_size: 2}}\n"
        f"run: {{name: x, out: {tmp_path / 'run'}, device: cpu}}\n"
    )
    run("train", tmp_path / "e.yaml")
    assert (tmp_path / "run" / "summary.json").exists()
    assert {path: file_hash(path) for path in table.rglob("*") if path.is_file()} == before
    assert list(remote.mirror_folder(f"file://{table}").glob("cache/vae/*"))


def test_what_cannot_be_read_is_named(tmp_path: Path, store: fsspec.AbstractFileSystem) -> None:
    with pytest.raises(DataError, match="nowhere://x: .*install the library that reads this kind of store"):
        open_table("nowhere://x")
    with pytest.raises(DataError, match="leaves its folder"):
        remote._local(tmp_path, "../x")
