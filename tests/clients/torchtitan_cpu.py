"""torchtitan's trainer on CPU ranks, several jobs after each other; torchrun starts this.

    torchrun --nproc-per-node 2 -m tests.clients.torchtitan_cpu JOBS.json FOLDER

JOBS.json: name -> {"ranks": 1 or 2, "flags": torchtitan's}. Each rank writes what it saw of the
jobs to FOLDER/<rank>.json: name -> {"losses": per step, "wire": per step, the collectives as (name,
reduction, dtype, elements), "sizes": name -> (elements, whether it is gathered in float8)}.
"""

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from fp8dist import Float8Linear
from tests.distributed.wire import collectives


def make_cpu_a_device() -> None:
    """What torchtitan asks of a device that a CPU does not answer, or answers otherwise."""
    torch._utils._get_available_device_type = lambda: "cpu"
    answers: dict[str, Any] = {
        "current_device": 0,
        "empty_cache": None,
        "get_device_name": "CPU",
        "get_device_properties": types.SimpleNamespace(total_memory=2**34),
        "memory_stats": {},
        "reset_peak_memory_stats": None,
    }
    for name, answer in answers.items():
        setattr(torch.cpu, name, lambda *_, answer=answer: answer)
    # Kernels of mixtures of experts, for which torchtitan imports Triton.
    kernels: Any = types.ModuleType("torchtitan.models.moe.kernels")
    kernels.generate_permute_indices = None
    sys.modules[kernels.__name__] = kernels
    divide = FSDPModule.set_gradient_divide_factor

    def sum_and_divide(self: FSDPModule, factor: float) -> None:
        self.set_force_sum_reduction_for_comms(True)  # gloo does not multiply while it reduces
        divide(self, factor)

    FSDPModule.set_gradient_divide_factor = sum_and_divide


make_cpu_a_device()

import torchtitan.train  # noqa: E402 - it looks for the device when it is imported
from torchtitan.config import ConfigManager  # noqa: E402


class RecordedTrainer(torchtitan.train.Trainer):
    def __init__(self, config: Any) -> None:
        self.losses: list[float] = []
        self.wire: list[list[tuple[str, str, str, int]]] = []
        super().__init__(config)

    def train_step(self, data_iterator: Any) -> None:
        with collectives() as found:
            super().train_step(data_iterator)
        self.wire.append([(c.name, c.reduction, str(c.dtype), c.numel) for c in found])

    def forward_backward_step(self, **given: Any) -> torch.Tensor:
        loss = super().forward_backward_step(**given)
        self.losses.append(loss.item())  # this rank's part of the mean over all tokens
        return loss

    def sizes(self) -> dict[str, tuple[int, bool]]:
        layers = dict(self.model_parts[0].named_modules())
        return {
            name: (parameter.numel(), isinstance(layers[name.rpartition(".")[0]], Float8Linear))
            for name, parameter in self.model_parts[0].named_parameters()
        }


def run(ranks: int, flags: list[str], store: str) -> dict[str, Any]:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(os.environ["RANK"]), world_size=ranks
    )
    trainer = RecordedTrainer(ConfigManager().parse_args(flags))
    trainer.train()
    trainer.close()
    dist.destroy_process_group()
    return {"losses": trainer.losses, "wire": trainer.wire, "sizes": trainer.sizes()}


def main(jobs_file: str, folder: str) -> None:
    # It waits at the end of a job, for ranks of other machines.
    torchtitan.train.time = types.SimpleNamespace(
        **vars(torchtitan.train.time) | {"sleep": lambda _: None}
    )
    rank, found = int(os.environ["RANK"]), {}
    for name, job in json.loads(Path(jobs_file).read_text()).items():
        if rank < job["ranks"]:
            found[name] = run(job["ranks"], job["flags"], f"{folder}/store-{name}")
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
