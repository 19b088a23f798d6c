"""Files of answers as an attacker would write them: every defect costs its own row, with its reason, and nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from mmalign.data import import_table, open_vlm
from mmalign.data.check import CheckPolicy
from mmalign.data.vlm_check import check_vlm
from tests.data.clips import clip
from tests.data.making import picture
from tests.data.test_answer_formats import BAD, GOOD, POOR, QUESTION, RATED, ROWS, assistant, gpt, human, user

GONE = object()
"""The key itself is left out."""
WRONG = "unsupported_format"


def changed(row: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """A copy of a row with another value at a dotted place."""
    made = copy.deepcopy(row)
    *way, last = [int(key) if key.isdigit() else key for key in place.split(".")]
    inside: Any = made
    for key in way:
        inside = inside[key]
    if value is GONE:
        del inside[last]
    else:
        inside[last] = value
    return made


MEDIA = {
    "none.png": "missing_image", "../a.png": "missing_image", "": "missing_image", 7: "missing_image",
    "cut.png": "truncated_image", "page.png": "unsupported_format", "empty.png": "empty_image",
}  # fmt: skip
ONE_TURN = {
    "question": {GONE: "empty_prompt", "": "empty_prompt", " \n": "empty_prompt", 5: WRONG, ("x",): WRONG, None: "empty_prompt",
                 "<image>\n<image>\nx": "placeholder_count_mismatch", "<audio>x": WRONG},
    "chosen": {GONE: "missing_chosen", None: "missing_chosen", "": "empty_chosen", 5: "missing_chosen",
               BAD: "identical_responses"},
    "rejected": {GONE: "missing_rejected", None: "missing_rejected", "\t": "empty_rejected", ("x",): "missing_rejected"},
    "image": {**MEDIA, None: "missing_image", GONE: "missing_image"},
    "weight": {"high": "non_finite_score", float("nan"): "non_finite_score", -1: "non_finite_score", True: "non_finite_score"},
    "p_chosen": {0.2: "label_out_of_range", "a": "non_finite_score"},
}  # fmt: skip
DEFECTS: dict[str, dict[str, dict[Any, str]]] = {
    "rlaifv": ONE_TURN,
    "rlhfv": {
        "image": ONE_TURN["image"],
        "text": {GONE: WRONG, None: WRONG, "": WRONG, "{": WRONG, "[1]": WRONG, "{}": "missing_chosen",
                 json.dumps({"question": "x", "chosen": GOOD}): "missing_rejected",
                 json.dumps({"question": 3, "chosen": GOOD, "rejected": BAD}): WRONG},
    },
    "vlfeedback": {
        "img_path": ONE_TURN["image"],
        "prompt": {GONE: "empty_prompt", 5: WRONG, "": "empty_prompt"},
        "completions": {GONE: WRONG, None: WRONG, (): "too_few"},
        "completions.response.0": {None: "too_few", 5: "too_few", "": "empty_rejected"},
        "completions.annotations.1.Ethics.Rating": {"N/A": "too_few", None: "too_few", "inf": "too_few"},
    },
    "povid": {
        "image": MEDIA,
        "conversations": {GONE: WRONG, None: WRONG, (): "different_prompts"},
        "rejected_conversations": {GONE: "missing_rejected", (): "missing_rejected", ("x",): WRONG},
        "rejected_conversations.1.value": {None: "empty_rejected", "": "empty_rejected", 5: WRONG, GOOD: "identical_responses"},
        "conversations.0.from": {None: WRONG, "nobody": WRONG},
        "conversations.0.value": {"another question": "different_prompts"},
    },
    "llamafactory": {
        "images": {GONE: "placeholder_count_mismatch", None: "placeholder_count_mismatch",
                   ("a.png", "b.png"): "placeholder_count_mismatch", ("none.png",): "missing_image"},
        "conversations": {GONE: WRONG, 5: WRONG},
        "conversations.0.value": {QUESTION: "placeholder_count_mismatch", "<image>": "empty_prompt"},
        "chosen": {GONE: "missing_chosen", None: "missing_chosen"},
        "rejected.value": {None: "empty_rejected", 5: WRONG, GOOD: "identical_responses"},
    },
    "msswift": {
        "images": {("a.png", "b.png"): "placeholder_count_mismatch", (): "placeholder_count_mismatch",
                   "cut.png": "truncated_image"},
        "messages": {GONE: WRONG, (): "missing_chosen"},
        "messages.1.content": {None: "empty_chosen", 5: WRONG},
        "messages.0.content": {"<image>": "empty_prompt", "<video>x": "placeholder_count_mismatch"},
        "rejected_response": {GONE: "missing_rejected", None: "missing_rejected", 5: "missing_rejected", "": "empty_rejected"},
        "rejected_images": {5: "missing_image"},
        "margin": {"wide": "non_finite_score"},
    },
    "trl": {
        "prompt": {5: WRONG, ("x",): WRONG},
        "prompt.0.content": {5: WRONG, None: "empty_prompt"},
        "prompt.0.content.1.text": {5: WRONG, "": "empty_prompt"},
        "chosen": {GONE: "missing_chosen", (): "missing_chosen", 5: WRONG},
        "chosen.0.content.0.text": {BAD: "identical_responses", "": "empty_chosen"},
        "rejected.0.role": {"user": "bad_turns"},
        "images": {("a.png", "b.png"): "placeholder_count_mismatch", GONE: "placeholder_count_mismatch"},
    },
    "llava": {
        "conversations": {GONE: WRONG, (): "missing_chosen"},
        "conversations.1.value": {None: "empty_answer", 5: WRONG},
        "conversations.0.value": {"<image>": "empty_prompt", QUESTION + "<image><image>": "placeholder_count_mismatch"},
        "video": {"none.mp4": "unreadable_video", "cut.mp4": "unreadable_video", "sound.mp4": "no_video_stream"},
    },
}  # fmt: skip
BASES = {
    **{name: rows[0] for name, rows in ROWS.items()},
    "vlfeedback": {**ROWS["vlfeedback"][0], "completions": {"response": [BAD, GOOD], "annotations": [POOR, RATED]}},
    "llava": {"id": "x", "video": "fine.mp4", "conversations": [human(f"<image>\n{QUESTION}"), gpt(GOOD)]},
}
ALWAYS = [  # lines that are no rows, in any format
    '{"id": "half', "[1, 2]", '"text"', "null", "{}x", '{"id": "a", "id": "b"}', '{"id": "lone", "question": "\\ud83d"}',
]


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for name, data in {
        "a.png": picture(1), "b.png": picture(2), "cut.png": picture(3)[:-60], "page.png": b"<!DOCTYPE html>", "empty.png": b"",
        "fine.mp4": clip(4), "cut.mp4": clip(4)[:-300], "sound.mp4": b"ID3\x04" + bytes(400),
    }.items():  # fmt: skip
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("name", DEFECTS)
def test_every_defect_costs_its_own_row(name: str, media: Path, tmp_path: Path) -> None:
    """Of one file with everything wrong in it, sound rows before, between and behind."""
    rows: list[str] = []
    expected: dict[int, str] = {}

    def put(row: dict[str, Any] | str, reason: str | None) -> None:
        rows.append(row if isinstance(row, str) else json.dumps(row))
        if reason is not None:
            expected[len(rows)] = reason

    base = BASES[name]
    sound = 0
    for place, values in DEFECTS[name].items():
        for value, reason in values.items():
            given = list(value) if isinstance(value, tuple) else value
            put(changed({**base, "id": f"bad {len(rows)}"}, place, given), reason)
            if len(rows) % 5 == 0:
                put({**base, "id": f"good {sound} 日本 \u202e"}, None)
                sound += 1
    for line in ALWAYS:
        put(line, WRONG)
    put({**base, "id": "long", "note": "word " * 300_000}, None)
    (tmp_path / "train.jsonl").write_bytes(("\r\n".join(rows) + "\r\n\r\n").encode())
    report = import_table(tmp_path / "train.jsonl", tmp_path / "out", media=media, progress=False)
    assert report.format == name
    table = open_vlm(tmp_path / "out")
    policy = CheckPolicy(max_bad_fraction=1.0, duplicates="keep")
    checked = check_vlm(table, policy=policy, workers=1, progress=False)
    found: dict[int, str] = {}
    for line in (tmp_path / "out" / "import" / "quarantine.jsonl").read_text().splitlines():
        entry = json.loads(line)
        found[entry["row"]] = entry["reason"]  # a row of several answers is named last
    numbers = {table.row_id(row): row for row in range(len(table))}
    lines = {json.loads(text)["id"]: number for number, text in enumerate(rows, start=1) if number not in found}
    used = {table.row_id(int(row)).partition(":")[0] for row in checked.rows}
    for problem in checked.problems:
        found[lines[problem.id.partition(":")[0]]] = problem.reason
    assert found == expected
    assert used == {name for name in lines if name.startswith(("good", "long"))}
    assert len(numbers) == len(lines)
    again = check_vlm(table, policy=policy, workers=3, write=False, progress=False)
    assert again.rows.tolist() == checked.rows.tolist() and again.counts == checked.counts


def test_a_defect_in_the_first_rows_does_not_hide_the_format(media: Path, tmp_path: Path) -> None:
    first = [{"id": "0"}, {"id": "1", "conversations": None}, BASES["povid"]]
    for name, text in (("a.jsonl", "\n".join(map(json.dumps, first))), ("b.json", json.dumps(first))):
        (tmp_path / name).write_text(text)
        report = import_table(tmp_path / name, tmp_path / f"out-{name}", media=media, progress=False)
        assert (report.format, report.written, report.total) == ("povid", 1, 3)


def test_a_first_row_of_megabytes_is_read_to_its_end(media: Path, tmp_path: Path) -> None:
    row = {"messages": [user("<image>" + "so " * 700_000), assistant(GOOD)], "rejected_response": BAD, "images": ["a.png"]}
    (tmp_path / "train.json").write_text(json.dumps([row]))
    assert import_table(tmp_path / "train.json", tmp_path / "out", media=media, progress=False).format == "msswift"
