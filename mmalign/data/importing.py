"""Turn a source of some known format into a table: streaming, with every row accounted for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mmalign.data.conversations import ConversationRow, ConversationWriter
from mmalign.data.files import atomic_file, write_json
from mmalign.data.formats import FORMATS
from mmalign.data.formats.base import ListRow, Reader, SourceRow, plain
from mmalign.data.progress import progress_bar
from mmalign.data.reasons import QUARANTINE, Problem, reasons_table
from mmalign.data.remote import is_remote, local_path, results_at
from mmalign.data.writer import FolderWriter, RankedWriter, TableWriter
from mmalign.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """What an import did: `total` rows were read, `written` are in the table, the others are counted by reason."""

    path: Path
    format: str
    detected: bool
    """True when the format was found from the columns rather than named."""
    total: int
    written: int
    counts: Mapping[str, int]

    @property
    def quarantined(self) -> int:
        """Rows with defects, not counting those a policy leaves out."""
        return sum(number for reason, number in self.counts.items() if reason in QUARANTINE)

    def __str__(self) -> str:
        how = "detected from the columns" if self.detected else "as named"
        lines = [f"{self.path}: imported as {self.format} ({how})"]
        lines.append(reasons_table(self.counts, total=self.total, used=self.written))
        if self.counts:
            lines.append(f"  listed in {self.path / 'import' / 'quarantine.jsonl'}")
        return "\n".join(lines)


def import_table(
    source: str | Path,
    out: str | Path,
    *,
    format: str | None = None,
    split: str | None = None,
    media: str | Path | None = None,
    options: Mapping[str, str] | None = None,
    progress: bool = True,
) -> ImportReport:
    """Read a source into a new table folder.

    Only what a row cannot do without is judged here (labels, answers, files that are not there, places of media); pictures and
    words are kept as they are and judged by the check. Columns with no meaning to us are kept in `meta`.

    Args:
        format: a name in `FORMATS`; found from the source's columns when None.
        split: which split, where the source has several.
        media: folder that relative paths of pictures and clips start from; by default the source's.
        options: settings of the format, by its own names.

    Source, media and out may be addresses in a store (``s3://...``).

    Raises:
        ConfigError: the format is not known.
        DataError: the source is absent or of no known format, `out` is taken, or no row could be used.
    """
    if is_remote(out):
        with results_at(out) as folder:
            return import_table(
                source, folder, format=format, split=split, media=media, options=options, progress=progress
            )
    source, out = local_path(source, progress=progress), Path(out)
    media = None if media is None else local_path(media, progress=progress)
    if not source.exists():
        raise DataError(f"{source}: no such file or folder; download the data set first and give its local path")
    if media is not None and not Path(media).is_dir():
        raise DataError(f"{media}: no such folder")
    chosen = format or detect_format(source)
    reader: Reader = FORMATS.get(chosen)(
        source, split, media=None if media is None else Path(media), options=dict(options or {})
    )
    counts: dict[str, int] = {}
    with _writer(reader, out) as writer:
        with (
            progress_bar(f"Importing {source.name}", reader.total(), enabled=progress) as advance,
            atomic_file(writer.building / "import" / "quarantine.jsonl") as listing,
        ):
            for row in reader.rows():
                advance(1)
                if isinstance(row, Problem):
                    counts[row.reason] = counts.get(row.reason, 0) + 1
                    listing.write((json.dumps(row.as_json(), ensure_ascii=False) + "\n").encode())
                else:
                    _add(writer, row)
        report = ImportReport(
            path=out,
            format=chosen,
            detected=format is None,
            total=writer.count + sum(counts.values()),
            written=writer.count,
            counts=counts,
        )
        if writer.count == 0:
            raise DataError(
                f"{source}: none of its rows can be used\n{reasons_table(counts, total=report.total, used=0)}"
            )
        summary = {"format": chosen, "kind": reader.KIND, "split": split, "options": reader.options,
                   "rows": report.total, "written": report.written, "reasons": counts}  # fmt: skip
        write_json(writer.building / "import" / "report.json", summary)
    return report


def _writer(reader: Reader, out: Path) -> TableWriter | RankedWriter | ConversationWriter:
    if reader.KIND == "pairs":
        return TableWriter(out, rewards=reader.reward_names())
    if reader.KIND == "lists":
        return RankedWriter(out, rewards=reader.reward_names())
    return ConversationWriter(out, paired=reader.KIND == "answers", rewards=reader.reward_names())


def _add(writer: FolderWriter, row: SourceRow | ListRow | ConversationRow) -> None:
    meta = json.dumps(plain(row.meta), ensure_ascii=False)
    if isinstance(writer, TableWriter) and isinstance(row, SourceRow):
        writer.add(
            id=row.id, prompt=row.prompt, chosen=row.chosen, rejected=row.rejected, p_chosen=row.p_chosen, user=row.user,
            weight=row.weight, group=row.group, meta=meta, scores=None if row.scores is None else dict(row.scores),
            chosen_name=row.chosen_name, rejected_name=row.rejected_name,
        )  # fmt: skip
    elif isinstance(writer, RankedWriter) and isinstance(row, ListRow):
        writer.add(
            id=row.id,
            prompt=row.prompt,
            images=row.images,
            names=row.names,
            scores=row.scores,
            user=row.user,
            meta=meta,
        )
    elif isinstance(writer, ConversationWriter) and isinstance(row, ConversationRow):
        writer.add(row, meta)
    else:
        raise TypeError(f"a reader's rows are {type(row).__name__}, which is not what its KIND says")


def detect_format(source: Path) -> str:
    """The one format whose reader recognises the source.

    Raises:
        DataError: none or several do; names the formats.
    """
    found = [entry.name for entry in FORMATS if FORMATS.get(entry.name).recognises(source)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(FORMATS.names())
    problem = "fits several formats: " + ", ".join(found) if found else "fits none of the known formats"
    raise DataError(f"{source}: {problem}; name one with --from (known: {known})")
