"""Answers drawn from a model, adapters on and off, and what plain transformers and peft make of saved folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.errors import ModelError
from mmalign.models.adapters import attach_lora, lora_state
from mmalign.models.reference import AdapterOffReference
from mmalign.models.vlm import forward, generation
from mmalign.models.vlm.base import VlmFamily
from mmalign.models.vlm.generation import Prefill, Repetition, pick
from mmalign.models.vlm.idefics import SmolVLM
from mmalign.models.vlm.layout import build
from mmalign.objectives import get_objective
from mmalign.types import PairScores
from tests.fixtures.tiny_vlm import clip, load, picture, record

Loaded = Callable[[str], VlmFamily]
Folders = Callable[[str], Path]


def stepwise(family: VlmFamily, item: Any, count: int, given: Sequence[int] = ()) -> list[int]:
    """Greedy tokens behind a beginning by reading everything anew for every token, without cache or padding."""
    made: list[int] = []
    example = family.encode(item, training=False)
    row = example.rows[0]
    for _ in range(count):
        ids = torch.tensor([*given, *made, 0])
        start = family.next_position(row.positions)
        after = torch.arange(start, start + len(ids))
        positions = torch.cat([row.positions, after if row.positions.ndim == 1 else after.expand(3, -1)], -1)
        grown = replace(
            row, branches=(ids,), weights=(None,), answers=(0,), positions=positions,
            token_types=torch.cat([family.token_types(row.prefix), torch.zeros(len(ids), dtype=torch.int64)]),
        )  # fmt: skip
        with torch.no_grad():
            logits = last_logits(family, family.collate([replace(example, rows=(grown,), labels=(1.0,))]))
        logits[sorted(family.placeholder_ids)] = float("-inf")
        token = int(logits.argmax())
        if token in family.end_ids:
            break
        made.append(token)
    return made


def last_logits(family: VlmFamily, batch: Any) -> Tensor:
    """[V] logits that predict the last answer token."""
    layout = build(batch, "plain")
    vision = family.vision_features(family.network, batch)
    inputs = {"input_ids": layout.input_ids, "position_ids": layout.position_ids, "use_cache": False}
    inputs |= forward.attention_inputs(family, layout)
    if layout.images or layout.videos:
        inputs["mm_encoder_outputs"] = forward.encoder_outputs(family, vision, layout.images, layout.videos)
    return family.network(**inputs).logits[0, int(layout.columns[-1])].clone()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_cached_generation_equals_reading_everything_anew(name: str, tiny_vlm_family: Loaded) -> None:
    """Prompts of different lengths in one left-padded group; three-axis positions go on where the prompt ends."""
    family = tiny_vlm_family(name)
    items = [record("a", media=[picture(1)]), record("b", media=[picture(2, (64, 30)), picture(1)], prompt="Describe. What?")]
    if name.startswith("qwen"):
        items.append(record("c", media=[clip(1)]))
    texts = family.generate(
        family.network, [family.encode(item, training=False) for item in items], max_new_tokens=5, temperature=0
    )
    for item, found in zip(items, texts, strict=True):
        assert found == [family.tokenizer.decode(stepwise(family, item, 5), skip_special_tokens=True).strip()]


def test_a_sample_depends_on_its_own_stream_alone(tiny_vlm_family: Loaded) -> None:
    family = tiny_vlm_family("smolvlm")
    examples = [family.encode(record(str(n), media=[picture(n)] * (1 + n % 2)), training=False) for n in range(3)]
    settings = {"max_new_tokens": 6, "temperature": 1.0, "top_p": 0.9, "seed": 3}
    together = family.generate(family.network, examples, samples=3, batch_size=9, **settings)
    assert together == family.generate(family.network, examples, samples=3, batch_size=2, **settings)
    alone = [family.generate(family.network, [example], samples=1, **settings)[0][0] for example in examples]
    assert alone == [texts[0] for texts in together]
    assert len({text for texts in together for text in texts}) == 9
    assert together != family.generate(family.network, examples, samples=3, step=1, **settings)


def test_what_is_there_already_becomes_less_likely() -> None:
    """Token 0 in the prompt, token 3 drawn: 2 / 1.5 and -1 x 1.5; padding (token 1) does not count. As transformers has it."""
    from transformers import RepetitionPenaltyLogitsProcessor

    prompts = Prefill(
        input_ids=torch.tensor([[1, 0, 2]]), attention_mask=torch.tensor([[0, 1, 1]]), position_ids=torch.zeros(1, 3),
        types=torch.zeros(1, 3), next_position=torch.tensor([2]),
    )  # fmt: skip
    logits = torch.tensor([[2.0, 5.0, -3.0, -1.0]])
    found = Repetition.of(prompts, logits[:, None], torch.tensor([0, 0]), 1.5)
    assert found is not None and Repetition.of(prompts, logits[:, None], torch.tensor([0]), 1.0) is None
    found.add(torch.tensor([3, 1]))
    made = found.apply(logits.expand(2, -1))
    torch.testing.assert_close(made, torch.tensor([[2 / 1.5, 5.0, -4.5, -1.5], [2 / 1.5, 5 / 1.5, -4.5, -1.0]]))
    theirs = RepetitionPenaltyLogitsProcessor(1.5)
    assert torch.equal(made[:1], theirs(torch.tensor([[0, 2, 3]]), logits))


def test_a_repetition_penalty_reaches_generation(tiny_vlm_family: Loaded) -> None:
    """A large one: no token of the answer is in the prompt or comes twice, whatever else is in the batch."""
    family = tiny_vlm_family("llava")
    records = [record("a", media=[picture(1)]), record("b", media=[picture(2)], prompt="Describe. What is it then?")]
    examples = [family.encode(item, training=False) for item in records]
    how = {"max_new_tokens": 8, "temperature": 0.0, "repetition_penalty": 1e6}
    said: list[list[int]] = []
    keep = generation.text_of

    def kept(family: VlmFamily, ids: Any) -> str:
        said.append(list(ids))
        return keep(family, ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "text_of", kept)
        together = family.generate(family.network, examples, batch_size=2, **how)
    for example, ids in zip(sorted(examples, key=lambda item: len(item.rows[0].prefix)), said, strict=True):
        prompt = set(example.rows[0].prefix.tolist())
        assert len(ids) > 2 and len(set(ids)) == len(ids) and not prompt & set(ids)
    assert together == [family.generate(family.network, [example], **how)[0] for example in examples]
    assert together != family.generate(family.network, examples, max_new_tokens=8, temperature=0.0)
    with pytest.raises(ValueError, match="repetition_penalty must be positive"):
        family.generate(family.network, examples, max_new_tokens=8, repetition_penalty=0.0)


def test_tokens_are_drawn_with_their_probabilities() -> None:
    """p = (0.5, 0.3, 0.2): draws 0.49, 0.51, 0.81; with top_p 0.6 the third is out, and 0.81 of 0.8 is in the second."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(4, 3)
    draw = torch.tensor([0.49, 0.51, 0.81, 0.0], dtype=torch.float64)
    assert pick(logits, draw, temperature=1.0, top_p=1.0, never=frozenset()).tolist() == [0, 1, 2, 0]
    assert pick(logits, draw, temperature=1.0, top_p=0.6, never=frozenset()).tolist() == [0, 0, 1, 0]
    assert pick(logits, draw, temperature=1.0, top_p=1.0, never=frozenset({0})).tolist() == [1, 1, 2, 1]
    assert pick(logits, draw, temperature=0, top_p=1.0, never=frozenset({0})).tolist() == [1, 1, 1, 1]


