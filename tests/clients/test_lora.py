"""peft's LoRA on frozen float8 weights, as scripts/clients/lora.py has it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fp8dist
from tests.clients.client import accelerate_on_cpu, float8_of, layer_bytes, script
from tests.distributed.harness import run_on_ranks
from tests.distributed.wire import Collective, collectives

pytest.importorskip("transformers", reason="for .ci/clients")
peft = pytest.importorskip("peft", reason="for .ci/clients")

STEPS = 3
GATHERED_IN_BFLOAT16 = fp8dist.Float8Config(
    recipe_name="rowwise", enable_fsdp_float8_all_gather=False
)


def batches() -> list[torch.Tensor]:
    """Other tokens on each rank."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    return list(torch.randint(256, (STEPS, 2, 16), generator=generator))


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for tokens in batches():
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def sharded(config: Any = "rowwise", converted_first: bool = False) -> Any:
    program = script("lora")
    model = program.new_model()
    if converted_first:
        keep_head = fp8dist.float8_module_filter("rowwise", ["lm_head"])
        fp8dist.convert_to_float8_training(model, config=config, module_filter_fn=keep_head)
    model = program.add_adapters(model, config)
    return model, program.shard(model)


def gathered_bytes(recorded: list[Collective]) -> list[int]:
    return [c.numel for c in recorded if c.name == "all_gather" and c.dtype == torch.uint8]


def trained(folder: str) -> None:
    from peft import PeftModel

    program = script("lora")
    model, optimizer = sharded()
    layers = model.get_base_model().model.layers
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    float8 = float8_of(model)
    assert len(float8) == 14 and all(name.endswith("base_layer.weight") for name in float8)
    assert len(trainable) == 28 and all("lora_" in name for name in trainable)
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    frozen = {name: param.full_tensor() for name, param in float8.items()}
    with collectives() as recorded:
        losses = train(model, optimizer)
    # A byte per element of a weight, 2 per element of adapters and norms, in forward and backward.
    assert sorted(gathered_bytes(recorded)) == sorted(
        [layer_bytes(layer) for layer in layers] * 2 * STEPS
    )
    # Weights that nothing edits need no scales but those of before the first step.
    assert [str(c) for c in recorded if c.dtype == torch.int32] == []
    for name, param in float8.items():
        assert param.full_tensor().equal(frozen[name])
    # Gathered in bfloat16, and cast where it arrives, a weight is the same.
    assert losses == train(*sharded(GATHERED_IN_BFLOAT16))
    assert losses == train(*sharded(converted_first=True))
    program.save(model, folder)
    expected = {name: param.full_tensor() for name, param in trainable.items()}
    if dist.get_rank() == 0:
        loaded = PeftModel.from_pretrained(
            program.new_model(), folder, autocast_adapter_dtype=False
        )
        found = {name: p for name, p in loaded.named_parameters() if "lora_" in name}
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert value.equal(expected[name]), name


def test_adapters_are_trained_beside_float8_weights(tmp_path: Path) -> None:
    run_on_ranks(2, trained, str(tmp_path))


def trained_by_accelerate() -> None:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    program = script("lora")
    expected = train(*sharded())
    with accelerate_on_cpu():
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            reshard_after_forward=True,
        )
        accelerator = Accelerator(fsdp_plugin=plugin)
        model = program.add_adapters(program.new_model())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model, optimizer = accelerator.prepare(model, optimizer)
        assert len(float8_of(model)) == 14
        with collectives() as recorded:
            assert train(model, optimizer) == expected
    assert len(gathered_bytes(recorded)) == 2 * 2 * STEPS


def test_accelerate_shards_adapters_and_weights() -> None:
    pytest.importorskip("accelerate", reason="for .ci/clients")
    run_on_ranks(2, trained_by_accelerate)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_adapters_merge_into_a_converted_model(safe_merge: bool) -> None:
    merged = []
    for config in (None, "rowwise"):
        model = script("lora").new_model()
        if config is not None:
            fp8dist.convert_to_float8_training(model, config=config)
        torch.manual_seed(1)
        lora = peft.LoraConfig(
            r=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False
        )
        model = peft.get_peft_model(model, lora)
        merged.append(model.merge_and_unload(safe_merge=safe_merge).state_dict())
    plain, float8 = merged
    assert plain.keys() == float8.keys()
    unmerged = script("lora").new_model().state_dict()
    changed = {name for name, value in plain.items() if not value.equal(unmerged[name])}
    assert len(changed) == 4
    for name, value in float8.items():
        assert value.equal(plain[name]), name
