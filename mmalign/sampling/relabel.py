"""Reward-augmented relabelling (arXiv:2410.08067): the score an answer has becomes part of the question, and every pair two.

Asked for an answer of the chosen one's score, the chosen answer is preferred; asked for one of the rejected one's score, the
rejected answer is. A model trained on both learns from what is good in rejected answers, and is asked for the best score when
it is used. Any pairwise method trains on the result; the authors use DPO with beta 0.01, label smoothing 0.3 and rate 5e-7.

The score stands in the text of the last user turn, behind the media, so that both rows of a pair still share their media's
features; the answers are swapped and the turns are not (the authors' script swaps the user's turns where there is no system turn,
which leaves the better answer chosen in both halves).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mmalign.branches import BranchRecord, Message, Part
from mmalign.data.files import write_json
from mmalign.data.progress import progress_bar
from mmalign.data.schema import sampled_schema
from mmalign.data.vlm import open_vlm
from mmalign.data.vlm_rows import RowProblem
from mmalign.data.writer import FolderWriter
from mmalign.errors import DataError
from mmalign.sampling.base import SampledRow
from mmalign.sampling.table import table_row

TEMPLATE = "Give an answer that a judge scores {score} (range: {low} to {high}).\n\n"
"""Put in front of the words of the last user turn; ours, in the manner of the authors' goal-conditioned system turn."""
LOST = {"p_chosen", "margin", "weight", "rejected_images", "rejected_prompt"}
"""Columns that say something about a pair in its own order, or that a sampled table does not have."""
CARD = """Pairs of answers, each asked for at the score of either answer: see `meta` for the score asked for.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relabelled:
    """What became of a table."""

    rows: int
    """Rows written: two for every pair used."""
    left_out: dict[str, int]
    """Pairs that gave none, by reason: ``no_score``, ``tie``, or what made the row unusable."""


def relabel_table(
    source: str | Path, out: str | Path, *, reward: str, low: float, high: float, template: str = TEMPLATE, digits: int = 2,
    progress: bool = True,
) -> Relabelled:  # fmt: skip
    """Write a table of pairs with twice the rows, conditioned on scores.

    Args:
        source: a table of pairs with scores of `reward`.
        out: folder to make.
        low, high: the range of scores as the question says it; the best score to ask for is `high`.
        template: holds ``{score}`` once; ``{low}`` and ``{high}`` where wanted.
        digits: decimals of a score in the question; pairs that then look alike are ties.

    Raises:
        DataError: no table of pairs, no such scores in any row, a folder that exists, or settings without meaning.
    """
    if template.count("{score}") != 1:
        raise DataError("the template of relabelling needs {score} exactly once")
    if not (math.isfinite(low) and math.isfinite(high) and low < high) or digits < 0:
        raise DataError(f"relabelling needs a range low < high and digits of at least 0, got {low}, {high} and {digits}")
    table = open_vlm(source, progress=progress)
    if table.kind != "pairs":
        raise DataError(f"{table.path}: relabelling reads pairs, and this table holds {table.kind}")
    lost = sorted(LOST & set(table.columns))
    if lost:
        raise DataError(f"{table.path}: the new table could not hold the columns {', '.join(lost)}; remove them first")
    left: Counter[str] = Counter()
    written = 0
    with (
        FolderWriter(out, sampled_schema("pairs", (reward,)), media=("images", "videos"), card=CARD) as writer,
        progress_bar(f"Relabelling {table.path.name}", len(table), enabled=progress) as advance,
    ):
        for number in range(len(table)):
            advance(1)
            try:
                record = table.record(number)
            except RowProblem as problem:
                left[problem.reason] += 1
                continue
            values = [answer.scores.get(reward) for answer in record.answers]
            if any(value is None for value in values):
                left["no_score"] += 1
                continue
            shown = [f"{value:.{digits}f}" for value in values]
            if shown[0] == shown[1]:
                left["tie"] += 1
                continue
            for row in halves(record, reward, shown, template, f"{low:g}", f"{high:g}"):
                made = table_row(row, "pairs", (reward,), writer.building, {"method": "relabel", "reward": reward})
                writer.add_row(made, size_of(made))
                written += 1
        if not written:
            raise DataError(f"{table.path}: no pair with different scores of '{reward}' ({dict(left) or 'it has no rows'})")
        settings = {"reward": reward, "low": low, "high": high, "template": template, "digits": digits, "source": str(table.path)}
        write_json(writer.building / "relabel.json", {**settings, "rows": written, "left_out": dict(sorted(left.items()))})
    return Relabelled(rows=written, left_out=dict(left))


def halves(
    record: BranchRecord, reward: str, shown: list[str], template: str, low: str, high: str
) -> Iterator[SampledRow]:
    """Both rows of a pair: at the chosen answer's score as it is, at the rejected one's score with the answers swapped."""
    for side, order in (("chosen", (0, 1)), ("rejected", (1, 0))):
        said = {"{score}": shown[order[0]], "{low}": low, "{high}": high}
        words = template
        for place, text in said.items():
            words = words.replace(place, text)
        yield SampledRow(
            id=f"{record.id}/{side}", record=conditioned(record, words),
            answers=tuple(record.answers[place].text for place in order),
            scores={reward: [record.answers[place].scores[reward] for place in order]},
            meta={"asked_for": shown[order[0]], "half": side},
        )  # fmt: skip


def conditioned(record: BranchRecord, words: str) -> BranchRecord:
    """The record with `words` in front of the text of its last user turn, behind the media that stand there."""
    turns = list(record.messages)
    last = max(number for number, turn in enumerate(turns) if turn.role == "user")
    parts = list(turns[last].parts)
    place = next((number for number, part in enumerate(parts) if part.media is None), len(parts))
    if any(part.media is not None for part in parts[place:]):
        place = len(parts)  # words and media alternate: behind all of them
    parts.insert(place, Part(text=words))
    turns[last] = Message(role=turns[last].role, parts=tuple(parts))
    return replace(record, messages=tuple(turns))


def size_of(row: dict[str, object]) -> int:
    """About how many bytes a row takes: its pictures."""
    images = row.get("images")
    return sum(len(image.get("bytes") or b"") for image in images) if isinstance(images, list) else 0
