"""ImageReward (arXiv:2304.05977): a cross-encoder of picture and prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmalign.errors import ModelError, RewardError
from mmalign.rewards.base import EncodingBackend, Texts
from mmalign.rewards.blip import BlipShape, ImageRewardNet
from mmalign.rewards.cards import Card
from mmalign.rewards.files import fingerprint, load_strictly, read_folder_state, read_json, read_state
from mmalign.rewards.hub import local_weights, pick_device, pick_dtype
from mmalign.rewards.layouts import standard_heads
from mmalign.rewards.preprocess import Preprocess
from mmalign.rewards.table import LoadRequest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw scores on the authors' data; printed scores are standardised with them."""
WEIGHT_FILES = ("ImageReward.safetensors", "model.safetensors", "ImageReward.pt")
# In the checkpoint but not in the score: contrastive projections, and a constant.
UNUSED = re.compile(r"^(vision_proj|text_proj)\.|embeddings\.position_ids$")


class ImageReward(EncodingBackend):
    """The picture is encoded once; each prompt attends to its states."""

    def __init__(self, card: Card, net: ImageRewardNet, tokenizer: Tokenizer, identity: str) -> None:
        self.card, self.net, self.tokenizer, self.identity = card, net, tokenizer, identity
        self.preprocess = Preprocess("blip_224", net.shape.image_size)
        self.device, self.dtype = net.visual_encoder.pos_embed.device, net.visual_encoder.pos_embed.dtype
        self.image_key = f"imagereward:{identity}:{self.dtype}"
        self.text_key = f"imagereward:{identity}:{tokenizer.encode_special_tokens}"

    def record(self) -> Mapping[str, Any]:
        return {"weights": self.identity, "dtype": str(self.dtype), "preprocess": self.preprocess.key}

    def encode_images(self, pixels: Tensor) -> Tensor:
        return self.net.visual_encoder(pixels)

    def encode_texts(self, prompts: Sequence[str]) -> Texts:
        bodies = [item.ids for item in self.tokenizer.encode_batch(list(prompts), add_special_tokens=False)]
        start, end, pad = (int(self.tokenizer.token_to_id(token) or 0) for token in ("[CLS]", "[SEP]", "[PAD]"))
        rows = [[start, *body[: MAX_TOKENS - 2], end] for body in bodies]
        ids = torch.full((len(rows), MAX_TOKENS), pad, dtype=torch.long)
        mask = torch.zeros((len(rows), MAX_TOKENS), dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row)], mask[index, : len(row)] = torch.tensor(row), 1
        truncated = torch.tensor([len(body) > MAX_TOKENS - 2 for body in bodies], dtype=torch.bool)
        placed = (ids.to(self.device, non_blocking=True), mask.to(self.device, non_blocking=True))
        return Texts(tensors=placed, truncated=truncated)

    def pair(self, images: Tensor, texts: Texts | None) -> Tensor:
        if texts is None:
            raise RewardError("imagereward needs a prompt")
        first = self.net.text_encoder(texts.tensors[0], texts.tensors[1], images)
        return (self.net.mlp(first.float()) - MEAN) / STD


