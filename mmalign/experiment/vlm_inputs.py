"""Answers made ready for a run: usable rows, rows that the model's processor refuses, caches, and the loader of this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mmalign.branches import Answer, BranchRecord, EncodedExample, VideoRef
from mmalign.data.autoworkers import fixed_workers
from mmalign.data.check import CheckPolicy, CheckResult
from mmalign.data.files import canonical_hash, write_json
from mmalign.data.frames import FrameCache
from mmalign.data.progress import progress_bar
from mmalign.data.reasons import Problem
from mmalign.data.vlm import VlmTable, open_vlm
from mmalign.data.vlm_check import usable_vlm
from mmalign.data.vlm_loader import Encode, RowRefused, VlmLoader
from mmalign.data.vlm_rows import RowProblem
from mmalign.errors import ConfigError, DataError
from mmalign.experiment import streams
from mmalign.experiment.inputs import Inputs, cache_root
from mmalign.experiment.settings import ExperimentConfig
from mmalign.models.reference import Reference
from mmalign.models.stored_answers import StoredAnswers, VisionStore
from mmalign.models.vlm.base import VlmFamily
from mmalign.models.vlm.errors import VlmDataError
from mmalign.models.vlm.media import open_media
from mmalign.trainers import METHODS
from mmalign.trainers.choices import collate_records

ENCODE_VERSION = 1
KINDS = {
    "vlm_pairs": ("pairs",), "vlm_labelled": ("unpaired", "pairs"), "vlm_chosen": ("unpaired", "pairs"), "vlm_lists": ("lists",),
    "vlm_triples": ("pairs",), "vlm_joint": ("pairs",),
    "vlm_records": ("pairs", "unpaired", "lists", "questions"), "vlm_answered": ("pairs", "unpaired"),
}  # fmt: skip
"""What a method's batches are made of -> kinds of tables that hold it."""
LIKED = ("vlm_chosen", "vlm_answered")
"""Batches of methods to which a single answer is a good one."""


def prepare_vlm(config: ExperimentConfig, parts: Any, accelerator: Any) -> Inputs:
    """Check the table, ask the processor about every row, fill the caches, and build the loader of this process.

    The main process does the work first; the others then find it done.

    Args:
        parts: the ``assembly.Assembled`` of the run.

    Raises:
        DataError: too many bad rows, or none usable. ConfigError: a table of another kind than the method reads.
    """
    if METHODS.get(config.method_name).batches == "vlm_stages":
        from mmalign.experiment.vlm_stages import prepare_stages

        return prepare_stages(config, parts, accelerator)
    main, family = accelerator.is_main_process, parts.family
    table = open_vlm(config.data.manifest, progress=main)
    require_kind(config, table)
    if not main:
        accelerator.wait_for_everyone()
    frames = parts.frames
    if frames is None and config.data.cache_frames:
        frames = parts.frames = FrameCache(cache_root(config), decoder=config.data.video_decoder)
        family.read_clip = frames.read
    policy = CheckPolicy(ties=config.data.ties, max_bad_fraction=config.data.max_bad_fraction)
    checked = usable_vlm(table, check=config.data.check, policy=policy, progress=main)
    shaped = shaper(config)
    checked = _usable_answers(config, table, checked)
    if config.data.check != "off":
        checked = _encodable(config, family, table, checked, shaped, progress=main).demand()
    if frames is not None:
        _fill_frames(frames, config, table, checked, progress=main)
    raw = METHODS.get(config.method_name).batches in ("vlm_records", "vlm_answered")
    if raw and config.method.model_dump().get("offline") and table.kind != "pairs":
        raise ConfigError(f"method.offline: {table.path} holds {table.kind}; offline rows need a table of pairs")
    loader = VlmLoader(
        table, checked.rows, encode=as_it_is if raw else encoder(family, shaped),
        collate=cast(Any, collate_records if raw else family.collate), batch_size=config.optim.batch_size,
        accumulate=config.optim.accumulate, world_size=accelerator.num_processes, rank=accelerator.process_index,
        seed=config.run.seed, shuffle=config.data.shuffle, workers=config.data.workers, prefetch=config.data.prefetch,
        max_runtime_failures=streams.masked_limit(accelerator.num_processes),
        mismatched=wants_mismatched(config),
    )  # fmt: skip
    if config.data.cache_vision:
        store = parts.trainer.features or VisionStore(vision_folder(config, family))
        _fill_vision(store, loader, encoder(family, shaped), parts, accelerator.device, progress=main)
    if parts.start is not None:
        _fill_references(config, loader, parts, accelerator.device, progress=main)
    if main:
        accelerator.wait_for_everyone()
    return Inputs(
        loader=loader, table_fingerprint=loader.order.fingerprint, processes=accelerator.num_processes, checked=checked
    )


