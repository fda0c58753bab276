"""A model trained in a way that combines values of `composition_axes`."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import fp8dist
from fp8dist import Float8Config
from tests.distributed.harness import DEVICE
from tests.distributed.pairwise import Case
from tests.distributed.toy import batch_of, full, loss_of

LEARNING_RATE = 1e-2

WORLDS = {"fsdp 1": 1, "fsdp 2": 2, "fsdp 3": 3}
# Multiples of 128, as blockwise asks for, also of the parts that tensor parallelism leaves; 3 ranks
# cut HIDDEN unevenly, and all cut DIM evenly, as FSDP2 asks for on dimension 1.
DIM, HIDDEN, VOCAB, RANK = 384, 256, 48, 16


def world_of(case: Case) -> int:
    return WORLDS.get(case["mesh"], 4)


def tensor_parallel(case: Case) -> int:
    return 2 if "tp" in case["mesh"] else 1


class Block(nn.Module):
    """x -> x + w2(silu(w1(norm(x)))) + mix(x), varied as the case's model says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.RMSNorm(DIM)
        self.w1 = nn.Linear(DIM, HIDDEN, bias=kind == "biases")
        self.w2 = nn.Linear(HIDDEN, DIM, bias=kind == "biases")
        self.mix = nn.Linear(DIM, DIM, bias=kind == "biases")
        if kind == "shared":
            self.mix_again = self.mix
        if kind == "lora":
            self.lora_a = nn.Linear(DIM, RANK, bias=False)
            self.lora_b = nn.Linear(RANK, DIM, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        x = x + self.w2(F.silu(self.w1(h)))
        mixed = self.mix(h)
        if self.kind == "shared":
            mixed = self.mix_again(torch.tanh(mixed))
        if self.kind == "lora":
            mixed = mixed + self.lora_b(self.lora_a(h))
        return x + mixed


class First(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.layer = Block(kind)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.layer(self.embedding(tokens))
        return self.layer(x) if self.kind == "twice" else x


class Second(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = Block(kind)
        self.norm = nn.RMSNorm(DIM)
        self.output = nn.Linear(DIM, VOCAB, bias=False)
        self.calls_layer = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.calls_layer:
            x = self.layer(x)
        return self.output(self.norm(x))


class Model(nn.Module):
    """tokens (batch, sequence) -> logits (batch, sequence, VOCAB), in two parts of a block each."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second = First(kind), Second(kind)
        with torch.no_grad():
            self.first.embedding.weight.mul_(0.1)  # tied, it makes the logits too
        if kind == "tied":
            self.second.output.weight = self.first.embedding.weight
        if kind == "frozen":
            self.first.layer.w1.requires_grad_(False)
            self.second.layer.mix.requires_grad_(False)
        if kind == "lora":
            self.first.layer.mix.requires_grad_(False)
            self.second.layer.mix.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(tokens))


def _to_float8(module: nn.Module, fqn: str) -> bool:
    return isinstance(module, nn.Linear) and not fqn.endswith(("output", "lora_a", "lora_b"))


def converted(case: Case, device: str) -> Model:
    """The same weights in every process, unless it is made on the meta device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Model(case["model"])
    if case["dtype"] == "bfloat16":
        model.to(torch.bfloat16)
    if case["recipe"] == "none":
        return model
    # Emulated on GPUs too: their matmuls of operands that lie otherwise in memory round otherwise.
    config = Float8Config(case["recipe"], emulate=True)
    fp8dist.convert_to_float8_training(model, config=config, module_filter_fn=_to_float8)
    return model


@functools.cache
def _mesh(name: str) -> DeviceMesh:
    kind, sizes = name.rsplit(" ", 1)
    dims = {"fsdp": ("shard",), "hsdp": ("replicate", "shard"), "fsdp x tp": ("shard", "tp")}
    shape = tuple(int(size) for size in sizes.split("x"))
    return init_device_mesh(DEVICE, shape, mesh_dim_names=dims[kind])


def _keep_matmuls(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op is torch.ops.aten.mm.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _checkpointed(block: nn.Module, case: Case) -> nn.Module:
    if case["checkpointing"].startswith("full"):
        return checkpoint_wrapper(block)
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_matmuls)
    return checkpoint_wrapper(block, context_fn=contexts)


def _cut(model: Model, mesh: DeviceMesh) -> None:
    plan = {"w1": fp8dist.Float8ColwiseParallel(), "w2": fp8dist.Float8RowwiseParallel()}
    for part in (model.first, model.second):
        parallelize_module(part.layer, mesh, plan)


def _placement(case: Case, param: nn.Parameter) -> Shard:
    """Dimension 1 where it is asked for, where the ranks divide it and TP does not cut it."""
    if case["shard_dim"] == "0" or param.dim() < 2 or param.shape[1] != DIM:
        return Shard(0)
    return Shard(1)


def sharded(case: Case) -> Model:
    """The model, converted, cut, wrapped, compiled and sharded."""
    on_cpu = case["offload"] != "none"
    device = "cpu" if on_cpu else DEVICE
    model = converted(case, "meta" if case["init"] == "meta" else device)
    mesh = _mesh(case["mesh"])
    if "tp" in case["mesh"]:
        _cut(model, mesh["tp"])
        mesh = mesh["shard"]
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": case["reshard"] == "after forward",
        "shard_placement_fn": functools.partial(_placement, case),
    }
    if case["dtype"] != "float32":
        param_dtype = torch.bfloat16 if "shards" in case["dtype"] else None
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype, torch.float32)
    if on_cpu:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=case["offload"] == "pinned")
    for part in (model.first, model.second):
        if case["checkpointing"].endswith("in FSDP"):
            part.layer = _checkpointed(part.layer, case)
        # Compiling takes seconds per block.
        if case["compile"] == "a block" and part is model.first:
            part.layer.compile(backend="aot_eager", fullgraph=True)
        fully_shard(part.layer, **options)
    for root in roots(model, case):
        fully_shard(root, **options)
    _prefetch(model, case)
    for part in (model.first, model.second):
        if case["checkpointing"].endswith("around FSDP"):
            part.layer = _checkpointed(part.layer, case)
    if case["init"] == "meta":
        model.to_empty(device=device)
        _load(model, converted(case, "cpu"))
    return model


