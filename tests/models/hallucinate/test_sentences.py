"""Sentences by hand: where they end, what is swapped, where they may be cut."""

from __future__ import annotations

import re

import pytest

from mmalign.models.hallucinate.sentences import cut_places, sentence_end, split_sentences, swap_yes_no


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("A cat. A dog sits.", ["A cat.", "A dog sits."]),
        ("It is 3.5 m high. Dr. Who is there! Really?", ["It is 3.5 m high.", "Dr. Who is there!", "Really?"]),
        ("Option B. is right, e.g. this. Yes", ["Option B. is right, e.g. this.", "Yes"]),
        ('He said "stop." Then he left...  Gone', ['He said "stop."', "Then he left...", "Gone"]),
        ("First line\nsecond line. End", ["First line", "second line.", "End"]),
        ("猫がいる。犬もいる。", ["猫がいる。", "犬もいる。"]),
        ("  no mark at all  ", ["no mark at all"]),
        ("", []),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    assert [text[slice(*span)] for span in split_sentences(text)] == sentences


def test_an_end_is_not_guessed_while_a_digit_may_follow() -> None:
    assert sentence_end("A pole of 3.") is None
    assert sentence_end("A pole of 3.5 m") is None
    assert sentence_end(" A pole of 3. It") == len(" A pole of 3.")
    assert sentence_end("one\n") == 3
    assert sentence_end(". A") is None, "a mark with nothing before it ends nothing"


def test_yes_and_no_are_whole_words() -> None:
    """The published pattern has no word border."""
    assert swap_yes_no("Yes, there is.") == "No, there is."
    assert swap_yes_no("no it is not") == "yes it is not"
    assert swap_yes_no("NO!") == "YES!"
    for kept in ("Note that it is red.", "Nothing is there.", "Yesterday it rained.", "North is up.", "There is no cat."):
        assert swap_yes_no(kept) is None


def tokens_of(text: str, pattern: str) -> list[tuple[int, int]]:
    return [found.span() for found in re.finditer(pattern, text)]


def test_cuts_lie_in_front_of_words_and_never_behind_the_last() -> None:
    text = "A red circle. It glows."
    with_blank = tokens_of(text, r"\s?\w+|\.")  # A, " red", " circle", ".", " It", " glows", "."
    assert cut_places(text, (0, 13), with_blank) == [(0, 0), (1, 2), (2, 6)]
    assert cut_places(text, (14, 23), with_blank) == [(4, 14), (5, 17)]
    apart = tokens_of(text, r"\s|\w+|\.")  # white space is a token of its own
    assert cut_places(text, (14, 23), apart) == [(7, 14), (9, 17)]


def test_tokens_within_words_are_no_cuts_unless_there_are_no_words() -> None:
    text = "circles glow."
    pieces = [(0, 6), (6, 7), (7, 9), (9, 12), (12, 13)]  # circle s _g low .
    assert cut_places(text, (0, 13), pieces) == [(0, 0), (2, 8)]
    plain = "猫がいる。"
    assert cut_places(plain, (0, 5), [(0, 1), (1, 2), (2, 4), (4, 5)]) == [(0, 0), (1, 1), (2, 2), (3, 4)]


def test_white_space_that_the_template_puts_in_front_is_part_of_the_first_token() -> None:
    assert cut_places("A dog", (0, 5), [(-1, 1), (1, 5)]) == [(0, 0), (1, 2)]
