"""Asking a language model without eyes: for judges that compare texts, given a reference.

It is shown no picture. A judge of answers about pictures that cannot see them can compare with a reference and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from mmalign.errors import ModelError
from mmalign.rewards.hub import load_speaker, pick_device
from mmalign.rewards.vlm import Question


def has_eyes(source: str) -> bool:
    """Whether transformers would load the folder or hub id as a model of pictures and text.

    Raises:
        ModelError: no readable config.json.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    try:
        settings = AutoConfig.from_pretrained(source, local_files_only=Path(source).is_dir())
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read the configuration of the judge '{source}': {str(error).splitlines()[0]}") from error
    return settings.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


class LocalLlm:
    """A causal language model with its tokenizer and chat template; one user turn in, a greedy reply out.

    Args:
        source: local folder or hub id; safetensors only.
        device, dtype: as for every reward.
    """

    def __init__(
        self, source: str, *, device: str | None, dtype: str | None, revision: str | None, local_files_only: bool
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.source = source
        self.device = pick_device(device)
        self.tokenizer, self.model = load_speaker(
            "language model", source, AutoTokenizer, AutoModelForCausalLM, device=device, dtype=dtype, revision=revision,
            local_files_only=local_files_only,
        )  # fmt: skip
        if self.tokenizer.chat_template is None:
            raise ModelError(f"the language model '{source}' has no chat template, which turns a question into a prompt")

    def reply(self, questions: Sequence[Question], *, max_tokens: int) -> list[str]:
        """Greedy replies; rows of equal length run together, so that no padding can change one."""
        rows = [self._ids(question.text) for question in questions]
        groups: dict[int, list[int]] = {}
        for number, ids in enumerate(rows):
            groups.setdefault(len(ids), []).append(number)
        out = [""] * len(rows)
        for length, members in groups.items():
            inputs = torch.tensor([rows[number] for number in members], device=self.device)
            with torch.inference_mode():
                made = self.model.generate(
                    input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_tokens, do_sample=False,
                    pad_token_id=self._pad,
                )  # fmt: skip
            texts = self.tokenizer.batch_decode(made[:, length:], skip_special_tokens=True)
            for number, text in zip(members, texts, strict=True):
                out[number] = str(text)
        return out

    @property
    def _pad(self) -> int | None:
        found = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if found is None else found  # type: ignore[no-any-return]

    def _ids(self, text: str) -> list[int]:
        turn = [{"role": "user", "content": text}]
        rendered = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(rendered, add_special_tokens=False).input_ids)