def _load(model: Model, source: Model) -> None:
    """Of a parameter with two names under the first, as `set_model_state_dict` wants it."""
    values = source.state_dict()
    first_names = {name: values[name] for name, _ in source.named_parameters()}
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, first_names, options=options)


def roots(model: Model, case: Case) -> list[nn.Module]:
    return [model.first, model.second] if case["parts"] == "two" else [model]


def _prefetch(model: Model, case: Case) -> None:
    if case["prefetch"] == "implicit":
        return
    if case["parts"] == "two":
        for root in (model.first, model.second):
            root.set_modules_to_forward_prefetch([root.layer])
        return
    model.first.layer.set_modules_to_forward_prefetch([model.second.layer])
    model.second.layer.set_modules_to_backward_prefetch([model.first.layer])


# Of these the step of one parameter takes seconds: it is done for one, in float8.
SLOW = ("compiled", "8 bits")
SLOWLY_TRAINED = "first.layer.w2.weight"


def optimizers_of(named: dict[str, nn.Parameter], case: Case) -> list[torch.optim.Optimizer]:
    """One, or before it that of one parameter."""
    trained = {name_of(name): param for name, param in named.items() if param.requires_grad}
    kind = case["optimizer"]
    if kind not in SLOW:
        return [_optimizer(list(trained.values()), kind)]
    alone = trained.pop(SLOWLY_TRAINED)
    return [_optimizer([alone], kind), _optimizer(list(trained.values()), "foreach")]


def _optimizer(trained: list[nn.Parameter], kind: str) -> torch.optim.Optimizer:
    match kind:
        case "SGD":
            return torch.optim.SGD(trained, lr=10 * LEARNING_RATE, momentum=0.9)
        case "8 bits":
            from torchao.optim import AdamW8bit

            return AdamW8bit(trained, lr=LEARNING_RATE)
        case "fused":
            return torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
        case "for-loop":
            return torch.optim.AdamW(trained, lr=LEARNING_RATE, foreach=False)
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, foreach=True)


