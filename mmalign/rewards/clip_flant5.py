"""VQAScore's own network, CLIP-FlanT5 (arXiv:2404.01291; linzhiqiu/t2v_metrics): does the picture show the prompt?

A CLIP ViT-L/14 at 336 pixels, its last block left out and its class token dropped, a projector of two layers, and Flan-T5, whose
encoder reads ``system message USER: <picture> question ASSISTANT:`` and whose decoder is asked for the answer. The text before
and behind the picture is tokenised apart, so each part ends with T5's end of sequence. The score is the geometric mean of the
probabilities of the answer's tokens, of which the end is one: sqrt(P("Yes") P(end | "Yes")).

Built from transformers' T5 and CLIP on the names that the released code gives its parts; the published weights were not at hand.
As released: the pad token is the unknown one, so words that T5 does not know are not attended to; probabilities are over the
tokenizer's tokens, of which there are fewer than rows in the table. Departures: log-probabilities are float32, and a literal
``</s>`` or ``<image>`` in a prompt is ordinary text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor, nn

from mmalign.errors import ModelError, RewardError
from mmalign.rewards.base import Answers, DirectBackend
from mmalign.rewards.cards import Card
from mmalign.rewards.files import fingerprint, load_strictly, read_folder_state, read_json
from mmalign.rewards.hub import local_weights, pick_device, pick_dtype
from mmalign.rewards.judge import VQA_QUESTION, check_template, fill, template_record
from mmalign.rewards.preprocess import CLIP_MEAN, Preprocess, normalise
from mmalign.rewards.table import LoadRequest

SYSTEM: Final = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the user's questions."
)
BEFORE, BEHIND = f"{SYSTEM} USER: ", "\n{question} ASSISTANT: "
LONGEST: Final = 2048
"""Tokens of text, the picture counted as one; what goes beyond is cut."""
GROUND: Final = tuple(int(value * 255) for value in CLIP_MEAN)
"""Colour of the bars that make a picture square: (122, 116, 104)."""
WEIGHT_FILES: Final = ("model.safetensors", "pytorch_model.bin")
TOWER: Final = "vision_tower.vision_tower."
L14_336: Final = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
                  "patch_size": 14, "image_size": 336, "hidden_act": "quick_gelu", "projection_dim": 768}  # fmt: skip
"""openai/clip-vit-large-patch14-336, on which both releases were trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The loaded network."""

    t5: Any
    tower: Any
    projector: nn.Sequential
    tokenizer: Any
    identity: str


class ClipFlanT5(DirectBackend):
    """exp(mean log-probability of the answer's tokens), in (0, 1).

    Args:
        question: with ``{prompt}``.
        said: the answer whose probability is the score.
    """

    def __init__(self, card: Card, parts: Parts, *, question: str, said: str) -> None:
        check_template(question)
        self.card, self.parts, self.question, self.said = card, parts, question, said
        self.device, self.dtype = parts.t5.device, parts.t5.dtype
        self.rule = Preprocess("clip_hf", int(parts.tower.config.image_size))
        self.labels = self._ids(said)
        self._before = self._ids(BEFORE)

    def record(self) -> Mapping[str, Any]:
        return {"weights": self.parts.identity, "dtype": str(self.dtype), "answer": self.said,
                "preprocess": self.card.preprocess, **template_record(self.question)}  # fmt: skip

    def answer(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Answers:
        distinct = {id(image): image for image in images}
        seen = dict(zip(distinct, self._look(list(distinct.values())), strict=True))
        rows = [self._ids(BEHIND.replace("{question}", fill(self.question, prompt))) for prompt in prompts]
        room = LONGEST - len(self._before) - 1
        truncated = tuple(len(ids) > room for ids in rows)
        groups: dict[int, list[int]] = {}
        for row, ids in enumerate(rows):  # rows of one length together, so that no padding can change a score
            groups.setdefault(min(len(ids), room), []).append(row)
        values = torch.empty(len(images))
        for length, members in groups.items():
            tokens = torch.tensor([rows[row][:length] for row in members], device=self.device)
            pictures = torch.stack([seen[id(images[row])] for row in members])
            values[torch.tensor(members)] = self._log_prob(pictures, tokens).exp().cpu()
        return Answers(values=values, errors=(None,) * len(images), truncated=truncated)

    @torch.inference_mode()
    def _look(self, images: Sequence[Image.Image]) -> Tensor:
        """Projected patches: ``[N, patches, width of T5]``."""
        parts = self.parts
        pixels = torch.stack([self.rule.from_image(squared(image)) for image in images]).to(self.device)
        states = parts.tower(pixel_values=normalise(pixels).to(self.dtype), output_hidden_states=True).hidden_states
        found: Tensor = parts.projector(states[-2][:, 1:])
        return found

    @torch.inference_mode()
    def _log_prob(self, pictures: Tensor, tokens: Tensor) -> Tensor:
        """Mean log-probability of the answer's tokens: float32 ``[N]``."""
        parts = self.parts
        before = torch.tensor(self._before, device=self.device).repeat(len(tokens), 1)
        table = parts.t5.get_input_embeddings()
        read = torch.cat([table(before), pictures.to(table.weight.dtype), table(tokens)], dim=1)
        known = [ids != parts.tokenizer.unk_token_id for ids in (before, tokens)]
        mask = torch.cat([known[0], torch.ones_like(pictures[..., 0], dtype=torch.bool), known[1]], dim=1)
        labels = torch.tensor(self.labels, device=self.device).repeat(len(tokens), 1)
        logits = parts.t5(inputs_embeds=read, attention_mask=mask.long(), labels=labels).logits
        chances = logits[..., : len(parts.tokenizer)].float().log_softmax(-1)
        return chances.gather(-1, labels[..., None])[..., 0].mean(-1)

    def _ids(self, text: str) -> list[int]:
        """Tokens with T5's end of sequence; special tokens in the text are text."""
        found: list[int] = self.parts.tokenizer(text, verbose=False).input_ids
        return found


def squared(image: Image.Image) -> Image.Image:
    """The picture in the middle of a square of CLIP's mean colour; it stays as it is where it is square."""
    if image.width == image.height:
        return image
    side = max(image.size)
    out = Image.new("RGB", (side, side), GROUND)
    out.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return out


def clip_flant5(request: LoadRequest) -> ClipFlanT5:
    """Load CLIP-FlanT5. `path`: the released folder (``config.json`` and weights).

    Options: ``tokenizer`` and ``tower`` for local folders of Flan-T5's tokenizer and of CLIP ViT-L/14-336 (whose weights are only
    read where the release has none of its own); by default the release's folder, then the hub. ``question``, ``answer``.
    """
    options = request.take(tokenizer=None, tower=None, question=VQA_QUESTION, answer="Yes")
    folder = local_weights(request, more=("*.bin", "*.model"))
    state, source = read_folder_state(folder, WEIGHT_FILES)
    state.pop("embed_tokens.weight", None)  # the same table by another name
    device, dtype = pick_device(request.device), pick_dtype(request.dtype, request.device)
    t5 = _t5({name: value for name, value in state.items() if not name.startswith(("vision_tower.", "mm_projector."))},
             read_json(folder / "config.json"), source, dtype)  # fmt: skip
    tower = _tower({name: value for name, value in state.items() if name.startswith("vision_tower.")}, source,
                   Path(options["tower"]) if options["tower"] else None, request)  # fmt: skip
    projector = nn.Sequential(
        nn.Linear(tower.config.hidden_size, t5.config.d_model), nn.GELU(), nn.Linear(t5.config.d_model, t5.config.d_model)
    )
    load_strictly(projector, {name.removeprefix("mm_projector."): value for name, value in state.items()
                              if name.startswith("mm_projector.")}, source)  # fmt: skip
    parts = [part.to(device, dtype).eval().requires_grad_(False) for part in (t5, tower, projector)]
    hashes = {f"{number}.{name}": value for number, part in enumerate(parts) for name, value in part.state_dict().items()}
    loaded = Parts(t5=parts[0], tower=parts[1], projector=parts[2], identity=fingerprint(hashes),
                   tokenizer=_tokenizer(Path(options["tokenizer"]) if options["tokenizer"] else folder, request))  # fmt: skip
    card = replace(request.card, preprocess=f"llava_pad{tower.config.image_size}")
    return ClipFlanT5(card, loaded, question=options["question"], said=options["answer"])


def _t5(state: dict[str, Tensor], config: dict[str, Any], source: Path, dtype: torch.dtype) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    known = {name: value for name, value in config.items() if not name.startswith("mm_") and name not in ("model_type", "dtype")}
    shared = state.get("shared.weight")
    if shared is None:
        raise ModelError(f"{source} is no CLIP-FlanT5: it has no tensor shared.weight")
    known["vocab_size"] = len(shared)
    with torch.device("meta"):  # eleven billion numbers are not drawn only to be thrown away
        made = T5ForConditionalGeneration(T5Config(**known))
    # transformers 5 declares the output layer tied whatever the file says; Flan-T5 has one of its own.
    tied = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    for name in [*tied, *(["lm_head.weight"] if config.get("tie_word_embeddings", True) else [])]:
        if not torch.equal(state.setdefault(name, shared), shared):
            raise ModelError(f"{source}: {name} and shared.weight are one table in T5, and differ here")
    load_strictly(made, {name: value.to(dtype) for name, value in state.items()}, source, assign=True)
    made.set_input_embeddings(made.shared)
    return made


def _tower(state: dict[str, Tensor], source: Path, folder: Path | None, request: LoadRequest) -> Any:
    """The release's own tower, or the published CLIP's where the release has none."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    if not state:
        card = replace(request.card, weights="openai/clip-vit-large-patch14-336", weights_file="", revision="")
        place = folder or local_weights(replace(request, path=None, revision=None, card=card))
        return CLIPVisionModel.from_pretrained(place, use_safetensors=True, local_files_only=True)
    config = CLIPVisionConfig.from_pretrained(folder) if folder is not None else CLIPVisionConfig(**L14_336)
    made = CLIPVisionModel(config)
    wanted = made.state_dict()
    # Releases of transformers differ in whether the tower is called vision_model, and older ones stored the positions' numbers.
    own = {name.removeprefix(TOWER): value.float() for name, value in state.items() if not name.endswith(".position_ids")}
    if not any(name.startswith("vision_model.") for name in wanted):
        own = {name.removeprefix("vision_model."): value for name, value in own.items()}
    load_strictly(made, own, source)
    return made


def _tokenizer(folder: Path, request: LoadRequest) -> Any:
    from transformers import T5TokenizerFast

    if any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        place: str | Path = folder
    else:
        size = re.search(r"xxl|xl", request.name)
        place = f"google/flan-t5-{size[0] if size else 'xl'}"
    try:
        found = T5TokenizerFast.from_pretrained(place, local_files_only=request.local_files_only or isinstance(place, Path))
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RewardError(
            f"reward '{request.name}': no tokenizer of Flan-T5 ({first}); with a local one: tokenizer='/folder'"
        ) from error
    found.backend_tokenizer.encode_special_tokens = True
    return found
