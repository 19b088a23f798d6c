"""Online and mixed DPO through the public command: what is generated, what becomes of it, and exact resumption."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mmalign.branches import BranchRecord
from mmalign.errors import ConfigError
from mmalign.experiment import train as run_training
from mmalign.rewards.answers import Overlap, load_judge
from tests.fixtures import tiny_vlm
from tests.fixtures.vlm_runs import write_experiment, write_table
from tests.invariants.conftest import metric_lines, state_files
from tests.rewards.test_api import Endpoint, endpoint, says
from tests.rewards.test_preference import shown

__all__ = ["endpoint"]  # a fixture

METHOD = {"name": "vlm_online_dpo", "judge": "verbosity", "max_new_tokens": 12, "samples": 3}


class Silent:
    """A judge that cannot say."""

    def score(self, records: Sequence[BranchRecord], answers: Sequence[str]) -> list[float | None]:
        return [None] * len(answers)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    tiny_vlm.build("llava", folder / "llava")
    for kind in ("pairs", "unpaired"):
        write_table(folder, kind)
    return folder


def train(world: Path, out: Path, *overrides: str, kind: str = "pairs", resume: bool = False, **method: Any) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    file = write_experiment(out, world / "llava", world / f"{kind}.jsonl", method={**METHOD, **method})
    run_training(file, [f"run.out={out / 'run'}", "optim.ema_decay=0.9", *overrides], resume=resume)
    return out / "run"


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "online/rank-0.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def mixed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(world, tmp_path_factory.mktemp("mixed"), offline=0.5)


def test_every_pair_is_written_with_where_it_came_from(mixed: Path) -> None:
    rows = lines(mixed)
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert {row["source"] for row in rows} >= {"online", "offline"}
    for row in rows:
        if row["source"] == "offline":
            assert row["answers"] == []
            assert row["judge"] is None
            assert row["pair"][0].startswith("a red circle")
            continue
        assert len(row["answers"]) == len(row["scores"]) == 3
        said = [score for score, text in zip(row["scores"], row["answers"], strict=True) if text.strip()]
        if row["source"] == "online":
            best, worst = (row["answers"].index(text) for text in row["pair"])
            assert row["scores"][best] == max(said) > min(said) == row["scores"][worst]
    logged = metric_lines(mixed)
    assert sum(line["share_offline"] for line in logged) / 4 == pytest.approx(
        sum(row["source"] == "offline" for row in rows) / 8
    )
    assert logged[0]["share_online"] + logged[0]["share_offline"] + logged[0]["share_tied"] == pytest.approx(1)


def test_a_resumed_run_answers_as_the_straight_one(world: Path, mixed: Path, tmp_path: Path) -> None:
    shutil.copytree(mixed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    with (tmp_path / "run/online/rank-0.jsonl").open("a") as handle:
        handle.write('{"step": 9, "cut')
    train(world, tmp_path, offline=0.5, resume=True)
    assert lines(tmp_path / "run") == lines(mixed)
    assert state_files(tmp_path / "run", 4) == state_files(mixed, 4)
    assert metric_lines(tmp_path / "run") == metric_lines(mixed)


def test_accumulating_answers_as_one_batch_does(world: Path, mixed: Path, tmp_path: Path) -> None:
    split = train(world, tmp_path, "optim.batch_size=1", "optim.accumulate=2", offline=0.5)
    assert [row["answers"] for row in lines(split)[:2]] == [row["answers"] for row in lines(mixed)[:2]]
    for left, right in zip(metric_lines(split)[:2], metric_lines(mixed)[:2], strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=2e-4)


def test_a_judge_of_length_prefers_the_longer_answer(world: Path, tmp_path: Path) -> None:
    """Whatever the table's own answers are: single answers serve as prompts."""
    run = train(world, tmp_path, "optim.steps=2", kind="unpaired", samples=4)
    for row in lines(run):
        if row["source"] == "online":
            assert row["scores"][row["answers"].index(row["pair"][0])] > row["scores"][row["answers"].index(row["pair"][1])]
    assert all(line["share_offline"] == 0 for line in metric_lines(run))


def test_a_judge_that_cannot_say_teaches_nothing(world: Path, tmp_path: Path) -> None:
    run = train(world, tmp_path, "optim.steps=1", judge="tests.experiment.test_vlm_online:Silent")
    (line,) = metric_lines(run)
    assert (line["share_tied"], line["loss"], line["grad_norm"]) == (1.0, 0.0, 0.0)
    assert {row["source"] for row in lines(run)} == {"tied"}


