"""`Float8Linear` against torchao's, and what it must do where torchao's does not work."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear as TorchaoLinear

from fp8dist import FastAccum, Float8Config, Float8Linear, hardware, linear
from fp8dist.linear import _Float8Matmul
from fp8dist.numerics import Scaled

K, N = 64, 48
DTYPES = [torch.float32, torch.bfloat16]
CONFIGS = {
    "float8 gather": Float8Config(),
    "high precision gather": Float8Config(enable_fsdp_float8_all_gather=False),
    "emulate": Float8Config(emulate=True),
    "rowwise": Float8Config("rowwise"),
    "rowwise_with_gw_hp": Float8Config("rowwise_with_gw_hp"),
}


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain_linear(bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(K, N, bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(seeded(N, K, seed=1) / 8)
        if bias:
            layer.bias.copy_(seeded(N, seed=2))
    return layer


def pair(
    config: Float8Config | None = None, bias: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[Float8Linear, nn.Module]:
    """The same layer here and in torchao."""
    config = config or Float8Config()
    theirs = dataclasses.replace(
        Float8LinearConfig.from_recipe_name(config.recipe_name),
        emulate=True,
        # torchao's rowwise_with_gw_hp does not round, here it must: see `fp8dist.config`.
        round_scales_to_power_of_2=config.recipe.scale_format == "power_of_2",
    )
    return (
        Float8Linear.from_float(plain_linear(bias, dtype), config),
        TorchaoLinear.from_float(plain_linear(bias, dtype), theirs),
    )


def run(
    layer: nn.Module, input: torch.Tensor, grad_output: torch.Tensor
) -> dict[str, torch.Tensor | None]:
    """Output and gradients of one forward and backward."""
    layer.zero_grad()
    input = input.detach().requires_grad_(input.requires_grad)
    output = layer(input)
    output.backward(grad_output)
    return {
        "output": output.detach(),
        "grad_input": input.grad,
        "grad_weight": layer.weight.grad,
        "grad_bias": layer.bias.grad if layer.bias is not None else None,
    }


def check_bitwise(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
            continue
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name
        assert type(found[name]) is torch.Tensor, name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("leading", [(32,), (7,), (1,), (2, 16), (3, 5), (2, 3, 4)], ids=str)
def test_is_bitwise_torchaos(
    leading: tuple[int, ...], bias: bool, dtype: torch.dtype, config: Float8Config
) -> None:
    ours, theirs = pair(config, bias, dtype)
    input = seeded(*leading, K, seed=3, dtype=dtype).requires_grad_()
    grad_output = seeded(*leading, N, seed=4, dtype=dtype)
    found, expected = run(ours, input, grad_output), run(theirs, input, grad_output)
    assert found["output"].shape == (*leading, N)
    check_bitwise(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "recipe, dtype",
    [
        ("tensorwise", torch.bfloat16),
        ("tensorwise", torch.float32),
        # Torchao's matmuls of these write bfloat16 only.
        ("rowwise", torch.bfloat16),
        ("rowwise_with_gw_hp", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("tokens", [256, 1024])
def test_is_bitwise_torchaos_on_float8_units(recipe: str, dtype: torch.dtype, tokens: int) -> None:
    """The same kernels of cuBLAS on the same bytes."""
    shape, device = (512, 1024), torch.device("cuda")
    config = Float8Config(recipe, enable_fsdp_float8_all_gather=False)
    if not hardware.has_matmul(device, config.recipe):
        pytest.skip("no float8 units")
    weight = (seeded(*shape, seed=1) / 8).to(device, dtype)
    ours, theirs = (
        nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=dtype) for _ in range(2)
    )
    for layer in (ours, theirs):
        layer.weight = nn.Parameter(weight.clone())
    torchao_config = dataclasses.replace(
        Float8LinearConfig.from_recipe_name(recipe),
        round_scales_to_power_of_2=config.recipe.scale_format == "power_of_2",
    )
    input = seeded(tokens, shape[1], seed=3).to(device, dtype).requires_grad_()
    grad_output = seeded(tokens, shape[0], seed=4).to(device, dtype)
    found = run(Float8Linear.from_float(ours, config), input, grad_output)
    expected = run(TorchaoLinear.from_float(theirs, torchao_config), input, grad_output)
    check_bitwise(found, expected)


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


def test_bias_is_added_in_the_dtype_of_the_output() -> None:
    """Mixed precision: bfloat16 activations meet a float32 bias."""
    ours, theirs = pair(bias=True)
    input = seeded(32, K, seed=3, dtype=torch.bfloat16).requires_grad_()
    grad_output = seeded(32, N, seed=4, dtype=torch.bfloat16)
    found = run(ours, input, grad_output)
    assert found["output"].dtype == torch.bfloat16
    check_bitwise(found, run(theirs, input, grad_output))


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_frozen_weight_gets_no_gradient(bias: bool) -> None:
    ours, theirs = pair(bias=bias)
    for layer in (ours, theirs):
        layer.weight.requires_grad_(False)
    input, grad_output = seeded(32, K, seed=3).requires_grad_(), seeded(32, N, seed=4)
    found = run(ours, input, grad_output)
    assert found["grad_weight"] is None
    check_bitwise(found, run(theirs, input, grad_output))


def test_an_input_that_needs_no_gradient_gets_none() -> None:
    ours, theirs = pair()
    input, grad_output = seeded(32, K, seed=3), seeded(32, N, seed=4)
    found = run(ours, input, grad_output)
    assert found["grad_input"] is None
    check_bitwise(found, run(theirs, input, grad_output))


@pytest.mark.parametrize(
    ("weight_needs_grad", "input_needs_grad", "expected"),
    [(True, True, 3), (False, True, 2), (True, False, 2), (False, False, 1)],
)
def test_matmuls_that_no_one_asked_for_are_not_done(
    monkeypatch: pytest.MonkeyPatch, weight_needs_grad: bool, input_needs_grad: bool, expected: int
) -> None:
    calls = []
    scaled_matmul = linear.scaled_matmul

    def counting(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(args)
        return scaled_matmul(*args, **kwargs)

    monkeypatch.setattr(linear, "scaled_matmul", counting)
    ours, _ = pair(bias=True)  # the bias makes the output need a gradient in every case
    ours.weight.requires_grad_(weight_needs_grad)
    ours(seeded(32, K).requires_grad_(input_needs_grad)).sum().backward()
    assert len(calls) == expected


def test_no_grad_saves_nothing_and_gives_the_same() -> None:
    ours, _ = pair()
    input = seeded(32, K, seed=3)
    with torch.no_grad():
        output = ours(input)
    assert not output.requires_grad
    assert torch.equal(output, ours(input))


@pytest.mark.parametrize("leading", [(0,), (0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_an_empty_batch_does_what_nn_linear_does(leading: tuple[int, ...], bias: bool) -> None:
    """torchao's raises: it takes the max of no elements."""
    ours, _ = pair(bias=bias)
    input, grad_output = seeded(*leading, K).requires_grad_(), seeded(*leading, N)
    check_bitwise(run(ours, input, grad_output), run(plain_linear(bias), input, grad_output))


