"""TEMPLE's generated captions (arXiv:2503.16929; lscpku/TEMPLE) as preferences: a clip's caption against one of a worse clip.

The source is the folder of answers that its generation writes: one JSONL file per clip treatment, named
``caption_caption_<none|drop|reverse|shuffle>_<ratio>_...``, rows with `video_id`, `video_path` and `response`. What
its conversion script writes from them is an ms-swift file, which that format reads. Its three filters are named
reasons here:

- ``not_longer``: the caption of a clip with dropped frames must be shorter than the true one;
- ``contained``: the true caption must not lie within the other;
- ``length_ratio``: for reversed and shuffled clips, neither caption may be more than 1.5 times as long as the other.

The instruction is one of the script's kind, drawn by (seed, clip, treatment) where the script draws without a seed.
Curriculum stages count the ratios from the largest, as the paper's training goes from easy to hard.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

from mmalign.data.conversations import ConversationRow
from mmalign.data.formats.answers import AnswersReader, Draft, Refusal, answer_text
from mmalign.data.formats.base import Names
from mmalign.data.formats.rowfiles import Row, RowFiles
from mmalign.data.reasons import Problem
from mmalign.data.turns import media_part, say, text_part, turn
from mmalign.errors import DataError

INSTRUCTIONS: Final = (
    "Describe this video in detail.",
    "Tell what happens in the video, step by step.",
    "Give a full account of the events in this clip.",
    "List the events of the video in the order in which they happen.",
    "Explain how the scene develops from beginning to end.",
    "What are the main actions in this video, and when do they happen?",
)
_NAME: Final = re.compile(r"^caption_caption_(?P<kind>none|drop|reverse|shuffle)_(?P<ratio>\d+)(_|\.|$)")
MAX_LENGTH_RATIO: Final = 1.5


class TempleReader(AnswersReader):
    """Pairs each clip's true caption with those of its treated clips. Option `seed`: of the drawn instruction."""

    PREFIX: ClassVar[str] = "temple"
    OPTIONS: ClassVar[Mapping[str, str]] = {"seed": "0"}

    def __init__(self, source: Path, split: str | None, **settings: Any) -> None:
        super().__init__(source, split, **settings)
        self._by_kind = {
            (match["kind"], int(match["ratio"])): file
            for file in self._files.files
            if (match := _NAME.match(file.name)) is not None
        }
        self._true = next((file for (kind, _), file in self._by_kind.items() if kind == "none"), None)
        if self._true is None:
            raise DataError(f"{source}: holds no file caption_caption_none_..., the captions of the clips as they are")
        ratios = sorted({ratio for kind, ratio in self._by_kind if kind != "none"}, reverse=True)
        self._stages = {ratio: number for number, ratio in enumerate(ratios)}

    @classmethod
    def fits(cls, row: Mapping[str, Any]) -> bool:
        return {"video_id", "video_path", "response"} <= set(row)

    def total(self) -> int:
        return sum(len(list(self._rows_of(file))) for (kind, _), file in self._by_kind.items() if kind != "none")

    def rows(self) -> Iterator[ConversationRow | Problem]:
        assert self._true is not None  # checked when made
        names, true = Names(self.PREFIX), dict[str, Row]()
        for row in self._rows_of(self._true):
            if row.broken:
                yield self.broken(row, names)
            else:
                true[str(row.values.get("video_id"))] = row
        for (kind, ratio), file in sorted(self._by_kind.items()):
            if kind == "none":
                continue
            for row in self._rows_of(file):
                if row.broken:
                    yield self.broken(row, names)
                    continue
                clip = str(row.values.get("video_id"))
                name = names.name(clip, kind, ratio)
                try:
                    draft = self._draft(true.get(clip), row, clip, kind, ratio)
                except Refusal as found:
                    yield self.problem(row, name, found)
                    continue
                yield self._finish(row, draft, name)

    def drafts(self, row: Row) -> Iterator[Draft | Refusal]:
        raise TypeError("a caption alone is no preference; rows() pairs them")

    def _rows_of(self, file: Path) -> Iterator[Row]:
        return iter(RowFiles(file, None, keep_broken=True))

    def _draft(self, true: Row | None, row: Row, clip: str, kind: str, ratio: int) -> Draft:
        if true is None:
            raise Refusal("video_id", "missing_chosen", f"clip {clip} has no caption of its own")
        said = (answer_text(item.values.get("response"), side) for item, side in ((true, "chosen"), (row, "rejected")))
        chosen, rejected = (text.split("</think>")[-1].strip() for text in said)
        if not chosen or not rejected:
            side = "rejected" if chosen else "chosen"
            raise Refusal("response", f"empty_{side}", "nothing is said")
        refuse_unequal(chosen, rejected, kind)
        from mmalign import rng

        draw = rng.numpy_stream(int(self.number_option("seed")), f"temple-{kind}-{ratio}", 0, clip).bit_generator
        instruction = INSTRUCTIONS[int(draw.random_raw(1)[0]) % len(INSTRUCTIONS)]
        return Draft(
            prompt=[turn("user", [media_part("video"), text_part(instruction)])],
            chosen=[say("assistant", chosen)],
            rejected=[say("assistant", rejected)],
            videos=[true.values.get("video_path")],
            used=("video_path", "response"),
            meta={"treatment": kind, "ratio": ratio},
            stage=self._stages[ratio],
        )


def refuse_unequal(chosen: str, rejected: str, kind: str) -> None:
    """The three filters, in the script's order.

    Args:
        kind: the treatment of the clip behind `rejected`.

    Raises:
        Refusal: which filter leaves the pair out.
    """
    if kind == "drop" and len(chosen) <= len(rejected):
        raise Refusal(
            "response", "not_longer", f"{len(chosen)} characters against {len(rejected)} of the shortened clip"
        )
    if chosen in rejected:
        raise Refusal("response", "contained", "the true caption lies within the other")
    longer, shorter = max(len(chosen), len(rejected)), min(len(chosen), len(rejected))
    if kind in ("shuffle", "reverse") and longer > MAX_LENGTH_RATIO * shorter:
        raise Refusal("response", "length_ratio", f"{len(chosen)} and {len(rejected)} characters")
