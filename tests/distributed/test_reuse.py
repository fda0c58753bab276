"""Caching, precompute, resharding, recomputing, or not: bitwise the same training."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

import fp8dist
from fp8dist import Float8Config
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.toy import RECIPE_NAMES, convert, mesh_of, new_model, same_bits, train


@dataclass(frozen=True)
class Variant:
    cache_payload: bool = True
    precompute: Literal["call", "hook", "never"] = "call"
    reshard: bool = True
    # By the model itself, or by a wrapper that is put on before conversion, between conversion
    # and fully_shard, or after both.
    recompute: Literal["no", "model", "convert", "fully_shard", "last"] = "no"
    offload: bool = False


BASE = Variant()
OFFLOADED = Variant(offload=True)
VARIANTS = [
    Variant(cache_payload=False),
    Variant(cache_payload=False, precompute="never"),
    Variant(precompute="never"),
    Variant(precompute="hook"),
    Variant(reshard=False),
    Variant(reshard=False, precompute="never", recompute="model"),
    Variant(recompute="convert"),
    Variant(recompute="fully_shard"),
    Variant(recompute="last", cache_payload=False),
    OFFLOADED,
    Variant(offload=True, precompute="never", cache_payload=False),
]
# Together they differ from the base in each way.
FEW_VARIANTS = [
    Variant(cache_payload=False, recompute="fully_shard"),
    Variant(precompute="never", recompute="model", reshard=False),
    Variant(precompute="hook", offload=True),
]


def history(variant: Variant, recipe: str, mesh: tuple[int, ...], microbatches: int) -> list[Any]:
    """Losses and gradients of 3 steps."""
    model = new_model(layers=1, recompute=variant.recompute == "model")

    def wrap_if(when: str) -> None:
        if variant.recompute == when:
            for i, layer in enumerate(model.layers):
                model.layers[i] = checkpoint_wrapper(layer)

    wrap_if("convert")
    convert(model, Float8Config(recipe, cache_payload=variant.cache_payload))
    wrap_if("fully_shard")
    options: dict[str, Any] = {"mesh": mesh_of(*mesh), "reshard_after_forward": variant.reshard}
    if variant.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        model.cpu()
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    wrap_if("last")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if variant.precompute == "hook":
        fp8dist.register_precompute_hook(optimizer, model)

    def precompute() -> None:
        if variant.precompute == "call":
            fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)

    steps = train(model, optimizer, 3, microbatches=microbatches, after_step=precompute)
    wrapped = "_checkpoint_wrapped_module."
    return [
        (losses, {name.replace(wrapped, ""): grad for name, grad in gradients.items()})
        for losses, gradients in steps
    ]


def compare(
    variants: list[Variant], recipe: str, mesh: tuple[int, ...], microbatches: int
) -> tuple[list[Any], list[str]]:
    """The losses by step, and the variants that do not train as the base does."""
    base = history(BASE, recipe, mesh, microbatches)
    offloaded = base
    if DEVICE != "cpu":
        # AdamW on the CPU rounds otherwise: from the second step on, the base is offloaded too.
        offloaded = history(OFFLOADED, recipe, mesh, microbatches)
    different = [
        str(variant)
        for variant in variants
        if not (
            same_bits(found := history(variant, recipe, mesh, microbatches), base)
            or (variant.offload and same_bits([base[0], *offloaded[1:]], found))
        )
    ]
    return [losses for losses, _ in base], different


def check(results: list[tuple[list[Any], list[str]]]) -> None:
    for losses, different in results:
        assert different == []
        assert len({step[0] for step in losses}) == 3  # it does train


@pytest.mark.parametrize(
    ("mesh", "variants"),
    [((2,), VARIANTS), ((3,), VARIANTS), ((2, 2), FEW_VARIANTS)],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_reuse_changes_nothing(mesh: tuple[int, ...], variants: list[Variant]) -> None:
    check(run_on_ranks(math.prod(mesh), compare, variants, "tensorwise", mesh, 1))


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_microbatches_reuse_the_payloads(recipe: str) -> None:
    microbatches = 3 if recipe == "tensorwise" else 2
    check(run_on_ranks(3, compare, FEW_VARIANTS, recipe, (3,), microbatches))
