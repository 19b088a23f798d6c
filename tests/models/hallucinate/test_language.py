"""Words exchanged for others with the same neighbours."""

from __future__ import annotations

import numpy as np

from mmalign.models.hallucinate.language import WordSwaps

TEXTS = ["There is a red circle here.", "There is a blue circle here.", "A red star. There was a red square here."]


def test_a_word_is_exchanged_for_what_stands_there_elsewhere() -> None:
    swaps = WordSwaps(TEXTS)
    found = {swaps.spoil("There is a red circle here.", 0.01, np.random.default_rng(seed)) for seed in range(40)}
    # red: blue stands between a and circle. is: was stands between There and a. circle: square stands between red and here.
    assert found == {
        ("There is a blue circle here.", 1), ("There was a red circle here.", 1), ("There is a red square here.", 1)
    }  # fmt: skip


def test_neighbours_are_not_exchanged_both_and_case_is_kept() -> None:
    swaps = WordSwaps(TEXTS)
    for seed in range(20):
        text, count = swaps.spoil("There is a red circle here.", 1.0, np.random.default_rng(seed))
        assert count == 2 and text in ("There was a blue circle here.", "There was a red square here.")
    shouted = WordSwaps(["Red is it.", "Blue is it."]).spoil("Red is it.", 1.0, np.random.default_rng(0))
    assert shouted == ("Blue is it.", 1)


def test_a_text_without_chances_stays() -> None:
    assert WordSwaps(["one two"]).spoil("one two", 1.0, np.random.default_rng(0)) == ("one two", 0)
