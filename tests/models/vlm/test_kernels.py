"""The kernels without masks against a mask over all pairs; and weights cast without rounding the tables of positions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.errors import ModelError
from mmalign.models.vlm import forward, kernels
from mmalign.models.vlm.base import VlmFamily
from mmalign.models.vlm.kernels import Document, Plan, branches_attention, carrying, segments_attention
from mmalign.models.vlm.loading import cast_weights
from tests.fixtures.tiny_vlm import load

Folders = Callable[[str], Path]
Loaded = Callable[[str], VlmFamily]
CPU = torch.device("cpu")


def seen(rows: list[list[Document]], length: int) -> Tensor:
    """The rule written out token by token: ``[B, T, T]``, padding sees itself."""
    mask = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)
    for number, documents in enumerate(rows):
        for document in documents:
            prompt = range(document.start, document.start + document.prefix)
            spans, begin = [prompt], prompt.stop
            for size in document.branches:
                spans.append(range(begin, begin + size))
                begin += size
            for span in spans:
                for query in span:
                    for key in (*prompt, *span):
                        if key <= query:
                            mask[number, query, key] = True
    return mask


PLANS = {
    "one row": [[Document(0, 5, (2, 3, 1))]],
    "unequal rows": [[Document(0, 5, (2, 3))], [Document(0, 2, (6,))], [Document(0, 4, ())]],
    "packed": [[Document(0, 3, (2, 2)), Document(7, 2, (1, 3))], [Document(0, 6, (1,))]],
}


@pytest.mark.parametrize("name", PLANS)
def test_values_and_gradients_are_those_of_the_mask(name: str) -> None:
    rows = PLANS[name]
    length = 1 + max(row[-1].stop for row in rows)
    stream = torch.Generator().manual_seed(0)
    states = [torch.randn(len(rows), heads, length, 8, generator=stream).requires_grad_() for heads in (4, 2, 2)]
    found, _ = branches_attention(nn.Module(), *states, carrying(Plan(rows), CPU), scaling=0.3)
    key, value = (whole.repeat_interleave(2, dim=1) for whole in states[1:])
    wanted = F.scaled_dot_product_attention(states[0], key, value, attn_mask=seen(rows, length)[:, None], scale=0.3)
    real = torch.zeros(len(rows), length, dtype=torch.bool)
    for number, row in enumerate(rows):
        real[number, : row[-1].stop] = True
    torch.testing.assert_close(found[real], wanted.transpose(1, 2)[real])
    mixture = torch.randn(found.shape, generator=stream) * real[:, :, None, None]
    slopes = torch.autograd.grad((found * mixture).sum(), states)
    expected = torch.autograd.grad((wanted.transpose(1, 2) * mixture).sum(), states)
    for one, other in zip(slopes, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("lengths", [(4, 4, 4), (4, 1, 4, 3, 1), (7,)])
def test_segments_see_themselves_alone(lengths: tuple[int, ...]) -> None:
    stream = torch.Generator().manual_seed(0)
    states = [torch.randn(1, 2, sum(lengths), 8, generator=stream).requires_grad_() for _ in range(3)]
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    found, _ = segments_attention(nn.Module(), *states, None, cu_seq_lens_q=borders, scaling=0.3, is_causal=False)
    apart = zip(*(whole.split(lengths, 2) for whole in states), strict=True)
    pieces = [F.scaled_dot_product_attention(*parts, scale=0.3) for parts in apart]
    wanted = torch.cat(pieces, dim=2).transpose(1, 2)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), states), torch.autograd.grad(wanted.square().sum(), states), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_another_kernel_cannot_take_a_plan_for_a_mask() -> None:
    states = [torch.zeros(1, 2, 6, 8) for _ in range(3)]
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(*states, attn_mask=carrying(Plan([[Document(0, 4, (1, 1))]]), CPU))


def test_loaded_models_run_them_and_files_do_not_name_them(tiny_vlm_family: Loaded, tmp_path: Path) -> None:
    family = tiny_vlm_family("qwen2_5_vl")
    assert family.splits and family.text_config._attn_implementation == kernels.BRANCHES
    assert family.model_config.vision_config._attn_implementation == kernels.SEGMENTS
    family.save_full(family.network, tmp_path)
    assert "mmalign" not in (tmp_path / "config.json").read_text()


def test_rotary_tables_are_not_rounded_with_the_weights(tiny_vlm_folder: Folders) -> None:
    family = load("qwen2_5_vl", tiny_vlm_folder("qwen2_5_vl"), dtype="bf16")
    before = {name: value.clone() for name, value in family.network.named_buffers()}
    assert any("inv_freq" in name for name in before)
    cast_weights(family.network, torch.bfloat16)
    assert all(value.dtype == torch.bfloat16 for value in family.network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in family.network.named_buffers())


def test_a_forward_that_takes_no_features_is_refused(tiny_vlm_family: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older transformers would leave the argument out, and every picture with it, without a word."""

    class Old(nn.Module):
        def forward(self, input_ids: Tensor, **kwargs: object) -> Tensor:
            return input_ids

    assert forward.media_inputs(Old(), {}) == {}
    with pytest.raises(ModelError, match=r"Old of transformers .* takes no ready features.*transformers>=5.18"):
        forward.media_inputs(Old(), {"image": object()})
