"""Asking any vision-language model that transformers can load: next-token probabilities and short replies.

Rows are batched only with rows of equal token length, so no padding exists that could change an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmalign.errors import RewardError
from mmalign.rewards.hub import load_speaker, pick_device


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Pictures, then text, as one user turn."""

    images: tuple[Image.Image, ...]
    text: str


class LocalVlm:
    """A model with its own processor and chat template.

    Args:
        source: local folder or hub id.
        device, dtype: as for every reward.
    """

    def __init__(
        self, source: str, *, device: str | None, dtype: str | None, revision: str | None, local_files_only: bool
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.source = source
        self.device = pick_device(device)
        self.processor, self.model = load_speaker(
            "vision-language model", source, AutoProcessor, AutoModelForImageTextToText, device=device, dtype=dtype,
            revision=revision, local_files_only=local_files_only,
        )  # fmt: skip
        self.tokenizer = self.processor.tokenizer

    def answer_ids(self, answer: str) -> list[int]:
        """The tokens of an answer as they follow the prompt; without special tokens."""
        ids = self.tokenizer(answer, add_special_tokens=False).input_ids
        if not ids:
            raise RewardError(f"the answer {answer!r} has no tokens for '{self.source}'")
        return list(ids)

    def answer_log_probs(self, questions: Sequence[Question], answers: Sequence[str]) -> Tensor:
        """Mean log-probability per token of every answer after every question: float32 ``[n, answers]`` on the CPU.

        All answers of one token are read from a single forward.
        """
        ids = [self.answer_ids(answer) for answer in answers]
        single = [column for column, item in enumerate(ids) if len(item) == 1]
        out = torch.empty((len(questions), len(answers)))
        for rows, inputs in self._batches(questions):
            index = torch.tensor(rows)
            if single:
                final = self._logits(inputs, 1)[:, -1].float().log_softmax(-1).cpu()
                out[index[:, None], torch.tensor(single)[None]] = final[:, [ids[column][0] for column in single]]
            for column, item in enumerate(ids):
                if len(item) > 1:
                    logits = self._logits(self._extend(inputs, item), len(item) + 1)[:, :-1].float().log_softmax(-1)
                    target = torch.tensor(item, device=logits.device).expand(len(rows), -1)
                    out[index, column] = logits.gather(-1, target[..., None])[..., 0].mean(-1).cpu()
        return out

    def reply(self, questions: Sequence[Question], *, max_tokens: int) -> list[str]:
        """Greedy replies."""
        out = [""] * len(questions)
        for rows, inputs in self._batches(questions):
            with torch.inference_mode():
                made = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
            fresh = made[:, inputs["input_ids"].shape[1] :]
            for row, text in zip(rows, self.tokenizer.batch_decode(fresh, skip_special_tokens=True), strict=True):
                out[row] = str(text)
        return out

    def _logits(self, inputs: dict[str, Tensor], keep: int) -> Tensor:
        with torch.inference_mode():
            return self.model(**inputs).logits[:, -keep:]

    def _extend(self, inputs: dict[str, Tensor], ids: list[int]) -> dict[str, Tensor]:
        """The same inputs with the answer's tokens behind the prompt."""
        shape = inputs["input_ids"].shape
        out = dict(inputs)
        for name, value in inputs.items():
            if value.shape == shape:
                fill = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids))}.get(
                    name, torch.zeros(len(ids))
                )
                out[name] = torch.cat([value, fill.to(value).expand(shape[0], -1)], dim=1)
        return out

    def _batches(self, questions: Sequence[Question]) -> list[tuple[list[int], dict[str, Tensor]]]:
        """Rows with inputs of equal shapes, joined."""
        groups: dict[Any, list[tuple[int, dict[str, Tensor]]]] = {}
        for row, question in enumerate(questions):
            inputs = self._inputs(question)
            shapes = tuple((name, tuple(value.shape)) for name, value in sorted(inputs.items()))
            groups.setdefault(shapes, []).append((row, inputs))
        out = []
        for members in groups.values():
            joined = {name: torch.cat([inputs[name] for _, inputs in members]) for name in members[0][1]}
            out.append(([row for row, _ in members], {name: value.to(self.device) for name, value in joined.items()}))
        return out

    def _inputs(self, question: Question) -> dict[str, Tensor]:
        content: list[dict[str, str]] = [{"type": "image"} for _ in question.images]
        content.append({"type": "text", "text": question.text})
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        found = self.processor(text=[text], images=list(question.images), return_tensors="pt")
        dtype = self.model.dtype
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in found.items()}
