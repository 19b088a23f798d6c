"""From a user's preference pairs to an embedding, by a frozen network.

Three readers: CLIP differences (ours), a vision-language model that reads all pairs in one prompt and describes the user
(arXiv:2501.06655), and differences of a vision-language model's hidden states (ours, for models that cannot read eight
pictures at once). Departures from the released code of the second: the order of chosen and rejected is drawn per pair and the
preferred one named, so that position does not stand for preference; supports are drawn by seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from mmalign import assets, rng
from mmalign.errors import ModelError
from mmalign.media import open_image, read_bytes
from mmalign.models.users.settings import UsersConfig
from mmalign.types import ImageRef, PairRecord


class SupportEncoder(Protocol):
    """Reads pairs."""

    @property
    def unit(self) -> Literal["pair", "support"]:
        """Whether it reads pairs one by one (the embedding of several is their mean) or all of a support together."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, dim) of an embedding."""

    def fingerprint(self) -> Mapping[str, Any]:
        """Everything the numbers depend on, as plain values."""

    def __call__(self, supports: Sequence[Sequence[PairRecord]]) -> Tensor:
        """Embeddings of several supports (of one pair each where the unit is a pair). float32 ``[N, rows, dim]``"""


def pair_key(prompt: str, chosen: bytes, rejected: bytes) -> str:
    """Identity of a pair's content, from caption and SHA-256 of both files. Says nothing of who made the choice."""
    return hashlib.sha256(hashlib.sha256(prompt.encode()).digest() + bytes(chosen) + bytes(rejected)).hexdigest()


def key_of(record: PairRecord) -> str:
    """`pair_key` of a record, whose files are read."""
    chosen, rejected = (hashlib.sha256(read_bytes(one)[0]).digest() for one in (record.chosen, record.rejected))
    return pair_key(record.prompt, chosen, rejected)


def support_key(keys: Sequence[str]) -> str:
    """Identity of a support, from the keys of its pairs in their order."""
    return hashlib.sha256("".join(keys).encode()).hexdigest()


def embed(encoder: SupportEncoder, records: Sequence[PairRecord]) -> Tensor:
    """One embedding of some pairs. float32 ``[rows, dim]``, not standardised."""
    if encoder.unit == "pair":
        return encoder([[record] for record in records]).mean(0)
    return encoder([list(records)])[0]


def place_of(settings: UsersConfig) -> str:
    """The encoder's path; one that starts with ``assets/`` and is not there is looked up among the embedded assets."""
    return str(assets.placed(str(settings.path)))


def shape_of(settings: UsersConfig) -> tuple[int, int]:
    """(rows, dim) of an embedding, from the encoder's settings alone: no weights are read.

    Raises:
        ModelError: they cannot be read.
    """
    if settings.source != "encoded":
        return settings.rows, settings.dim
    from transformers import AutoConfig

    path = place_of(settings)
    config: Any = _read(path, lambda: AutoConfig.from_pretrained(path))
    if settings.encoder == "clip":
        vision = getattr(config, "vision_config", config)
        if config.model_type not in ("clip", "clip_vision_model"):
            raise ModelError(f"users.path: {path} holds a '{config.model_type}' model; encoder 'clip' reads a CLIP vision tower")
        return 1, 3 * int(vision.hidden_size)
    if not hasattr(config, "vision_config"):
        raise ModelError(f"users.path: {path} holds a '{config.model_type}' model, which reads no pictures")
    text = config.get_text_config()
    return int(text.num_hidden_layers) + 1, int(text.hidden_size)


def load_encoder(settings: UsersConfig, device: torch.device) -> SupportEncoder:
    """The encoder that the settings name.

    Raises:
        ModelError: it cannot be loaded, or the source needs none.
    """
    if settings.source != "encoded" or settings.path is None:
        raise ModelError(f"users with source '{settings.source}' are fitted, not encoded")
    return ENCODERS[settings.encoder](settings, device)


def _picture(picture: ImageRef) -> Any:
    return open_image(picture).image


