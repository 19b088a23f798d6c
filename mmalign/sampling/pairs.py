"""Pairs of answers from judged lists: best against worst, with filters by margin and by length, and every list accounted for.

Judges that reward what is found reward length too, and a model trained on such pairs writes longer rather than better
(arXiv:2410.07025 measures reports up to 3.2 times longer). Two filters work on that: a limit to the ratio of lengths within a
pair, and a balance over all pairs, after which chosen and rejected answers are about equally long.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.branches import BranchRecord
from mmalign.data.reasons import QUARANTINE, Problem, count, reasons_table
from mmalign.errors import DataError
from mmalign.registry import did_you_mean

if TYPE_CHECKING:
    from mmalign.data.vlm import VlmTable

RULES = ("best_worst", "all_pairs")
TIE = 1e-8
"""Scores closer than this are a tie (the released code of arXiv:2410.07025)."""
_CARD = "Pairs of answers made of judged lists by `mmalign data pairs`; `meta.pair` says of which, and by what margin.\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPairsReport:
    """What became of the lists."""

    path: Path
    rule: str
    reward: str
    lists: int
    pairs: int
    counts: Mapping[str, int]
    """Lists, answers or possible pairs left out, by reason."""
    chosen_words: float
    """Mean over the pairs."""
    rejected_words: float

    @property
    def quarantined(self) -> int:
        return sum(number for reason, number in self.counts.items() if reason in QUARANTINE)

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.pairs} pairs from {self.lists} lists ({self.rule} by {self.reward})",
            f"  words: chosen {self.chosen_words:.1f}, rejected {self.rejected_words:.1f}, "
            f"ratio {self.chosen_words / max(1e-9, self.rejected_words):.3f}",
        ]
        if self.counts:
            lines.append(reasons_table(self.counts, total=self.pairs + sum(self.counts.values()), used=self.pairs))
            lines.append(f"  listed in {self.path / 'import' / 'quarantine.jsonl'}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """A possible pair: the row of its list, places of its answers, and how many words they have."""

    row: int
    chosen: int
    rejected: int
    margin: float
    words: tuple[int, int]

    @property
    def longer(self) -> int:
        return self.words[0] - self.words[1]


def make_answer_pairs(
    source: str | Path,
    out: str | Path,
    *,
    rule: str = "best_worst",
    reward: str | None = None,
    min_margin: float = 0.0,
    soft: bool = False,
    max_length_ratio: float | None = None,
    balance_lengths: bool = False,
    progress: bool = True,
) -> AnswerPairsReport:
    """Make a table of pairs from a table of judged lists, pictures and clips included.

    Args:
        rule: ``best_worst`` takes each list's extremes; ``all_pairs`` takes every two answers.
        reward: whose scores rank; may be left out where there is only one.
        min_margin: pairs whose scores differ by less are left out; ties always are.
        soft: p_chosen = sigmoid(margin), otherwise 1.
        max_length_ratio: pairs of which one answer has more than so many times the words of the other are left out.
        balance_lengths: leave out the pairs that differ most in length, on the side where more words win (or lose), until
            chosen and rejected answers are on average about equally long.

    Raises:
        DataError: no lists, an unknown rule or judge, a setting out of range, `out` is taken, or no pair is left.
    """
    from mmalign.data.vlm import open_vlm

    if rule not in RULES:
        raise DataError(f"rule '{rule}' is not known{did_you_mean(rule, RULES)}")
    if not min_margin >= 0:
        raise DataError(f"min_margin must not be negative, got {min_margin}")
    if max_length_ratio is not None and not max_length_ratio >= 1:
        raise DataError(f"max_length_ratio must be at least 1, got {max_length_ratio}")
    table = open_vlm(source, progress=progress)
    by = _choose(table, source, reward)
    found, problems = _find(table, by, rule, min_margin=min_margin, ratio=max_length_ratio)
    if balance_lengths:
        found, dropped = balance(found)
        problems += [
            _problem(table, pair.row, "length_balance", f"answers {pair.chosen} and {pair.rejected}: {pair.longer:+d} words")
            for pair in dropped
        ]
    if not found:
        counts = count(problems)
        raise DataError(f"{source}: no pair is left\n{reasons_table(counts, total=sum(counts.values()), used=0)}")
    _write(table, Path(out), found, problems, by=by, soft=soft, progress=progress)
    words = [sum(pair.words[side] for pair in found) / len(found) for side in (0, 1)]
    return AnswerPairsReport(
        path=Path(out), rule=rule, reward=by, lists=len(table), pairs=len(found), counts=count(problems),
        chosen_words=words[0], rejected_words=words[1],
    )  # fmt: skip


def balance(pairs: Sequence[_Pair]) -> tuple[list[_Pair], list[_Pair]]:
    """(kept, dropped): pairs that differ much in length go, largest first, while that brings the mean difference nearer to 0.

    Of equal differences the smaller margin goes first.
    """
    surplus = sum(pair.longer for pair in pairs)
    order = sorted(pairs, key=lambda pair: (-abs(pair.longer), pair.margin, pair.row))
    gone: set[_Pair] = set()
    changed = True
    while changed:  # having dropped on one side may have opened a little room on the other
        changed = False
        for pair in order:
            if pair not in gone and abs(surplus - pair.longer) < abs(surplus):
                surplus -= pair.longer
                gone.add(pair)
                changed = True
    return [pair for pair in pairs if pair not in gone], [pair for pair in pairs if pair in gone]


def _choose(table: VlmTable, source: str | Path, reward: str | None) -> str:
    from mmalign.sampling.judging import score_names

    if table.kind != "lists":
        raise DataError(f"{source}: holds {table.kind} of answers; pairs are made of lists (prompt, answers, scores)")
    names = score_names(table)
    if not names:
        raise DataError(f"{source}: holds no scores; 'mmalign annotate' adds them")
    if reward is None:
        if len(names) > 1:
            raise DataError(f"{source}: holds scores of several ({', '.join(names)}); choose one with --reward")
        return names[0]
    if reward not in names:
        raise DataError(f"{source}: no scores of '{reward}'{did_you_mean(reward, names)}")
    return reward


def _problem(table: VlmTable, row: int, reason: str, detail: str, column: str = "scores") -> Problem:
    file, number = table.file_and_number(row)
    return Problem(file=file, row=number, id=table.row_id(row), column=column, reason=reason, detail=detail)


def _find(
    table: VlmTable, by: str, rule: str, *, min_margin: float, ratio: float | None
) -> tuple[list[_Pair], list[Problem]]:
    from mmalign.data.vlm_rows import RowProblem

    found: list[_Pair] = []
    problems: list[Problem] = []
    for row in range(len(table)):
        try:
            record = table.record(row)
        except RowProblem as problem:
            problems.append(_problem(table, row, problem.reason, problem.detail, problem.column))
            continue
        scores = {place: answer.scores[by] for place, answer in enumerate(record.answers) if by in answer.scores}
        for place in range(len(record.answers)):
            if place not in scores:
                problems.append(_problem(table, row, "no_score", f"answer {place}: {by} has no score"))
        if len(scores) < 2:
            problems.append(_problem(table, row, "too_few", f"{len(scores)} answers with a score make no pair"))
            continue
        for chosen, rejected in _candidates(scores, rule):
            made = _pair(record, row, scores, chosen, rejected, min_margin=min_margin, ratio=ratio)
            if isinstance(made, _Pair):
                found.append(made)
            else:
                problems.append(_problem(table, row, *made))
    return found, problems


def _candidates(scores: Mapping[int, float], rule: str) -> Iterator[tuple[int, int]]:
    """(better, worse) places; equal scores come in list order."""
    if rule == "best_worst":
        best = max(scores, key=lambda place: scores[place])
        yield best, min((place for place in scores if place != best), key=lambda place: scores[place])
        return
    for left, right in itertools.combinations(scores, 2):
        yield (left, right) if scores[left] >= scores[right] else (right, left)


def _pair(
    record: BranchRecord, row: int, scores: Mapping[int, float], chosen: int, rejected: int, *, min_margin: float,
    ratio: float | None,
) -> _Pair | tuple[str, str]:  # fmt: skip
    """The pair, or (reason, detail) of its refusal."""
    which, margin = f"answers {chosen} and {rejected}", scores[chosen] - scores[rejected]
    texts = [record.answers[place].text.split() for place in (chosen, rejected)]
    if margin <= TIE:
        return "tie", f"{which} have equal scores"
    if margin < min_margin:
        return "below_margin", f"{which}: {margin:g} < {min_margin:g}"
    if texts[0] == texts[1]:
        return "identical_responses", f"{which} say the same"
    words = (len(texts[0]), len(texts[1]))
    if ratio is not None and max(words) > ratio * min(words):
        return "length_ratio", f"{which}: {words[0]} against {words[1]} words"
    return _Pair(row=row, chosen=chosen, rejected=rejected, margin=margin, words=words)


def _write(
    table: VlmTable, out: Path, pairs: Sequence[_Pair], problems: Sequence[Problem], *, by: str, soft: bool, progress: bool
) -> None:
    import pyarrow as pa

    from mmalign.data.files import write_text
    from mmalign.data.progress import progress_bar
    from mmalign.data.schema import sampled_schema
    from mmalign.data.writer import FolderWriter
    from mmalign.sampling.base import SampledRow
    from mmalign.sampling.judging import score_names
    from mmalign.sampling.table import table_row

    names = score_names(table)
    schema = sampled_schema("pairs", names).append(pa.field("p_chosen", pa.float32()))
    with (
        FolderWriter(out, schema, media=("images",), card=_CARD) as writer,
        progress_bar("Writing pairs", len(pairs), enabled=progress) as advance,
    ):
        for pair in pairs:
            record = table.record(pair.row)
            both = [record.answers[place] for place in (pair.chosen, pair.rejected)]
            scores = {name: [answer.scores.get(name) for answer in both] for name in names}
            known = {name: None if None in values else values for name, values in scores.items()}
            row = SampledRow(
                id=f"{record.id}:{pair.chosen}-{pair.rejected}", record=record, answers=(both[0].text, both[1].text),
                group=record.group or record.id, stage=record.stage or None,
            )  # fmt: skip
            values = table_row(row, "pairs", (), writer.building, dict(record.meta.get("sampled") or {}))
            about = {"chosen": pair.chosen, "rejected": pair.rejected, "judge": by, "margin": pair.margin}
            values["meta"] = json.dumps({**json.loads(values["meta"]), "pair": about}, ensure_ascii=False)
            values |= {"scores": known, "p_chosen": 1 / (1 + math.exp(-pair.margin)) if soft else 1.0}
            writer.add_row(values, sum(len(item["bytes"]) for item in _pictures(values)))
            advance(1)
        lines = "".join(json.dumps(problem.as_json(), ensure_ascii=False) + "\n" for problem in problems)
        write_text(writer.building / "import" / "quarantine.jsonl", lines)


def _pictures(values: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from values["images"]
    for clip in values["videos"]:
        yield from clip["frames"] or ()
