"""The contract of a vision-language family and its default, which the processor and the chat template drive.

A trainer sees records, ``BranchBatch`` and log-probabilities; placeholders, tiles, grids and positions stay inside the
family. A further family is a file with what it does differently, a line in ``VLM_FAMILIES`` and a tiny fixture.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from mmalign.branches import (
    BranchBatch,
    BranchLogps,
    BranchRecord,
    EncodedExample,
    Unit,
    VisionFeatures,
)
from mmalign.config import Section
from mmalign.errors import ModelError
from mmalign.media import decode_video
from mmalign.models.vlm import encoding, forward, generation, loading, saving
from mmalign.models.vlm.collate import collate
from mmalign.models.vlm.layout import Layout
from mmalign.models.vlm.media import ReadClip, digest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class VlmConfig(Section):
    """Which weights to start from, how to run them, and how large inputs may be."""

    name: str = "vlm"
    path: str
    """A local folder in the transformers layout, or a hub id."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the forward passes. Log-probabilities, losses and trained weights are float32 in any case."""
    attention: Literal["sdpa", "flex", "eager", "flash"] = "sdpa"
    """sdpa: a dense mask; flex: block-sparse, for long prompts on a GPU; flash: needs `method.prefix: plain`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile the network: slow first steps, faster later ones."""
    min_pixels: int | None = None
    """Smallest area of a picture, for processors that resize to an area (Qwen)."""
    max_pixels: int | None = None
    """Largest area of a picture, for processors that resize to an area (Qwen)."""
    image_splitting: bool | None = None
    """Cut pictures into tiles (SmolVLM, Idefics3, InternVL); None: as the processor's own settings say."""
    video_fps: float | None = None
    """Frames per second taken from a video file."""
    max_frames: int | None = None
    """Most frames taken from a clip; more are thinned evenly."""
    max_prefix: int | None = None
    """Most tokens of a prompt, media included; longer prompts are refused, never cut."""
    max_length: int | None = None
    """Most tokens of a prompt with one answer; answers are cut to fit, all of a record to the same length."""
    max_answer: int | None = None
    """Most tokens of an answer, turn end included."""
    template_only: bool = False
    """Train on exactly what the chat template writes: no start token and no end of sequence that it leaves out (as TRL)."""
    chunk: int = 0
    """Positions whose logits exist at a time; 0: as many as fit into 128 MiB."""
    row_tokens: int = 0
    """Pack several prompts into rows of up to this many tokens; 0: one prompt a row."""


