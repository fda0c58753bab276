"""Experts in float8 against one plain float8 layer per expert, and torchao's grouped autograd."""

from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import fp8dist
from fp8dist import FastAccum, Float8Config, experts, grouped_numerics, numerics
from fp8dist.config import RECIPES
from fp8dist.experts import Float8Experts, Float8ShardedExperts
from fp8dist.grouped_numerics import GROUP_MULTIPLE
from tests.unit.moe import (
    DIM,
    EXPERTS,
    HIDDEN,
    FusedExperts,
    StackedExperts,
    arrived,
    new_model,
    one_linear_per_expert,
    tokens,
)

RECIPE_NAMES = ["rowwise", "mxfp8_rceil"]
COUNTS = [
    [5, 0, 37, 16],  # not multiples of 16 or 32, and an expert without tokens
    [0, 0, 0, 50],  # one has all
    [32, 64, 32, 96],
]


def offsets(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0, dtype=torch.int32)


def float8_parameter(weight: torch.Tensor, recipe: str) -> nn.Parameter:
    return nn.Parameter(Float8ShardedExperts(weight, Float8Config(recipe), "weight"))


def close(found: torch.Tensor, expected: torch.Tensor, rows_contracted: bool = False) -> None:
    """The same products, summed in float32 in another order: their last bits (2^-24) differ. Where
    rows are contracted, elements of either operand are subnormal at other magnitudes: rounded to
    steps of 2^-9, where the largest are 2^8."""
    atol = (2**-17 if rows_contracted else 2e-6) * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("stored", ["E, N, K", "E, K, N"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_one_float8_layer_per_expert(recipe: str, counts: list[int], stored: str) -> None:
    x, weight = tokens(counts), torch.randn(EXPERTS, HIDDEN, DIM)
    grad = tokens(counts, HIDDEN, seed=1)
    leaf = x.clone().requires_grad_()
    if stored == "E, N, K":
        parameter = float8_parameter(weight, recipe)
        output = F.grouped_mm(leaf, parameter.transpose(-2, -1), offs=offsets(counts))
    else:
        parameter = float8_parameter(weight.transpose(1, 2).contiguous(), recipe)
        output = F.grouped_mm(leaf, parameter, offs=offsets(counts))
    output.backward(grad)
    grad_weight = parameter.grad if stored == "E, N, K" else parameter.grad.transpose(1, 2)
    expected = one_linear_per_expert(x, weight, counts, recipe, grad)
    by_rows = recipe == "rowwise"
    close(output.detach(), expected[0], by_rows and stored == "E, K, N")
    close(leaf.grad, expected[1], by_rows and stored == "E, N, K")
    close(grad_weight, expected[2])
    assert type(parameter.grad) is torch.Tensor


@pytest.mark.parametrize("kind", [StackedExperts, FusedExperts])
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_modules_of_models_work_unchanged(recipe: str, kind: type[nn.Module]) -> None:
    """In float8 their results are those of bfloat16 but for the noise of float8's 3 bits."""
    counts = torch.tensor(COUNTS[0])
    x, grad = tokens(COUNTS[0]), tokens(COUNTS[0], seed=1)
    results = []
    for convert in (False, True):
        model = new_model(kind)
        if convert:
            fp8dist.convert_moe_to_float8_training(model, config=recipe)
        leaf = x.clone().requires_grad_()
        output = model(leaf, counts)
        output.backward(grad)
        results.append([output.detach(), leaf.grad] + [p.grad for p in model.parameters()])
    for plain, float8 in zip(*results, strict=True):
        assert float8.dtype == plain.dtype
        noise = (plain - float8).norm() / plain.norm()
        # A product of two roundings to 1 in 16 (uniform: 2.5 % each), and three of those in a row.
        assert noise < 0.12
    names = [name for name, _ in new_model(kind).named_parameters()]
    for name, plain, float8 in zip(names, *(r[2:] for r in results), strict=True):
        if name.startswith("experts.") and "bias" not in name:
            assert not plain.equal(float8), f"{name} was multiplied in high precision"


def test_top_k_and_rows_of_no_expert() -> None:
    """A token that goes to two experts is two rows; rows after the last expert's do not count."""
    weight = torch.randn(EXPERTS, DIM, HIDDEN)
    base = tokens([8])
    x = torch.cat([base, base, torch.full((3, DIM), torch.nan)]).requires_grad_()
    counts = [8, 0, 8, 0]
    grad = torch.cat([tokens([8], HIDDEN), tokens([8], HIDDEN, 1), torch.full((3, HIDDEN), 1e4)])
    parameter = float8_parameter(weight, "rowwise")
    output = F.grouped_mm(x, parameter, offs=offsets(counts))
    output.backward(grad)
    expected = one_linear_per_expert(
        torch.cat([base, base]), weight.transpose(1, 2), counts, "rowwise", grad[:16]
    )
    close(output[:16].detach(), expected[0], rows_contracted=True)
    close(x.grad[:16], expected[1])
    close(parameter.grad.transpose(1, 2), expected[2])


def test_batched_tokens_without_offsets() -> None:
    weight, x = torch.randn(EXPERTS, HIDDEN, DIM), tokens([24] * EXPERTS)
    parameter = float8_parameter(weight, "rowwise")
    batched = x.unflatten(0, (EXPERTS, -1)).clone().requires_grad_()
    output = F.grouped_mm(batched, parameter.transpose(-2, -1))
    grad = tokens([24] * EXPERTS, HIDDEN, 1)
    output.backward(grad.unflatten(0, (EXPERTS, -1)))
    expected = one_linear_per_expert(x, weight, [24] * EXPERTS, "rowwise", grad)
    close(output.detach().flatten(0, 1), expected[0])
    close(batched.grad.flatten(0, 1), expected[1], rows_contracted=True)
    close(parameter.grad, expected[2])


@pytest.mark.parametrize("which", ["input", "weight"])
def test_only_the_gradients_that_are_wanted(which: str) -> None:
    parameter = float8_parameter(torch.randn(EXPERTS, DIM, HIDDEN), "rowwise")
    x = tokens(COUNTS[0])
    parameter.requires_grad_(which == "weight")
    x.requires_grad_(which == "input")
    F.grouped_mm(x, parameter, offs=offsets(COUNTS[0])).sum().backward()
    assert (x.grad is None) == (which == "weight")
    assert (parameter.grad is None) == (which == "input")


def test_mxfp8_against_torchao() -> None:
    from torchao.prototype.moe_training.mxfp8_grouped_mm import _to_mxfp8_then_scaled_grouped_mm
    from torchao.quantization.quantize_.common import KernelPreference

    counts = [32, 64, 0, 96]
    x, weight = tokens(counts).bfloat16(), torch.randn(EXPERTS, HIDDEN, DIM).bfloat16()
    grad = tokens(counts, HIDDEN, seed=1).bfloat16()
    theirs, their_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    output = _to_mxfp8_then_scaled_grouped_mm(
        theirs,
        their_weight.transpose(-2, -1),
        offsets(counts),
        kernel_preference=KernelPreference.EMULATED,
    )
    output.backward(grad)
    ours, parameter = x.clone().requires_grad_(), float8_parameter(weight, "mxfp8")
    found = F.grouped_mm(ours, parameter.transpose(-2, -1), offs=offsets(counts))
    found.backward(grad)
    pairs = [(found, output), (ours.grad, theirs.grad), (parameter.grad, their_weight.grad)]
    for mine, other in pairs:
        # Both round sums of the same products to bfloat16, theirs already in between (2^-8).
        bound = 2**-7 * other.abs().max().item()
        torch.testing.assert_close(mine.detach(), other.detach(), rtol=0, atol=bound)


@pytest.mark.gpu
def test_rowwise_against_torchao() -> None:
    from torchao.prototype.moe_training.fp8_grouped_mm import (
        _to_fp8_rowwise_then_scaled_grouped_mm,
    )

    counts = [32, 64, 0, 96]  # of multiples of 16: torchao does not pad
    x, weight = (
        tokens(counts).bfloat16().cuda(),
        torch.randn(EXPERTS, HIDDEN, DIM).bfloat16().cuda(),
    )
    grad, ends = tokens(counts, HIDDEN, seed=1).bfloat16().cuda(), offsets(counts).cuda()
    theirs, their_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    output = _to_fp8_rowwise_then_scaled_grouped_mm(
        theirs, their_weight.transpose(-2, -1), ends, pad_token_groups_for_grouped_mm=False
    )
    output.backward(grad)
    config = Float8Config("rowwise")
    parameter = nn.Parameter(Float8ShardedExperts(weight, config, "weight"))
    ours = x.clone().requires_grad_()
    found = F.grouped_mm(ours, parameter.transpose(-2, -1), offs=ends)
    found.backward(grad)
    used = [0, 1, 3]  # what theirs has for an expert without tokens is undefined
    pairs = [
        (found, output),
        (ours.grad, theirs.grad),
        (parameter.grad[used], their_weight.grad[used]),
    ]
    for mine, other in pairs:
        # Products rounded once: a last bit of bfloat16 (2^-8) at most, of the same bytes or, in
        # grad_input, but for subnormal elements, which change less (2^-17, see `close`).
        bound = 2**-8 * other.abs().max().item()
        torch.testing.assert_close(mine.detach(), other.detach(), rtol=0, atol=bound)
    assert parameter.grad[2].count_nonzero() == 0


def test_each_matmul_gets_its_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    accumulated: dict[str, bool] = {}

    def noting(name: str, matmul: Any) -> Any:
        def call(*args: Any, fast_accum: bool, **kwargs: Any) -> torch.Tensor:
            accumulated[f"{name} {args[0].data.size(1)}"] = fast_accum  # what is contracted
            return matmul(*args, fast_accum=fast_accum, **kwargs)

        return call

    for name in ("scaled_grouped_matmul", "scaled_grouped_outer"):
        monkeypatch.setattr(experts, name, noting(name, getattr(experts, name)))
    weight = torch.randn(EXPERTS, HIDDEN, DIM)
    config = Float8Config("rowwise", fast_accum=FastAccum(False, True, False))
    parameter = nn.Parameter(Float8ShardedExperts(weight, config, "weight"))
    x = tokens(COUNTS[0]).requires_grad_()
    F.grouped_mm(x, parameter.transpose(-2, -1), offs=offsets(COUNTS[0])).sum().backward()
    padded = grouped_numerics.padded_rows(x.size(0), EXPERTS, GROUP_MULTIPLE)
    assert accumulated == {
        f"scaled_grouped_matmul {DIM}": False,
        f"scaled_grouped_matmul {HIDDEN}": True,
        f"scaled_grouped_outer {padded}": False,
    }


# --- weights that arrived in float8


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_casts_and_transposes_keep_float8(recipe: str, mode: Any) -> None:
    weight = arrived(torch.randn(EXPERTS, HIDDEN, DIM), recipe)
    with mode():
        check_casts_and_transposes(weight)


def check_casts_and_transposes(weight: Float8Experts) -> None:
    value = weight.dequantize()
    assert value.dtype == torch.float32
    for found, expected in (
        (weight.bfloat16(), value.bfloat16()),
        (weight.to(torch.bfloat16), value.bfloat16()),
        (weight.transpose(-2, -1), value.transpose(1, 2)),
        (weight.transpose(1, 2), value.transpose(1, 2)),
        (weight.mT, value.mT),
        (weight.permute(0, 2, 1), value.mT),
        (weight.mT.mT, value),
        (weight.bfloat16().transpose(-2, -1), value.bfloat16().mT),
        (weight.mT.contiguous(), value.mT),
        (weight.detach(), value),
    ):
        assert isinstance(found, Float8Experts)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.stride() == expected.stride() or found.is_contiguous()
        assert found.dequantize().equal(expected)
    for plain, expected in (
        (weight[1], value[1]),
        (weight.transpose(0, 1), value.transpose(0, 1)),
        (weight * 2, value * 2),
        (weight.to(torch.float64), value.double()),
    ):
        assert type(plain) is torch.Tensor
        assert plain.equal(expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_arrived_weights_are_multiplied_as_they_are(recipe: str, transposed: bool) -> None:
    """Output and grad_input are products with the values that arrived, or those derived."""
    of = RECIPES[recipe]
    hp = torch.randn(EXPERTS, HIDDEN, DIM) * torch.logspace(-1, 1, DIM)
    weight, value = arrived(hp, recipe), arrived(hp, recipe).dequantize()
    # Casting the arrived values for a matmul along the other dimension changes none of them that
    # is not subnormal there: normal numbers within a range of 2^12 are not.
    operand = weight.mT if transposed else weight
    n = HIDDEN if transposed else DIM
    x = tokens([8, 0, 8, 8], DIM if transposed else HIDDEN).requires_grad_()
    output = F.grouped_mm(x, operand, offs=offsets([8, 0, 8, 8]))
    grad = tokens([8, 0, 8, 8], n, 1)
    output.backward(grad)

    def cast(t: torch.Tensor) -> torch.Tensor:
        scaled = numerics.quantize(t.detach(), of.input, of.input_dtype, of.scale_format)
        return numerics.dequantize(scaled.data, scaled.scale)

    ends = offsets([8, 0, 8, 8])
    plain = value.mT if transposed else value
    expected = F.grouped_mm(cast(x), plain, offs=ends)
    expected_grad = F.grouped_mm(cast(grad), plain.mT, offs=ends)
    for found, wanted in ((output.detach(), expected), (x.grad, expected_grad)):
        # A few small elements round again, by at most 1/16 of a smallest normal number.
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())


def test_a_sharded_weight_stays_one() -> None:
    weight = float8_parameter(torch.randn(EXPERTS, HIDDEN, DIM), "rowwise")
    for found in (weight.bfloat16(), weight.mT, weight.detach(), weight.clone(), weight[:2]):
        assert isinstance(found, Float8ShardedExperts)
        assert found.config == Float8Config("rowwise")
        assert found.parameter_name == "weight"
    with torch.no_grad():
        assert weight.add_(1) is weight


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    counts = [5, 0, 37, 16]
    parameter = nn.Parameter(
        Float8ShardedExperts(
            torch.randn(EXPERTS, HIDDEN, DIM, device="cuda").bfloat16(),
            Float8Config("rowwise"),
            "weight",
        )
    )
    x, ends = tokens(counts).bfloat16().cuda().requires_grad_(), offsets(counts).cuda()
    grad = tokens(counts, HIDDEN).bfloat16().cuda()
    for mode in ("default", "error"):  # kernels are compiled the first time
        torch.cuda.set_sync_debug_mode(mode)
        try:
            F.grouped_mm(x, parameter.transpose(-2, -1), offs=ends).backward(grad)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# --- refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: F.grouped_mm(x, w, offs=offsets([8, 8])), "4 offsets.*got.*\\(2,\\)"),
        (lambda x, w: F.grouped_mm(x, w), "with offs, or .* without"),
        (lambda x, w: F.grouped_mm(x[:, :32], w, offs=offsets([8] * 4)), "64 elements"),
        (lambda x, w: F.grouped_mm(x, w, offs=offsets([8] * 4).long()), "int64"),
        (lambda x, w: F.grouped_mm(x.double(), w, offs=offsets([8] * 4)), "float64"),
        (
            lambda x, w: F.grouped_mm(x, w, offs=offsets([8] * 4), bias=torch.zeros(HIDDEN)),
            "no bias",
        ),
    ],
)
def test_bad_calls(call: Any, message: str) -> None:
    weight = float8_parameter(torch.randn(EXPERTS, DIM, HIDDEN), "rowwise")
    with pytest.raises(ValueError, match=message):
        call(tokens([8] * 4), weight)
