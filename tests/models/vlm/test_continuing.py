"""Going on from a draft with part of the picture hidden: against reading everything anew, and against the layers' own masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.branches import VisionFeatures
from mmalign.errors import ModelError
from mmalign.models.hallucinate.masks import image_positions
from mmalign.models.vlm import continuing, generation
from mmalign.models.vlm.base import VlmFamily
from mmalign.models.vlm.continuing import Draft, continue_answers
from tests.fixtures.tiny_vlm import VARIANTS, clip, load, picture, record
from tests.models.vlm.test_generation_and_files import stepwise

Loaded = Callable[[str], VlmFamily]
ANSWER = "a red circle and a blue square"


def items(name: str) -> list[Any]:
    """One picture, two pictures behind a longer question, and a clip where the family reads them."""
    found = [record("a", media=[picture(1)]), record("b", media=[picture(2, (64, 30)), picture(1)], prompt="Describe. What?")]
    return [*found, record("c", media=[clip(1)])] if VARIANTS[name].video else found


def drafts(family: VlmFamily, name: str, hide: Callable[[Tensor], Tensor], cuts: Sequence[int] = (0, 3, 7)) -> list[Draft]:
    given = family.tokenizer(ANSWER, add_special_tokens=False, return_tensors="pt").input_ids[0]
    made = []
    for number, item in enumerate(items(name)):
        example = family.encode(item, training=False)
        made.append(
            Draft(example=example, given=given, cuts=tuple(min(cut, len(given) - number) for cut in cuts),
                  names=tuple(f"{item.id}.{cut}" for cut in cuts), hide=hide(image_positions(family, example.rows[0].prefix)))
        )  # fmt: skip
    return made


@pytest.mark.parametrize("name", list(VARIANTS))
def test_nothing_hidden_goes_on_as_the_plain_model_does(name: str, tiny_vlm_family: Loaded) -> None:
    """Token for token at temperature 0, from several cuts, pictures and clips; equal for one row at a time and all at once."""
    family = tiny_vlm_family(name)
    asked = drafts(family, name, torch.zeros_like)
    wanted = [
        [stepwise(family, item, 4, draft.given[:cut].tolist()) for cut in draft.cuts]
        for item, draft in zip(items(name), asked, strict=True)
    ]
    for batch_size in (16, 2):
        found = continue_answers(
            family, family.network, asked, max_new_tokens=4, temperature=0, batch_size=batch_size
        )
        assert found == wanted
    unmasked = [replace(draft, hide=None) for draft in asked]
    assert continue_answers(family, family.network, unmasked, max_new_tokens=4, temperature=0) == wanted


@contextmanager
def seen_masks(family: VlmFamily) -> Iterator[list[Tensor]]:
    """The masks that every language layer is given, call by call."""
    kept: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        mask = kwargs.get("attention_mask")
        assert mask is not None and mask.ndim == 4, "a layer ran without a mask"
        kept.append(mask if mask.dtype == torch.bool else mask >= 0)

    language = family.parts()["language"][0]
    assert isinstance(language, torch.nn.Module)
    layers = [module for module in language.modules() if type(module).__name__.endswith("Attention")]
    assert len(layers) == family.text_config.num_hidden_layers
    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", list(VARIANTS))
def test_what_no_layer_looks_at_is_exactly_the_image_tokens(name: str, tiny_vlm_family: Loaded) -> None:
    """In the pass over the prompt and in every later step, in every layer: all placeholders hidden, and nothing else."""
    family = tiny_vlm_family(name)
    draft = drafts(family, name, lambda image: image, cuts=(2,))[-1]
    hidden = draft.hide
    assert hidden is not None and hidden.any() and not hidden.all()
    length = len(hidden) + 2
    with seen_masks(family) as masks:
        made = continue_answers(family, family.network, [draft], max_new_tokens=4, temperature=0)[0][0]
    layers = family.text_config.num_hidden_layers
    assert made and len(masks) >= layers * 2, "a prompt and at least one step after it"
    for number, mask in enumerate(masks):
        queries, keys = mask.shape[-2:]
        first = length - queries if number < layers else keys - 1
        for query in range(0 if number < layers else queries - 1, queries):
            place = query + first if number < layers else length + number // layers - 1
            window = keys if number >= layers else place + 1
            offset = place + 1 - window  # of the oldest key that a sliding layer has kept
            row = mask[0, 0, query, :window]
            for key, allowed in enumerate(row.tolist()):
                at = offset + key
                is_hidden = at < len(hidden) and bool(hidden[at])
                if is_hidden:
                    # A key that nobody sees may stand alone for itself, where a row would have no key at all.
                    assert not allowed or row.sum() == 0, f"layer {number % layers}: token {at} is seen from {place}"
                elif not _slides(family, number % layers):
                    assert allowed, f"layer {number % layers}: text token {at} is hidden from {place}"


def _slides(family: VlmFamily, layer: int) -> bool:
    values = family.text_config.to_dict()
    kinds = values.get("layer_types")
    return kinds[layer] == "sliding_attention" if kinds else values.get("sliding_window") is not None


def swapped(family: VlmFamily, hide: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., VisionFeatures]:
    """`vision_features` with the features of hidden (or visible) tokens replaced, deeper layers' as well."""
    original = generation.vision_features

    def made(own: Any, network: Any, media: Any) -> VisionFeatures:
        found = original(own, network, media)
        flat, place = hide, 0

        def spoil(features: Sequence[Tensor]) -> tuple[Tensor, ...]:
            nonlocal place
            out = []
            for unit in features:
                out.append(change(unit, flat[place : place + len(unit)]))
                place += len(unit)
            return tuple(out)

        return VisionFeatures(
            image=spoil(found.image), video=spoil(found.video),
            image_deep=tuple(tuple(change(layer, flat[: len(layer)]) for layer in unit) for unit in found.image_deep),
            video_deep=tuple(tuple(change(layer, flat[: len(layer)]) for layer in unit) for unit in found.video_deep),
        )  # fmt: skip

    return made


