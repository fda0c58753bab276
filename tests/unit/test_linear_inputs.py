"""Which inputs `Float8Linear` takes and refuses, and what it saves of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn

from fp8dist import Float8Config, Float8Linear, hardware
from fp8dist.linear import _Float8Matmul
from tests.unit.linear_pair import K, N, check_bitwise, pair, plain_linear, run, seeded


@pytest.mark.parametrize("kind", ["zeros", "wide", "outlier", "nan", "inf"])
def test_unusual_values_go_through_as_in_torchao(kind: str) -> None:
    ours, theirs = pair(bias=True)
    input = seeded(32, K, seed=3)
    if kind == "zeros":
        input.zero_()
    elif kind == "wide":
        input *= torch.exp2(torch.arange(32.0) - 16).view(-1, 1)
    else:
        input[3, 3] = {"outlier": 1e4, "nan": float("nan"), "inf": float("inf")}[kind]
    grad_output = seeded(32, N, seed=4)
    found = run(ours, input.requires_grad_(), grad_output)
    expected = run(theirs, input, grad_output)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "view",
    [
        lambda: seeded(K, 32).t(),
        lambda: seeded(32, 2 * K)[:, ::2],
        lambda: seeded(1, K).expand(32, K),
        lambda: seeded(4, 8, K).transpose(0, 1),
        lambda: seeded(32, K + 5)[:, 5:],
    ],
    ids=["transposed", "strided", "expanded", "permuted", "offset"],
)
def test_inputs_and_gradients_that_are_not_contiguous(view: Callable[[], torch.Tensor]) -> None:
    ours, theirs = pair()
    input = view()
    grad_output = seeded(N, *input.shape[:-1], seed=4).movedim(0, -1)
    assert not input.is_contiguous() and not grad_output.is_contiguous()
    found = run(ours, input.requires_grad_(), grad_output)
    expected = run(theirs, input.detach().contiguous().requires_grad_(), grad_output.contiguous())
    # The numbers that are multiplied are the same; the CPU's float32 matmul adds them in another
    # order when an operand is laid out differently. K = 64 terms: a few units in the last place.
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


# [Note: autocast] torchao's layer asks for the autocast of the GPU and its dtype, so that under CPU
# autocast it computes in the input's dtype and is no oracle. What autocast means is taken from
# nn.Linear instead: the layer computes as if its input were of the autocast dtype.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_autocast_is_a_cast_of_the_input(bias: bool, dtype: torch.dtype) -> None:
    ours, theirs = pair(bias=bias)
    input = seeded(2, 16, K, seed=3)
    grad_output = seeded(2, 16, N, seed=4, dtype=dtype)

    def forward(layer: nn.Module, *, autocast: bool) -> dict[str, Any]:
        leaf = input.clone().requires_grad_()
        layer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            output = layer(leaf if autocast else leaf.to(dtype))
        output.backward(grad_output)
        grad_bias = layer.bias.grad if bias else None
        return {
            "output": output.detach(),
            "grad_input": leaf.grad,
            "grad_weight": layer.weight.grad,
            "grad_bias": grad_bias,
        }

    found = forward(ours, autocast=True)
    assert found["output"].dtype == dtype
    assert found["grad_weight"].dtype == torch.float32
    check_bitwise(found, forward(theirs, autocast=False))


def test_disabled_autocast_changes_nothing() -> None:
    ours, _ = pair()
    input = seeded(32, K, seed=3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        assert ours(input).dtype == torch.float32


@pytest.mark.parametrize("leading", [(0,), (0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_an_empty_batch_does_what_nn_linear_does(leading: tuple[int, ...], bias: bool) -> None:
    """torchao's raises: it takes the max of no elements."""
    ours, _ = pair(bias=bias)
    input, grad_output = seeded(*leading, K).requires_grad_(), seeded(*leading, N)
    check_bitwise(run(ours, input, grad_output), run(plain_linear(bias), input, grad_output))


def saved_by(layer: nn.Module, input: torch.Tensor) -> list[torch.Tensor]:
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(input)
    return saved


@pytest.mark.parametrize("leading", [(32,), (2, 16)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_the_float8_input_is_saved_and_not_the_input(leading: tuple[int, ...], bias: bool) -> None:
    ours, _ = pair(bias=bias)
    input = seeded(*leading, K).requires_grad_()
    saved = saved_by(ours, input)
    of_input = [tensor for tensor in saved if tensor.numel() == input.numel()]
    assert [tensor.dtype for tensor in of_input] == [torch.float8_e4m3fn]
    # Beside it a scale, and the weight itself: no copy of it in any dtype.
    others = [tensor for tensor in saved if tensor.numel() not in (1, input.numel())]
    assert len(others) == 1
    assert others[0]._tensor.data_ptr() == ours.weight._tensor.data_ptr()


def test_the_input_may_be_overwritten_after_forward() -> None:
    """It is not saved, so that an in-place op after the layer (relu_) is allowed."""
    ours, _ = pair()
    input = seeded(32, K, seed=3)
    ours(input.clone()).sum().backward()
    expected = ours.weight.grad.clone()
    ours.zero_grad()
    output = ours(input)
    input.zero_()
    output.sum().backward()
    assert torch.equal(ours.weight.grad, expected)


@pytest.mark.parametrize("width", [K + 1, K + 16, 2 * K, K // 2])
def test_an_input_of_the_wrong_width_is_refused(width: int) -> None:
    """Also one that has as many elements as some number of rows of the right width."""
    ours, _ = pair()
    with pytest.raises((RuntimeError, ValueError)):
        ours(seeded(32, width))


def test_a_one_dimensional_input() -> None:
    ours, _ = pair()
    input = seeded(K, seed=3)
    output = ours(input)
    assert output.shape == (N,)
    assert torch.equal(output, ours(input.view(1, K))[0])


def test_emulation_is_decided_by_the_device_of_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def multiplies(device: torch.device, recipe: Any, emulate: bool) -> bool:
        asked.append((device.type, recipe.name, emulate))
        return False

    monkeypatch.setattr(hardware, "multiplies", multiplies)
    _Float8Matmul.apply(seeded(16, K), seeded(16, K), Float8Config(emulate=True), True)
    assert asked == [("cpu", "tensorwise", True)]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.complex64])
def test_an_input_that_cannot_be_cast_is_refused(dtype: torch.dtype) -> None:
    ours, _ = pair()
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        ours(torch.zeros(2, K, dtype=dtype))


@pytest.mark.parametrize("gather", [False, True])
def test_sizes_that_only_emulation_multiplies(gather: bool) -> None:
    """N is no multiple of the 16 that tokens are padded to."""
    config = Float8Config(emulate=True, enable_fsdp_float8_all_gather=gather)
    layer = Float8Linear.from_float(nn.Linear(16, 10), config)
    input = seeded(5, 16, seed=1).requires_grad_()
    layer(input).sum().backward()
    assert input.grad.shape == (5, 16) and layer.weight.grad.shape == (10, 16)
    exact = torch.ones(5, 10) @ layer.weight.detach()
    assert (input.grad - exact).norm() < 0.1 * exact.norm()  # e5m2 and e4m3: some 4 % of noise


def test_a_meta_device() -> None:
    layer = Float8Linear.from_float(nn.Linear(64, 48, device="meta"), Float8Config())
    assert layer(torch.empty(2, 3, 64, device="meta")).shape == (2, 3, 48)