@pytest.fixture
def adapted(tiny_vlm_folder: Folders) -> VlmFamily:
    """Qwen2.5-VL with a moved adapter on its language model."""
    family = load("qwen2_5_vl", tiny_vlm_folder("qwen2_5_vl"))
    attach_lora(family.network, rank=2, alpha=4.0, targets=family.lora_targets["language"])
    with torch.no_grad():
        for name, value in family.network.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return family


def items() -> list[Any]:
    return [record("a", media=[picture(1)]), record("b", media=[picture(1), picture(2, (64, 30))], answers=["yes", "no", "a"])]


@pytest.mark.parametrize("prefix", ["shared", "plain"])
def test_adapters_off_is_the_base_and_shares_its_features(prefix: Any, adapted: VlmFamily, tiny_vlm_family: Loaded) -> None:
    base = tiny_vlm_family("qwen2_5_vl")
    batch = adapted.collate([adapted.encode(item) for item in items()])
    assert adapted.shares_vision(adapted.network)
    vision = adapted.vision_features(adapted.network, batch)
    assert not any(value.requires_grad for value in vision.image)
    reference = AdapterOffReference(adapted.network)
    found = reference(lambda module: adapted.log_probs(module, batch, prefix=prefix, vision=vision).sum)
    with torch.no_grad():
        wanted = base.log_probs(base.network, batch, prefix=prefix).sum
        moved = adapted.log_probs(adapted.network, batch, prefix=prefix, vision=vision).sum
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-5)
    assert (moved - wanted).abs().max() > 0.1