def require_kind(config: ExperimentConfig, table: VlmTable) -> None:
    """Refuse a table of another kind than the method reads."""
    wanted = KINDS.get(METHODS.get(config.method_name).batches)
    if wanted is not None and table.kind not in wanted:
        raise ConfigError(
            f"data.manifest: '{config.method_name}' reads {' or '.join(wanted)}, and {table.path} holds {table.kind}"
        )


def wants_mismatched(config: ExperimentConfig) -> bool:
    """Whether rows need another row's answer behind their own (KTO's reference point)."""
    return bool(METHODS.get(config.method_name).wants_mismatched(config.method))


def shaper(config: ExperimentConfig) -> Callable[[BranchRecord], BranchRecord]:
    """What a method makes of a record: the chosen answer alone, answers with labels, with the gold answer, or everything."""
    batches = METHODS.get(config.method_name).batches

    def chosen(record: BranchRecord) -> BranchRecord:
        return replace(record, answers=record.answers[:1])

    def labelled(record: BranchRecord) -> BranchRecord:
        if len(record.answers) == 1:
            return record
        answers = [replace(answer, label=float(number == 0)) for number, answer in enumerate(record.answers)]
        return replace(record, answers=tuple(answers))

    def with_gold(record: BranchRecord) -> BranchRecord:
        gold = record.meta.get("reference")
        if not isinstance(gold, str) or not gold.strip():
            raise RowRefused("no_reference", "the method needs a reference answer in the column 'reference'")
        return replace(record, answers=(*record.answers, Answer(text=gold)))

    def joint(record: BranchRecord) -> BranchRecord:
        return replace(record, joint=True)

    known = {"vlm_chosen": chosen, "vlm_labelled": labelled, "vlm_triples": with_gold, "vlm_joint": joint}
    return known.get(batches, lambda record: record)


def asked(family: VlmFamily, record: BranchRecord) -> EncodedExample:
    """A question without answers to an example; refusals carry the family's reason."""
    try:
        return family.encode(record, training=False)
    except VlmDataError as error:
        raise RowRefused(error.reason, error.detail) from error


def encoder(
    family: VlmFamily, shaped: Callable[[BranchRecord], BranchRecord]
) -> Encode:
    """A record, with another row's answer where there is one, to an example; refusals carry the family's reason."""

    def encode(record: BranchRecord, mismatched: str | None = None) -> EncodedExample:
        if not record.answers:
            return asked(family, record)
        record = shaped(record)
        if mismatched is not None:
            record = replace(record, answers=(*record.answers, Answer(text=mismatched)))
        try:
            return family.encode(record)
        except VlmDataError as error:
            raise RowRefused(error.reason, error.detail) from error

    return encode


def as_it_is(record: BranchRecord, mismatched: str | None = None) -> Any:
    """For methods that make answers themselves."""
    return record


