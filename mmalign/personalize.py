"""A finished personalised run at work: take in a new person from a few choices, and make pictures for people and mixtures.

``mmalign personalize RUN --pairs my_pairs.jsonl --prompts "a red circle"`` and what the voting page calls.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from mmalign.experiment.opening import OpenRun
    from mmalign.models.users.blend import Mode
    from mmalign.models.users.store import UserStore
    from mmalign.types import PairRecord

MINIMUM = 4
"""Fewest pairs that make a user."""
SHARE = 0.01
"""Mixture weights that sum to 1 within this are brought to 1."""


@dataclass(frozen=True, kw_only=True)
class Personalised:
    """What a call left behind."""

    folder: Path
    """`grid.png`, `pictures/`, and `personal.json` with all that made them."""
    pictures: np.ndarray = field(repr=False)
    """For the person: uint8 ``[N, H, W, 3]``."""
    base: np.ndarray = field(repr=False)
    """For nobody, from the same noise."""
    prompts: tuple[str, ...]
    """Of every picture."""
    pairs: int
    """Pairs that the user was embedded from in this call; 0 where they were known."""
    mix: Mapping[str, float]
    """Who the pictures are for."""


def personalize(
    run: str | Path | OpenRun,
    pairs: str | Path | Sequence[PairRecord] | None = None,
    prompts: Sequence[str] | str | Path = (),
    *,
    user: str | None = None,
    mix: Mapping[str, float] | None = None,
    out: str | Path | None = None,
    scale: float = 1.0,
    guidance: float = 1.0,
    mode: Mode = "prediction",
    seed: int = 0,
    images_per_prompt: int = 1,
    fit: int | None = None,
    minimum: int = MINIMUM,
    overrides: Sequence[str] = (),
) -> Personalised:
    """Embed a person from their pairs, keep them in the run's users, and make pictures for them and for nobody.

    Args:
        run: folder of a run with a personalised method, or one opened already (``experiment.opening.open_run``).
        pairs: a pair table (JSONL, Parquet, folder: ``id, prompt, chosen, rejected, p_chosen?, user?``) or records; None where
            everybody is known.
        prompts: texts, or a file with a prompt a line (or JSONL); none: only take the person in.
        user: the person's name; default: the one the pairs name, or ``me``.
        mix: name -> weight, summing to 1; default: the user alone.
        out: folder for the pictures; default ``RUN/personal/<key of the user or mixture>``.
        scale: strength of the added attention; 0 gives the base's pictures to the last bit.
        guidance: g in base + g (personal - base).
        mode: what a mixture means; see ``models.users.blend``.
        seed: of the noise.
        fit: learn the embedding in so many steps from the pairs, everything else frozen; default: 0 where the run has an
            encoder, 60 where its users are a table or prototypes.
        minimum: fewest pairs that are accepted.

    Raises:
        ConfigError: a run without users, an unknown user, too few pairs, weights that do not sum to 1.
        DataError, ModelError: pairs or weights that cannot be read.
    """
    opened = _opened(run, overrides)
    known = _records(pairs, user) if pairs is not None else None
    name = user or _named(known) or "me"
    if known is not None:
        add_user(opened, known, name, fit=fit, minimum=minimum, seed=seed)
    shares = dict(mix) if mix else {name: 1.0}
    store = store_of(opened)
    texts = _prompts(prompts, images_per_prompt)
    embeddings = {one: store.get(one) for one in shares}
    weights = _weights(shares)
    if not texts:
        empty = np.zeros((0, 0, 0, 3), dtype=np.uint8)
        return Personalised(
            folder=opened.folder, pictures=empty, base=empty, prompts=(), pairs=len(known or ()), mix=weights
        )
    mixture = [(embeddings[one], weight) for one, weight in weights.items()]
    pictures = sample_for(opened, [mixture] * len(texts), texts, scale=scale, guidance=guidance, mode=mode, seed=seed)
    base = sample_for(opened, [[]] * len(texts), texts, seed=seed)
    folder = Path(out) if out else opened.folder / "personal" / "-".join(store.key(one)[:12] for one in weights)
    asked = {"scale": scale, "guidance": guidance, "mode": mode, "seed": seed, "weights": list(weights.values()),
             "users": [store.key(one) for one in weights], "pairs": len(known or ())}  # fmt: skip
    _write(folder, pictures, base, texts, asked)
    return Personalised(
        folder=folder, pictures=pictures, base=base, prompts=tuple(texts), pairs=len(known or ()), mix=weights
    )


def add_user(
    run: OpenRun, records: Sequence[PairRecord], name: str, *, fit: int | None = None, minimum: int = MINIMUM, seed: int = 0,
    replace: bool = True,
) -> str:  # fmt: skip
    """Embed a person from their pairs and keep them. Returns the key that stands for the name on disk.

    Raises:
        ConfigError: fewer pairs than `minimum`, all of them ties, or a known name where `replace` is False.
    """
    decided = [record for record in records if record.p_chosen != 0.5]
    if len(decided) < minimum:
        raise ConfigError(f"--pairs: {len(decided)} decided pairs of '{name}'; at least {minimum} are needed")
    embedding, keys, kind = embed_user(run, decided, fit=fit, seed=seed)
    return store_of(run).add(name, embedding, kind=kind, pairs=keys, replace=replace).key


def embed_user(
    run: OpenRun, records: Sequence[PairRecord], *, fit: int | None = None, seed: int = 0
) -> tuple[Tensor, tuple[str, ...], str]:
    """The embedding of some pairs ``[rows, dim]``, the keys of the pairs, and how it came about: encoded or fitted.

    Raises:
        ConfigError: no steps to fit a user of a run that has no encoder.
    """
    from mmalign.experiment.users import encode_user, users_of
    from mmalign.models.users.encoders import key_of

    settings = users_of(run.config)
    assert settings is not None
    encoded = settings.source == "encoded"
    steps = fit if fit is not None else (0 if encoded else 60)
    start = None
    if encoded:
        start, keys = encode_user(run.config, records, run.family.device)
    else:
        keys = tuple(key_of(record) for record in records)
        if not steps:
            raise ConfigError("--fit 0: the users of this run are learned, not read from pairs; a new one has to be fitted")
    if steps:
        from mmalign.experiment.fitting import fit_user

        start = fit_user(run, records, start=start, steps=steps, seed=seed)
    assert start is not None
    return start, keys, "fitted" if steps else "encoded"


def sample_for(
    run: OpenRun, mixtures: Sequence[Sequence[tuple[Any, float]]], prompts: Sequence[str], *, scale: float = 1.0,
    guidance: float = 1.0, mode: Mode = "prediction", seed: int = 0,
) -> np.ndarray:  # fmt: skip
    """Pictures, one per prompt, each for the mixture [(embedding ``[rows, dim]``, weight), ...] beside it; empty: for nobody.

    Noise depends on seed, prompt and its count alone, so that equal calls for different people differ in the person only.

    Returns:
        uint8 ``[N, H, W, 3]``.
    """
    from mmalign import rng
    from mmalign.models.users.blend import made_for, persons

    if len(mixtures) != len(prompts):
        raise ConfigError(f"{len(mixtures)} people for {len(prompts)} prompts; each picture is for one mixture")
    settings, seen, keys = run.config.evaluate, dict[str, int](), []
    for prompt in prompts:
        seen[prompt] = seen.get(prompt, 0) + 1
        keys.append(f"{prompt}\x1f{seen[prompt]}")
    noise = rng.normal(keys, run.family.latent_shape, seed=seed, purpose="personal")
    during = None
    if any(mixtures):
        who = persons(mixtures, scale=scale, guidance=guidance, mode=mode)

        def during(rows: slice) -> Any:
            return made_for(run.aligned, who.rows(rows))

    found: np.ndarray = run.family.sample(
        run.aligned, list(prompts), noise, steps=settings.steps, guidance=settings.guidance, batch_size=settings.batch_size,
        during=during,
    )  # fmt: skip
    return found


def store_of(run: OpenRun) -> UserStore:
    """The users of a run."""
    from mmalign.experiment.users import FOLDER, encoder_print
    from mmalign.models.users.store import UserStore

    return UserStore.create(run.folder / FOLDER, encoder=encoder_print(run.config))


def parse_mix(text: str) -> dict[str, float]:
    """``alice=0.3,bob=0.7`` to weights.

    Raises:
        ConfigError: a part that is not NAME=NUMBER, a name twice, or weights that do not sum to 1.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = float("nan")
        if not name.strip() or weight != weight or abs(weight) == float("inf"):
            raise ConfigError(f"--mix: '{part}' is not NAME=WEIGHT, e.g. alice=0.3,bob=0.7")
        if name.strip() in found:
            raise ConfigError(f"--mix: '{name.strip()}' is named twice")
        found[name.strip()] = weight
    return _weights(found)


