"""``mmalign generate`` for answers: a table in parts, resumable and sharded, with provenance and every refusal counted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.errors import ConfigError, DataError
from mmalign.sampling.base import AnswerSampler, Refused, SampledRow
from mmalign.sampling.settings import SamplingConfig

if TYPE_CHECKING:
    import pyarrow as pa

    from mmalign.branches import BranchRecord
    from mmalign.data.engines import Engine
    from mmalign.data.partfolder import PartFolder
    from mmalign.data.vlm import VlmTable
    from mmalign.models.vlm.base import VlmFamily

_CARD = """Answers made by a model (`generate.yaml` says how): {kind} in TRL's conversational form; `meta.sampled` says where each
row came from. Loads with `mmalign.data.open_vlm(<this folder>)`. `refused.jsonl` lists the rows that gave nothing.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingReport:
    """What came of a run."""

    path: Path | str | None
    """The finished table; None while other shards have parts to make."""
    rows: int
    """Rows of the table that was read."""
    made: int
    """Rows made: of the whole table when it is finished, else by this run."""
    missing: int
    """Parts that are still to be made by others."""
    used: int = 0
    """Rows of it that gave at least one row; known when the table is finished."""
    refused: Mapping[str, int] = field(default_factory=dict)
    """Reason -> refusals; a sampler that makes several rows of one may refuse some of them."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What the sampler counts."""

    @property
    def failed(self) -> int:
        """Rows with defects, not counting those that a rule leaves out."""
        from mmalign.data.reasons import QUARANTINE

        return sum(number for reason, number in self.refused.items() if reason in QUARANTINE)

    def __str__(self) -> str:
        from mmalign.data.reasons import reasons_table

        if self.path is None:
            return f"made {self.made} rows; {self.missing} parts are left to other shards"
        lines = [f"{self.path}: {self.made} rows made from {self.rows}"]
        lines.append(reasons_table(self.refused, total=self.rows, used=self.used))
        if self.refused:
            lines.append(f"  listed in {self.path}/refused.jsonl")
        width = max(map(len, self.figures), default=0)
        return "\n".join([*lines, *(f"  {name:<{width}}  {value:g}" for name, value in self.figures.items())])


def sample_answers(
    config: SamplingConfig, *, shard: tuple[int, int] = (0, 1), engine: Engine = "local", workers: int | None = None,
    gpus: float | None = None, progress: bool = True,
) -> SamplingReport:  # fmt: skip
    """Make the answers that are not there yet; the process that finds all parts done gives the table its name.

    Args:
        shard: (i, n): make every n-th part from the i-th on. Shards may run at once, on machines that share the folder.
        engine: ``processes`` or ``ray`` have the parts made by others, which must see the same folder; the rows are the same.
        workers, gpus: as of ``mmalign.data.engines.each_part``.

    Raises:
        ConfigError: a shard that does not exist, or no CUDA device where one was asked for.
        DataError: the table cannot be read, no row gave anything, or `out` is taken or holds parts of other settings.
        ModelError: the model cannot be loaded.
        MissingExtraError: Ray is not installed.
    """
    from mmalign.data.engines import each_part
    from mmalign.data.progress import progress_bar

    if not 0 <= shard[0] < shard[1]:
        raise ConfigError(f"--shard: {shard[0]}/{shard[1]} does not exist; shards are counted from 0")
    maker = AnswerMaker(config, progress=progress)
    missing = maker.folder.missing(shard)
    if engine != "local":
        maker.family.network.to("cpu")  # the workers need its room
        made = sum(each_part(partial(AnswerMaker, config), missing, engine=engine, workers=workers, gpus=gpus,
                             title="Answering", progress=progress))  # fmt: skip
    else:
        made = 0
        with progress_bar("Answering", sum(len(maker.rows(number)) for number in missing), enabled=progress) as advance:
            for number in missing:
                made += maker(number)
                advance(len(maker.rows(number)))
    left = len(maker.folder.missing())
    if left:
        return SamplingReport(path=None, rows=maker.count, made=made, missing=left)
    return _finish(config, maker.folder, maker.sampler, maker.count)


