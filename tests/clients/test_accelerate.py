"""Hugging Face accelerate: FSDP2, as scripts/clients/accelerate_fsdp2.py uses it."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy

import fp8dist
from tests.clients.client import (
    PlainLoop,
    Watched,
    accelerate_on_cpu,
    check_collectives,
    float8_of,
    full_state,
    script,
)
from tests.clients.models import new_model, to_be_float8
from tests.distributed.harness import run_on_ranks
from tests.distributed.wire import collectives

pytest.importorskip("accelerate", reason="for .ci/clients")
pytest.importorskip("transformers", reason="for .ci/clients")

STEPS = 3


def batches(steps: int) -> list[dict[str, torch.Tensor]]:
    """Other tokens on each rank."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(256, (steps, 2, 16), generator=generator)
    return [{"input_ids": one, "labels": one} for one in tokens]


def new_accelerator(**options: Any) -> Any:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    precision = options.pop("mixed_precision", "no")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        **options,
    )
    return Accelerator(fsdp_plugin=plugin, mixed_precision=precision)


def prepared(name: str, accelerator: Any, dtype: torch.dtype = torch.float32) -> Any:
    """What the program makes of a model, and what to watch it by."""
    model = new_model(name).to(dtype)
    watched = Watched(model)
    if name != "llama":
        fp8dist.convert_moe_to_float8_training(model)
    model, optimizer = script("accelerate_fsdp2").prepare(model, accelerator)
    return model, optimizer, watched


def trained(name: str, **options: Any) -> None:
    program = script("accelerate_fsdp2")
    with accelerate_on_cpu():
        accelerator = new_accelerator(**options)
        model, optimizer, watched = prepared(name, accelerator)
        unconverted = new_model(name)
        assert float8_of(model).keys() == to_be_float8(unconverted)
        # Each parameter is trained, once.
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
            id(p) for p in model.parameters()
        ]
        with collectives() as recorded:
            program.train(model, optimizer, batches(STEPS), accelerator)
        check_collectives(recorded, model, STEPS, gathers=2)
        plain = PlainLoop(new_model(name))
        assert watched.losses == plain.losses(watched.inputs)
        expected = full_state(plain.model)
        saved = accelerator.get_state_dict(model)
    if dist.get_rank() == 0:
        assert {type(value) for value in saved.values()} == {torch.Tensor}
        assert saved.keys() == unconverted.state_dict().keys()
        unconverted.load_state_dict(saved, assign=True)
        for key, value in unconverted.state_dict().items():
            assert value.equal(expected[key]), key


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_losses_are_those_of_the_plain_loop(name: str) -> None:
    run_on_ranks(2, trained, name)


def test_weights_from_rank_0_and_recomputed_activations() -> None:
    run_on_ranks(2, trained, "llama", cpu_ram_efficient_loading=True, activation_checkpointing=True)


def trained_in_bfloat16() -> None:
    """accelerate makes float32 shards of a model in bfloat16, in place, before it shards it."""
    with accelerate_on_cpu():
        accelerator = new_accelerator(mixed_precision="bf16")
        model, optimizer, watched = prepared("llama", accelerator, torch.bfloat16)
        assert {param.dtype for param in model.parameters()} == {torch.float32}
        script("accelerate_fsdp2").train(model, optimizer, batches(STEPS), accelerator)
        policy = accelerator.state.fsdp_plugin.mixed_precision_policy
        assert isinstance(policy, MixedPrecisionPolicy)
        plain = PlainLoop(new_model("llama").bfloat16().float(), policy=policy)
        assert watched.losses == plain.losses(watched.inputs)


def test_a_model_in_bfloat16() -> None:
    run_on_ranks(2, trained_in_bfloat16)


def resumed(state_dict_type: str, folder: str) -> None:
    program = script("accelerate_fsdp2")
    with accelerate_on_cpu():
        accelerator = new_accelerator(state_dict_type=state_dict_type)
        model, optimizer, watched = prepared("llama", accelerator)
        first, *others = batches(STEPS)
        program.train(model, optimizer, [first], accelerator)
        accelerator.save_state(folder)
        saved = full_state(model)
        program.train(model, optimizer, others, accelerator)
        accelerator.load_state(folder)
        for key, value in full_state(model).items():
            assert value.equal(saved[key]), key
        program.train(model, optimizer, others, accelerator)
        assert watched.losses[3:] == watched.losses[1:3]
        assert len(float8_of(model)) == 14
    if state_dict_type == "FULL_STATE_DICT":
        weights = torch.load(os.path.join(folder, "pytorch_model_fsdp.bin"), weights_only=True)
        assert weights.keys() == new_model("llama").state_dict().keys()


@pytest.mark.parametrize("state_dict_type", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_saved_state_loads_back(state_dict_type: str, tmp_path: Any) -> None:
    run_on_ranks(2, resumed, state_dict_type, str(tmp_path))