def _usable_answers(config: ExperimentConfig, table: VlmTable, checked: CheckResult) -> CheckResult:
    """Leave out single answers without a label (KTO), or disliked ones (fine-tuning); rows of other stages."""
    batches = METHODS.get(config.method_name).batches
    stage = config.data.stage
    if stage is not None and stage not in table.stages:
        raise ConfigError(f"data.stage: the table has no stage '{stage}' (stages: {', '.join(table.stages) or 'none'})")
    if stage is None and not (table.kind == "unpaired" and batches in ("vlm_labelled", *LIKED)):
        return checked
    problems: dict[int, tuple[str, str, str]] = {}
    for row in checked.rows.tolist():
        values = table.values(row, without=("images", "image", "videos", "video"))
        label = values.get("label")
        if stage is not None and str(values.get("stage")) != stage:
            problems[row] = ("stage", "other_stage", f"data.stage is '{stage}'")
        elif table.kind == "unpaired" and batches == "vlm_labelled" and label is None:
            problems[row] = ("label", "no_label", "neither liked nor disliked")
        elif table.kind == "unpaired" and batches in LIKED and label is False:
            problems[row] = ("label", "disliked", "this method takes the row's answer for a good one")
    return without_rows(table, checked, problems).demand()


def without_rows(table: VlmTable, checked: CheckResult, problems: dict[int, tuple[str, str, str]]) -> CheckResult:
    """The result with further rows left out: row -> (column, reason, detail)."""
    if not problems:
        return checked
    made = []
    for row, (column, reason, detail) in problems.items():
        file, number = table.file_and_number(row)
        made.append(Problem(file=file, row=number, id=table.row_id(row), column=column, reason=reason, detail=detail))
    rows = np.array([row for row in checked.rows.tolist() if row not in problems], dtype=np.int64)
    return replace(checked, rows=rows, problems=(*checked.problems, *made))


def _encodable(
    config: ExperimentConfig, family: VlmFamily, table: VlmTable, checked: CheckResult,
    shaped: Callable[[BranchRecord], BranchRecord], *, progress: bool,
) -> CheckResult:  # fmt: skip
    """Ask the processor about every row once; what it refused is kept beside the table, unless caches are off."""
    keep = config.data.cache != "off"
    key = canonical_hash(
        {"version": ENCODE_VERSION, "table": table.fingerprint, "processor": family.fingerprint("processor"),
         "limits": family.config.model_dump(mode="json"), "batches": METHODS.get(config.method_name).batches}
    )  # fmt: skip
    path = cache_root(config) / "encode" / f"{key[:32]}.json"
    known: dict[str, list[str] | None] = json.loads(path.read_text()) if keep and path.exists() else {}
    encode = encoder(family, shaped)

    def ask(row: int) -> list[str] | None:
        try:
            encode(table.record(row), None)
        except (RowRefused, RowProblem) as refused:
            return [refused.reason, refused.detail]
        return None

    rows = [row for row in checked.rows.tolist() if str(row) not in known]
    with (
        progress_bar("Tokenising", len(rows), enabled=progress) as advance,
        ThreadPoolExecutor(max(1, fixed_workers(config.data.workers)), thread_name_prefix="mmalign-encode") as pool,
    ):
        for row, said in zip(rows, pool.map(ask, rows), strict=True):
            known[str(row)] = said
            advance(1)
    if keep and rows:
        write_json(path, known)
    problems = {}
    for row in checked.rows.tolist():
        said = known[str(row)]
        if said is not None:
            problems[row] = ("prompt", said[0], said[1])
    return without_rows(table, checked, problems)


def vision_folder(config: ExperimentConfig, family: VlmFamily) -> Path:
    """Where features of this tower and processor are stored."""
    fields = {"vision": family.fingerprint("vision"), "processor": family.fingerprint("processor")}
    return cache_root(config) / "vision" / canonical_hash(fields)[:32]


def _examples(loader: VlmLoader, encode: Encode, *, title: str, progress: bool) -> Iterator[tuple[int, EncodedExample]]:
    """(row, example) of every usable row; used one by one, for what is stored must not depend on a row's neighbours."""
    with progress_bar(title, len(loader.order.rows), enabled=progress) as advance:
        for row in loader.order.rows.tolist():
            example = None
            with suppress(RowRefused, RowProblem):  # masked when training meets it, and listed then
                example = encode(loader.table.record(row), None)
            if example is not None:
                yield row, example
            advance(1)


