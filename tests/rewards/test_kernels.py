"""The kernels between matrix products, run by Triton's interpreter on the CPU: the numbers of torch's own."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from mmalign.rewards import clip_net

triton = pytest.importorskip("triton")


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    """A copy of the module whose kernels are interpreted; the one that the package uses stays as it is."""
    found = importlib.util.find_spec("mmalign.rewards.kernels")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [7, 64, 80])
def test_a_layer_norm_is_torchs(kernels: ModuleType, dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(width)
    states, update = (torch.randn(2, 3, width, dtype=dtype) * 3 for _ in range(2))
    weight, bias = torch.randn(width, dtype=dtype), torch.randn(width, dtype=dtype)
    exact = F.layer_norm(states.double(), (width,), weight.double(), bias.double(), 1e-5)
    close = {"rtol": 0.01, "atol": 0.01} if dtype == torch.bfloat16 else {"rtol": 0.002, "atol": 0.002}
    torch.testing.assert_close(kernels.layer_norm(states, weight, bias, 1e-5).double(), exact, **close)
    total, normed = kernels.add_layer_norm(states, update, weight, bias, 1e-5)
    # The interpreter cuts what a GPU rounds to bfloat16.
    torch.testing.assert_close(total, states + update, rtol=2**-7 if dtype == torch.bfloat16 else 0.0, atol=0.0)
    exact = F.layer_norm(total.double(), (width,), weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(normed.double(), exact, **close)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])
def test_an_activation_is_exact_to_the_rounding_of_its_result(kernels: ModuleType, activation: str) -> None:
    values = torch.cat([torch.linspace(-12, 12, 5001), torch.tensor([0.0, -0.0, 1e-4, -1e4, 1e4])]).half()
    exact = clip_net._activate(values.double(), activation)
    found = kernels.activate_(values.clone(), activation)
    torch.testing.assert_close(found.double(), exact, rtol=2**-11, atol=3e-7)


def test_values_that_are_not_in_one_piece_are_refused(kernels: ModuleType) -> None:
    with pytest.raises(ValueError, match="contiguous"):
        kernels.activate_(torch.zeros(4, 4, dtype=torch.half).t(), "gelu")
    with pytest.raises(ValueError, match="8192"):
        wide = torch.zeros(1, 9000, dtype=torch.half)
        kernels.layer_norm(wide, wide[0], wide[0], 1e-5)
