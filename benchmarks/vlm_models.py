"""Random vision-language models in their real classes, and pairs of answers about random pictures, for timing.

The tokenizer is trained here on made-up words, so nothing is downloaded; the embedding has the vocabulary of the released
models all the same, because the output layer's cost belongs to the step.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmalign.branches import Answer, BranchRecord, Message, Part
from mmalign.types import ImageRef

TEMPLATE = (
    "{%% for message in messages %%}<|im_start|>{{ message['role'] }}\n{%% for part in message['content'] %%}"
    "{%% if part['type'] == 'image' %%}%s{%% else %%}{{ part['text'] }}{%% endif %%}{%% endfor %%}<|im_end|>\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
)
QUESTION = "What is in the picture, where does it stand, and what is around it?"


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A model to time and the pictures it sees."""

    name: str
    build: Callable[[Path, int], Path]
    pixels: int
    """Width and height of a picture."""
    checkpointing: bool
    batch: int
    """Pairs per step."""


def words(count: int) -> list[str]:
    """Made-up words of two syllables."""
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    return [f"{a}{b}" for a in syllables for b in syllables][:count]


@cache
def _raw_tokenizer() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=5000, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([" " + " ".join(words(3000)), QUESTION, "user assistant"] * 3, trainer)
    return str(made.to_str())


def _tokenizer(special: Sequence[str], **named: str) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer.from_str(_raw_tokenizer())
    raw.add_special_tokens(["<pad>", "<|im_start|>", "<|im_end|>", *special])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<pad>", extra_special_tokens=named,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_llava(folder: Path, scale_down: int) -> Path:
    """LLaVA-1.5's parts at small widths: CLIP at 336 px (576 placeholders), two-layer projector, Llama, 32,000 words."""
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer = _tokenizer(["<image>"], image_token="<image>")
    side = {"height": 336, "width": 336}
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=side), tokenizer, patch_size=14,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=TEMPLATE % "<image>\n",
    )  # fmt: skip
    width = 256 // scale_down
    vision = {
        "model_type": "clip_vision_model", "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 6,
        "num_attention_heads": 4, "image_size": 336, "patch_size": 14,
    }  # fmt: skip
    text = {
        "model_type": "llama", "hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 32_000 // scale_down,
        "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    text["vocab_size"] = max(text["vocab_size"], len(tokenizer))
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2, image_seq_length=576,
    )  # fmt: skip
    return _save(folder, LlavaForConditionalGeneration(config), processor)


def build_qwen(folder: Path, scale_down: int) -> Path:
    """Qwen2.5-VL-3B's own proportions with random weights; pictures of 2128 px become 5,776 placeholders."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    config, processor = qwen_parts(scale_down)
    return _save(folder, Qwen2_5_VLForConditionalGeneration(config), processor)


def qwen_parts(scale_down: int) -> tuple[Any, Any]:
    """Configuration and processor of `build_qwen`, without weights."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = _tokenizer(
        names, image_token=names[2], video_token=names[3], vision_start_token=names[0], vision_end_token=names[1]
    )
    bounds = {"shortest_edge": 56 * 56, "longest_edge": 2128 * 2128}
    sizes = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "size": bounds}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**sizes), tokenizer, Qwen2VLVideoProcessor(**sizes),
        chat_template=TEMPLATE % "<|vision_start|><|image_pad|><|vision_end|>",
    )  # fmt: skip
    width, layers, depth = 2048 // scale_down, max(2, 36 // scale_down), max(2, 32 // scale_down)
    vision = {
        "depth": depth, "hidden_size": 1280 // scale_down, "intermediate_size": 3420 // scale_down,
        "num_heads": max(1, 16 // scale_down),
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": width, "window_size": 112,
        "fullatt_block_indexes": [number for number in (7, 15, 23, 31) if number < depth] or [depth - 1],
        "tokens_per_second": 2,
    }  # fmt: skip
    head = width // 16
    text = {
        "hidden_size": width, "intermediate_size": 11_008 // scale_down, "num_hidden_layers": layers,
        "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": max(151_936 // scale_down, len(tokenizer)),
        "max_position_embeddings": 32_768, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6,
                            "mrope_section": [head // 8, head * 3 // 16, head // 2 - head // 8 - head * 3 // 16]},
    }  # fmt: skip
    numbers = tokenizer.convert_tokens_to_ids(list(names))
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, tie_word_embeddings=True, vision_start_token_id=numbers[0],
        vision_end_token_id=numbers[1], image_token_id=numbers[2], video_token_id=numbers[3],
    )  # fmt: skip
    return config, processor


def _save(folder: Path, model: Any, processor: Any) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


SPECS = {
    "llava-small": Spec(name="llava-small", build=build_llava, pixels=336, checkpointing=False, batch=2),
    "qwen2.5-vl-3b": Spec(name="qwen2.5-vl-3b", build=build_qwen, pixels=2128, checkpointing=True, batch=1),
}


def build(name: str, folder: Path, scale_down: int = 1) -> Path:
    """Save a model's folder with weights that depend on nothing but its name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SPECS[name].build(folder, scale_down)


def pairs(count: int, pixels: int, *, shortest: int = 64, longest: int = 128) -> list[BranchRecord]:
    """Pairs of answers of about `shortest` to `longest` tokens about distinct random pictures."""
    stream = np.random.default_rng(0)
    vocabulary = words(3000)
    made = []
    for number in range(count):
        coarse = stream.integers(0, 256, (pixels // 14, pixels // 14, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(coarse).resize((pixels, pixels), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
        answers = tuple(_answer(stream, vocabulary, shortest, longest) for _ in range(2))
        made.append(
            BranchRecord(
                id=f"pair-{number}", answers=answers, media=(ImageRef(data=out.getvalue(), label=f"picture {number}"),),
                messages=(Message(role="user", parts=(Part(media=0), Part(text=QUESTION))),),
            )
        )  # fmt: skip
    return made


def _answer(stream: np.random.Generator, vocabulary: Sequence[str], shortest: int, longest: int) -> Answer:
    from tokenizers import Tokenizer

    raw, wanted = Tokenizer.from_str(_raw_tokenizer()), int(stream.integers(shortest, longest - 4))
    text = str(stream.choice(vocabulary))
    while len(raw.encode(text).ids) < wanted:
        text += " " + str(stream.choice(vocabulary))
    return Answer(text=text)


def trl_rows(records: Sequence[BranchRecord]) -> list[dict[str, Any]]:
    """The same pairs as TRL's conversational rows."""
    rows = []
    for record in records:
        reference = record.media[0]
        data = reference.data if isinstance(reference, ImageRef) else None
        text = next(part.text for part in record.messages[0].parts if part.text is not None)
        chosen, rejected = ([{"role": "assistant", "content": answer.text}] for answer in record.answers)
        rows.append({
            "images": [Image.open(io.BytesIO(data or b"")).convert("RGB")],
            "prompt": [{"role": "user", "content": text}], "chosen": chosen, "rejected": rejected,
        })  # fmt: skip
    return rows
