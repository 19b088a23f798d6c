"""What is asked of vLLM, by a stand-in for the library with its signatures (0.33); the library itself is not installed here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign import rng
from mmalign.errors import ConfigError, MissingExtraError
from mmalign.models.adapters import attach_lora
from mmalign.models.vlm.vllm_engine import VllmGenerator, VllmOptions
from tests.fixtures import vllm_library
from tests.fixtures.tiny_vlm import clip, load, picture, record

Folders = Callable[[str], Path]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_library.install(monkeypatch)


SETTINGS: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0.7, "top_p": 0.9, "seed": 3, "step": 2, "samples": 2}


def test_questions_draws_and_the_adapter_of_the_step_are_sent(installed: None, tiny_vlm_folder: Folders) -> None:
    family = load("qwen2_5_vl", tiny_vlm_folder("qwen2_5_vl"))
    policy = attach_lora(family.network, rank=4, alpha=8, targets=family.lora_targets["language"], seed=0)
    made = VllmGenerator(family, VllmOptions(max_model_len=512))
    records = [record("a", media=[picture(1)]), record("b", media=[clip(1), picture(2)], prompt="And now?")]
    answers = made.generate(policy, records, **SETTINGS)
    word = [family.tokenizer.decode([40 + number]).strip() for number in range(3)]
    assert answers == [[word[0], word[1]], [word[2], word[0]]]  # what stands behind the end token is not read
    prompts, params, adapter, weights = made.engine(policy).asked[0]
    assert [len(prompt["multi_modal_data"].get("image", [])) for prompt in prompts] == [1, 1, 1, 1]
    frames, facts = prompts[2]["multi_modal_data"]["video"][0]
    assert frames.shape[0] == 4 and facts["fps"] == 1.0 and facts["frames_indices"] == [0, 1, 2, 3]
    ids = prompts[0]["prompt_token_ids"]
    assert ids.count(family.image_token_id) == 1  # one mark a picture; the engine expands it
    assert [item.seed for item in params] == [rng.key(3, "generate", 2, f"{name}#{k}") for name in "ab" for k in (0, 1)]
    assert params[0].temperature == 0.7 and params[0].max_tokens == 5
    assert set(params[0].logit_bias) == family.placeholder_ids and set(params[0].stop_token_ids) == family.end_ids
    assert adapter.lora_int_id == 1 and all(name.startswith("base_model.model.") for name in weights)
    with torch.no_grad():
        for name, value in policy.named_parameters():
            if "lora_B" in name:
                value.fill_(0.5)
    made.generate(policy, records[:1], **SETTINGS)
    _, _, later, moved = made.engine(policy).asked[1]
    assert later.lora_int_id == 2 and not Path(adapter.lora_path).exists()
    assert all(float(value.min()) == 0.5 for name, value in moved.items() if "lora_B" in name)
    engine = made.engine(policy)
    assert (engine.model, engine.dtype, engine.enable_lora, engine.max_lora_rank) == (family.config.path, "float32", True, 8)


def test_the_model_itself_answers_without_adapters(installed: None, tiny_vlm_folder: Folders) -> None:
    family = load("qwen2_5_vl", tiny_vlm_folder("qwen2_5_vl"), max_pixels=3136)
    made = VllmGenerator(family, VllmOptions(), adapters=False)
    said = made.generate(None, [record("a", media=[picture(1)])], **{**SETTINGS, "repetition_penalty": 1.05})
    (engine,) = vllm_library.MADE
    assert len(said) == 1 and len(said[0]) == 2
    assert not engine.enable_lora and engine.mm_processor_kwargs == {"max_pixels": 3136}
    _, params, adapter, _ = engine.asked[0]
    assert adapter is None and {item.repetition_penalty for item in params} == {1.05}
    assert made.answer(None, [], **SETTINGS) == [] and len(engine.asked) == 1


def test_tiles_that_the_engine_would_cut_otherwise_are_refused(installed: None, tiny_vlm_folder: Folders) -> None:
    family = load("internvl", tiny_vlm_folder("internvl"), image_splitting=False)
    with pytest.raises(ConfigError, match="remove model.image_splitting"):
        VllmGenerator(family, VllmOptions())


def test_full_fine_tuning_is_refused(installed: None, tiny_vlm_folder: Folders) -> None:
    family = load("llava", tiny_vlm_folder("llava"))
    with pytest.raises(ConfigError, match="use tuning.name: lora"):
        VllmGenerator(family, VllmOptions()).generate(family.network, [record("a", media=[picture(1)])], **SETTINGS)


def test_without_the_library_the_extra_is_named(tiny_vlm_folder: Folders) -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    with pytest.raises(MissingExtraError, match=r"generator: vllm needs .*mmalign\[vllm\]"):
        VllmGenerator(load("llava", tiny_vlm_folder("llava")), VllmOptions())
