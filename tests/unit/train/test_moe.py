"""The mixture of experts against one token at a time, and the balance of loads."""

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from fp8dist.train.model import FLAVORS, FeedForward, ModelShape
from fp8dist.train.moe import MoE, MoEShape, Router, balance

DIM = 32
SHAPE = MoEShape(experts=4, top_k=2, hidden_dim=48)


def build(shape: MoEShape = SHAPE) -> MoE:
    torch.manual_seed(0)
    sizes = ModelShape(DIM, 1, 1, 1, shape.hidden_dim, 16)
    moe = MoE(DIM, shape, FeedForward(sizes))
    with torch.no_grad():
        for param in moe.parameters():
            nn.init.normal_(param, std=DIM**-0.5)
    return moe


def by_token(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    """Each token through its experts, in float64."""
    outputs = []
    weights = {name: param.double() for name, param in moe.named_parameters()}
    for token in x.double().flatten(0, 1):
        scores = (weights["router.weight"] @ token).sigmoid()
        best = (scores + moe.router.bias.double()).topk(moe.shape.top_k).indices
        output = moe.shared_expert.double()(token)
        for e in best:
            w1, w2, w3 = (weights[f"experts.w{i}"][e] for i in (1, 2, 3))
            expert = w2 @ (F.silu(w1 @ token) * (w3 @ token))
            output = output + scores[e] / scores[best].sum() * expert
        outputs.append(output)
    moe.float()
    return torch.stack(outputs).view_as(x)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_every_token_goes_through_its_experts(top_k: int) -> None:
    moe = build(MoEShape(experts=4, top_k=top_k, hidden_dim=48))
    moe.router.bias.copy_(torch.tensor([0.3, 0.0, -0.3, 0.0]))
    x = torch.randn(3, 5, DIM)
    # float32 sums of some 50 products: a few of its last bits (2^-24) of numbers up to 4.
    torch.testing.assert_close(moe(x).double(), by_token(moe, x), rtol=0, atol=5e-6)


def test_gradients_reach_the_router_and_the_chosen_experts() -> None:
    moe = build()
    moe.router.bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))  # the first two, always
    moe(torch.randn(2, 4, DIM)).square().sum().backward()
    for param in moe.experts.parameters():
        assert param.grad is not None
        assert param.grad[:2].count_nonzero() > 0
        assert param.grad[2:].count_nonzero() == 0
    assert moe.router.weight.grad is not None
    assert moe.router.weight.grad.count_nonzero() > 0


def test_the_bias_chooses_and_does_not_weigh() -> None:
    router = Router(DIM, SHAPE)
    nn.init.normal_(router.weight)
    x = torch.randn(6, DIM)
    router.bias.copy_(torch.tensor([0.0, 5.0, 0.0, 5.0]))
    weights, chosen = router(x)
    assert {1, 3} == set(chosen.flatten().tolist())
    scores = (x @ router.weight.t()).sigmoid().gather(1, chosen)
    torch.testing.assert_close(weights, scores / scores.sum(1, keepdim=True))


@pytest.fixture
def alone() -> object:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def test_loads_even_out(alone: object) -> None:
    """With a router that prefers one expert, the bias takes the preference away."""
    moe = build(MoEShape(experts=4, top_k=1, hidden_dim=48, bias_step=0.01))
    with torch.no_grad():
        moe.router.weight.mul_(0.1)
        moe.router.weight[2] += 1.0
    x = torch.randn(8, 32, DIM) + 0.1
    loads = []
    for _ in range(150):
        moe(x)
        assert moe.counts.sum() == 8 * 32
        loads.append(balance([moe]).item())
        assert moe.counts.count_nonzero() == 0
    assert loads[0] > 2.5
    assert max(loads[-5:]) < 1.5
    assert moe.router.bias[2] < 0


def test_load_of_the_busiest_expert(alone: object) -> None:
    layers = [build(), build()]
    layers[0].counts.copy_(torch.tensor([4.0, 2.0, 1.0, 1.0]))
    layers[1].counts.copy_(torch.tensor([2.0, 2.0, 2.0, 2.0]))
    assert balance(layers).item() == pytest.approx((2 + 1) / 2)
    step = SHAPE.bias_step
    assert layers[0].router.bias.tolist() == pytest.approx([-step, 0, step, step])
    assert layers[1].router.bias.tolist() == [0.0] * 4


def test_only_training_counts() -> None:
    moe = build().eval()
    moe(torch.randn(1, 4, DIM))
    assert moe.counts.count_nonzero() == 0


def test_buffers_are_float32_whatever_the_parameters_are() -> None:
    moe = build().to(torch.bfloat16)
    moe.reset_buffers()
    assert moe.router.bias.dtype == moe.counts.dtype == torch.float32
    assert list(moe.state_dict())[:2] == ["router.weight", "router.bias"]
    assert "counts" not in moe.state_dict()


def test_the_debug_flavor_is_a_mixture_of_experts_whose_sizes_float8_takes() -> None:
    shape = FLAVORS["debugmoe"]
    assert shape.moe is not None
    assert shape.dim % 32 == shape.moe.hidden_dim % 32 == 0