def test_adapters_get_equal_gradients_from_both_layouts(adapted: VlmFamily) -> None:
    adapted.network.train()
    batch = adapted.collate([adapted.encode(item) for item in items()])
    slopes = []
    for prefix in ("shared", "plain"):
        adapted.network.zero_grad()
        found = adapted.log_probs(adapted.network, batch, prefix=prefix)  # type: ignore[arg-type]
        (found.sum * torch.linspace(-1, 1, len(found.sum))).sum().backward()
        slopes.append(torch.cat([p.grad.flatten() for p in adapted.network.parameters() if p.grad is not None]))
    assert len(slopes[0]) == sum(p.numel() for p in adapted.network.parameters() if p.requires_grad)
    assert (slopes[0] - slopes[1]).norm() <= 1e-5 * slopes[1].norm()


def test_features_are_not_shared_where_the_tower_learns(tiny_vlm_folder: Folders) -> None:
    family = load("llava", tiny_vlm_folder("llava"))
    family.network.requires_grad_(True)
    assert not family.shares_vision(family.network)
    assert family.shares_vision(family.freeze_vision(family.network))
    assert family.network.lm_head.weight.requires_grad
    attach_lora(family.network, rank=2, alpha=2.0, targets=family.lora_targets["all"])
    assert not family.shares_vision(family.network)


def test_named_layers_leave_the_tower_alone(tiny_vlm_family: Loaded) -> None:
    for name in ("llava", "qwen2_5_vl", "smolvlm", "internvl", "gemma3"):
        family = tiny_vlm_family(name)
        sets = family.lora_targets
        assert set(sets["attention"]) < set(sets["language"]) < set(sets["all"])
        towers = {id(m) for part in family.parts()["vision"] for m in part.modules()}  # type: ignore[union-attr]
        own = dict(family.network.named_modules())
        assert not any(id(own[layer]) in towers for layer in sets["language"])
        assert any(id(own[layer]) in towers for layer in sets["all"])