def _weights(shares: Mapping[str, float]) -> dict[str, float]:
    total = sum(shares.values())
    if not shares or abs(total - 1) > SHARE:
        raise ConfigError(f"--mix: the weights sum to {total:g}; they must sum to 1 (one below 0 pushes away from that user)")
    return {name: weight / total for name, weight in shares.items()}


def _opened(run: str | Path | OpenRun, overrides: Sequence[str]) -> OpenRun:
    from mmalign.experiment.opening import open_run
    from mmalign.experiment.users import users_of

    opened = open_run(run, overrides) if isinstance(run, str | Path) else run
    if opened.config.on_answers or users_of(opened.config) is None:
        raise ConfigError(
            f"{opened.folder}: '{opened.config.method_name}' trained for no users; personalize needs a run of personalized_dpo"
        )
    return opened


def _records(pairs: str | Path | Sequence[PairRecord], user: str | None) -> list[PairRecord]:
    """The pairs of one person."""
    from mmalign import data

    if isinstance(pairs, str | Path):
        table = data.open_table(pairs, progress=False)
        records = [table[row] for row in range(len(table))]
    else:
        records = list(pairs)
    names = sorted({record.user for record in records if record.user is not None})
    if user is not None and user in names:
        return [record for record in records if record.user == user]
    if len(names) > 1:
        raise ConfigError(f"--pairs: they are of {len(names)} people ({', '.join(names[:5])}); say whose with --user")
    if user is not None and names and any(record.user is None for record in records):
        raise ConfigError(f"--pairs: some are of '{names[0]}' and some of nobody; say whose they are in the column 'user'")
    return records


