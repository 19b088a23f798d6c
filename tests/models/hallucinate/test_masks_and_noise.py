"""Which tokens are hidden, and how much of a picture noise leaves; numbers by hand."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.models.hallucinate.masks import STRATEGIES, hidden_tokens, image_positions
from mmalign.models.hallucinate.noise import noisy_picture, noisy_record, signal
from mmalign.models.hallucinate.settings import BdhsSettings
from mmalign.models.vlm.base import VlmFamily
from mmalign.models.vlm.errors import VlmDataError
from tests.fixtures import tiny_vlm

Loaded = Callable[[str], VlmFamily]


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", list(tiny_vlm.VARIANTS))
def test_image_tokens_are_the_placeholders_and_no_mark_around_them(name: str, tiny_vlm_family: Loaded) -> None:
    """As many as the model has features for, and each with the placeholder's number."""
    family = tiny_vlm_family(name)
    example = family.encode(tiny_vlm.record("a", media=[tiny_vlm.picture(1), tiny_vlm.picture(2, (64, 30))]), training=False)
    prefix = example.rows[0].prefix
    found = image_positions(family, prefix)
    assert torch.equal(found, prefix == family.image_token_id)
    with torch.no_grad():
        features = family.vision_features(family.network, family.collate([example])).image
    assert int(found.sum()) == sum(len(unit) for unit in features)
    everything = hidden_tokens(family, prefix, 1.0, draw())
    assert torch.equal(everything, found) and not hidden_tokens(family, prefix, 0.0, draw()).any()


def test_strategies_hide_the_share_they_are_told(tiny_vlm_family: Loaded) -> None:
    rates = [STRATEGIES["random"](1000, 0.3, draw(seed)).sum() for seed in range(20)]
    assert 270 < np.mean(rates) < 330 and len(set(rates)) > 5
    assert STRATEGIES["exact"](10, 0.3, draw()).sum() == 3
    runs = [STRATEGIES["run"](10, 0.4, draw(seed)) for seed in range(30)]
    assert all(run.sum() == 4 for run in runs)
    assert all(np.abs(np.diff(run.astype(int), append=int(run[0]))).sum() == 2 for run in runs), "one stretch, round the end"
    assert len({run.tobytes() for run in runs}) > 5
    family = tiny_vlm_family("llava")
    prefix = family.encode(tiny_vlm.record(media=[tiny_vlm.picture(1)]), training=False).rows[0].prefix
    assert hidden_tokens(family, prefix, 0.5, draw(), strategy="exact").sum() == 8
    with pytest.raises(ValueError, match="share"):
        hidden_tokens(family, prefix, 1.5, draw())
    with pytest.raises(ValueError, match="unknown masking strategy"):
        hidden_tokens(family, prefix, 0.5, draw(), strategy="blocks")


def test_visible_tokens_are_a_rate_by_the_number_of_image_tokens() -> None:
    """0.99 of LLaVA-1.6's 2,880 leaves 29; where a model has fewer, the same number stays."""
    assert BdhsSettings().share(2880) == pytest.approx(1 - 29 / 2880) and BdhsSettings().share(20) == 0.0
    assert BdhsSettings(visible_tokens=6).share(576) == pytest.approx(0.98958333)
    assert BdhsSettings(rho=0.5).share(36) == 0.5 and BdhsSettings(visible_tokens=0).share(0) == 0.0


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"rho": 0.5, "visible_tokens": 3}, "not both"), ({"rho": 1.1}, "rho"), ({"visible_tokens": -1}, "visible"),
     ({"rounds": 0}, "rounds"), ({"noise_steps": 1000}, "noise_steps"), ({"max_similarity": 2.0}, "max_similarity"),
     ({"strategy": "blocks"}, "strategy")],
)  # fmt: skip
def test_settings_without_meaning_are_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BdhsSettings(**changed)  # type: ignore[arg-type]


def test_what_noise_leaves_is_that_of_the_released_schedule() -> None:
    assert signal(0) == 1.0
    assert signal(500) == pytest.approx(0.863, abs=5e-4)
    assert math.sqrt(1 - signal(500) ** 2) == pytest.approx(0.505, abs=5e-4)
    assert signal(300) == pytest.approx(0.99, abs=1e-2)
    with pytest.raises(ValueError, match="noise_steps"):
        signal(1000)


def test_noise_has_its_deviation_and_keeps_the_size() -> None:
    grey = Image.new("RGB", (64, 48), (128, 128, 128))
    made = np.asarray(noisy_picture(grey, 200, draw()), np.float64) / 255
    assert made.shape == (48, 64, 3)
    assert made.std() == pytest.approx(math.sqrt(1 - signal(200) ** 2), rel=0.05)
    assert made.mean() == pytest.approx(signal(200) * 128 / 255, abs=0.01)
    assert np.array_equal(np.asarray(noisy_picture(grey, 0, draw())), np.asarray(grey))
    white = np.asarray(noisy_picture(Image.new("RGB", (64, 48), (255, 255, 255)), 500, draw()))
    assert (white == 255).mean() > 0.2, "values beyond white are white; the released code lets them wrap round to black"


def test_a_record_under_noise_keeps_everything_but_its_pictures() -> None:
    record = tiny_vlm.record(media=[tiny_vlm.picture(1), tiny_vlm.clip(1, frames=2)])
    made = noisy_record(record, 500, draw())
    assert (made.id, made.messages, made.answers) == (record.id, record.messages, record.answers)
    picture, frames = made.media[0], made.media[1].frames  # type: ignore[union-attr]
    assert len(frames) == 2 and Image.open(io.BytesIO(picture.data)).size == (56, 40)  # type: ignore[arg-type]
    assert picture.data != record.media[0].data
    from mmalign.branches import VideoRef

    with pytest.raises(VlmDataError, match="not on files"):
        noisy_record(tiny_vlm.record(media=[VideoRef(path="clip.mp4")]), 500, draw())
    broken = tiny_vlm.record(media=[tiny_vlm.ImageRef(data=b"none")])
    with pytest.raises(VlmDataError, match="undecodable_media"):
        noisy_record(broken, 500, draw())
