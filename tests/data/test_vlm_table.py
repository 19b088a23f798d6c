"""The vision-language table: every form a row may have, every reason for which one is refused, order and masking."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mmalign.branches import BranchBatch, BranchRecord, EncodedExample, EncodedRow, MediaBatch, VideoRef
from mmalign.data.check import CheckPolicy
from mmalign.data.staged import StagedLoader
from mmalign.data.vlm import is_vlm, open_vlm
from mmalign.data.vlm_check import check_vlm, usable_vlm
from mmalign.data.vlm_loader import RowRefused, VlmLoader
from mmalign.data.vlm_rows import RowProblem
from mmalign.errors import DataError


def png(shade: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), shade, dtype=np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def user(text: str, images: int = 1) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}]


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def pair(number: int, **changed: Any) -> dict[str, Any]:
    row = {
        "id": f"row-{number}", "prompt": user(f"What is it? {number}"), "chosen": said(f"a square {number}"),
        "rejected": said(f"a circle {number}"), "images": [f"pictures/{number}.png"],
    }  # fmt: skip
    return {**row, **changed}


def table_of(folder: Path, rows: list[dict[str, Any]]) -> Path:
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    for number in range(len(rows)):
        (pictures / f"{number}.png").write_bytes(png(10 * number % 256))
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_of(record: BranchRecord) -> list[Any]:
    return [[message.role, [part.text if part.media is None else part.media for part in message.parts]]
            for message in record.messages]  # fmt: skip


def test_a_pair_in_the_conversational_form(tmp_path: Path) -> None:
    row = pair(0, p_chosen=0.8, weight=2.0, margin=0.5, group="shapes", scores={"judge": [0.9, 0.1]})
    record = open_vlm(table_of(tmp_path, [row]))[0]
    assert text_of(record) == [["user", [0, "What is it? 0"]]]
    assert [answer.text for answer in record.answers] == ["a square 0", "a circle 0"]
    assert [dict(answer.scores) for answer in record.answers] == [{"judge": 0.9}, {"judge": 0.1}]
    assert (record.p_chosen, record.weight, record.margin, record.group) == (0.8, 2.0, 0.5, "shapes")
    assert [Path(str(item.path)).name for item in record.media] == ["0.png"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"prompt": "Describe."}, [["user", [0, "Describe."]]]),
        ({"prompt": "Look at <image> closely."}, [["user", ["Look at ", 0, " closely."]]]),
        ({"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Describe."}]},
         [["system", ["Be brief."]], ["user", [0, "Describe."]]]),
        ({"prompt": None, "chosen": user("Describe.") + said("yes"), "rejected": user("Describe.") + said("no")},
         [["user", [0, "Describe."]]]),
        ({"images": [], "prompt": "Two and two?"}, [["user", ["Two and two?"]]]),
        ({"prompt": [*user("One?"), *said("Yes."), {"role": "user", "content": "And now?"}]},
         [["user", [0, "One?"]], ["assistant", ["Yes."]], ["user", ["And now?"]]]),
    ],
)  # fmt: skip
def test_forms_of_a_prompt(tmp_path: Path, changed: dict[str, Any], expected: list[Any]) -> None:
    assert text_of(open_vlm(table_of(tmp_path, [pair(0, **changed)]))[0]) == expected


def test_pictures_and_clips_keep_the_order_of_the_prompt(tmp_path: Path) -> None:
    parts = [{"type": kind} for kind in ("video", "image", "image")] + [{"type": "text", "text": "Which?"}]
    row = pair(
        0, prompt=[{"role": "user", "content": parts}], images=["pictures/0.png", {"bytes": base64.b64encode(png(7)).decode()}],
        videos=[{"frames": ["pictures/0.png", "pictures/0.png"], "fps": 2.0}],
    )  # fmt: skip
    record = open_vlm(table_of(tmp_path, [row]))[0]
    clip, first, second = record.media
    assert isinstance(clip, VideoRef)
    assert (len(clip.frames), clip.fps) == (2, 2.0)
    assert not isinstance(first, VideoRef)
    assert not isinstance(second, VideoRef)
    assert first.path is not None
    assert second.data == png(7)
    assert text_of(record) == [["user", [0, 1, 2, "Which?"]]]


@pytest.mark.parametrize(
    ("changed", "column", "reason"),
    [
        ({"prompt": user("Two?", images=2)}, "images", "placeholder_count_mismatch"),
        ({"prompt": "See <image> and <image>."}, "images", "placeholder_count_mismatch"),
        ({"chosen": said("look at <image>")}, "chosen", "placeholder_in_answer"),
        ({"rejected": said("  ")}, "rejected", "empty_rejected"),
        ({"chosen": said("")}, "chosen", "empty_chosen"),
        ({"rejected": []}, "rejected", "missing_rejected"),
        ({"rejected": None}, "rejected", "missing_rejected"),
        ({"chosen": user("I am a user.", images=0)}, "chosen", "bad_turns"),
        ({"chosen": [*said("a"), *user("b", 0), *said("c")]}, "chosen", "bad_turns"),
        ({"prompt": said("I begin.")}, "prompt", "bad_turns"),
        ({"prompt": [{"role": "tool", "content": "x"}, *user("y")]}, "prompt", "bad_turns"),
        ({"prompt": [{"role": "user", "content": [{"type": "audio"}]}]}, "prompt", "bad_turns"),
        ({"prompt": [{"text": "no role"}]}, "prompt", "bad_turns"),
        ({"prompt": "", "images": []}, "prompt", "empty_prompt"),
        ({"prompt": None, "chosen": user("A?") + said("a"), "rejected": user("B?") + said("b")}, "rejected", "bad_turns"),
        ({"p_chosen": 0.3}, "p_chosen", "label_out_of_range"),
        ({"p_chosen": None}, "p_chosen", "no_label"),
        ({"weight": -1.0}, "weight", "non_finite_score"),
        ({"scores": {"judge": [1.0]}}, "scores.judge", "non_finite_score"),
        ({"images": ["data:image/png;base64,!!"]}, "images[0]", "undecodable_media"),
        ({"rejected_images": ["pictures/0.png", "pictures/0.png"]}, "rejected_images", "placeholder_count_mismatch"),
    ],
)
def test_reasons_for_which_a_row_is_refused(tmp_path: Path, changed: dict[str, Any], column: str, reason: str) -> None:
    table = open_vlm(table_of(tmp_path, [pair(0, **changed)]))
    with pytest.raises(RowProblem) as caught:
        table.record(0)
    assert (caught.value.column, caught.value.reason) == (column, reason)
    with pytest.raises(DataError, match=r"rows.jsonl line 1 .*mmalign data check"):
        table[0]


def test_a_path_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leaves the manifest's folder"):
        open_vlm(table_of(tmp_path, [pair(0, images=["../secret.png"])])).record(0)


def test_answers_one_by_one_and_in_lists(tmp_path: Path) -> None:
    single = {"id": "a", "prompt": user("?"), "completion": said("yes"), "label": False, "images": ["pictures/0.png"]}
    record = open_vlm(table_of(tmp_path, [single]))[0]
    assert [(answer.text, answer.label) for answer in record.answers] == [("yes", 0.0)]
    (tmp_path / "lists").mkdir()
    listed = {"id": "a", "prompt": "?", "answers": ["one", said("two"), "three"], "scores": {"judge": [1, 3, 2]}, "images": []}
    record = open_vlm(table_of(tmp_path / "lists", [listed]))[0]
    assert [(answer.text, answer.scores["judge"]) for answer in record.answers] == [("one", 1.0), ("two", 3.0), ("three", 2.0)]


def test_another_picture_behind_the_rejected_answer(tmp_path: Path) -> None:
    row = pair(0, rejected_images=["pictures/1.png"], rejected=said("a square 0"))
    record = open_vlm(table_of(tmp_path, [row, pair(1)]))[0]
    assert record.answers[0].media is None
    assert record.answers[1].media is not None
    assert [Path(str(item.path)).name for item in record.answers[1].media] == ["1.png"]  # type: ignore[union-attr]
    assert len(check_vlm(tmp_path / "rows.jsonl", write=False, progress=False).rows) == 2


def test_parquet_with_bytes_and_without_ids(tmp_path: Path) -> None:
    """As `datasets` saves TRL's sets: structs of role and content, pictures as {bytes, path}, one per row, no id."""
    rows = [{key: value for key, value in pair(n).items() if key not in ("id", "images")} for n in range(3)]
    for number, row in enumerate(rows):
        row["images"] = [{"bytes": png(number), "path": None}]
        for column in ("chosen", "rejected"):
            row[column] = [{"role": "assistant", "content": [{"type": "text", "text": row[column][0]["content"]}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "part-00000.parquet")
    table = open_vlm(tmp_path)
    assert is_vlm(tmp_path)
    assert [table.row_id(row) for row in range(3)] == ["0", "1", "2"]
    assert table[2].media[0].data == png(2)  # type: ignore[union-attr]
    assert text_of(table[2]) == [["user", [0, "What is it? 2"]]]
    assert check_vlm(tmp_path, write=False, progress=False).rows.tolist() == [0, 1, 2]


def test_what_is_no_vision_language_table(tmp_path: Path) -> None:
    images = [{"id": "a", "prompt": "x", "chosen": "a.png", "rejected": "b.png"}]
    assert not is_vlm(table_of(tmp_path, images))
    assert not is_vlm(tmp_path / "absent")
    assert is_vlm(table_of(tmp_path, [pair(0)]))
    with pytest.raises(DataError, match="no vision-language table; expected the columns"):
        open_vlm(table_of(tmp_path, [{"id": "a", "caption": "x"}]))
    questions = open_vlm(table_of(tmp_path, [{"id": "a", "prompt": "What?", "images": []}]))
    assert (questions.kind, questions[0].answers) == ("questions", ())
    with pytest.raises(DataError, match="'p_chosn' is not known; did you mean 'p_chosen'"):
        open_vlm(table_of(tmp_path, [pair(0, p_chosn=1.0)]))


def test_stages_are_numbered(tmp_path: Path) -> None:
    rows = [pair(n, stage=stage) for n, stage in enumerate(["hard", "easy", "hard"])]
    table = open_vlm(table_of(tmp_path, rows))
    assert table.stages == ("hard", "easy")
    assert [table[row].stage for row in range(3)] == [0, 1, 0]
    table = open_vlm(table_of(tmp_path, [pair(n, stage=stage) for n, stage in enumerate([16, 2, 8])]))
    assert table.stages == ("2", "8", "16")
    assert [table[row].stage for row in range(3)] == [2, 0, 1]


def defective(folder: Path) -> Path:
    """Ten rows: two good, and one of each kind that is left out."""
    rows = [pair(n) for n in range(10)]
    rows[2] = pair(2, rejected=said("a  square 2"))
    rows[3] = pair(3, images=["pictures/absent.png"])
    rows[4] = pair(4, images=["pictures/broken.png"])
    rows[5] = pair(5, p_chosen=0.5)
    rows[6] = {**pair(0), "id": "again"}
    rows[7] = {**pair(0), "id": "contrary", "chosen": said("a circle 0"), "rejected": said("a square 0")}
    rows[8] = pair(8, chosen=said("<image>"))
    for row in rows:
        row.setdefault("p_chosen", 1.0)
    path = table_of(folder, rows)
    (folder / "pictures" / "broken.png").write_bytes(png(3)[:40])
    return path


def test_a_check_lists_every_row_it_leaves_out(tmp_path: Path) -> None:
    path = defective(tmp_path)
    result = check_vlm(path, policy=CheckPolicy(max_bad_fraction=0.5), progress=False)
    assert result.rows.tolist() == [0, 1, 7, 9]
    assert {problem.row: problem.reason for problem in result.problems} == {
        3: "identical_responses", 4: "missing_image", 5: "truncated_image", 6: "tie", 7: "duplicate", 9: "placeholder_in_answer",
    }  # fmt: skip
    assert result.conflicts == 2
    assert result.quarantined == 3
    listed = [json.loads(line) for line in (tmp_path / "rows.check" / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in listed] == ["row-2", "row-3", "row-4", "row-5", "again", "row-8"]
    table = open_vlm(path)
    stored = usable_vlm(table, check="required", policy=CheckPolicy(max_bad_fraction=0.5), progress=False)
    assert stored.rows.tolist() == result.rows.tolist()
    assert stored.problems == result.problems
    soft = usable_vlm(table, check="required", policy=CheckPolicy(ties="soft", max_bad_fraction=0.5), progress=False)
    assert soft.rows.tolist() == [0, 1, 5, 7, 9]
    with pytest.raises(DataError, match="3 of 10 rows are bad"):
        usable_vlm(table, check="online", progress=False)


def test_a_changed_table_must_be_checked_again(tmp_path: Path) -> None:
    path = table_of(tmp_path, [pair(0), pair(1)])
    with pytest.raises(DataError, match="has not been checked; run 'mmalign data check"):
        usable_vlm(open_vlm(path), check="required", progress=False)
    check_vlm(path, progress=False)
    assert usable_vlm(open_vlm(path), check="required", progress=False).rows.tolist() == [0, 1]
    table_of(tmp_path, [pair(0), pair(2)])
    with pytest.raises(DataError, match="the table has changed since it was checked"):
        usable_vlm(open_vlm(path), check="required", progress=False)


def encode(record: BranchRecord, mismatched: str | None = None) -> EncodedExample:
    """An example whose prefix is the row's number: enough to see which rows a batch holds."""
    number = int(record.id.removeprefix("row-"))
    if number == 3:
        raise RowRefused("too_long", "its prefix has 9 tokens")
    row = EncodedRow(
        prefix=torch.tensor([number]), branches=(torch.tensor([1]), torch.tensor([2])), weights=(None, None), answers=(0, 1),
        positions=torch.arange(3), token_types=None, units=(),
    )  # fmt: skip
    return EncodedExample(
        id=record.id, rows=(row,), p_chosen=record.p_chosen, weight=record.weight, margin=0.0, labels=(1.0, 0.0), scores={}
    )


def collate(examples: Any) -> BranchBatch:
    empty, count = torch.zeros(len(examples), 1), len(examples)
    return BranchBatch(
        ids=tuple(example.id for example in examples), input_ids=torch.stack([example.rows[0].prefix for example in examples]),
        branch_id=empty, position_ids=empty, token_types=None, pred_index=empty, target=empty, seg=empty, flat=empty,
        offset=empty, tok_weight=None, media=MediaBatch(), prefix_lengths=(1,) * count, branch_lengths=((1, 1),) * count,
        branch_flat=tuple((2 * number, 2 * number + 1) for number in range(count)),
        record=torch.arange(2 * count) // 2, answer=torch.arange(2 * count) % 2, lengths=torch.ones(2 * count),
        p_chosen=torch.tensor([example.p_chosen for example in examples]), margin=empty[:, 0],
        weight=torch.tensor([example.weight for example in examples]), label=torch.zeros(2 * count), scores={},
        counts=(2,) * count, groups=(None,) * count, stages=(0,) * count,
    )  # fmt: skip


def loader(path: Path, **settings: Any) -> VlmLoader:
    table = open_vlm(path)
    return VlmLoader(table, range(len(table)), encode=encode, collate=collate, **{"batch_size": 2, **settings})


def test_batches_are_the_same_at_any_number_of_workers_and_from_any_step(tmp_path: Path) -> None:
    path = table_of(tmp_path, [pair(n) for n in range(7) if n != 3])

    def seen(start: int, workers: int) -> list[Any]:
        stream = loader(path, accumulate=2, workers=workers).micro_batches(start)
        return [(step, micro, batch.ids) for step, micro, batch in (next(stream) for _ in range(6))]

    straight = seen(0, 0)
    assert straight == seen(0, 3)
    assert straight[2:] == seen(1, 2)[:4]
    assert [name for _, _, ids in straight[:3] for name in ids] != [f"row-{n}" for n in (0, 1, 2, 4, 5, 6)]


def test_two_processes_cover_what_two_micro_batches_do(tmp_path: Path) -> None:
    path = table_of(tmp_path, [pair(n) for n in range(9) if n != 3])
    one = loader(path, accumulate=2, workers=0).micro_batches()
    expected = [next(one)[2].ids for _ in range(4)]
    halves = [loader(path, world_size=2, rank=rank, workers=0).micro_batches() for rank in (0, 1)]
    assert [next(halves[index % 2])[2].ids for index in range(4)] == expected


def test_a_row_that_cannot_be_encoded_keeps_its_place_without_weight(tmp_path: Path) -> None:
    made = loader(table_of(tmp_path, [pair(n) for n in range(4)]), shuffle=False, workers=2)
    stream = made.micro_batches()
    next(stream)
    batch = next(stream)[2]
    assert batch.ids == ("row-2", "row-3")
    assert batch.weight.tolist() == [1.0, 0.0]
    assert [(row.id, row.reason, row.step) for row in made.masked] == [("row-3", "too_long", 1)]
    alone = loader(tmp_path / "rows.jsonl", shuffle=False, workers=0, batch_size=1).micro_batches(3)
    assert next(alone)[2].weight.tolist() == [0.0]


def test_too_many_masked_rows_stop_the_run(tmp_path: Path) -> None:
    made = loader(table_of(tmp_path, [pair(n) for n in range(4)]), shuffle=False, workers=0, max_runtime_failures=0)
    stream = made.micro_batches()
    next(stream)
    with pytest.raises(DataError, match=r"row-3.*too_long: its prefix has 9 tokens"):
        next(stream)


def test_masked_rows_of_stages_have_the_steps_of_the_run(tmp_path: Path) -> None:
    """Two steps of rows 0 to 3, then three of the same: row 3 is met at steps 1 and 3, and the batch that a stage's loader
    makes beyond its end is nobody's."""
    path = table_of(tmp_path, [pair(n) for n in range(4)])
    made = StagedLoader([loader(path, shuffle=False, workers=0) for _ in range(2)], [2, 3])
    stream = made.micro_batches()
    assert [next(stream)[0] for _ in range(5)] == [0, 1, 2, 3, 4]
    assert [(row.id, row.step) for row in made.masked] == [("row-3", 1), ("row-3", 3)]
    short = StagedLoader([loader(path, shuffle=False, workers=0) for _ in range(2)], [1, 3])
    stream = short.micro_batches()
    assert [next(stream)[0] for _ in range(2)] == [0, 1]
    assert not short.masked, "row 3 was in the batch after the last one of the first stage"


def test_a_line_without_a_label_is_certain_and_null_is_no_label(tmp_path: Path) -> None:
    """The documented default of the column is that of a line, whatever other lines say."""
    table = open_vlm(table_of(tmp_path, [pair(0), pair(1, p_chosen=0.75), pair(2, p_chosen=None)]))
    assert [table.record(row).p_chosen for row in (0, 1)] == [1.0, 0.75]
    with pytest.raises(RowProblem, match="no_label"):
        table.record(2)