class VlmFamily:
    """A loaded model with its processor. The default serves families whose processor says all."""

    Config: ClassVar[type[VlmConfig]] = VlmConfig
    vision_names: ClassVar[tuple[str, ...]] = ("vision_tower", "visual", "vision_model")
    projector_names: ClassVar[tuple[str, ...]] = ("multi_modal_projector", "connector", "image_newline")
    language_names: ClassVar[tuple[str, ...]] = ("language_model", "text_model")
    takes: ClassVar[frozenset[str]] = frozenset({"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values"})
    """Names of a processor's tensors that the default knows what to do with."""
    stacked: ClassVar[frozenset[str]] = frozenset()
    """Kinds whose features the model wants as one tensor ``[units, n, D]`` instead of a list."""

    mixes_media: ClassVar[bool] = True
    """Whether the processor takes pictures and clips in one prompt."""
    windowed: ClassVar[bool] = False
    """Whether the vision tower attends within windows of one long row."""
    splits: bool = False
    """Whether the language model's layers run the kernel that needs no mask over all pairs of tokens."""

    network: nn.Module
    """The model as loaded: the start of the policy, and the base to compare with."""
    processor: Any
    tokenizer: Any
    dtype: torch.dtype
    device: torch.device
    config: VlmConfig
    end_ids: frozenset[int]
    """Tokens that end an answer."""
    end_marks: tuple[str, ...]
    """Their text."""
    placeholder_ids: frozenset[int]
    """Tokens that stand for pictures and clips."""
    lora_targets: Mapping[str, Sequence[str]]
    """Named sets of full layer names: 'language' (all linear layers of the language model), 'attention' (its projections),
    'all' (vision tower and projector as well)."""

    def __init__(self, config: VlmConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.read_clip: ReadClip = decode_video
        self.dtype = DTYPES[config.dtype]
        self._local = threading.local()
        self._prints: dict[str, dict[str, Any]] = {}

    @classmethod
    def load(cls, config: VlmConfig, *, device: torch.device) -> VlmFamily:
        """Load from a folder or hub id, safetensors only. The name `vlm` picks the family by the folder's own config.

        Raises:
            ModelError: no such folder, a part missing, weights that do not fit, or a folder of another family.
        """
        return loading.load(cls, config, device)

    def with_limits(
        self, *, max_length: int | None = None, max_answer: int | None = None, max_prefix: int | None = None
    ) -> Self:
        """The same model with other limits; None keeps a limit."""
        wanted = {"max_length": max_length, "max_answer": max_answer, "max_prefix": max_prefix}
        changed = copy.copy(self)
        changed.config = self.config.model_copy(update={name: value for name, value in wanted.items() if value is not None})
        return changed

    # Data: CPU work

    def encode(self, record: BranchRecord, *, training: bool = True) -> EncodedExample:
        """All CPU work on one record: decode media, render the template, tokenise. Safe to call from several threads.

        Args:
            record: prompt, media and answers.
            training: False encodes the prompt alone, for `generate`.

        Raises:
            VlmDataError: a DataError whose `reason` is one of ``models.vlm.errors.REASONS``.
        """
        return encoding.encode(self, record, training=training)

    def collate(self, examples: Sequence[EncodedExample]) -> BranchBatch:
        """Encoded records as one batch on the CPU: right padded, every distinct picture or clip once."""
        return collate(self, examples)

    def local_processor(self) -> Any:
        """The processor of the calling thread: tokenizers keep settings that threads must not share."""
        own = self._local.__dict__
        if "processor" not in own:
            own["processor"] = copy.deepcopy(self.processor)
        return own["processor"]

    def mark(self, kind: str) -> str | None:
        """What a chat template writes for a picture or clip; None where the model takes none."""
        known = vars(self.processor)
        if kind == "video" and known.get("video_processor") is None:
            return None
        found = known.get(f"{kind}_token")
        return None if found is None else str(found)

    def token_types(self, ids: Tensor) -> Tensor:
        """0 text, 1 picture, 2 clip for every token id, same shape."""
        out = torch.zeros_like(ids)
        out[ids == self.image_token_id] = 1
        if self.video_token_id is not None:
            out[ids == self.video_token_id] = 2
        return out

    @property
    def image_token_id(self) -> int:
        return int(self.model_config.image_token_id)

    @property
    def video_token_id(self) -> int | None:
        values = self.model_config.to_dict()  # some configs store the number under the older name alone
        found = values.get("video_token_id", values.get("video_token_index"))
        return None if found is None else int(found)

    def units(self, inputs: Mapping[str, Any]) -> list[Unit]:
        """What the processor returned for one prompt, cut into what the vision tower reads in one piece."""
        found = self.cut(inputs)
        return [Unit(kind=kind, tensors=tensors, digest=digest(kind, tensors)) for kind, tensors in found]

    def cut(self, inputs: Mapping[str, Any]) -> list[tuple[Literal["image", "video"], dict[str, Tensor]]]:
        """Kind and tensors of every unit. Default: one per row of the pixels.

        Raises:
            ModelError: the processor returned tensors that this family does not know: leaving them out would be silent.
        """
        unknown = sorted(set(inputs) - self.takes)
        if unknown:
            raise ModelError(f"{self.config.path}: no family here knows what its model does with {', '.join(unknown)}")
        pixels = inputs.get("pixel_values")
        return [] if pixels is None else [("image", {"pixel_values": row}) for row in pixels]

    def join(self, kind: str, units: Sequence[Unit]) -> dict[str, Tensor]:
        """Arguments of the vision encoder for several units. Default: tensors stacked by name."""
        return {name: torch.stack([unit.tensors[name] for unit in units]) for name in units[0].tensors}

    def positions(self, prefix: Tensor, types: Tensor, units: Sequence[Unit]) -> Tensor:
        """Position ids of a prefix: ``[P]``, or ``[3, P]`` for three-axis families."""
        return torch.arange(len(prefix))

    def next_position(self, positions: Tensor) -> int:
        """Where every branch starts, on all axes. Default: after the last token's position (text by construction)."""
        return int(positions[..., -1].max()) + 1

    # Model

    @property
    def model_config(self) -> Any:
        return self.network.config

    @property
    def text_config(self) -> Any:
        return self.model_config.get_text_config()

    def parts(self, module: nn.Module | None = None) -> dict[str, list[nn.Module | nn.Parameter]]:
        """'vision', 'projector', 'language' and 'head' of a network of this family."""
        base: Any = forward.inner(module or self.network)
        own = {**dict(base.model.named_children()), **dict(base.model.named_parameters(recurse=False))}

        def named(names: tuple[str, ...]) -> list[nn.Module | nn.Parameter]:
            return [own[name] for name in names if name in own]

        return {
            "vision": named(self.vision_names), "projector": named(self.projector_names),
            "language": named(self.language_names), "head": [base.get_output_embeddings()],
        }  # fmt: skip

    def freeze_vision(self, module: nn.Module, *, projector: bool = True) -> nn.Module:
        """Stop gradients of the vision tower (and projector): what makes features shareable in full fine-tuning."""
        for name in ("vision", "projector") if projector else ("vision",):
            for part in self.parts(module)[name]:
                part.requires_grad_(False)
        return module

    def shares_vision(self, module: nn.Module) -> bool:
        """Whether features are the same for policy and reference: tower and projector frozen and without adapters."""
        return forward.shares_vision(self, module)

    def vision_features(self, module: nn.Module, batch: BranchBatch) -> VisionFeatures:
        """Projected features, once per distinct unit. Without gradients where none can be wanted (`shares_vision`)."""
        return forward.vision_features(self, module, batch.media)

    def encode_units(self, base: Any, kind: str, tensors: Mapping[str, Tensor]) -> tuple[Sequence[Tensor], Sequence[Any]]:
        """Features ``[n_i, D]`` per unit and, for models that have them, the tuple of deeper layers' features per unit."""
        out = base.get_image_features(**tensors, return_dict=True) if kind == "image" else base.get_video_features(
            **tensors, return_dict=True)  # fmt: skip
        return list(out.pooler_output), ()

    def pooled(self, kind: str, features: Sequence[Tensor], deep: Sequence[tuple[Tensor, ...]]) -> Any:
        """Features of every placeholder in order, in the form that the model's forward takes."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(
            pooler_output=torch.stack(list(features)) if kind in self.stacked else list(features)  # type: ignore[arg-type]
        )

    def unsharable(self) -> str | None:
        """Why prefix sharing would not be exact for this model; None where it is."""
        return forward.unsharable(self)

    def blocks(self, layout: Layout) -> Tensor | None:
        """[B, T] number of the picture a token belongs to where pictures attend in both directions; -1 elsewhere."""
        return None

    def prefill_inputs(self, types: Tensor) -> dict[str, Any]:
        """What the model's forward needs besides for a prompt that is read for generation; types [B, P]."""
        return {}

    def log_probs(
        self,
        module: nn.Module,
        batch: BranchBatch,
        *,
        prefix: Literal["shared", "plain"] = "shared",
        vision: VisionFeatures | None = None,
        per_token: bool = False,
        hide: Tensor | None = None,
        mean_logits: bool = False,
    ) -> BranchLogps:
        """Log-probabilities of every answer of a batch under a module of this family.

        Args:
            module: the policy (wrapped or not) or another network of this family; its own forward runs.
            batch: on the module's device.
            prefix: ``shared`` reads every prompt once for all its answers, ``plain`` once per answer. Equal to rounding.
            vision: features from `vision_features`; None computes them here.
            per_token: also give every token's value.
            hide: [B, T] bool: positions of the batch that no token may look at (see `image_token_positions`).
            mean_logits: also give the mean raw logit of every answer.

        Raises:
            ModelError: `shared` where it would not be exact, with the reason.
        """
        return forward.log_probs(
            self, module, batch, prefix=prefix, vision=vision, per_token=per_token, hide=hide, mean_logits=mean_logits
        )

    def image_token_positions(self, batch: BranchBatch) -> Tensor:
        """[B, T] bool: placeholders of pictures and clips, in the prefix only."""
        types = self.token_types(batch.input_ids)
        return (types > 0) & (batch.branch_id == 0)

    def generate(
        self,
        module: nn.Module,
        examples: Sequence[EncodedExample],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        step: int = 0,
        samples: int = 1,
        batch_size: int = 8,
        hide: Sequence[Tensor] | None = None,
        repetition_penalty: float = 1.0,
    ) -> list[list[str]]:
        """`samples` answers to every encoded prompt: left padded, cached keys, placeholders never drawn.

        Args:
            module: as for `log_probs`.
            examples: from ``encode(record, training=False)`` (answers, if any, are not read).
            max_new_tokens: most tokens of an answer.
            temperature: 0 takes the most likely token.
            top_p: smallest set of tokens of this probability to draw from.
            seed, step: the draw of a sample depends on these, the record's id and its own number, not on the batch.
            samples: answers per prompt.
            batch_size: answers made at a time.
            hide: per example, [P] bool: positions of the prefix that no token may look at.
            repetition_penalty: above 1, tokens of the prompt and of the answer so far become less likely.
        """
        return generation.generate(
            self, module, examples, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
            step=step, samples=samples, batch_size=batch_size, hide=hide, repetition_penalty=repetition_penalty,
        )  # fmt: skip

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Run networks in the configured dtype; nothing in float32."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            yield

    # Keys, copies and files

    def fingerprint(self, kind: Literal["vision", "processor", "reference", "network"]) -> dict[str, Any]:
        """What identifies the part that fills a cache: weights, settings, precision. Of the network as it is now, kept."""
        if kind not in self._prints:
            self._prints[kind] = saving.fingerprint(self, kind)
        return self._prints[kind]

    def reference_keys(self, examples: Sequence[EncodedExample]) -> list[str]:
        """One key per answer, in the flat order: prompt ids, answer ids and the digests of the media."""
        return saving.answer_keys(examples)

    def copy_network(self) -> nn.Module:
        """A second network with the weights and dtype that `network` has at the moment, frozen, in evaluation mode."""
        return copy.deepcopy(self.network).eval().requires_grad_(False)

    def save_lora(self, state: Mapping[str, Tensor], folder: Path, config: Mapping[str, Any]) -> Path:
        """An adapter folder that ``peft.PeftModel.from_pretrained(model, folder)`` reads. Returns its weights' path."""
        return saving.save_lora(self, state, folder, config)

    def save_full(self, module: nn.Module, folder: Path) -> Path:
        """A whole model folder, processor included, that plain transformers reads. Returns the folder."""
        return saving.save_full(self, module, folder)
