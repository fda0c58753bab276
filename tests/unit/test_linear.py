"""`Float8Linear` against torchao's, bit for bit; which matmuls it does, and with what noise."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn as nn
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear as TorchaoLinear

from fp8dist import FastAccum, Float8Config, Float8Linear, hardware, linear
from fp8dist.numerics import Scaled
from tests.unit.linear_pair import (
    CONFIGS,
    DTYPES,
    K,
    N,
    check_bitwise,
    pair,
    plain_linear,
    run,
    seeded,
)


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


@pytest.mark.parametrize("name", ["rowwise", "tensorwise"])
def test_an_input_is_cast_once_and_for_grad_weight_if_that_is_wanted(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = pair(Float8Config(name))
    x, recipe, casts = seeded(4, K), Float8Config(name).recipe, []
    original = linear.kernels.quantize_both

    def noting(given: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        casts.append((tuple(given.shape), *args[:2]))
        return original(given, *args, **kwargs)

    monkeypatch.setattr(linear.kernels, "quantize_both", noting)
    ours(x)
    with torch.no_grad():
        ours(x)
    with torch.inference_mode():
        ours(x)
    weight, alone = ((N, K), recipe.weight, None), ((4, K), recipe.input, None)
    both = ((4, K), recipe.input, recipe.input_for_grad_weight)
    assert casts == [both, weight, alone, weight, alone, weight]