def test_gradients_accumulate_over_microbatches() -> None:
    ours, theirs = pair()
    for layer in (ours, theirs):
        for seed in (3, 4, 5):
            layer(seeded(32, K, seed=seed)).backward(seeded(32, N, seed=seed + 10))
    assert torch.equal(ours.weight.grad, theirs.weight.grad)


def test_each_matmul_gets_its_dtypes_and_its_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def noting(a: Scaled, b: Scaled, dtype: Any, recipe: Any, **kwargs: Any) -> torch.Tensor:
        x, y = a.data, b.data
        calls.append((x.dtype, tuple(x.shape), y.dtype, tuple(y.shape), kwargs))
        return torch.zeros(x.size(0), y.size(0), dtype=dtype)

    monkeypatch.setattr(linear, "scaled_matmul", noting)
    fast = FastAccum(output=False, grad_input=True, grad_weight=False)
    ours, _ = pair(Float8Config(fast_accum=fast, emulate=True))
    ours(seeded(32, K).requires_grad_()).sum().backward()
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    assert calls == [
        (e4m3, (32, K), e4m3, (N, K), {"fast_accum": False, "emulate": True}),
        (e5m2, (32, N), e4m3, (K, N), {"fast_accum": True, "emulate": True}),
        (e5m2, (N, 32), e4m3, (K, 32), {"fast_accum": False, "emulate": True}),
    ]


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


