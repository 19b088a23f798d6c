"""The columns of our tables, and errors that name file, row and column with the nearest known name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from mmalign.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION: Final = 1
PAIR_REQUIRED: Final = ("id", "prompt", "chosen", "rejected")
PAIR_OPTIONAL: Final = ("p_chosen", "user", "scores", "weight", "group", "meta")
RANKED_REQUIRED: Final = ("id", "prompt", "images")
RANKED_OPTIONAL: Final = ("scores", "user", "meta")


def check_columns(
    present: Iterable[str], required: Sequence[str], optional: Sequence[str], *, source: str
) -> tuple[str, ...]:
    """Refuse missing columns and misspelt ones.

    Returns:
        the columns that are neither required nor optional; they are kept as metadata.

    Raises:
        DataError: a required column is absent, or an extra one is nearly an optional name (its values would be lost).
    """
    columns = list(present)
    if not columns:
        raise DataError(f"{source}: no rows in it")
    known = (*required, *optional)
    extra = tuple(name for name in columns if name not in known)
    problems = []
    for name in required:
        if name not in columns:
            near = difflib.get_close_matches(name, extra, n=1, cutoff=0.5)
            hint = f"; is it the column '{near[0]}'?" if near else f" (columns: {', '.join(columns) or 'none'})"
            problems.append(f"column '{name}' is missing{hint}")
    if problems and "images" in columns and "images" not in optional and "chosen" in required:
        problems = ["it is a table of ranked lists; methods on lists read it, and 'mmalign data pairs' makes pairs of it"]
    elif problems and "images" in required and {"chosen", "rejected"} <= set(columns):
        problems = ["it is a table of pairs; a method on lists needs several pictures a prompt with scores (docs/data.md)"]
    elif len(problems) > 1:
        problems.append("'mmalign data import' turns tables of other layouts into one that training reads")
    absent = [name for name in known if name not in columns]
    for name in extra:
        near = difflib.get_close_matches(name, absent, n=1, cutoff=0.8)
        if near and near[0] in optional:
            problems.append(f"column '{name}' is not known; did you mean '{near[0]}'?")
    if problems:
        raise DataError("\n".join(f"{source}: {problem}" for problem in problems))
    return extra


def image_type() -> pa.DataType:
    """How a picture is stored: encoded bytes, or a path relative to the table's folder (as `datasets` does)."""
    import pyarrow as pa

    return pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def pair_schema(rewards: Sequence[str] = ()) -> pa.Schema:
    """The Arrow schema of a pair table, with the metadata that lets `datasets` show its pictures.

    Args:
        rewards: names in the `scores` column, each holding (chosen, rejected).
    """
    import pyarrow as pa

    fields = [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("chosen", image_type()),
        ("rejected", image_type()),
        ("p_chosen", pa.float32()),
        ("user", pa.string()),
        ("weight", pa.float32()),
        ("group", pa.string()),
        ("meta", pa.string()),
    ]
    if rewards:
        fields.append(("scores", pa.struct([(name, pa.list_(pa.float32())) for name in rewards])))
    return pa.schema(fields, metadata=_metadata(fields, "image_pairs"))


def ranked_schema(rewards: Sequence[str] = (), *, annotated: bool = True) -> pa.Schema:
    """The Arrow schema of a table of ranked lists.

    Args:
        rewards: names in the `scores` column, each holding one number per picture.
        annotated: with `phi`, `ranks`, `soft_label` and `disagreement` beside the scores, as `mmalign annotate` writes them.
    """
    import pyarrow as pa

    fields = [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("images", pa.list_(image_type())),
        ("user", pa.string()),
        ("meta", pa.string()),
    ]
    numbers = pa.list_(pa.float32())
    if rewards:
        fields.append(("scores", pa.struct([(name, numbers) for name in rewards])))
    if rewards and annotated:
        fields += [("phi", numbers), ("ranks", numbers), ("soft_label", pa.float32()), ("disagreement", pa.float32())]
    return pa.schema(fields, metadata=_metadata(fields, "image_lists"))


