"""`pal:PATH` as a reward: a fitted head over its encoder, each row scored for its own user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.errors import RewardError
from mmalign.rewards.base import EncodingBackend, Texts, User, UserNote
from mmalign.rewards.clip_net import VisionTower
from mmalign.rewards.dual import DualEncoder
from mmalign.rewards.files import fingerprint
from mmalign.rewards.pal.folder import PalFolder
from mmalign.rewards.table import LoadRequest

NO_USER, UNKNOWN_USER, BAD_MIXTURE = "no_user", "unknown_user", "bad_mixture"
UNKNOWN = ("error", "population")


class PalReward(EncodingBackend):
    """The reward of a picture and a prompt for a user.

    A row without a user is scored for the population (the mean of the weights of the users the head was fitted with) and
    flagged ``no_user``. A user who is not known is the row error ``unknown_user``, or with ``unknown="population"`` the
    population with that flag. A mixture mixes the users' weights.

    Args:
        encoder: its picture and text vectors are what the head reads; shared with other rewards on it.
        fixed: one user for all rows, whatever they say; ``""`` is the population.
    """

    def __init__(self, request: LoadRequest, encoder: DualEncoder, folder: PalFolder, *, unknown: str, fixed: str | None) -> None:
        if unknown not in UNKNOWN:
            raise RewardError(f"pal's option unknown is one of {', '.join(UNKNOWN)}, got {unknown!r}")
        self.encoder, self.folder, self.unknown, self.fixed = encoder, folder, unknown, fixed
        self.device = encoder.device
        self.head = folder.head.to(self.device).requires_grad_(False).eval()
        self.preprocess, self.mean, self.std = encoder.preprocess, encoder.mean, encoder.std
        self.image_key = encoder.image_key
        shape = self.head.shape
        self.text_key = encoder.text_key if shape.needs_prompt else ""
        self.reads_user = fixed is None
        if fixed:
            folder.weights(fixed)  # a name that is not there is one error here, not one per row
        near = {"b": "scale * cos(f(picture), sum w_k g_k(prompt))", "a": "-scale * |f(picture) - ideal point|"}
        self.card = replace(
            request.card, formula=near[shape.variant], needs_prompt=shape.needs_prompt, preprocess=encoder.preprocess.key,
            backbone=encoder.card.name, max_text_tokens=encoder.card.max_text_tokens if shape.needs_prompt else 0,
            parameters_millions=encoder.card.parameters_millions + self.head.parameter_count() / 1e6,
        )  # fmt: skip

    def record(self) -> Mapping[str, Any]:
        users = {"logits": self.folder.logits, "known": torch.tensor(self.folder.known)}
        return {
            "encoder": dict(self.encoder.record()), "head": fingerprint(self.head.state_dict()), "users": fingerprint(users),
            "names": len(self.folder.names), "shape": self.head.shape.as_dict(), "unknown": self.unknown, "fixed": self.fixed,
        }  # fmt: skip

    def about_user(self, user: User) -> UserNote:
        if user is None or user == "":
            return UserNote(flags=(NO_USER,))
        if isinstance(user, tuple):
            try:
                self.folder.mixture(dict(user))
            except RewardError as error:
                return UserNote(reason=BAD_MIXTURE, message=str(error))
            return UserNote()
        if self.folder.has(user):
            return UserNote()
        if self.unknown == "population":
            return UserNote(flags=(UNKNOWN_USER,))
        return UserNote(reason=UNKNOWN_USER, message=self.folder.unknown(user))

    def user_key(self, user: str | None) -> str:
        """As the head's folder writes it: a hash, unless names are kept there too."""
        return self.folder.stored_name(user) if user else ""

    def weights(self, users: Sequence[User]) -> Tensor:
        """Mixture weights of the rows' users ``[n, K]``, on the reward's device."""
        found: dict[User, Tensor] = {}
        for user in set(users):
            found[user] = self._weights(user)
        return torch.stack([found[user] for user in users]).to(self.device)

    def _weights(self, user: User) -> Tensor:
        if isinstance(user, tuple):
            return self.folder.mixture(dict(user))
        if not user or not (self.folder.has(user) or self.unknown == "error"):
            return self.folder.population.weights
        return self.folder.weights(user)

    def encode_images(self, pixels: Tensor) -> Tensor:
        return self.encoder.encode_images(pixels)

    @property
    def image_tower(self) -> VisionTower:
        return self.encoder.image_tower

    def finish_images(self, states: Tensor) -> Tensor:
        return self.encoder.finish_images(states)

    def bytes_per_image(self) -> int:
        return self.encoder.bytes_per_image()

    def encode_texts(self, prompts: Sequence[str]) -> Texts:
        return self.encoder.encode_texts(prompts)

    def pair(self, images: Tensor, texts: Texts | None) -> Tensor:
        return self.pair_for(images, texts, [None] * len(images))

    def pair_for(self, images: Tensor, texts: Texts | None, users: Sequence[User]) -> Tensor:
        whose = users if self.fixed is None else [self.fixed or None] * len(images)
        prompts = None if texts is None else texts.tensors[0].float()
        scores: Tensor = self.head(images.float(), prompts, self.weights(whose))
        return scores

    def embedding(self, images: Tensor) -> Tensor:
        return images


def load_encoder(name: str, path: str | Path | None, request: LoadRequest) -> DualEncoder:
    """The reward whose vectors a head reads.

    Raises:
        RewardError: it has no vectors of pictures and prompts in one space.
    """
    from mmalign.rewards.loading import load_backend

    backend = load_backend(
        name, path, request.device, request.dtype, local_files_only=request.local_files_only, shared=request.shared
    )
    if not isinstance(backend, DualEncoder):
        raise RewardError(
            f"PAL needs a reward that compares a picture's vector with a prompt's (pickscore, clipscore, hpsv2.1, tiny-clip, "
            f"...); '{name}' does not"
        )
    return backend


def pal(request: LoadRequest) -> PalReward:
    """`pal:FOLDER`, or with one user for all rows `pal:FOLDER#NAME` (`pal:FOLDER#`: the population).

    Options: ``encoder=`` (local weights of the encoder, where they have moved), ``unknown="population"``.
    """
    options = request.take(encoder=None, unknown="error")
    named, mark, user = request.argument.partition("#")
    place = Path(named) if named else request.path
    if place is None:
        raise RewardError("name the folder of a PAL head: pal:FOLDER, or path=; 'mmalign rewards fit-pal' makes one")
    folder = PalFolder.load(place)
    path = options["encoder"] or (request.path if named else None) or folder.encoder.get("path")
    encoder = load_encoder(str(folder.encoder["name"]), path, request)
    if encoder.identity != folder.encoder["weights"]:
        raise RewardError(
            f"{place}: fitted on '{folder.encoder['name']}' with weights {folder.encoder['weights']}, but those found are "
            f"{encoder.identity}; give the right ones with encoder= (Python) or --path"
        )
    if encoder.net.shape.embedding != folder.head.shape.width:
        raise RewardError(f"{place}: reads {folder.head.shape.width} numbers, the encoder gives {encoder.net.shape.embedding}")
    return PalReward(request, encoder, folder, unknown=options["unknown"], fixed=user if mark else None)