def _fill_frames(
    frames: FrameCache, config: ExperimentConfig, table: VlmTable, checked: CheckResult, *, progress: bool
) -> None:
    """Decode every clip that is not stored yet, once for all answers about it; a second start reads nothing."""
    settings = config.model.model_dump()
    fps, most = settings.get("video_fps"), settings.get("max_frames")
    demand = canonical_hash([table.fingerprint, checked.rows.tolist(), fps, most, frames.fields])
    note = frames.root / "frames" / f"complete-{demand[:32]}.json"

    def decode(row: int) -> None:
        with suppress(RowProblem, VlmDataError):  # masked when training meets it, and listed then
            record = table.record(row)
            for item in (*record.media, *(item for answer in record.answers for item in answer.media or ())):
                if isinstance(item, VideoRef) and not item.frames:
                    open_media(record.id, item, fps=fps, max_frames=most, read_clip=frames.read)

    rows = [] if note.exists() else checked.rows.tolist()
    with (
        progress_bar("Decoding clips", len(rows), enabled=progress) as advance,
        ThreadPoolExecutor(max(1, fixed_workers(config.data.workers)), thread_name_prefix="mmalign-frames") as pool,
    ):
        for _ in pool.map(decode, rows):
            advance(1)
    frames.flush()
    write_json(note, {"rows": len(checked.rows)})


def _fill_vision(
    store: VisionStore, loader: VlmLoader, encode: Encode, parts: Any, device: torch.device, *, progress: bool
) -> None:
    """Encode every distinct picture and clip that is not stored yet."""
    for _, example in _examples(loader, encode, title="Encoding pictures", progress=progress):
        batch = parts.family.collate([example])
        if store.lacks(batch):
            with torch.no_grad():
                store.put(batch, parts.family.vision_features(parts.policy, batch.to(device)))


def _fill_references(
    config: ExperimentConfig, loader: VlmLoader, parts: Any, device: torch.device, *, progress: bool
) -> None:
    """Ask the starting weights about every answer that was not asked yet, and give the stored values to the trainer."""
    from mmalign.data import Cache

    family, store, start = parts.family, parts.trainer.reference, parts.start
    if not isinstance(store, StoredAnswers):
        raise TypeError("only a precomputed reference is filled")
    fields = {
        "reference": family.fingerprint("reference"), "processor": family.fingerprint("processor"),
        "limits": family.config.model_dump(mode="json"), "tuning": config.tuning.model_dump()["name"],
    }  # fmt: skip
    cache = Cache.open_or_create(cache_root(config), "reflogp", fields)
    keys: dict[int, str] = {}

    def items() -> Any:
        for row, example in _examples(loader, loader.encode, title="Asking the reference", progress=progress):
            keys[row] = canonical_hash(family.reference_keys([example]))
            yield keys[row], loader.collate([example])

    def ask(batches: Sequence[Any]) -> dict[str, Tensor]:
        return {"sum": torch.stack([_asked(family, start, batch.to(device)) for batch in batches])}

    try:
        cache.fill(items(), ask, batch_size=1)
    except OSError as error:
        raise DataError(
            f"data.cache: cannot write to {cache_root(config)} ({error}); free space, name another folder with "
            f"data.cache=..., or use another reference"
        ) from error
    for row, key in keys.items():
        store.sums[loader.table.row_id(row)] = tuple(cache.gather([key])["sum"][0].tolist())


def _asked(family: VlmFamily, start: Reference, batch: Any) -> Tensor:
    return start(lambda module: family.log_probs(module, batch).sum).cpu()


def media_counts(parts: Any) -> dict[str, Any]:
    """How many clips this process decoded, how often its vision tower ran, and how often stored features were read."""
    store = getattr(parts.trainer, "features", None)
    found: dict[str, Any] = {}
    if parts.frames is not None:
        found["clips_decoded"] = parts.frames.decoded
    if store is not None:
        found |= {"features_encoded": store.counts["encoded"], "features_read": store.counts["read"]}
    return found
