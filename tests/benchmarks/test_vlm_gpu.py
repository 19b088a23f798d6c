"""FLOPs of the GPU timing against a count of the real operators; a side that fails is a line of the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import vlm_gpu
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from vlm_flops import Shape, pair_flops

SMALL = ["--device", "cpu", "--scale-down", "16", "--pixels", "112", "--pairs", "1", "--seconds", "0", "--repeats", "1"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> vlm_gpu.Bench:
    return vlm_gpu.Bench(vlm_gpu.parse(SMALL), tmp_path_factory.mktemp("gpu"))


def test_linear_flops_are_those_of_the_operators(bench: vlm_gpu.Bench) -> None:
    """Forward of the two whole sequences: all but attention is equal, and attention counts half of a kernel's square."""
    side: Any = bench.make("two sequences")
    batch = side.batches[0]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        side._scores(batch)
    shape, prefix, lengths = bench.shape, bench.prefixes[0], bench.lengths[0]
    longest = max(lengths)
    own = shape.answers(prefix, lengths, shared=False, gradient=False) + 2 * shape.encode(bench.patches[0])
    width = prefix + longest
    padded = shape.answers(prefix, (longest, longest), shared=False, gradient=False) - own + 2 * shape.encode(bench.patches[0])
    squares = 4 * shape.width * shape.layers * (width * width - width)  # 2 x (T^2 - T (T + 1) / 2)
    adapters = sum(2 * value.numel() * 2 * width for name, value in side.policy.named_parameters() if "lora_" in name)
    assert counter.get_total_flops() == pytest.approx(own + padded + squares + adapters, rel=0.01)


def test_shared_counts_are_smaller_by_hand() -> None:
    """One layer, one head of size 1: a prompt of 10 with answers of 2 and 3."""
    shape = Shape(language=7, layers=1, width=1, head=5, vision=0, merger=0, vision_width=0, full_blocks=0, window_blocks=0,
                  window=1, merge=1)  # fmt: skip
    forward = 2 * 7 * 15 + 2 * 5 * 5 + 4 * (55 + (20 + 3) + (30 + 6))
    assert shape.answers(10, (2, 3), shared=True, gradient=False) == forward
    assert shape.answers(10, (2, 3), shared=False, gradient=False) == 2 * 7 * 25 + 2 * 5 * 5 + 4 * (78 + 91)
    backward = 2 * 7 * 15 + 2 * 5 * 5 + 8 * (55 + 23 + 36)
    assert pair_flops(shape, patches=4, prefix=10, lengths=(2, 3), shared=True, encodes=1) == 2 * forward + backward


def test_sides_start_from_one_loss_and_a_failing_one_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make = vlm_gpu.Bench.make

    def broken(self: vlm_gpu.Bench, name: str) -> Any:
        if name == "ours, flex":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(self, name)

    monkeypatch.setattr(vlm_gpu.Bench, "make", broken)
    out = tmp_path / "out.json"
    assert vlm_gpu.main([*SMALL, "--minutes", "30", "--skip", "TRL", "ours, kept", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "out of memory: CUDA out of memory" in text and out.exists()
    rows = __import__("json").loads(out.read_text())["sides"]
    losses = [rows[name]["first_loss"] for name in ("ours", "ours, cached", "two sequences")]
    assert max(losses) - min(losses) < 1e-5 and abs(losses[0] - 0.693147) > 1e-5
    assert rows["ours"]["flops"] < rows["two sequences"]["flops"] and rows["ours, cached"]["flops"] < rows["ours"]["flops"]
