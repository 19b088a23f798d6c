"""Answers on a GPU: both layouts and every kernel against the CPU, the bfloat16 step, stored features, generation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.branches import BranchRecord
from mmalign.models.adapters import attach_lora
from mmalign.models.reference import AdapterOffReference
from mmalign.models.vlm.base import VlmFamily
from mmalign.models.vlm.layout import block_mask, build, dense_mask
from mmalign.models.vlm.loading import cast_weights
from mmalign.trainers.base import Parts
from mmalign.trainers.vlm_dpo import VlmDPO, VlmDPOConfig
from mmalign.types import StepContext
from tests.fixtures import tiny_vlm
from tests.fixtures.tiny_vlm import picture, record

pytestmark = pytest.mark.gpu
FAMILIES = ("llava", "qwen2_5_vl", "smolvlm", "internvl", "gemma3")
LONG = "there is nothing here, two green triangles and one yellow star on a grey ground"


def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


class Folders(dict[str, Path]):
    """Model folders, made when first asked for: a library that one processor needs must not stop the others."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, name: str) -> Path:
        if name == "smolvlm":
            pytest.importorskip("num2words", reason="SmolVLM's processor needs num2words: pip install 'mmalign[vlm]'")
        self[name] = tiny_vlm.build(name, self.root / name)
        return self[name]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("vlm-gpu"))


def items() -> list[BranchRecord]:
    return [
        record("0", media=[picture(1)], answers=("yes", LONG)),
        record("1", media=[picture(2, (64, 30)), picture(1)], answers=(LONG, "a red circle")),
    ]


def sums(family: VlmFamily, prefix: str) -> torch.Tensor:
    batch = family.collate([family.encode(item) for item in items()]).to(family.device)
    with torch.no_grad():
        return family.log_probs(family.network, batch, prefix=prefix).sum.cpu()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FAMILIES)
def test_both_layouts_agree_with_the_cpu(name: str, folders: dict[str, Path]) -> None:
    wanted = sums(tiny_vlm.load(name, folders[name]), "plain")
    family = tiny_vlm.load(name, folders[name], device=cuda())
    for prefix in ("shared", "plain"):
        torch.testing.assert_close(sums(family, prefix), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_packed_rows_and_eager_attention_agree(name: str, folders: dict[str, Path]) -> None:
    wanted = sums(tiny_vlm.load(name, folders[name], device=cuda()), "shared")
    for settings in ({"row_tokens": 4096}, {"attention": "eager"}):
        found = sums(tiny_vlm.load(name, folders[name], device=cuda(), **settings), "shared")
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def test_the_block_mask_is_the_dense_mask(folders: dict[str, Path]) -> None:
    """FlexAttention under the rule against PyTorch's attention under the mask, at a width that its kernels take."""
    from torch.nn.attention.flex_attention import flex_attention

    family = tiny_vlm.load("llava", folders["llava"], device=cuda())
    batch = family.collate([family.encode(item) for item in items()]).to(cuda())
    layout = build(batch, "shared", multiple=128)
    rows, length = layout.document.shape
    stream = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(rows, 2, length, 32, generator=stream).to(cuda()) for _ in range(3))
    mask: Any = block_mask(layout)
    found = flex_attention(query, key, value, block_mask=mask)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense_mask(layout))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def step(family: VlmFamily, policy: Any) -> tuple[float, torch.Tensor]:
    trainer = VlmDPO.build(
        VlmDPOConfig(beta=0.1), Parts(family=family, policy=policy, reference=AdapterOffReference(policy), steps=4)
    )
    batch = family.collate([family.encode(item) for item in items()])
    out = trainer.training_step(batch, StepContext(step=0, seed=0, device=family.device))
    out.loss.backward()
    grads = [value.grad.float().flatten().cpu() for value in policy.parameters() if value.grad is not None]
    return float(out.loss.detach()), torch.cat(grads)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_fresh_adapter_gives_log_2(name: str, dtype: str, folders: dict[str, Path]) -> None:
    family = tiny_vlm.load(name, folders[name], device=cuda(), dtype=dtype, gradient_checkpointing=True)
    cast_weights(family.network, family.dtype)
    policy = attach_lora(family.network, rank=4, alpha=8, targets=family.lora_targets["language"], seed=0).train()
    loss, slope = step(family, policy)
    assert loss == pytest.approx(math.log(2), abs=1e-5) and torch.isfinite(slope).all() and slope.norm() > 0


def test_a_step_agrees_with_the_cpu(folders: dict[str, Path]) -> None:
    found = []
    for device in (torch.device("cpu"), cuda()):
        family = tiny_vlm.load("qwen2_5_vl", folders["qwen2_5_vl"], device=device)
        policy = attach_lora(family.network, rank=4, alpha=8, targets=family.lora_targets["language"], seed=0)
        stream = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for value in policy.parameters():
                if value.requires_grad:
                    value.add_(0.1 * torch.randn(value.shape, generator=stream).to(device))
        found.append(step(family, policy))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    assert (found[1][1] - found[0][1]).norm() <= 1e-3 * found[0][1].norm()


def test_rotary_tables_stay_in_float32(folders: dict[str, Path]) -> None:
    family = tiny_vlm.load("qwen2_5_vl", folders["qwen2_5_vl"], device=cuda(), dtype="bf16")
    cast_weights(family.network, torch.bfloat16)
    assert all(value.dtype == torch.float32 for name, value in family.network.named_buffers() if "inv_freq" in name)
    assert all(value.dtype == torch.bfloat16 for value in family.network.parameters())


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_greedy_answers_are_those_of_the_cpu(name: str, folders: dict[str, Path]) -> None:
    answers = []
    for device in (torch.device("cpu"), cuda()):
        family = tiny_vlm.load(name, folders[name], device=device)
        examples = [family.encode(item, training=False) for item in items()]
        answers.append(family.generate(family.network, examples, max_new_tokens=6, temperature=0.0))
    assert answers[0] == answers[1]
