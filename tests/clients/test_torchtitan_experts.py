"""torchtitan 0.2.2's own experts, unchanged."""

import importlib.util
import sys
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch

import fp8dist
from fp8dist.experts import Float8ShardedExperts

# Not `importorskip`: torchtitan imports Triton, which a CPU has no use for.
if importlib.util.find_spec("torchtitan") is None:
    pytest.skip("needs torchtitan==0.2.2", allow_module_level=True)

EXPERTS, DIM, HIDDEN = 4, 64, 96


@pytest.fixture
def moe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that has them, without its kernels, which order tokens on a GPU."""
    kernels = "torchtitan.models.moe.kernels"
    monkeypatch.setitem(sys.modules, kernels, Mock(__spec__=None))
    from torchtitan.models.moe import moe

    monkeypatch.setattr(moe, "indices_padding_wrapper", lambda run_experts: run_experts)
    return moe


@pytest.mark.parametrize("recipe", ["rowwise", "mxfp8"])
def test_experts_compute_in_float8(recipe: str, moe: ModuleType) -> None:
    """In float8 their results are those of bfloat16 but for the noise of float8's 3 bits."""
    counts = torch.tensor([5, 0, 37, 16])
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(58, DIM, generator=generator) for _ in range(2))
    results = []
    for convert in (False, True):
        model = torch.nn.Module()
        model.experts = moe.GroupedExperts(DIM, HIDDEN, EXPERTS, use_grouped_mm=True)
        torch.manual_seed(0)
        with torch.no_grad():
            model.experts.init_weights(0.1)
        if convert:
            fp8dist.convert_moe_to_float8_training(model, config=recipe, fqns=["experts"])
            assert isinstance(model.experts.w1.data, Float8ShardedExperts)
        leaf = x.clone().requires_grad_()
        output = model.experts(leaf, counts)
        output.backward(grad)
        results.append([output.detach(), leaf.grad, *(p.grad for p in model.parameters())])
    for plain, float8 in zip(*results, strict=True):
        assert float8.dtype == plain.dtype and not float8.equal(plain)
        # As in tests/unit/test_experts.py: two roundings to 1 in 16 a product, three in a row.
        assert (plain - float8).norm() / plain.norm() < 0.12