@pytest.mark.parametrize("name", list(VARIANTS))
def test_features_of_hidden_tokens_have_no_effect_and_those_of_visible_ones_do(
    name: str, tiny_vlm_family: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the tokens hidden: replacing their features changes nothing, to the last bit; replacing the others' does."""
    family = tiny_vlm_family(name)
    example = family.encode(record("a", media=[picture(1)]), training=False)
    image = image_positions(family, example.rows[0].prefix)
    hide = image & (torch.rand(len(image), generator=torch.Generator().manual_seed(1)) < 0.5)
    given = family.tokenizer(ANSWER, add_special_tokens=False, return_tensors="pt").input_ids[0]

    def logits() -> Tensor:
        draft = Draft(example=example, given=given, cuts=(0, 3, 5), names=("x", "y", "z"), hide=hide)
        with torch.no_grad():
            return continuing._begin(family, family.network, [draft]).logits

    plain = logits()
    noise = torch.Generator().manual_seed(2)
    units = image.nonzero()[:, 0]
    hidden = hide[units]
    # An answer's tokens are looked at as a whole: where a unit has fewer features than placeholders there is nothing to test.
    with monkeypatch.context() as patch:
        patch.setattr(generation, "vision_features", swapped(
            family, hidden, lambda f, h: torch.where(h[:, None], torch.randn(f.shape, generator=noise), f)))  # fmt: skip
        assert torch.equal(logits(), plain)
    with monkeypatch.context() as patch:
        patch.setattr(generation, "vision_features", swapped(
            family, hidden, lambda f, h: torch.where(h[:, None], f, torch.randn(f.shape, generator=noise))))  # fmt: skip
        assert (logits() - plain).abs().max() > 1e-4


def test_hidden_tokens_change_what_is_said(tiny_vlm_family: Loaded) -> None:
    family = tiny_vlm_family("llava")
    shown = drafts(family, "llava", torch.zeros_like)
    blind = drafts(family, "llava", lambda image: image)
    settings = {"max_new_tokens": 6, "temperature": 0}
    assert continue_answers(family, family.network, shown, **settings) != continue_answers(
        family, family.network, blind, **settings
    )


def test_a_continuation_depends_on_its_own_stream_alone(tiny_vlm_family: Loaded) -> None:
    family = tiny_vlm_family("smolvlm")
    asked = drafts(family, "smolvlm", lambda image: image)
    settings: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "top_p": 0.9, "seed": 3}
    together = continue_answers(family, family.network, asked, batch_size=16, **settings)
    assert together == continue_answers(family, family.network, asked, batch_size=2, **settings)
    alone = [
        continue_answers(family, family.network, [replace(draft, cuts=draft.cuts[n : n + 1], names=draft.names[n : n + 1])],
                         **settings)[0][0]
        for draft in asked for n in range(3)
    ]  # fmt: skip
    assert alone == [ids for made in together for ids in made]
    assert together != continue_answers(family, family.network, asked, batch_size=16, step=1, **settings)


def test_writing_stops_where_it_is_told_to(tiny_vlm_family: Loaded) -> None:
    family = tiny_vlm_family("llava")
    asked = drafts(family, "llava", torch.zeros_like)
    long = continue_answers(family, family.network, asked, max_new_tokens=6, temperature=0)
    short = continue_answers(family, family.network, asked, max_new_tokens=6, temperature=0, stop=lambda ids: len(ids) == 2)
    assert short == [[ids[:2] for ids in made] for made in long]
    assert family.network.training is False


def test_flash_attention_is_refused(tiny_vlm_family: Loaded) -> None:
    family = tiny_vlm_family("llava")
    blocked = family.with_limits()
    blocked.config = family.config.model_copy(update={"attention": "flash"})
    with pytest.raises(ModelError, match="cannot be hidden: flash"):
        continue_answers(blocked, family.network, drafts(family, "llava", torch.zeros_like), max_new_tokens=2)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_eager_attention_hides_as_well(name: str, tiny_vlm_folder: Callable[[str], Any], tiny_vlm_family: Loaded) -> None:
    eager = load(name, tiny_vlm_folder(name), attention="eager")
    blind = drafts(eager, name, lambda image: image)
    settings: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0}
    found = continue_answers(eager, eager.network, blind, **settings)
    assert found == continue_answers(tiny_vlm_family(name), tiny_vlm_family(name).network, blind, **settings)


def test_a_clip_has_image_tokens_in_every_family_that_reads_clips(tiny_vlm_family: Loaded) -> None:
    """LLaVA-OneVision stores the number of its clips' placeholder under an older name."""
    for name, variant in VARIANTS.items():
        if variant.video:
            family = tiny_vlm_family(name)
            prefix = family.encode(record("c", media=[clip(1)]), training=False).rows[0].prefix
            assert image_positions(family, prefix).sum() >= 4, name
            assert {int(token) for token in prefix[image_positions(family, prefix)]} <= family.placeholder_ids