def sqnr(exact: torch.Tensor, found: torch.Tensor) -> float:
    exact, found = exact.double(), found.double()
    return float(10 * torch.log10(exact.square().sum() / (found - exact).square().sum()))


def expected_sqnr(*mantissa_bits: int) -> float:
    """Of a product of operands rounded to so many mantissa bits, in dB.

    Rounding errors are spread evenly over one unit in the last place: variance
    2^(-2 mantissa_bits) / 12 for values in [1, 2), whose mean square is 3 / (2 ln 2) if their
    logarithms are spread evenly. Errors of the operands are independent and small: their relative
    powers add.
    """
    mean_square = 3 / (2 * torch.tensor(2.0).log())
    noise = sum(2.0 ** (-2 * bits) / 12 / mean_square for bits in mantissa_bits)
    return float(-10 * torch.log10(torch.as_tensor(noise)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_precision_is_that_of_the_float8_formats(dtype: torch.dtype) -> None:
    """Within 1 dB of the formats' own noise: more is a loss, less noise is no float8.

    1 dB is how far a normal distribution's logarithms are from evenly spread, with some to spare;
    one mantissa bit is 6 dB.
    """
    torch.manual_seed(0)
    layer = nn.Linear(256, 256, bias=False, dtype=dtype)
    nn.init.normal_(layer.weight)
    exact_layer = copy.deepcopy(layer).float()
    ours = Float8Linear.from_float(layer, Float8Config())
    input, grad_output = torch.randn(512, 256, dtype=dtype), torch.randn(512, 256, dtype=dtype)
    exact = run(exact_layer, input.float().requires_grad_(), grad_output.float())
    found = run(ours, input.requires_grad_(), grad_output)
    e4m3, e5m2 = 3, 2
    for name, bits in {
        "output": (e4m3, e4m3),
        "grad_input": (e5m2, e4m3),
        "grad_weight": (e5m2, e4m3),
    }.items():
        assert sqnr(exact[name], found[name]) == pytest.approx(expected_sqnr(*bits), abs=1.0), name


def test_repr_shows_the_recipe_and_a_gather_that_is_off() -> None:
    ours, _ = pair(bias=True)
    assert repr(ours) == (
        f"Float8Linear(in_features={K}, out_features={N}, bias=True, recipe=tensorwise)"
    )
    off, _ = pair(Float8Config(enable_fsdp_float8_all_gather=False))
    assert repr(off).endswith("recipe=tensorwise, float8_all_gather=False)")


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


def test_from_float_keeps_the_module_and_its_parameters() -> None:
    layer = plain_linear(bias=True)
    weight, bias = layer.weight, layer.bias
    ours = Float8Linear.from_float(layer, Float8Config())
    assert ours is layer
    assert ours.bias is bias
    assert ours.weight._tensor.data_ptr() == weight.data_ptr()


def test_a_second_derivative_is_refused() -> None:
    """grad_weight depends on the input, of which only float8 data is left: rather an error than
    the silent loss of that part of the gradient."""
    ours, _ = pair()
    input = seeded(32, K).requires_grad_()
    (grad,) = torch.autograd.grad(ours(input).square().sum(), ours.weight, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.square().sum().backward()


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


@pytest.mark.parametrize("name", ["rowwise", "tensorwise"])
def test_without_gradients_nothing_is_cast_for_grad_weight(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = pair(Float8Config(name))
    transposed = []
    original = linear.kernels.quantize_both

    def noting(x: torch.Tensor, block: Any, transposed_block: Any, *args: Any) -> Any:
        transposed.append(transposed_block)
        return original(x, block, transposed_block, *args)

    monkeypatch.setattr(linear.kernels, "quantize_both", noting)
    with torch.no_grad():
        ours(seeded(4, K))
    with torch.inference_mode():
        ours(seeded(4, K))
    assert set(transposed) == {None}


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