class AnswerMaker:
    """Makes parts of a table of answers: opens the table and loads the model once."""

    def __init__(self, config: SamplingConfig, *, progress: bool = False) -> None:
        from mmalign.data.partfolder import PartFolder
        from mmalign.data.schema import sampled_schema
        from mmalign.data.vlm import open_vlm

        self.config = config
        self.table = open_vlm(config.manifest, progress=progress)
        self.count = len(self.table) if config.max_rows is None else min(len(self.table), config.max_rows)
        if not self.count:
            raise DataError(f"{config.manifest}: no rows")
        self.family = _load(config)
        self.sampler = _sampler(config, self.family)
        network = str(self.family.fingerprint("network")["weights"])
        job = {**config.model_dump(mode="json", exclude={"out", "device", "batch_size", "manifest"}),
               "table": self.table.fingerprint, "network": network}  # fmt: skip
        self.folder = PartFolder(config.out, job, -(-self.count // config.rows_per_part))
        self._schema = sampled_schema(self.sampler.MAKES, self.sampler.score_names())
        self._provenance = {
            "sampler": config.sampler.model_dump(mode="json"), "model": Path(config.model.path).name,  # type: ignore[attr-defined]
            "network": network, "seed": config.seed, "temperature": config.temperature, "top_p": config.top_p,
            "repetition_penalty": config.repetition_penalty, "generator": config.generator,
        }  # fmt: skip

    def rows(self, number: int) -> range:
        """Rows of a part."""
        return _rows(self.config, self.count, number)

    def __call__(self, number: int) -> int:
        """Make one part; returns the number of rows it holds."""
        return _part(self.folder, number, self.sampler, self.table, self.rows(number), self._schema, self._provenance)


def _rows(config: SamplingConfig, count: int, number: int) -> range:
    return range(number * config.rows_per_part, min((number + 1) * config.rows_per_part, count))


def _load(config: SamplingConfig) -> VlmFamily:
    import torch

    from mmalign.experiment.assembly import quiet_libraries
    from mmalign.models.vlm import VLM_FAMILIES

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: 'cuda' was asked for, but torch sees no CUDA device; use auto or cpu")
    quiet_libraries()
    # vLLM holds weights of its own: the device is left to it.
    own = config.device != "cpu" and config.generator == "transformers"
    where = torch.device("cuda" if own and torch.cuda.is_available() else "cpu")
    settings: Any = config.model
    return VLM_FAMILIES.get(settings.name).load(settings, device=where)  # type: ignore[attr-defined, no-any-return]


def _sampler(config: SamplingConfig, family: VlmFamily) -> AnswerSampler:
    from mmalign.sampling import ANSWER_SAMPLERS

    settings: Any = config.sampler
    made = ANSWER_SAMPLERS.get(settings.name)
    if not isinstance(made, type) or not issubclass(made, AnswerSampler):
        raise ConfigError(f"sampler.name: '{settings.name}' is no subclass of mmalign.sampling.base.AnswerSampler")
    return made(settings, config, family)


def _part(
    folder: PartFolder, number: int, sampler: AnswerSampler, table: VlmTable, rows: range, schema: pa.Schema,
    provenance: Mapping[str, Any],
) -> int:  # fmt: skip
    """Make and write one part; returns its rows."""
    from mmalign.sampling.table import table_row

    records, refused = _read(table, rows)
    made = sampler.sample(records) if records else []
    if {item.id if isinstance(item, Refused) else item.record.id for item in made} != {record.id for record in records}:
        raise RuntimeError(f"{type(sampler).__name__}.sample gave neither row nor refusal for some record")
    refused += [item for item in made if isinstance(item, Refused)]
    values = [
        table_row(item, sampler.MAKES, sampler.score_names(), folder.building, {**provenance, "from": item.record.id})
        for item in made
        if isinstance(item, SampledRow)
    ]
    notes = [{"id": item.id, "reason": item.reason, "detail": item.detail} for item in refused]
    folder.write(number, values, schema, notes)
    return len(values)


def _read(table: VlmTable, rows: range) -> tuple[list[BranchRecord], list[Refused]]:
    from mmalign.data.vlm_rows import RowProblem

    records, refused = [], []
    for row in rows:
        try:
            records.append(table.record(row))
        except RowProblem as problem:
            detail = f"{table.where(row)} column '{problem.column}': {problem.detail}"
            refused.append(Refused(id=table.row_id(row), reason=problem.reason, detail=detail))
        except DataError as error:  # a path that leaves the table's folder
            refused.append(Refused(id=table.row_id(row), reason="missing_media", detail=str(error)))
    return records, refused


def _finish(config: SamplingConfig, folder: PartFolder, sampler: AnswerSampler, count: int) -> SamplingReport:
    from mmalign.config import dump_yaml
    from mmalign.data.writer import CARD_HEAD

    notes = folder.notes()
    refused: dict[str, int] = {}
    for note in notes:
        refused[note["reason"]] = refused.get(note["reason"], 0) + 1
    metas = [json.loads(row["meta"])["sampled"] for number in range(folder.parts) for row in folder.rows(number, ["meta"])]
    if not metas:
        listed = ", ".join(f"{reason}: {number}" for reason, number in refused.items())
        folder.discard()  # so that the mended table starts afresh
        raise DataError(f"{config.manifest}: none of its {count} rows gave an answer ({listed}); the first: {_first(notes)}")
    figures = sampler.figures(metas)
    used = len({meta["from"] for meta in metas})
    report = {"rows": count, "used": used, "made": len(metas), "refused": refused, "figures": figures}
    path = folder.finish(
        {
            "README.md": CARD_HEAD + _CARD.format(kind=sampler.MAKES), "generate.yaml": dump_yaml(config),
            "report.json": json.dumps(report, indent=2) + "\n",
            "refused.jsonl": "".join(json.dumps(note, ensure_ascii=False) + "\n" for note in notes),
        }
    )  # fmt: skip
    return SamplingReport(path=path, rows=count, made=len(metas), missing=0, used=used, refused=refused, figures=figures)


def _first(notes: Sequence[Mapping[str, Any]]) -> str:
    return f"id {notes[0]['id']}: {notes[0]['reason']}: {notes[0]['detail']}" if notes else "the sampler gave nothing"
