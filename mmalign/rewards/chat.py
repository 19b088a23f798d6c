"""Models that answer text with text: a local folder through transformers, or an OpenAI-compatible endpoint."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmalign.errors import ModelError, RewardError
from mmalign.rewards.api import KEY, ApiVlm, Said
from mmalign.rewards.hub import pick_device, pick_dtype
from mmalign.rewards.replies import Reply
from mmalign.rewards.vlm import Question


class LocalChat:
    """Any model with a chat template that transformers loads for text, also one that could see pictures.

    Args:
        source: local folder or hub id; weights are read from safetensors alone.
        device, dtype: as for every reward.
        batch_size: prompts answered at a time.

    Raises:
        ModelError: it cannot be loaded, or has no chat template.
    """

    def __init__(self, source: str, *, device: str | None = None, dtype: str | None = None, batch_size: int = 8) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

        self.source, self.batch_size = source, batch_size
        self.device = pick_device(device)
        options: dict[str, Any] = {"local_files_only": Path(source).is_dir()}
        weights: dict[str, Any] = {**options, "dtype": pick_dtype(dtype, device), "use_safetensors": True}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source, **options)
            try:
                self.model = AutoModelForCausalLM.from_pretrained(source, **weights)
            except ValueError:  # a class of models with eyes
                self.model = AutoModelForImageTextToText.from_pretrained(source, **weights)
        except (OSError, ValueError, ImportError, KeyError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelError(f"cannot load the chat model '{source}': {first}") from error
        if not self.tokenizer.chat_template:
            raise ModelError(f"'{source}' has no chat template; name an instruction-tuned model, or add chat_template.jinja")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.to(self.device).eval().requires_grad_(False)

    def identity(self) -> Mapping[str, Any]:
        """See ``replies.Chat``."""
        source = Path(self.source)
        return {"model": str(source.resolve()) if source.is_dir() else self.source, "dtype": str(self.model.dtype)}

    def ask(self, prompts: Sequence[str], *, max_tokens: int, keep: Callable[[int, Reply], None]) -> None:
        """Greedy replies, the longest prompts first so that memory runs out at once or not at all."""
        texts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
        order = sorted(range(len(texts)), key=lambda at: -len(texts[at]))
        for begin in range(0, len(order), self.batch_size):
            rows = order[begin : begin + self.batch_size]
            for row, reply in zip(rows, self._answers([texts[row] for row in rows], max_tokens), strict=True):
                keep(row, reply)

    def _answers(self, texts: Sequence[str], max_tokens: int) -> list[Reply]:
        import torch

        inputs = self.tokenizer(
            list(texts), return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False,
            return_token_type_ids=False,
        ).to(self.device)  # fmt: skip
        with torch.inference_mode():
            made = self.model.generate(
                **inputs, max_new_tokens=max_tokens, do_sample=False, pad_token_id=self.tokenizer.pad_token_id
            )
        fresh = made[:, inputs["input_ids"].shape[1] :]
        stops = self.model.generation_config.eos_token_id
        ends = set(stops if isinstance(stops, list) else [stops, self.tokenizer.eos_token_id])
        replies = []
        for row in fresh.tolist():
            is_cut = len(row) >= max_tokens and not ends & set(row)
            replies.append(Reply(text=self.tokenizer.decode(row, skip_special_tokens=True), cut=is_cut))
        return replies


class EndpointChat:
    """A model behind ``POST {url}/chat/completions`` (``api.ApiVlm``), several questions at once.

    When a question has got no answer after all repetitions, no further ones are sent: those under way are waited for and kept,
    and the run ends with a message, to be started again when the server is well.
    """

    def __init__(self, vlm: ApiVlm) -> None:
        self.vlm = vlm

    def identity(self) -> Mapping[str, Any]:
        """See ``replies.Chat``."""
        return {"url": self.vlm.url, "model": self.vlm.model, "temperature": 0}

    def ask(self, prompts: Sequence[str], *, max_tokens: int, keep: Callable[[int, Reply], None]) -> None:
        """Raises:
        RewardError: the server refuses the caller, or some questions got no answer.
        """
        stop = threading.Event()
        failed: list[str] = []

        def one(number: int) -> None:
            if stop.is_set():
                return
            try:
                said = self.vlm.ask_one(Question(images=(), text=prompts[number]), max_tokens=max_tokens)
            except RewardError:
                stop.set()
                raise
            if said.is_final:
                keep(number, _reply(said))
            else:
                failed.append(f"{said.error} in {said.attempts} attempts")
                stop.set()

        with ThreadPoolExecutor(self.vlm.concurrency) as pool:
            for found in [pool.submit(one, number) for number in range(len(prompts))]:
                found.result()
        if failed:
            raise RewardError(
                f"{self.vlm.url} left questions without an answer ({failed[0]}); what was answered is kept, and the same "
                "command asks only the rest"
            )


def _reply(said: Said) -> Reply:
    return Reply(text=said.text, cut=said.cut, error=said.error)


def endpoint(argument: str, *, timeout: float, retries: int, concurrency: int, key_env: str = KEY) -> EndpointChat:
    """The chat model of ``URL#MODEL``. The key is read from the environment variable `key_env` and recorded nowhere.

    Raises:
        RewardError: no such address, or a variable that was named is not set.
    """
    url, _, model = argument.partition("#")
    if not url.startswith(("http://", "https://")) or not model:
        raise RewardError(f"'{argument}': name an endpoint as http://host:port/v1#model")
    if key_env != KEY and key_env not in os.environ:
        raise RewardError(f"the environment variable '{key_env}' for the endpoint's key is not set")
    key = os.environ.get(key_env, "")
    return EndpointChat(ApiVlm(url, model, timeout=timeout, retries=retries, concurrency=concurrency, key=key))
