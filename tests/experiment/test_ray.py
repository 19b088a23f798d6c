"""Batch jobs on Ray: really run on a cluster of this machine, and the rows are those of a single process.

Needs the extra `ray`, which the test extra does not bring for its size; without it these are skipped by name.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mmalign.annotate import annotate
from mmalign.data import CheckPolicy, checkfiles, import_table, lookparts, open_ranked
from mmalign.data.checking import check_any
from mmalign.data.engines import each_part
from mmalign.errors import DataError, MissingExtraError
from mmalign.generate import generate, load_generation
from mmalign.scoring.job import Job
from mmalign.scoring.run import score
from tests.data.making import pickapic_cases, write_pickapic
from tests.fixtures.vlm_runs import write_table

Folders = Callable[[str], Path]
LENIENT = CheckPolicy(max_bad_fraction=1.0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of this machine for all tests of the module."""
    ray = pytest.importorskip("ray", reason="the library ray is not installed (extra 'ray')")
    yield
    ray.shutdown()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"needs the library 'ray': pip install 'mmalign\[ray\]'"):
        list(each_part(partial(broken, "x"), [1], engine="ray", progress=False))


def broken(words: str) -> Callable[[int], int]:
    def make(number: int) -> int:
        raise DataError(f"part {number}: {words}")

    return make


def test_an_error_of_a_worker_keeps_its_words(cluster: None) -> None:
    with pytest.raises(DataError, match="part 3: row 7 cannot be read"):
        list(each_part(partial(broken, "row 7 cannot be read"), [3], engine="ray", workers=1, progress=False))


def test_a_check(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pairs and of answers: result and every file of the report."""
    import_table(write_pickapic(tmp_path / "source.parquet", pickapic_cases()), tmp_path / "pairs", progress=False)
    write_table(tmp_path, "pairs", 8)
    for table in (tmp_path / "pairs", tmp_path / "pairs.jsonl"):
        here = check_any(table, policy=LENIENT, workers=1, progress=False)
        report = content(checkfiles.check_folder(table))
        shutil.rmtree(checkfiles.check_folder(table))
        monkeypatch.setattr(lookparts.LookParts, "make", only_elsewhere)
        there = check_any(table, policy=LENIENT, workers=2, engine="ray", progress=False)
        monkeypatch.undo()
        assert there.rows.tolist() == here.rows.tolist() and there.problems == here.problems
        assert content(checkfiles.check_folder(table)) == report


def only_elsewhere(*_: Any) -> int:
    raise AssertionError("this process had nothing to look at")


def test_candidates_annotations_and_scores(cluster: None, tiny_folder: Folders, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"a circle {number}" for number in range(5)))
    (tmp_path / "config.yaml").write_text(
        f"prompts: {tmp_path}/prompts.txt\nout: {tmp_path}/one\nprompts_per_part: 2\ndevice: cpu\nseed: 5\nsources:\n"
        f"  - {{label: one, model: {{name: sd, path: {tiny_folder('sd1')}}}, candidates: 2, steps: 2, batch_size: 3}}\n"
    )

    def settings(out: str) -> Any:
        return load_generation(tmp_path / "config.yaml", [f"out={tmp_path}/{out}"])

    assert generate(settings("one"), progress=False).pictures == 10
    made = generate(settings("two"), engine="ray", workers=2, gpus=0, progress=False)
    assert (made.pictures, made.missing) == (10, 0)
    one, two = open_ranked(tmp_path / "one"), open_ranked(tmp_path / "two")
    assert [one.values(row) for row in range(5)] == [two.values(row) for row in range(5)]

    annotate(tmp_path / "one", tmp_path / "scored-one", ["brightness"], progress=False)
    found = annotate(
        tmp_path / "one", tmp_path / "scored-two", ["brightness"], engine="ray", workers=1, gpus=0, progress=False
    )
    assert found is not None and found.pictures == 10
    first, second = open_ranked(tmp_path / "scored-one"), open_ranked(tmp_path / "scored-two")
    assert [first.values(row) for row in range(5)] == [second.values(row) for row in range(5)]

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for row in range(5):
        for number, image in enumerate(one[row].images):
            (pictures / f"{row}-{number}.png").write_bytes(image.data or b"")
    tables = []
    for name, engine in (("here", "local"), ("there", "ray")):
        out = tmp_path / f"{name}.jsonl"
        job = Job(input=str(pictures), rewards=("brightness",), out=str(out))
        assert score(job, engine=engine, gpus=0) is not None  # type: ignore[arg-type]
        tables.append(out.read_text())
    assert tables[0] == tables[1]


def test_parts_and_numbers_agree(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes come back for every part, whoever made it."""
    sizes = sorted(each_part(partial(squares, 2), list(range(7)), engine="ray", workers=2, progress=False))
    assert sizes == sorted(each_part(partial(squares, 2), list(range(7)), engine="local", progress=False))
    assert list(each_part(partial(squares, 2), [], engine="ray", progress=False)) == []


def squares(power: int) -> Callable[[int], int]:
    return lambda number: number**power
