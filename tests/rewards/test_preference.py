"""Models as judges of answers: both orders, every pair, places that are not content; real small models and a real endpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.branches import BranchRecord, VideoRef
from mmalign.errors import MmalignError, RewardError
from mmalign.rewards.answers import load_judge
from mmalign.rewards.preference import (
    PreferenceJudge,
    PreferenceOptions,
    conversation,
    load_preference,
    parse_answer_choice,
    pictures,
)
from tests.fixtures import tiny_vlm
from tests.rewards.test_api import Endpoint, endpoint, says

__all__ = ["endpoint"]  # a fixture
RECORD = tiny_vlm.record("r", media=[tiny_vlm.picture(1)], answers=("the truth", "a lie"))


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Answer 1 is better.", 1.0), ("**Answer 2 is better**", -1.0), ("Both are equally good.", 0.0),
        ("Answer 1 is the better one", 1.0), ("Answer 1 is better. Answer 2 is better.", None), ("1", None), ("", None),
        ("Answer 12 is better", None),
    ],
)  # fmt: skip
def test_choices(reply: str, expected: float | None) -> None:
    assert parse_answer_choice(reply) == expected


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """The two answers of a request, in the order shown."""
    text = body["messages"][0]["content"][-1]["text"]
    found = re.search(r"Answer 1:\n(.*)\n\nAnswer 2:\n(.*)\n\nWhich answer", text, re.DOTALL)
    assert found is not None
    return found[1], found[2]


def by(better: Callable[[str, str], int]) -> Callable[[int, dict[str, Any]], Any]:
    """An endpoint that answers 1, 2 or 0 (a tie) to what it is shown."""
    words = {1: "Answer 1 is better.", 2: "Answer 2 is better.", 0: "Both are equally good.", -1: "Who knows?"}
    return lambda _, body: says(words[better(*shown(body))])


def judge_of(endpoint: Endpoint, **options: Any) -> PreferenceJudge:
    found = load_judge(f"prefer-api:http://127.0.0.1:{endpoint.server_address[1]}/v1#tiny", options)
    assert isinstance(found, PreferenceJudge)
    return found


def test_a_verdict_needs_both_orders(endpoint: Endpoint) -> None:
    judge = judge_of(endpoint)
    endpoint.script = by(lambda first, second: 1 if len(first) > len(second) else 2)
    assert judge.score([RECORD, RECORD], ["long answer", "short"]) == [1.0, -1.0]
    assert [shown(body) for body in endpoint.bodies] in ([("long answer", "short"), ("short", "long answer")],
                                                          [("short", "long answer"), ("long answer", "short")])  # fmt: skip
    endpoint.script = by(lambda *_: 1)  # whatever stands first
    assert judge.score([RECORD, RECORD], ["long answer", "short"]) == [0.0, 0.0]
    endpoint.script = by(lambda *_: 0)
    assert judge.score([RECORD, RECORD], ["long answer", "short"]) == [0.0, 0.0]
    endpoint.script = by(lambda *_: -1)
    assert judge.score([RECORD, RECORD], ["long answer", "short"]) == [None, None]
    assert judge.figures() == {"judge_unread": 0.25, "judge_inconsistent": pytest.approx(1 / 3)}
    judge.restart()
    assert judge.figures() == {"judge_unread": 0.0, "judge_inconsistent": 0.0}


def test_every_pair_of_several_answers_is_asked_once_per_order(endpoint: Endpoint) -> None:
    judge, order = judge_of(endpoint), ["best", "middle", "worst"]
    endpoint.script = by(lambda first, second: 1 if order.index(first) < order.index(second) else 2)
    other = tiny_vlm.record("s", media=[tiny_vlm.picture(2)])
    found = judge.score([RECORD] * 4 + [other] * 2, ["middle", "worst", "best", " ", "worst", "worst  "])
    assert found == [0.0, -1.0, 1.0, None, 0.0, 0.0]  # nothing said is not judged; the same words are a tie unasked
    assert len(endpoint.bodies) == 6 and judge.asked == 3


def test_the_model_sees_media_question_and_reference(endpoint: Endpoint) -> None:
    endpoint.script = by(lambda *_: 0)
    clip = tiny_vlm.record("c", media=[tiny_vlm.picture(3), tiny_vlm.clip(1, 20)], answers=("it is {second} so", "no"))
    judge_of(endpoint, show_reference=True).score([clip, clip], ["{first}", "{question} {reference}"])
    content = endpoint.bodies[0]["messages"][0]["content"]
    assert sum(part["type"] == "image_url" for part in content) == 9
    text = content[-1]["text"]
    assert "Look at the 9 pictures." in text and "What is in the picture?" in text and "it is {second} so" in text
    assert set(shown(endpoint.bodies[0])) == {"{first}", "{question} {reference}"}


def test_turns_have_their_roles_and_long_clips_are_thinned() -> None:
    assert conversation(RECORD) == "What is in the picture?"
    assert len(list(pictures(tiny_vlm.record("c", media=[tiny_vlm.clip(1, 30)])))) == 8
    gone = BranchRecord(id="g", messages=RECORD.messages, answers=(), media=(VideoRef(path="nowhere.mp4", label="x"),))
    with pytest.raises(RewardError, match="row 'g'"):
        list(pictures(gone))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("judges")
    seeing, blind = tiny_vlm.build("llava", root / "seeing"), root / "blind"
    made = tiny_vlm.tokenizer(["<|im_start|>"], eos="<|im_end|>")
    made.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with tiny_vlm.seeded(1):
        LlamaForCausalLM(LlamaConfig(**tiny_vlm.text_settings(made))).save_pretrained(blind)
    made.save_pretrained(blind)
    yield {"seeing": seeing, "blind": blind}


@pytest.mark.parametrize("name", ["seeing", "blind"])
def test_a_local_model_is_asked_and_babble_is_no_verdict(name: str, models: dict[str, Path]) -> None:
    judge: Any = load_judge(f"prefer:{models[name]}", {"max_tokens": 4, "device": "cpu"})
    assert judge._asker is None  # nothing is loaded before it is needed
    assert judge.score([RECORD, RECORD], ["a red circle", "nothing"]) == [None, None]
    assert judge.asked == judge.unread == 1 and type(judge._asker).__name__ == {"seeing": "LocalVlm", "blind": "LocalLlm"}[name]


def test_replies_of_a_language_model_do_not_depend_on_their_batch(models: dict[str, Path]) -> None:
    from mmalign.rewards.llm import LocalLlm
    from mmalign.rewards.vlm import Question

    model = LocalLlm(str(models["blind"]), device="cpu", dtype=None, revision=None, local_files_only=True)
    questions = [Question(images=(), text=text) for text in ("a circle?", "a star?", "two squares and a star?")]
    together = model.reply(questions, max_tokens=5)
    assert together == [model.reply([question], max_tokens=5)[0] for question in questions]
    ids = torch.tensor([model._ids("a star?")])
    with torch.no_grad():
        first = int(model.model(ids).logits[0, -1].argmax())
    assert together[1].startswith(model.tokenizer.decode([first], skip_special_tokens=True))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("prefer:", {}, "name a model's folder"), ("prefer:nowhere", {}, "name a model's folder"),
        ("prefer-api:localhost#m", {}, "prefer-api:http://host:port/v1#model"), ("prefer-api:http://h/v1", {}, "#model"),
        ("prefer:a/b", {"question": "Which?"}, "once each"), ("prefer:a/b", {"max_token": 3}, "max_token"),
        ("overlap", {"max_tokens": 3}, "takes no options"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_said_at_once(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(MmalignError, match=re.escape(words)):
        load_judge(name, options)


def test_an_unreadable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MmalignError, match="empty"):
        load_preference("prefer", str(tmp_path / "empty"), {}).score([RECORD, RECORD], ["a", "b"])


def test_options_have_meaning() -> None:
    with pytest.raises(ValueError, match="positive"):
        PreferenceOptions(batch_size=0)
