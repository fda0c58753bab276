"""The training of `composition.run` in one process, with neither FSDP2 nor tensor parallelism."""

import copy

import torch
import torch.nn as nn

import fp8dist
from tests.distributed.composition import (
    MAX_NORM,
    SLOWLY_TRAINED,
    Step,
    batch_for,
    calls_layer,
    converted,
    microbatches,
    optimizer_of,
    optimizers_of,
    take_step,
    tensor_parallel,
    world_of,
)
from tests.distributed.harness import DEVICE
from tests.distributed.pairwise import Case
from tests.distributed.toy import full, loss_of


class Reference:
    """The case's model and optimizer in one process, with neither FSDP2 nor tensor parallelism.

    Each step starts from the weights that the ranks had: left to themselves, two trainings that
    round one gradient differently drift apart as far as float8 drifts from high precision.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.ranks = world_of(case) // tensor_parallel(case)
        self.model = converted(case, DEVICE)
        # An offloaded weight is trained on the CPU, which rounds otherwise than a GPU.
        self.trained_on = DEVICE if case["offload"] == "none" else "cpu"
        self.stepped = copy.deepcopy(dict(self.model.to(self.trained_on).named_parameters()))
        self.model.to(DEVICE)
        self.optimizers = optimizers_of(self.stepped, case)
        self.shards: list[nn.Parameter] = []  # see `shards_after`
        if case["optimizer"] == "8 bits":
            del self.stepped[SLOWLY_TRAINED], self.optimizers[0]
        if "shards" in case["dtype"]:
            # FSDP2 gathers these in bfloat16; float8 weights are cast from float32.
            for module in self.model.modules():
                if isinstance(module, fp8dist.Float8Linear):
                    if module.bias is not None:
                        module.bias.data = module.bias.data.bfloat16()
                elif not list(module.children()):
                    module.to(torch.bfloat16)

    def set_weights(self, values: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, param in self.model.named_parameters():
                param.copy_(values[name].to(param.device))

    def losses_and_gradients(
        self, number: int, values: dict[str, torch.Tensor]
    ) -> tuple[list[list[float]], dict[str, torch.Tensor], float]:
        """Losses by rank and microbatch; gradients averaged over ranks, in float32, and their norm
        before they were clipped."""
        self.set_weights(values)
        self.model.second.calls_layer = calls_layer(self.case, number)
        losses: list[list[float]] = []
        sums: dict[str, torch.Tensor] = {}
        for rank in range(self.ranks):
            losses.append([])
            for microbatch in range(microbatches(self.case)):
                loss = loss_of(self.model, batch_for(number, microbatch, rank, self.ranks))
                loss.backward()
                losses[-1].append(loss.item())
                for name, param in self.model.named_parameters():
                    if param.grad is not None:
                        grad = param.grad.float().cpu()
                        sums[name] = sums[name] + grad if name in sums else grad
                        param.grad = None
        gradients = {name: grad / self.ranks for name, grad in sums.items()}
        norm = torch.stack([grad.norm() for grad in gradients.values()]).norm().item()
        if self.case["clipping"] == "by norm":
            gradients = {name: grad * (MAX_NORM / norm) for name, grad in gradients.items()}
        return losses, gradients, norm

    def evaluation(self, number: int, values: dict[str, torch.Tensor]) -> list[float]:
        """Losses by rank."""
        self.set_weights(values)
        with torch.no_grad():
            return [
                loss_of(self.model, batch_for(number, 9, rank, self.ranks)).item()
                for rank in range(self.ranks)
            ]

    def weights_after(self, step: Step) -> dict[str, torch.Tensor]:
        """What the optimizer makes of the ranks' weights with the ranks' gradients."""
        with torch.no_grad():
            for name, param in self.stepped.items():
                param.copy_(step.before[name].to(param.device))
                grad = step.gradients.get(name)
                param.grad = None if grad is None else grad.to(param.device)
        take_step(self.optimizers, self.case, compiled=False)
        return {name: full(param) for name, param in self.stepped.items()}

    def shards_after(self, by_rank: list[Step]) -> list[torch.Tensor]:
        """What the 8-bit optimizer makes of each rank's shard: its states are rounded in blocks of
        256 elements as they lie there, which are other blocks in the whole weight.
        """
        if not self.shards:
            self.shards = [
                nn.Parameter(step.shard[0].to(self.trained_on).clone()) for step in by_rank
            ]
            self.optimizer_of_shards = optimizer_of(self.shards, "8 bits")
        with torch.no_grad():
            for mine, step in zip(self.shards, by_rank, strict=True):
                before, gradient, _ = step.shard
                mine.copy_(before)
                mine.grad = gradient.to(self.trained_on)
        take_step([self.optimizer_of_shards], self.case)
        return [full(shard) for shard in self.shards]