def video_type() -> pa.DataType:
    """How a clip is stored: a path relative to the table's folder, or encoded bytes. Its fields are not in a picture's
    order, so that `datasets` does not take clips for pictures."""
    import pyarrow as pa

    return pa.struct([("path", pa.string()), ("bytes", pa.binary())])


def messages_type() -> pa.DataType:
    """Turns of a conversation, as TRL has them: a role, and parts that are text or stand for a picture or clip."""
    import pyarrow as pa

    part = pa.struct([("type", pa.string()), ("text", pa.string())])
    return pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(part))]))


def conversation_schema(rewards: Sequence[str] = (), *, paired: bool = True) -> pa.Schema:
    """The Arrow schema of answers about pictures and clips.

    Args:
        rewards: names in the `scores` column, each holding (chosen, rejected).
        paired: columns `chosen` and `rejected`; otherwise one `completion`.
    """
    import pyarrow as pa

    fields = [
        ("id", pa.string()),
        ("prompt", messages_type()),
        *((name, messages_type()) for name in (("chosen", "rejected") if paired else ("completion",))),
        ("images", pa.list_(image_type())),
        ("videos", pa.list_(video_type())),
        *(
            (("rejected_images", pa.list_(image_type())), ("p_chosen", pa.float32()), ("margin", pa.float32()))
            if paired
            else ()
        ),
        ("weight", pa.float32()),
        ("stage", pa.int32()),
        ("user", pa.string()),
        ("group", pa.string()),
        ("meta", pa.string()),
    ]
    if rewards and paired:
        fields.append(("scores", pa.struct([(name, pa.list_(pa.float32())) for name in rewards])))
    return pa.schema(fields, metadata=_metadata(fields, "conversations"))


def sampled_schema(kind: str, scores: Sequence[str] = ()) -> pa.Schema:
    """The Arrow schema of answers that a model made (``mmalign generate`` with a sampler).

    Args:
        kind: ``pairs`` (columns `chosen` and `rejected`) or ``lists`` (`answers`).
        scores: names in the `scores` column, each holding one number per answer.
    """
    import pyarrow as pa

    clip = pa.struct(
        [*video_type(), pa.field("frames", pa.list_(image_type())), *(pa.field(n, pa.float64()) for n in ("fps", "start", "end"))]
    )
    answers = ("chosen", "rejected") if kind == "pairs" else ("answers",)
    fields = [
        ("id", pa.string()),
        ("prompt", messages_type()),
        *((name, messages_type() if kind == "pairs" else pa.list_(messages_type())) for name in answers),
        ("images", pa.list_(image_type())),
        ("videos", pa.list_(clip)),
        ("stage", pa.int32()),
        ("group", pa.string()),
        ("meta", pa.string()),
    ]
    if scores:
        fields.append(("scores", pa.struct([(name, pa.list_(pa.float32())) for name in scores])))
    return pa.schema(fields, metadata=_metadata(fields, "conversations"))


def _metadata(fields: list[tuple[str, pa.DataType]], schema: str) -> dict[str, str]:
    import pyarrow as pa

    def feature(kind: pa.DataType) -> object:
        if kind == image_type():
            return {"_type": "Image"}
        if pa.types.is_struct(kind):
            return {kind.field(i).name: feature(kind.field(i).type) for i in range(kind.num_fields)}
        if pa.types.is_list(kind):
            return {"feature": feature(kind.value_type), "_type": "List"}
        return {"dtype": {"float": "float32"}.get(str(kind), str(kind)), "_type": "Value"}

    features = {name: feature(kind) for name, kind in fields}
    return {
        "huggingface": json.dumps({"info": {"features": features}}),
        "mmalign": json.dumps({"schema": schema, "version": SCHEMA_VERSION}),
    }


def check_version(metadata: dict[bytes, bytes] | None, *, source: str) -> None:
    """Refuse a table written by a newer version of this schema.

    Raises:
        DataError: the version is newer than this code, or the entry is not readable.
    """
    if not metadata or b"mmalign" not in metadata:
        return
    try:
        version = int(json.loads(metadata[b"mmalign"])["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{source}: its schema metadata cannot be read: {error}") from error
    if version > SCHEMA_VERSION:
        raise DataError(f"{source}: schema version {version} is newer than this mmalign knows ({SCHEMA_VERSION})")
