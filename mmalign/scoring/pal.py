"""PAL from tables: fit a head, add or forget a user, measure known and new users. The mathematics is in `rewards.pal`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmalign import __version__, rng
from mmalign.errors import DataError
from mmalign.rewards.pal.fitting import Fit, accuracy, first_logits, fit, predict
from mmalign.rewards.pal.folder import PalFolder, new_salt
from mmalign.rewards.pal.network import FIRST_SCALE, MAX_SCALE, HeadShape, PalHead
from mmalign.rewards.pal.settings import HeadConfig, PalConfig
from mmalign.rewards.table import LoadRequest, card
from mmalign.scoring.pal_features import Featured, LeftOut, embed_table

if TYPE_CHECKING:
    from mmalign.rewards.dual import DualEncoder

SINGLE = "single"
"""Folder inside a head's folder: the head with one prototype that was fitted beside it."""
FEW_PROMPTS = 20
LEFT_OUT = "left_out.jsonl"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> PalConfig:
    """Read and check a file of settings.

    Raises:
        ConfigError: all problems in one error.
    """
    from mmalign.config import decode, load_yaml

    return decode(PalConfig, load_yaml(path, list(overrides)), str(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """What came of a fit."""

    path: Path
    pairs: int
    users: int
    left_out: Sequence[LeftOut]
    rows: Mapping[str, Mapping[str, Any]]
    """``encoder``, ``one prototype`` and the head itself: figures on training and validation pairs."""

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.pairs} pairs of {self.users} users"]
        lines.append(f"  {'':<16} train  validation (pairs)   per user")
        for name, row in self.rows.items():
            lines.append(
                f"  {name:<16} {row['train']:.3f}  {row['validation']:.3f} ({row['validation_pairs']})"
                f"          {row['validation_macro']:.3f}" + (f"   epoch {row['epoch']}" if "epoch" in row else "")
            )
        lines.append("  validation pairs chose the epoch; a fair figure is that of 'mmalign rewards test-pal' on other pairs")
        return "\n".join(lines + left_out_lines(self.left_out, self.path / LEFT_OUT))


def left_out_lines(left_out: Sequence[LeftOut], listing: Path | None) -> list[str]:
    """Counts of rows that were not used, and where they are listed."""
    counts: dict[str, int] = {}
    for item in left_out:
        counts[item.reason] = counts.get(item.reason, 0) + 1
    if not counts:
        return []
    told = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
    return [f"  left out: {told}" + (f"; see {listing}" if listing else "")]


def load_encoder(config: PalConfig) -> DualEncoder:
    """The encoder a fit names."""
    return open_encoder(config.encoder, config.encoder_path, config.device, config.dtype)


def open_encoder(name: str, path: str | None, device: str | None, dtype: str | None) -> DualEncoder:
    from mmalign.rewards.pal import backend

    return backend.load_encoder(name, path, LoadRequest(name="pal", card=card("pal"), device=device, dtype=dtype))


def fit_pal(config: PalConfig, *, progress: bool = True) -> FitReport:
    """Fit a head on a table of pairs and write its folder.

    Raises:
        DataError: the table cannot be used, or `out` is taken.
        RewardError: the encoder cannot be loaded or has no vectors.
    """
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: already exists; remove it or choose another name")
    encoder = load_encoder(config)
    featured = embed_table(config.pairs, encoder, progress=progress)
    train, validation, by = split(featured, config.validation, config.seed)
    rows = {"encoder": _figures(featured, featured.encoder_margin, train, validation)}
    made: PalFolder | None = None
    for single in (True, False) if config.compare and config.head.prototypes > 1 else (False,):
        settings = config.head.model_copy(update={"prototypes": 1}) if single else config.head
        head, found = _train(config, settings, encoder, featured, train, validation)
        weights = torch.softmax(found.logits, dim=-1)
        margin = predict(head, featured.choices, weights)
        label = "one prototype" if settings.prototypes == 1 else f"{settings.prototypes} prototypes"
        rows[label] = _figures(featured, margin, train, validation) | {"epoch": found.epoch}
        facts = {
            "settings": config.model_dump(mode="json"), "table": featured.fingerprint, "version": __version__,
            "pairs": len(featured.choices), "split_by": by, "figures": rows[label], "encoder_figures": rows["encoder"],
            "epochs": found.epochs, "validation_loss": [round(value, 6) for value in found.validation_loss],
        }  # fmt: skip
        made = _folder(config, encoder, featured, head, found, facts, salt=made.salt if made else None)
        made.save(out / SINGLE if single else out)
    listing = "".join(json.dumps(_plain(item), ensure_ascii=False) + "\n" for item in featured.left_out)
    if listing:
        from mmalign.data.files import write_text

        write_text(out / LEFT_OUT, listing)
    return FitReport(path=out, pairs=len(featured.choices), users=len(featured.users), left_out=featured.left_out, rows=rows)


def split(featured: Featured, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Rows to train on, rows that decide when to stop, and what the split is by: ``prompt``, or ``pair`` if prompts are few.

    A function of the seed and of prompts and ids alone. A user all of whose rows would be held back keeps them for training.
    """
    choices = featured.choices
    by_prompt = len(set(choices.prompt.tolist())) >= FEW_PROMPTS
    names = [featured.prompts[row] for row in choices.prompt.tolist()] if by_prompt else list(featured.ids)
    distinct = sorted(set(names), key=lambda name: rng.key(seed, "pal/split", 0, name))
    held = set(distinct[: max(1, round(share * len(distinct)))]) if len(distinct) > 1 else set()
    back = torch.tensor([name in held for name in names])
    alone = torch.ones(len(featured.users), dtype=torch.bool)
    alone[choices.user[~back]] = False
    back &= ~alone[choices.user]
    if not bool(back.any()):
        raise DataError(
            f"{len(choices)} pairs are too few to hold any back for validation: users need at least two, of different prompts"
        )
    return torch.nonzero(~back).flatten(), torch.nonzero(back).flatten(), "prompt" if by_prompt else "pair"


def _train(config: PalConfig, settings: HeadConfig, encoder: DualEncoder, featured: Featured, train: torch.Tensor,
           validation: torch.Tensor) -> tuple[PalHead, Fit]:  # fmt: skip
    width = encoder.net.shape.embedding
    shape = HeadShape(
        variant=settings.variant, width=width, prototypes=settings.prototypes, input=settings.input, mixing=settings.mixing,
        hidden=width if settings.hidden is None else settings.hidden,
    )  # fmt: skip
    own = min(float(encoder.net.logit_scale.detach().float().exp()), MAX_SCALE)
    scale = settings.scale or (own if settings.variant == "b" else FIRST_SCALE)
    head = PalHead(shape, scale=scale, seed=rng.key(config.seed, "pal/head") % 2**63)
    start = first_logits(featured.users, shape.prototypes, noise=config.optim.noise, seed=config.seed)
    choices = featured.choices
    found = fit(head, start, choices.take(train), choices.take(validation), loss=_loss(config), settings=config.optim,
                seed=config.seed)  # fmt: skip
    return head.eval(), found


def _loss(config: PalConfig) -> str:
    return config.optim.loss or ("hinge" if config.head.variant == "a" else "logistic")


def _folder(config: PalConfig, encoder: DualEncoder, featured: Featured, head: PalHead, found: Fit, facts: Mapping[str, Any],
            *, salt: str | None) -> PalFolder:  # fmt: skip
    path = None if config.encoder_path is None else str(Path(config.encoder_path).resolve())
    made = PalFolder(
        head=head, names=list(featured.users), logits=found.logits, known=len(featured.users), loss=_loss(config), facts=facts,
        encoder={"name": config.encoder, "path": path, "weights": encoder.identity},
        salt=(salt or new_salt()) if config.hash_users else "",
    )  # fmt: skip
    made.names = [made.stored_name(name) for name in made.names]
    made.__post_init__()
    return made


def _figures(featured: Featured, margin: torch.Tensor, train: torch.Tensor, validation: torch.Tensor) -> dict[str, Any]:
    """Accuracy of margins on both sides of the split; None where a side holds ties alone."""
    known = accuracy(margin[train], featured.choices.take(train))
    held = accuracy(margin[validation], featured.choices.take(validation))
    return {
        "train": known.micro, "validation": held.micro, "validation_macro": held.macro, "validation_pairs": held.pairs,
    }  # fmt: skip


def _plain(item: LeftOut) -> dict[str, str]:
    return {"where": item.where, "id": item.id, "reason": item.reason, "detail": item.detail}