def imagereward(request: LoadRequest) -> ImageReward:
    """Load ImageReward. `path`: a folder with the weights, ``med_config.json`` and BERT's ``vocab.txt``, or a file.

    Options: ``vision_heads`` for a ViT whose heads are not 64 wide, ``tokenizer`` for the folder with BERT's vocabulary,
    ``allow_special_tokens`` to let a literal ``[SEP]`` in a prompt act as the released code does.
    """
    options = request.take(vision_heads=None, tokenizer=None, allow_special_tokens=False)
    path = local_weights(request)
    folder = path if path.is_dir() else path.parent
    state, source = read_folder_state(path, WEIGHT_FILES) if path.is_dir() else (read_state(path), path)
    state = {name.removeprefix("blip."): value.float() for name, value in state.items()}
    state = {name: value for name, value in state.items() if not UNUSED.search(name)}
    config = read_json(folder / "med_config.json") if (folder / "med_config.json").is_file() else {}
    shape = _shape(state, config, options["vision_heads"], source)
    net = ImageRewardNet(shape)
    load_strictly(net, state, source)
    identity = fingerprint(net.state_dict())
    net.requires_grad_(False).eval().place(pick_device(request.device), pick_dtype(request.dtype, request.device))
    tokenizer = _bert_tokenizer(Path(options["tokenizer"]) if options["tokenizer"] else folder, request)
    # By default a literal [SEP] in a prompt is text, not the end of it.
    tokenizer.encode_special_tokens = not options["allow_special_tokens"]
    return ImageReward(replace(request.card, preprocess=f"blip_224:{shape.image_size}"), net, tokenizer, identity)


def _shape(state: Mapping[str, Tensor], config: Mapping[str, Any], vision_heads: int | None, source: Path) -> BlipShape:
    def depth(pattern: str) -> int:
        return 1 + max((int(match[1]) for name in state if (match := re.match(pattern, name))), default=-1)

    try:
        width, _, patch, _ = state["visual_encoder.patch_embed.proj.weight"].shape
        tokens = state["visual_encoder.pos_embed"].shape[1]
        vocabulary, text_width = state["text_encoder.embeddings.word_embeddings.weight"].shape
        return BlipShape(
            vision_width=width,
            vision_layers=depth(r"visual_encoder\.blocks\.(\d+)\."),
            vision_heads=vision_heads or standard_heads(width, source, "say vision_heads="),
            vision_mlp=state["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
            patch=patch,
            image_size=round((tokens - 1) ** 0.5) * patch,
            text_width=text_width,
            text_layers=depth(r"text_encoder\.encoder\.layer\.(\d+)\."),
            text_heads=config["num_attention_heads"]
            if "num_attention_heads" in config
            else standard_heads(text_width, source, "put med_config.json beside them"),
            text_mlp=state["text_encoder.encoder.layer.0.intermediate.dense.weight"].shape[0],
            vocabulary=vocabulary,
            positions=state["text_encoder.embeddings.position_embeddings.weight"].shape[0],
            text_eps=config.get("layer_norm_eps", 1e-12),
        )
    except KeyError as error:
        raise ModelError(f"{source} is not an ImageReward checkpoint: it has no tensor {error}") from error


def _bert_tokenizer(folder: Path, request: LoadRequest) -> Tokenizer:
    """BERT's lower-casing WordPiece tokenizer, from ``tokenizer.json`` or ``vocab.txt``, else from the hub."""
    from tokenizers import BertWordPieceTokenizer, Tokenizer

    for place in (folder, folder / "tokenizer", folder / "bert-base-uncased"):
        if (place / "tokenizer.json").is_file():
            found = Tokenizer.from_file(str(place / "tokenizer.json"))
            break
        if (place / "vocab.txt").is_file():
            found = _word_piece(BertWordPieceTokenizer(str(place / "vocab.txt"), lowercase=True))
            break
    else:
        card = replace(request.card, weights="google-bert/bert-base-uncased", weights_file="vocab.txt", revision="",
                       parameters_millions=0)  # fmt: skip
        vocabulary = local_weights(replace(request, path=None, revision=None, card=card))
        found = _word_piece(BertWordPieceTokenizer(str(vocabulary), lowercase=True))
    found.no_truncation()
    found.no_padding()
    missing = [token for token in ("[CLS]", "[SEP]", "[PAD]") if found.token_to_id(token) is None]
    if missing:
        raise ModelError(f"the tokenizer in {folder} is not BERT's: it has no {', '.join(missing)}")
    return found


def _word_piece(wrapper: Any) -> Tokenizer:
    return wrapper._tokenizer  # type: ignore[no-any-return]  # the library wraps it without a public accessor