def _named(records: Sequence[PairRecord] | None) -> str | None:
    return next((record.user for record in records or () if record.user is not None), None)


def _prompts(prompts: Sequence[str] | str | Path, times: int) -> list[str]:
    from mmalign.experiment.prompts import read_prompts

    if times < 1:
        raise ConfigError(f"--images: at least 1, got {times}")
    if isinstance(prompts, Path) or (isinstance(prompts, str) and Path(prompts).is_file()):
        texts = [prompt for prompt, _ in read_prompts(str(prompts))]
    else:
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
    return [text for text in texts for _ in range(times)]


def _write(folder: Path, pictures: np.ndarray, base: np.ndarray, prompts: Sequence[str], asked: Mapping[str, Any]) -> None:
    """Pictures, a grid of base above personal, and how they came about."""
    from PIL import Image

    from mmalign.report.grids import grid

    target = folder / "pictures"
    target.mkdir(parents=True, exist_ok=True)
    for number, (own, plain) in enumerate(zip(pictures, base, strict=True)):
        Image.fromarray(own).save(target / f"{number:04d}-personal.png")
        Image.fromarray(plain).save(target / f"{number:04d}-base.png")
    beside = [picture for both in zip(base, pictures, strict=True) for picture in both]
    captions = [text for prompt in prompts for text in (prompt, prompt)]
    grid(beside, 2, captions, headings=["base", "personal"]).save(folder / "grid.png")
    (folder / "personal.json").write_text(json.dumps({**asked, "prompts": list(prompts)}, indent=2) + "\n", encoding="utf-8")