def test_peft_reads_the_adapter_and_answers_identically(adapted: VlmFamily, tiny_vlm_folder: Folders, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    targets = list(adapted.lora_targets["language"])
    adapted.save_lora(lora_state(adapted.network), tmp_path, {"r": 2, "lora_alpha": 4.0, "target_modules": targets})
    plain = AutoModelForImageTextToText.from_pretrained(tiny_vlm_folder("qwen2_5_vl"))
    model = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    processor = AutoProcessor.from_pretrained(tiny_vlm_folder("qwen2_5_vl"))
    row = adapted.encode(record(media=[picture(1)]), training=False).rows[0]
    unit = dict(row.units[0].tensors)
    inputs = {
        "input_ids": row.prefix[None], "attention_mask": torch.ones_like(row.prefix)[None], "pixel_values": unit["pixel_values"],
        "image_grid_thw": unit["image_grid_thw"][None], "mm_token_type_ids": adapted.token_types(row.prefix)[None],
    }  # fmt: skip
    made = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, len(row.prefix) :].tolist()
    wanted = processor.tokenizer.decode([n for n in made if n not in adapted.end_ids], skip_special_tokens=True).strip()
    example = adapted.encode(record(media=[picture(1)]), training=False)
    assert adapted.generate(adapted.network, [example], max_new_tokens=6, temperature=0) == [[wanted]]


def test_a_saved_folder_holds_the_merged_model_and_its_processor(adapted: VlmFamily, tmp_path: Path) -> None:
    adapted.save_full(adapted.network, tmp_path)
    again = load("qwen2_5_vl", tmp_path)
    batch = adapted.collate([adapted.encode(item) for item in items()])
    with torch.no_grad():
        one, other = adapted.log_probs(adapted.network, batch).sum, again.log_probs(again.network, batch).sum
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-4)
    assert again.fingerprint("processor") == adapted.fingerprint("processor")
    assert again.fingerprint("vision") == adapted.fingerprint("vision")
    assert again.fingerprint("network") != load("qwen2_5_vl", Path(adapted.config.path)).fingerprint("network")


def test_the_default_name_picks_the_family_of_the_folder(tiny_vlm_folder: Folders) -> None:
    family = load("smolvlm", tiny_vlm_folder("smolvlm"), name="vlm")
    assert isinstance(family, SmolVLM)


def test_a_template_beside_the_tokenizer_is_found(tiny_vlm_folder: Folders, tiny_vlm_family: Loaded, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(tiny_vlm_folder("llava"), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = (folder / "chat_template.jinja").read_text()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").unlink()
    found, wanted = (made.encode(record(media=[picture(1)])) for made in (load("llava", folder), tiny_vlm_family("llava")))
    assert torch.equal(found.rows[0].prefix, wanted.rows[0].prefix)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"nothing"), "cannot load weights"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template"),
        (lambda folder: (folder / "config.json").write_text("{}"), "cannot load config.json"),
    ],
)
def test_broken_folders_are_named(
    spoil: Callable[[Path], object], message: str, tiny_vlm_folder: Folders, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_vlm_folder("llava"), folder)
    spoil(folder)
    with pytest.raises(ModelError, match=message):
        load("llava", folder)


def test_a_folder_of_another_family_is_named(tiny_vlm_folder: Folders) -> None:
    with pytest.raises(ModelError, match="use model.name: smolvlm"):
        load("llava", tiny_vlm_folder("smolvlm"))


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_a_fresh_adapter_has_a_margin_of_zero(name: str, tiny_vlm_folder: Folders) -> None:
    """Policy in training mode against adapters off in evaluation mode: DPO starts at log 2."""
    family = load(name, tiny_vlm_folder(name))
    attach_lora(family.network, rank=2, alpha=4.0, targets=family.lora_targets["language"])
    policy = family.network.train()
    batch = family.collate([family.encode(record(str(n), media=[picture(n)])) for n in range(2)])
    chosen, rejected = batch.pair(family.log_probs(policy, batch).sum)
    base = batch.pair(AdapterOffReference(policy)(lambda module: family.log_probs(module, batch).sum))
    scores = PairScores(
        policy_chosen=chosen, policy_rejected=rejected, reference_chosen=base[0], reference_rejected=base[1]
    )
    losses = get_objective("dpo")(scores, beta=0.1)
    assert losses.tolist() == pytest.approx([0.6931472] * 2, abs=1e-6)