def longer(_: int, body: dict[str, Any]) -> Any:
    """A verdict for the longer answer, wherever it stands; of two that differ by a character at most, for the first."""
    first, second = map(len, shown(body))
    return says(f"Answer {1 if first >= second - 1 else 2} is better.")


def test_a_model_that_compares_two_answers_orders_what_is_trained_on(
    world: Path, tmp_path: Path, endpoint: Endpoint
) -> None:
    """Three answers are three comparisons in both orders; a run that was killed asks and trains as the straight one did."""
    endpoint.script = longer
    judge = {"judge": f"prefer-api:http://127.0.0.1:{endpoint.server_address[1]}/v1#tiny"}
    straight = train(world, tmp_path / "straight", **judge)
    told = [row for row in lines(straight) if row["source"] == "online"]
    assert told
    for row in told:
        best, worst = row["pair"]
        said = [text for text in row["answers"] if text.strip()]
        assert len(best) > len(worst) and len(best) >= max(map(len, said)) - 1 and len(worst) <= min(map(len, said)) + 1
    shares = {line["judge_inconsistent"] for line in metric_lines(straight)}
    assert len(shares) > 1 and all(line["judge_unread"] == 0 for line in metric_lines(straight))
    asked = [shown(body) for body in endpoint.bodies]
    assert len(set(asked)) > 3 and all((second, first) in asked for first, second in asked)
    assert all(any(part["type"] == "image_url" for part in body["messages"][0]["content"]) for body in endpoint.bodies)

    shutil.copytree(straight, tmp_path / "killed/run")
    shutil.rmtree(tmp_path / "killed/run/checkpoints/step-00000004")
    train(world, tmp_path / "killed", resume=True, **judge)
    assert lines(tmp_path / "killed/run") == lines(straight)
    assert state_files(tmp_path / "killed/run", 4) == state_files(straight, 4)
    assert metric_lines(tmp_path / "killed/run") == metric_lines(straight)


def stubborn(folder: Path) -> Path:
    """A language model of the real class that says *Answer 1 is better.* to everything: one token, then the end.

    Layers add nothing; every token but the verdict's has one and the same embedding, which the output layer turns into it.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tiny_vlm.tokenizer(["<|im_start|>"], eos="<|im_end|>")
    words.add_tokens(["Answer 1 is better."])
    verdict = words.convert_tokens_to_ids("Answer 1 is better.")
    words.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    model = LlamaForCausalLM(LlamaConfig(**tiny_vlm.text_settings(words)))
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.fill_(1.0 if "norm" in name else 0.0)
        model.get_input_embeddings().weight[:, 0] = 1.0
        model.get_input_embeddings().weight[verdict] = torch.eye(32)[1]
        model.lm_head.weight[verdict, 0] = model.lm_head.weight[words.eos_token_id, 1] = 10.0
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def test_a_local_judge_that_goes_by_the_place_teaches_nothing(world: Path, tmp_path: Path) -> None:
    judge = f"prefer:{stubborn(tmp_path / 'judge')}"
    run = train(world, tmp_path, "optim.steps=1", judge=judge, judge_options={"device": "cpu", "max_tokens": 4})
    (line,) = metric_lines(run)
    assert (line["judge_inconsistent"], line["judge_unread"]) == (1.0, 0.0)
    assert (line["share_tied"], line["loss"], line["grad_norm"]) == (1.0, 0.0, 0.0)


def test_offline_rows_need_pairs(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"method.offline: .*holds unpaired"):
        train(world, tmp_path, kind="unpaired", offline=0.5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"offline": 1.0}, "vlm_dpo"), ({"samples": 1}, "samples"), ({"temperature": 0.0}, "temperature"),
     ({"objective": "ld_dpo", "alpha": 0.5}, "generated answers"), ({"judge": "verbos"}, "did you mean 'verbosity'")],
)  # fmt: skip
def test_settings_without_meaning_are_refused(world: Path, tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(world, tmp_path, **changed)


def test_word_overlap_by_hand() -> None:
    record = tiny_vlm.record(answers=("a red circle", "nothing"))
    # 2 of 4 words shared with 3: 2 x 2 / (4 + 3)
    assert Overlap().score([record, record], ["the red big circle", "xyz"]) == [pytest.approx(4 / 7), 0.0]
    assert load_judge("brevity").score([record], ["one two"]) == [-2.0]
