"""GREEN-style judging: the strict reader of replies, and the judge over a real local chat model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.branches import Answer, BranchRecord, Message, Part
from mmalign.errors import ModelError, RewardError
from mmalign.rewards.answers import LengthControlled, judgements, load_judge, require_judge
from mmalign.rewards.green import ERROR_KINDS, REASONS, UnreadableReplyError, clean, parse_green
from mmalign.world.report_judge import ReportErrors

GOOD = """[Explanation]:
The candidate misses the effusion; 3 things agree.

[Clinically Significant Errors]:
(a) False report of a finding in the candidate: 0.
(b) Missing a finding present in the reference: 1. Small left pleural effusion
(e) Mentioning a comparison that is not there: 2. stable; improved

[Clinically Insignificant Errors]:
(c) Wrong location: 1. slightly

[Matched Findings]:
3. Normal heart; clear right lung; no pneumothorax
"""


def reply(significant: str = "No errors.", matched: str = "3. a; b; c", insignificant: str = "No errors.") -> str:
    return (
        f"[Explanation]:\nSo it is.\n\n[Clinically Significant Errors]:\n{significant}\n\n"
        f"[Clinically Insignificant Errors]:\n{insignificant}\n\n[Matched Findings]:\n{matched}\n"
    )


def record(reference: str | None, name: str = "r") -> BranchRecord:
    meta = {} if reference is None else {"reference": reference}
    return BranchRecord(
        id=name, messages=(Message(role="user", parts=(Part(text="Report."),)),), answers=(Answer(text="x"), Answer(text="y")),
        meta=meta,
    )  # fmt: skip


def test_a_reply_of_the_asked_form() -> None:
    found = parse_green(GOOD)
    assert (found.matched, found.errors) == (3, (0, 1, 0, 0, 2, 0)) and found.score == 0.5
    assert found.insignificant == (0, 0, 1, 0, 0, 0)
    assert found.notes == ("missing finding: Small left pleural effusion", "invented comparison: stable; improved")


def test_the_kinds_are_those_of_the_rule_based_judge() -> None:
    assert tuple(ReportErrors.__slots__) == ERROR_KINDS


@pytest.mark.parametrize(
    ("text", "matched", "errors"),
    [
        (reply(), 3, 0),
        (reply("None."), 3, 0),
        (reply("There are no clinically significant errors in the candidate report."), 3, 0),
        (reply(matched="No matched findings."), 0, 0),
        (reply("(a) False: 12. many"), 3, 12),
        (reply(matched="10. ten of them"), 10, 0),
        (reply("(1) False: 2. a; b\n(4) Severity: 1. c"), 3, 3),
        (reply("(a) False: 1. a nodule\nof the left lung: 2. visible\n(b) Missing: 1. b"), 3, 2),
        (reply("(a) False: 1. a\n\n(b) Missing: 1. b"), 3, 2),
        (reply("(a) False: none.\n(b) Missing: 2. a; b"), 3, 2),
        (reply(matched="3. a; b; c\n\nI hope that helps! Score: 7."), 3, 0),
        (reply(insignificant="who knows"), 3, 0),
        ("<think>\n[Matched Findings]:\n9. no\n</think>\n" + reply(), 3, 0),
        ("Sure! Here it is.\n\n" + reply().replace("[", "**[").replace("]:", "]:**"), 3, 0),
        (reply().replace("[Matched Findings]:\n", "[Matched Findings]: "), 3, 0),
        (reply().replace("[", "").replace("]", ""), 3, 0),
        (reply().replace("\n", "\r\n"), 3, 0),
    ],
)  # fmt: skip
def test_other_ways_of_saying_it(text: str, matched: int, errors: int) -> None:
    found = parse_green(text)
    assert (found.matched, sum(found.errors)) == (matched, errors)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no_sections"),
        ("I'm sorry, but I cannot assess medical reports.", "no_sections"),
        ("The candidate has 2 significant errors and 3 matched findings.", "no_sections"),
        ("4", "no_sections"),
        ('{"matched": 3, "errors": 1}', "no_sections"),
        (reply().replace("Matched Findings", "Hallazgos coincidentes"), "no_sections"),
        (reply().replace("Clinically Significant Errors", "Klinisch bedeutsame Fehler"), "no_sections"),
        (reply("Keine Fehler."), "unclear_errors"),
        (reply("エラーはありません"), "unclear_errors"),
        (reply("Nodule missing in the candidate."), "unclear_errors"),
        (reply("No errors except a false nodule."), "unclear_errors"),
        (reply("Two errors: a false nodule and a missing effusion."), "unclear_errors"),
        (reply("(a) False finding: one. a nodule"), "unclear_errors"),
        (reply("(a) False finding: 1-2. a nodule"), "unclear_errors"),
        (reply("(a) False finding: 1.5. a nodule"), "unclear_errors"),
        (reply("(a) False finding: -1. a nodule"), "unclear_errors"),
        (reply("(a) False finding: about 2. a nodule"), "unclear_errors"),
        (reply("(a) False finding: 1000. a nodule"), "unclear_errors"),
        (reply("(a) False finding: ３. a nodule"), "unclear_errors"),
        (reply("(a) False finding: <number>. <the errors>"), "unclear_errors"),
        (reply("(a) False finding: 1"), "unclear_errors"),
        (reply("(a) False: 1. a\n(a) False: 2. b"), "unclear_errors"),
        (reply("I found these errors.\n(a) False: 1. a"), "unclear_errors"),
        (reply(""), "unclear_errors"),
        (reply(matched="Three. a; b; c"), "unclear_matches"),
        (reply(matched="3"), "unclear_matches"),
        (reply(matched="3/5. a"), "unclear_matches"),
        (reply(matched="1.5. a"), "unclear_matches"),
        (reply(matched="<number>. <the findings>"), "unclear_matches"),
        (reply(matched=""), "unclear_matches"),
        (reply(matched="Normal heart; clear lungs"), "unclear_matches"),
        (reply() + "\n" + reply(), "repeated_section"),
        ("[Matched Findings]:\n3. a\n\n[Clinically Significant Errors]:\n(a) False: 1. b", "order"),
        ("<think>\n" + reply(), "cut_reply"),
        (GOOD[: GOOD.index("[Matched")], "no_sections"),
    ],
)  # fmt: skip
def test_what_is_not_clear_is_a_named_failure(text: str, reason: str) -> None:
    with pytest.raises(UnreadableReplyError) as found:
        parse_green(text)
    assert found.value.reason == reason and reason in REASONS


def test_no_cut_of_a_good_reply_is_read_as_another_number() -> None:
    """Wherever the text breaks off, it is refused, or all counts are there already."""
    whole = parse_green(GOOD)
    for end in range(len(GOOD)):
        try:
            found = parse_green(GOOD[:end])
        except UnreadableReplyError:
            continue
        assert (found.matched, found.errors) == (whole.matched, whole.errors), GOOD[:end][-40:]


def test_what_the_judge_sees_of_a_report() -> None:
    assert clean("FINDINGS: [no] **Big** heart.\n\n Clear   lungs", None) == "findings: big heart. clear lungs"
    assert clean("a b c d", 2) == "a b"


class Inner:
    """Scores 0.6 whatever is said."""

    def score(self, records: Any, answers: Any) -> list[float | None]:
        return [0.6 if answer else None for answer in answers]


def test_the_length_controlled_score_worked_by_hand() -> None:
    """120 words against 60 halve a score of 0.6; 30 words leave it as it is."""
    judge = LengthControlled(Inner())
    reference = record("w " * 60)
    assert judge.score([reference] * 3, ["w " * 120, "w " * 30, ""]) == [0.3, 0.6, None]
    assert judge.judge([reference], ["w " * 90])[0].parts["verbosity"] == 1.5
    assert [found.reason for found in judge.judge([record(None)], ["w"])] == ["no_reference"]


def test_names_with_arguments() -> None:
    require_judge("lc:cxr-report")
    require_judge("green:some/model")  # nothing is loaded
    require_judge("findings:cxr-kinds")
    with pytest.raises(RewardError, match="needs a name behind a colon"):
        require_judge("lc:")
    with pytest.raises(Exception, match="did you mean 'cxr-report'"):
        require_judge("lc:cxr-reprot")
    with pytest.raises(RewardError, match="no option 'retry'; did you mean 'retries'"):
        load_judge("green-api:http://127.0.0.1:9/v1#m", options={"retry": "3"})
    with pytest.raises(RewardError, match="retries is 'many', expected a number"):
        load_judge("green-api:http://127.0.0.1:9/v1#m", options={"retries": "many"})
    with pytest.raises(RewardError, match="takes no options"):
        load_judge("cxr-report", options={"retries": "3"})
    with pytest.raises(RewardError, match="name an endpoint as"):
        load_judge("green-api:127.0.0.1")


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny real Llama with a chat template and random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("chat")
    words = ["<s>", "</s>", "<unk>", *"abcdefghij", "[Matched", "Findings]:", "3."]
    plain = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for message in messages %}<s> {{ message['content'] }} {% endfor %}"
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                    eos_token_id=1, bos_token_id=0, max_position_embeddings=4096)
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_local_model_is_asked_once_and_its_babble_is_counted(chat_folder: Path, tmp_path: Path) -> None:
    replies = tmp_path / "replies.jsonl"
    options = {"max_tokens": "6", "batch_size": "2"}
    judge = load_judge(f"green:{chat_folder}", options=options, replies=replies)
    records = [record("a b", "1"), record("c d e", "2"), record(None, "3"), record("a b", "4")]
    found = judgements(judge, records, ["a", "b c", "d", ""])
    assert [one.score for one in found] == [None] * 4
    assert [one.reason for one in found][2:] == ["no_reference", "empty_answer"]
    assert {one.reason for one in found[:2]} <= {"cut_reply", "no_sections"} and found[0].raw
    assert len(replies.read_text().splitlines()) == 2
    again = load_judge(f"green:{chat_folder}", options=options, replies=replies)
    before = replies.read_bytes()
    assert judgements(again, records, ["a", "b c", "d", ""]) == found and replies.read_bytes() == before
    one = load_judge(f"green:{chat_folder}", options={**options, "batch_size": "1"})
    assert [got.raw for got in judgements(one, records[:2], ["a", "b c"])] == [got.raw for got in found[:2]]


def test_models_that_cannot_judge_are_refused(chat_folder: Path, tmp_path: Path) -> None:
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(chat_folder, bare)
    for name in bare.glob("chat_template*"):
        name.unlink()
    with pytest.raises(ModelError, match="no chat template"):
        load_judge(f"green:{bare}")
    with pytest.raises(ModelError, match="cannot load the chat model"):
        load_judge(f"green:{tmp_path / 'nothing'}")
    (tmp_path / "words.txt").write_text("Compare {reference} with it.")
    with pytest.raises(RewardError, match=r"\{candidate\} exactly once"):
        load_judge(f"green:{chat_folder}", options={"template": str(tmp_path / "words.txt")})


def test_reports_cannot_break_out_of_their_place() -> None:
    from mmalign.rewards.green import GreenJudge
    from mmalign.rewards.replies import ReplyStore

    judge = GreenJudge(None, ReplyStore(None), template="R: {reference} C: {candidate}")  # type: ignore[arg-type]
    assert judge._prompt("a {candidate} b {x}", "c {reference}") == "R: a {candidate} b {x} C: c {reference}"