class ClipDifference:
    """Pooled state and mean patch states of a CLIP vision tower, chosen minus rejected. One row of 3 x width."""

    unit: ClassVar[Literal["pair", "support"]] = "pair"
    batch = 32

    def __init__(self, settings: UsersConfig, device: torch.device) -> None:
        from transformers import CLIPImageProcessor, CLIPVisionModel

        path = place_of(settings)
        self.device = device
        self.processor = _read(path, lambda: CLIPImageProcessor.from_pretrained(path))
        self.network = _read(path, lambda: _complete(CLIPVisionModel, path)).to(device).eval().requires_grad_(False)
        self.shape = (1, 3 * int(self.network.config.hidden_size))

    def fingerprint(self) -> Mapping[str, Any]:
        return {"encoder": "clip", "version": 1, "weights": _hash(self.network)}

    @torch.no_grad()
    def __call__(self, supports: Sequence[Sequence[PairRecord]]) -> Tensor:
        records = [record for support in supports for record in support]
        found = []
        for start in range(0, len(records), self.batch):
            some = records[start : start + self.batch]
            features = self._features([_picture(one.chosen) for one in some] + [_picture(one.rejected) for one in some])
            found.append(features[: len(some)] - features[len(some) :])
        return torch.cat(found)[:, None]

    def _features(self, pictures: Sequence[Any]) -> Tensor:
        pixels = self.processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(self.device)
        out = self.network(pixel_values=pixels, output_hidden_states=True)
        layers = out.hidden_states
        patches = [layers[index][:, 1:].mean(1) for index in (len(layers) // 2, len(layers) - 1)]
        return torch.cat([out.pooler_output, *patches], -1).float().cpu()


class _VlmReader:
    """A vision-language model by path, any family that this package knows."""

    name: ClassVar[str]

    def __init__(self, settings: UsersConfig, device: torch.device) -> None:
        from mmalign.models.vlm.base import VlmConfig, VlmFamily

        self.settings, self.device = settings, device
        self.family = VlmFamily.load(VlmConfig(path=place_of(settings)), device=device)
        self.network: Any = self.family.network.requires_grad_(False)
        text = self.family.text_config
        self.shape = (int(text.num_hidden_layers) + 1, int(text.hidden_size))

    def fingerprint(self) -> Mapping[str, Any]:
        asked = {"new_tokens": self.settings.new_tokens, "instructions": self.settings.instructions}
        return {"encoder": self.name, "version": 1, "weights": _hash(self.network), **(asked if self.name == "vlm" else {})}

    def _inputs(self, content: Sequence[Mapping[str, str]], pictures: Sequence[Any]) -> Any:
        """One prompt of text and pictures as the model reads it."""
        processor = self.family.local_processor()
        turn = [{"role": "user", "content": list(content)}]
        text = processor.apply_chat_template(turn, add_generation_prompt=True)
        return processor(text=[text], images=list(pictures), return_tensors="pt").to(self.device)

    def _states(self, inputs: Mapping[str, Any]) -> Tensor:
        """Hidden states of the last token, all layers. ``[L + 1, d]``"""
        layers = self.network(**inputs, output_hidden_states=True, use_cache=False).hidden_states
        return torch.stack([layer[0, -1] for layer in layers]).float().cpu()


class VlmProfile(_VlmReader):
    """All pairs in one prompt; greedy description; the hidden states of its last token (29 x 3584 for the released model)."""

    unit: ClassVar[Literal["pair", "support"]] = "support"
    name = "vlm"

    @torch.no_grad()
    def __call__(self, supports: Sequence[Sequence[PairRecord]]) -> Tensor:
        return torch.stack([self._profile(support) for support in supports])

    def _profile(self, support: Sequence[PairRecord]) -> Tensor:
        content: list[dict[str, str]] = []
        pictures = []
        for number, record in enumerate(support, start=1):
            swapped = rng.key(0, "support-order", 0, key_of(record)) % 2
            both = (record.rejected, record.chosen) if swapped else (record.chosen, record.rejected)
            pictures += [_picture(one) for one in both]
            content += [
                {"type": "text", "text": f"{number}. {record.prompt} A:"}, {"type": "image"},
                {"type": "text", "text": "B:"}, {"type": "image"},
                {"type": "text", "text": f"Preferred: {'B' if swapped else 'A'}."},
            ]  # fmt: skip
        inputs = self._inputs([*content, {"type": "text", "text": self.settings.instructions}], pictures)
        limit = self.family.text_config.to_dict().get("max_position_embeddings")
        length = inputs["input_ids"].shape[1]
        room = self.settings.new_tokens if limit is None else min(self.settings.new_tokens, limit - length)
        if room < 1:
            raise ModelError(
                f"{self.settings.path}: {len(support)} pairs take {length} tokens and it reads {limit}; use fewer shots, or "
                f"users.encoder: vlm_difference"
            )
        out = self.network.generate(**inputs, max_new_tokens=room, do_sample=False)
        inputs["input_ids"] = out
        inputs["attention_mask"] = torch.ones_like(out)
        if "mm_token_type_ids" in inputs:
            types = inputs["mm_token_type_ids"]
            inputs["mm_token_type_ids"] = torch.cat([types, types.new_zeros(1, out.shape[1] - types.shape[1])], 1)
        return self._states(inputs)


class VlmDifference(_VlmReader):
    """Hidden states after reading the chosen picture with its caption, minus those after the rejected one."""

    unit: ClassVar[Literal["pair", "support"]] = "pair"
    name = "vlm_difference"

    @torch.no_grad()
    def __call__(self, supports: Sequence[Sequence[PairRecord]]) -> Tensor:
        return torch.stack(
            [self._read(record.chosen, record.prompt) - self._read(record.rejected, record.prompt)
             for support in supports for record in support]
        )  # fmt: skip

    def _read(self, picture: ImageRef, caption: str) -> Tensor:
        content = [{"type": "image"}, {"type": "text", "text": caption}]
        return self._states(self._inputs(content, [_picture(picture)]))


ENCODERS: Mapping[str, Callable[[UsersConfig, torch.device], SupportEncoder]] = {
    "clip": ClipDifference, "vlm": VlmProfile, "vlm_difference": VlmDifference,
}  # fmt: skip


def _complete(kind: Any, path: str) -> Any:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # the text tower is not read, which would be listed line by line
    try:
        network, found = kind.from_pretrained(path, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    finally:
        logging.set_verbosity(before)
    missing = [name for name in sorted(map(str, found["missing_keys"])) if "position_ids" not in name]
    if missing:
        raise ValueError(f"missing weights, e.g. '{missing[0]}'")
    return network


def _read(path: str, reading: Callable[[], Any]) -> Any:
    from safetensors import SafetensorError

    try:
        return reading()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        hint = "no CLIP with its image processor there" if Path(path).exists() else "no such local folder"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"users.path: cannot read {path}: {hint} ({reason})") from error


def _hash(network: torch.nn.Module) -> str:
    """Of a network's weights."""
    found = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]
