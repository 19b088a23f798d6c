"""Options about how pictures are read, and what they mean together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mmalign.errors import DataError

if TYPE_CHECKING:
    from mmalign.media import Colours

Workers = Annotated[
    int | None, typer.Option(min=1, help="Decoding threads per process; by default the cores shared between them.")
]
DecodeWorkers = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Processes that decode, for each one that scores; 0: its threads do. Same scores. By default one per core but two "
        "if a GPU scores 4,096 pictures or more, else 0.",
    ),
]
Decode = Annotated[
    str, typer.Option(help="full, or draft2x: JPEGs at a fraction that leaves twice the reward's size. Other pixels.")
]
FastPreprocess = Annotated[
    bool, typer.Option("--fast-preprocess", help="Resize by torch's 8-bit kernel where a rule has one. Other pixels.")
]
Alpha = Annotated[str, typer.Option(help="Transparent pictures: over white, over black, or drop the alpha.")]
Exif = Annotated[bool, typer.Option(help="Apply the rotation that a camera wrote.")]
Clip = Annotated[bool, typer.Option("--clip", help="Cut floating-point pictures off at 0 and 1 instead of failing their rows.")]


def colours(alpha: str, exif: bool, clip: bool) -> Colours:
    """What the options ask for.

    Raises:
        DataError: an unknown way with transparency.
    """
    from mmalign.media import Colours

    try:
        return Colours(alpha=alpha, exif=exif, clip=clip)
    except ValueError as error:
        raise DataError(f"--{error}") from error


def decoding_processes(processes: int, decode_workers: int | None, engine: str) -> int | None:
    """What --decode-workers comes to; None: chosen when it is known what is to be scored, and where.

    Helpers that score are ended with their parent by force, so they may not have processes of their own.

    Raises:
        DataError: both were asked for.
    """
    if decode_workers is None:
        return None if processes == 1 and engine == "local" else 0
    if decode_workers and processes > 1 and engine == "local":
        raise DataError(
            "--processes with --decode-workers: use one of them, or 'accelerate launch' (or --engine processes) with"
            " --decode-workers"
        )
    return decode_workers
