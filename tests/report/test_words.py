"""How figures are told, and that the headline claims no more than its interval."""

from __future__ import annotations

import math

import pytest

from mmalign.report import words
from mmalign.report.figures import EvaluationFigures
from mmalign.statistics import Interval
from tests.report.test_warnings import comparison, evaluation


def interval(low: float, mean: float, high: float) -> Interval:
    return Interval(mean=mean, low=low, high=high, prompts=9)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.714, "71 %"), (0.996, "99.6 %"), (1.0, "100 %"), (0.0, "0 %"), (0.004, "0.4 %"), (math.nan, "–")],
)
def test_percent(value: float, text: str) -> None:
    assert words.percent(value).replace(words.NBSP, " ") == text


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [(0.64, 0.78, "64–78 %"), (0.935, 0.994, "93.5–99.4 %"), (0.98, 1.0, "98–100 %"), (0.0, 0.004, "0–0.4 %")],
)
def test_both_ends_of_a_range_have_as_many_decimals(low: float, high: float, text: str) -> None:
    assert words.percent_range(interval(low, 0.5, high)).replace(words.NBSP, " ") == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.49, "0.490"),
        (-0.00152, "−0.00152"),
        (12.345, "12.3"),
        (4800.0, "4,800"),
        (3e-5, "3e−5"),
        (0.0, "0"),
        (2.5e6, "2.5e6"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert words.number(value) == text


def test_a_difference_is_rounded_to_what_its_interval_supports() -> None:
    assert words.signed_interval(interval(0.0843, 0.161, 0.239)) == "+0.16 (+0.08 to +0.24)"
    assert words.signed_interval(interval(-25.2, 3.04, 31.0)) == "+3 (−25 to +31)"
    assert words.signed_interval(interval(0.0, 0.0, 0.0)) == "0"
    assert words.signed_interval(interval(0.0443, 0.04434, 0.04438)) == "+0.04434 (+0.04430 to +0.04438)"
    assert words.signed_interval(interval(-0.3, -0.01, 0.3)) == "−0.01 (−0.30 to +0.30)"


def test_duration_and_ticks() -> None:
    assert [words.duration(s).replace(words.NBSP, " ") for s in (0.4, 48, 200, 18_120)] == [
        "0.4 s", "48 s", "3 min 20 s", "5 h 02 min",
    ]  # fmt: skip
    assert [words.axis(v) for v in (0.25, -0.5, 2000, 1e-5, 0.0)] == ["0.25", "−0.5", "2,000", "1e−5", "0"]


def headline(rate: tuple[float, float, float]) -> str:
    return words.headline(evaluation(("holdout", comparison((0, 0, 0), rate, prompts=128)))).replace(words.NBSP, " ")


def test_headline_of_a_win() -> None:
    assert headline((0.64, 0.71, 0.78)) == (
        "The aligned model wins 71 % of 128 prompts against the base (95 % interval 64–78 %)."
    )


def test_headline_says_plainly_when_nothing_was_shown() -> None:
    assert headline((0.46, 0.54, 0.62)).startswith(
        "No improvement over the base was shown: the aligned model wins 54 %"
    )
    assert headline((0.5, 0.6, 0.7)).startswith("No improvement")
    assert headline((0.2, 0.3, 0.4)).startswith("The aligned model is worse than the base")
    assert words.headline(None) == "This run has no evaluation against the base yet."


def test_the_claim_rests_on_the_named_reward_else_on_a_judge_kept_apart() -> None:
    win = comparison((0, 0, 0), (0.6, 0.7, 0.8))
    figures = evaluation(("training", win), ("oracle", win), ("holdout", win))
    assert figures.headline().name == "holdout"  # type: ignore[union-attr]
    named = EvaluationFigures.from_dict({**figures.as_dict(), "headline": "training"})
    assert named.headline().name == "training"  # type: ignore[union-attr]
