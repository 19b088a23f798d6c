"""Answers made up: what is kept, what is written anew, rounds, refusals, and that every draw belongs to its record."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign import assets
from mmalign.branches import BranchRecord
from mmalign.models.hallucinate.sampling import Generation, MadeUp, make_up
from mmalign.models.hallucinate.sentences import split_sentences
from mmalign.models.hallucinate.settings import BdhsSettings
from mmalign.models.hallucinate.similarity import WordSimilarity
from mmalign.models.vlm import VLM_FAMILIES
from mmalign.models.vlm.base import VlmFamily
from mmalign.world.scenes import draw_scene, render_board
from tests.fixtures import tiny_vlm

Loaded = Callable[[str], VlmFamily]
REFERENCE = "Yes, there is a red circle. No star is here. The ground is grey."


class Fixed:
    """A measure that says the same of all."""

    def __init__(self, value: float) -> None:
        self.name, self.value = "fixed", value

    def compare(self, first: Sequence[str], second: Sequence[str]) -> list[float]:
        return [self.value] * len(first)


def records(number: int) -> list[BranchRecord]:
    return [tiny_vlm.record(f"r{n}", media=[tiny_vlm.picture(n)] * (1 + n % 2)) for n in range(number)]


def run(
    family: VlmFamily, items: Sequence[BranchRecord], similarity: Any = None, references: Any = None, **settings: Any
) -> list[MadeUp]:
    drawn = {name: settings.pop(name) for name in ("temperature", "seed", "step", "batch_size") if name in settings}
    return make_up(
        family, family.network, items, references or [REFERENCE] * len(items),
        settings=BdhsSettings(**{"sentence_tokens": 16, **settings}),
        similarity=similarity or Fixed(0.0), generation=Generation(max_new_tokens=10, **drawn),
    )  # fmt: skip


@pytest.fixture(scope="module")
def board_model() -> VlmFamily:
    """The embedded model, which writes sentences."""
    family = VLM_FAMILIES.get("vlm")
    config = family.Config(name="vlm", path=str(assets.path("tiny-vlm")))  # type: ignore[attr-defined]
    return family.load(config, device=torch.device("cpu"))  # type: ignore[attr-defined,no-any-return]


def board(number: int, prompt: str = "Describe the picture.") -> BranchRecord:
    """A picture of the world that the embedded model knows."""
    draw = np.random.default_rng(number)
    buffer = io.BytesIO()
    Image.fromarray(render_board(draw_scene(draw), draw)).save(buffer, "PNG")
    return tiny_vlm.record(f"b{number}", media=[tiny_vlm.ImageRef(data=buffer.getvalue())], prompt=prompt)


def test_every_sentence_keeps_its_beginning_and_gets_a_new_end(board_model: VlmFamily) -> None:
    """Three sentences come back as three, each beginning with what was kept of it."""
    text = "There is a red circle at the top. There is a blue star on the left. The background is grey."
    for made in run(board_model, [board(number) for number in range(8)], references=[text] * 8, rho=0.3, swap_yes_no=0.0):
        assert made.reason == "" and made.guided and made.round == 1 and len(made.cuts) == 3
        old, new = ([t[slice(*span)] for span in split_sentences(t)] for t in (text, made.text))
        assert len(new) == 3, made.text
        for before, after, kept in zip(old, new, made.cuts, strict=True):
            assert kept < len(before) and after.startswith(before[:kept].rstrip()), (before, after, kept)
        assert made.image_tokens == 36 and 2 < made.hidden < 22


@pytest.mark.parametrize("name", list(tiny_vlm.VARIANTS))
def test_nothing_hidden_at_temperature_0_says_what_the_model_says(name: str, tiny_vlm_family: Loaded) -> None:
    """Unguided and with no beginning kept, rate 0 is the plain model, for every family."""
    family = tiny_vlm_family(name)
    items = records(2)
    found = run(family, items, rho=0.0, rounds=1, guided=False, temperature=0.0)
    plain = family.generate(
        family.network, [family.encode(item, training=False) for item in items], max_new_tokens=10, temperature=0
    )
    assert [made.text for made in found] == [texts[0] for texts in plain]
    assert all(made.hidden == 0 and made.image_tokens > 0 for made in found)


def test_the_models_own_answer_comes_back_and_gives_no_pair(board_model: VlmFamily) -> None:
    """Rate 0, temperature 0, cuts on token borders: the answer goes on as it went, in every round."""
    item = board(3)
    own = board_model.generate(
        board_model.network, [board_model.encode(item, training=False)], max_new_tokens=80, temperature=0
    )[0][0]
    assert len(split_sentences(own)) >= 3
    for rounds in (1, 3):
        settings = BdhsSettings(rho=0.0, rounds=rounds, swap_yes_no=0.0)
        (made,) = make_up(
            board_model, board_model.network, [item], [own], settings=settings, similarity=WordSimilarity(),
            generation=Generation(max_new_tokens=80, temperature=0.0),
        )  # fmt: skip
        assert (made.text, made.reason, made.round) == (own, "identical_responses", rounds)
        assert made.similarity == pytest.approx(1.0)


def test_the_last_of_several_rounds_is_not_guided(tiny_vlm_family: Loaded) -> None:
    family = tiny_vlm_family("llava")
    found = run(family, records(2), Fixed(1.0), rounds=3, rho=1.0)
    assert [(made.reason, made.round, made.guided, made.cuts) for made in found] == [("too_similar", 3, False, ())] * 2
    kept = run(family, records(2), Fixed(1.0), rounds=3, rho=1.0, keep_similar=True)
    assert [(made.reason, made.round, made.text) for made in kept] == [("", 3, made.text) for made in found]
    once = run(family, records(2), Fixed(1.0), rounds=1, rho=1.0, keep_similar=True)
    assert all(made.guided and made.cuts for made in once)


def test_an_answer_unlike_enough_ends_the_rounds(tiny_vlm_family: Loaded) -> None:
    family = tiny_vlm_family("llava")
    first = run(family, records(2), Fixed(0.5), rounds=5, rho=1.0)
    assert [made.round for made in first] == [1, 1]


def test_masks_and_cuts_are_drawn_anew_in_every_round(tiny_vlm_family: Loaded) -> None:
    class Counting(Fixed):
        seen: list[str]

        def compare(self, first: Sequence[str], second: Sequence[str]) -> list[float]:
            self.seen += first
            return super().compare(first, second)

    counting = Counting(1.0)
    counting.seen = []
    run(tiny_vlm_family("llava"), records(1), counting, rounds=4, rho=0.5)
    assert len(counting.seen) == len(set(counting.seen)) == 4


def test_leading_yes_and_no_are_swapped_with_their_probability(tiny_vlm_family: Loaded) -> None:
    family = tiny_vlm_family("llava")
    always = run(family, records(3), rho=1.0, swap_yes_no=1.0)
    assert all(made.swapped == (0, 1) for made in always)
    assert all(made.swapped == () for made in run(family, records(3), rho=1.0, swap_yes_no=0.0))
    for made in always:
        assert made.cuts[0] == 0 or made.text.startswith("No"[: made.cuts[0]])


def test_what_is_made_up_belongs_to_record_seed_and_step_alone(tiny_vlm_family: Loaded) -> None:
    family = tiny_vlm_family("smolvlm")
    items = records(3)
    together = run(family, items, rho=0.5, seed=4, batch_size=16)
    assert together == run(family, items, rho=0.5, seed=4, batch_size=2)
    assert [run(family, [item], rho=0.5, seed=4)[0] for item in items] == together
    assert [made.text for made in together] != [made.text for made in run(family, items, rho=0.5, seed=5)]
    assert [made.text for made in together] != [made.text for made in run(family, items, rho=0.5, seed=4, step=1)]


def test_a_picture_under_noise_is_what_the_model_sees(tiny_vlm_family: Loaded) -> None:
    family = tiny_vlm_family("llava")
    settings: dict[str, Any] = {"rho": 0.0, "rounds": 1, "guided": False, "temperature": 0.0}
    clear, noisy = run(family, records(2), **settings), run(family, records(2), noise_steps=900, **settings)
    assert [made.text for made in clear] != [made.text for made in noisy]


def test_records_that_cannot_be_read_are_named_and_the_others_are_made(tiny_vlm_family: Loaded) -> None:
    family = tiny_vlm_family("llava")
    broken = tiny_vlm.record("broken", media=[tiny_vlm.ImageRef(data=b"none")])
    found = run(family, [broken, *records(1)], rho=1.0)
    assert (found[0].reason, found[1].reason) == ("undecodable_media", "")
    blank = run(family, records(1), references=["   "], rho=1.0)
    assert blank[0].reason == "empty_answer"
