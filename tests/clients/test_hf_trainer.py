"""Hugging Face's Trainer under FSDP2, as scripts/clients/hf_trainer.py uses it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.clients.client import (
    PlainLoop,
    Watched,
    accelerate_on_cpu,
    check_collectives,
    float8_of,
    full_state,
    script,
)
from tests.clients.models import convert, new_model, to_be_float8
from tests.distributed.harness import run_on_ranks
from tests.distributed.wire import collectives

pytest.importorskip("accelerate", reason="for .ci/clients")
transformers = pytest.importorskip("transformers", reason="for .ci/clients")

STEPS = 4


def new_trainer(model: Any, folder: str, **options: Any) -> Any:
    return script("hf_trainer").new_trainer(
        model,
        folder,
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        lr_scheduler_type="constant",
        disable_tqdm=True,
        **options,
    )


def trained(name: str, folder: str) -> None:
    unconverted = new_model(name)
    with accelerate_on_cpu():
        model = new_model(name)
        watched = Watched(model)
        trainer = new_trainer(convert(model), folder, save_strategy="no")
        with collectives() as recorded:
            trainer.train()
        assert float8_of(trainer.model).keys() == to_be_float8(unconverted)
        check_collectives(recorded, trainer.model, STEPS, gathers=2)
        plain = PlainLoop(new_model(name), weight_decay=0.0, fused=True)  # the Trainer's
        # The Trainer divides by the tokens of all ranks, and FSDP2 by the ranks once more.
        losses = plain.losses(watched.inputs, scale=dist.get_world_size())
        assert watched.losses == losses
        expected = full_state(plain.model)
        trainer.save_model()
    if dist.get_rank() == 0:
        loaded = type(unconverted).from_pretrained(folder).state_dict()
        assert loaded.keys() == unconverted.state_dict().keys()
        for key, value in loaded.items():
            assert value.equal(expected[key]), key


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe", "gpt_oss"])
def test_losses_are_those_of_the_plain_loop(name: str, tmp_path: Path) -> None:
    run_on_ranks(2, trained, name, str(tmp_path))


def resumed(state_dict_type: str, folder: str) -> None:
    options = {"save_steps": 2, "fsdp_config": {"state_dict_type": state_dict_type}}
    with accelerate_on_cpu():
        model = new_model("mixtral")
        watched = Watched(model)
        trainer = new_trainer(convert(model), folder, **options)
        trainer.train()
        expected = full_state(trainer.model)
        again = new_model("mixtral")
        with torch.no_grad():
            for param in again.parameters():
                param.zero_()  # all is in the checkpoint
        watched_again = Watched(again)
        trainer = new_trainer(convert(again), folder, **options)
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
        assert watched_again.losses == watched.losses[2:]
        for key, value in full_state(trainer.model).items():
            assert value.equal(expected[key]), key


@pytest.mark.parametrize("state_dict_type", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_checkpoint_resumes(state_dict_type: str, tmp_path: Path) -> None:
    run_on_ranks(2, resumed, state_dict_type, str(tmp_path))