def take_step(optimizers: list[torch.optim.Optimizer], case: Case, compiled: bool = True) -> None:
    for optimizer in optimizers:
        step: Any = optimizer.step
        if case["optimizer"] == "compiled" and compiled and optimizer is not optimizers[-1]:
            step = torch.compile(step, backend="aot_eager")
        # torchao compiles its steps, for many seconds; without, they compute the same.
        eager = case["optimizer"] == "8 bits"
        with torch.compiler.set_stance("force_eager") if eager else nullcontext():
            step()
    for other in optimizers:
        other.zero_grad()


def _clip(model: nn.Module) -> None:
    """`clip_grad_norm_`, which takes parameters on one mesh only."""
    params = [param for param in model.parameters() if param.grad is not None]
    norms = [nn.utils.get_total_norm([param.grad]) for param in params]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.stack([norm.float().to(DEVICE) for norm in whole]).norm()
    for param in params:
        nn.utils.clip_grads_with_norm_([param], MAX_NORM, total)


MAX_NORM = 0.05


def name_of(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")


@dataclass
class Step:
    """What one step did: of this rank the losses, of all the weights and gradients."""

    losses: list[float] = field(default_factory=list)  # by microbatch
    evaluation: float | None = None  # after the step
    before: dict[str, torch.Tensor] = field(default_factory=dict)
    after: dict[str, torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


def microbatches(case: Case) -> int:
    return 1 if case["accumulation"] == "none" else 2


def steps_of(case: Case) -> int:
    """The second has trained weights; after one that leaves a layer out there is another."""
    return 3 if case["model"] == "not called" else 2


def calls_layer(case: Case, step: int) -> bool:
    return case["model"] != "not called" or step != 1


def batch_for(step: int, microbatch: int, rank: int, ranks: int) -> Any:
    return tuple(part.chunk(ranks)[rank] for part in batch_of(step, microbatch))


@contextmanager
def evaluating(model: nn.Module, case: Case) -> Iterator[None]:
    model.eval()
    with torch.inference_mode() if case["evaluation"] == "inference_mode" else torch.no_grad():
        yield
    model.train()


def run(case: Case) -> list[Step]:
    """On every rank: train as the case says. Rank 0 has the weights and gradients."""
    torch._dynamo.reset()
    model = sharded(case)
    parts = roots(model, case)
    optimizers = optimizers_of(dict(model.named_parameters()), case)
    if case["precompute"] == "hook":
        fp8dist.register_precompute_hook(optimizers[-1], parts)
    tp = tensor_parallel(case)
    rank, ranks = dist.get_rank() // tp, dist.get_world_size() // tp
    steps = []
    for number in range(steps_of(case)):
        step = Step(before=_values(model))
        model.second.calls_layer = calls_layer(case, number)
        for microbatch in range(microbatches(case)):
            last = microbatch == microbatches(case) - 1
            for part in parts:
                part.set_requires_gradient_sync(last or case["accumulation"] == "with sync")
            if case["unshard"] == "async_op" and number > 0:
                handles = [root.unshard(async_op=True) for root in parts]
                handles[0].wait()
            loss = loss_of(model, batch_for(number, microbatch, rank, ranks))
            loss.backward()
            step.losses.append(loss.item())
        if case["clipping"] == "by norm":
            _clip(model)
        step.gradients = {
            name_of(name): full(param.grad)
            for name, param in model.named_parameters()
            if param.grad is not None
        }
        take_step(optimizers, case)
        if case["precompute"] == "call":
            fp8dist.precompute_float8_dynamic_scale_for_fsdp(parts)
        if case["evaluation"] != "none":
            with evaluating(model, case):
                step.evaluation = loss_of(model, batch_for(number, 9, rank, ranks)).item()
            for module in model.modules():  # where forward does not, as FSDP2's users must
                if case["reshard"] == "after backward" and hasattr(module, "reshard"):
                    module.reshard()
        step.after = _values(model)
        steps.append(step)
    if dist.get_rank() > 0:
        for step in steps:
            step.before, step.after, step.gradients = {}, {}, {}
    return steps


def _values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name_of(name): full(param).clone() for name, param in model.named_parameters()}
