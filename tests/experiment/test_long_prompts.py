"""Prompts longer than the text encoders read: counted and told, or left out by name; a cap of rows a prompt in a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mmalign.data import open_table, usable_rows
from mmalign.errors import ConfigError, DataError
from mmalign.experiment import load_experiment
from mmalign.experiment.long_prompts import judge_prompts
from mmalign.experiment.settings import DataConfig
from mmalign.models.diffusion.base import DiffusionFamily
from tests.invariants.conftest import CONFIG, write_pairs

Families = Callable[[str], DiffusionFamily]
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pairs; the third and sixth prompt are long, and four have one prompt."""
    path = write_pairs(tmp_path_factory.mktemp("long"), 8)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number in (2, 5):
        lines[number]["prompt"] = "a red circle " * 60
    for number in (0, 3, 4, 7):
        lines[number]["prompt"] = "a red circle"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("variant", ["sd1", "sdxl", "sd3", "flux"])
def test_what_an_encoder_loses_is_counted_exactly(variant: str, tiny_family: Families) -> None:
    """One token more than fits: the ids of the tokenizer say where that is."""
    family = tiny_family(variant)
    name, length = max(family._prompt_lengths().items(), key=lambda item: item[1])  # type: ignore[attr-defined]
    tokenizer = family._part(name)  # type: ignore[attr-defined]

    def count(words: int) -> int:
        return len(tokenizer("red " * words, verbose=False).input_ids)

    fits = max(words for words in range(1, length + 1) if count(words) <= length)
    assert family.tokens_cut(["red", "red " * fits, "red " * (fits + 1), "red " * (3 * length)]) == [
        0, 0, count(fits + 1) - length, count(3 * length) - length,
    ]  # fmt: skip
    assert family.tokens_cut([]) == []


def test_rows_are_told_or_left_out(table: Path, tiny_family: Families) -> None:
    opened = open_table(table)
    checked = usable_rows(opened, check="online", progress=False)
    kept, said = judge_prompts(DataConfig(manifest=str(table)), tiny_family("sd1"), opened, checked)
    assert kept is checked and said is not None
    assert said.startswith("2 of 8 rows have prompts that no text encoder reads whole (first pairs.jsonl line 3: the last ")
    assert "data.long_prompts=drop" in said
    drop = DataConfig(manifest=str(table), long_prompts="drop")
    kept, said = judge_prompts(drop, tiny_family("sd1"), opened, checked)
    assert said is None and kept.rows.tolist() == [0, 1, 3, 4, 6, 7] and kept.counts == {"prompt_too_long": 2}
    assert [(problem.row, problem.column, problem.action) for problem in kept.problems] == [
        (3, "prompt", "drop"), (6, "prompt", "drop"),
    ]  # fmt: skip
    assert kept.quarantined == 0
    with pytest.raises(DataError, match="none of 8 rows can be used(.|\n)*prompt_too_long"):
        judge_prompts(drop, tiny_family("sd1"), opened, replace(checked, rows=checked.rows[[2, 5]]))


def test_a_run_says_both(table: Path, tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"pairs": table, "optim__steps": 2, "run__save_every": 2, "data__max_per_prompt": 2}
    train(tmp_path / "cut", **settings)
    said = capsys.readouterr().out
    assert "data: 2 of 8 rows have prompts that no text encoder reads whole" in said
    assert "data: an epoch has 6 of 8 rows, at most 2 of a prompt" in said
    out = train(tmp_path / "drop", data__long_prompts="drop", **settings)
    said = capsys.readouterr().out
    assert "6 of 8 rows used; 2 prompt_too_long dropped" in said and "an epoch has 4 of 6 rows" in said
    refused = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [row["id"] for row in refused] == ["row-2", "row-5"] and {row["reason"] for row in refused} == {"prompt_too_long"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.max_per_prompt=0"], "data.max_per_prompt: at least 1"),
        (["data.max_per_prompt=2", "data.buckets=true"], "not with data.mix, data.buckets"),
        (["data.max_per_prompt=2", "data.mix=[x]"], "not with data.mix, data.buckets"),
        (["data.shuffle=blocks"], "data.shuffle"),
        (["data.long_prompts=keep"], "data.long_prompts"),
    ],
)
def test_settings_without_meaning(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_experiment(CONFIG, overrides)


def test_other_methods_refuse_what_is_for_pairs() -> None:
    config = str(Path(CONFIG).with_name("rank_dpo.yaml"))
    for setting in ("data.max_per_prompt=2", "data.long_prompts=drop"):
        with pytest.raises(ConfigError, match=f"{setting.split('=')[0]}: 'rank_dpo' does not train on pairs"):
            load_experiment(config, [setting])

