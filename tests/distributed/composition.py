"""A model trained in a way that combines values of `composition_axes`."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import fp8dist
from fp8dist import Float8Config
from fp8dist.tensors import weight_state
from tests.distributed.composition_model import DIM, Model
from tests.distributed.harness import DEVICE
from tests.distributed.pairwise import Case
from tests.distributed.toy import batch_of, full, loss_of

LEARNING_RATE = 1e-2
MAX_NORM = 0.05  # less than any step's

WORLDS = {"fsdp 1": 1, "fsdp 2": 2, "fsdp 3": 3, "hsdp 2x1": 2}


def world_of(case: Case) -> int:
    return WORLDS.get(case["mesh"], 4)


def tensor_parallel(case: Case) -> int:
    return 2 if "tp" in case["mesh"] else 1


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
            root.set_modules_to_backward_prefetch([root.layer])
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
        return [optimizer_of(list(trained.values()), kind)]
    alone = trained.pop(SLOWLY_TRAINED)
    return [optimizer_of([alone], kind), optimizer_of(list(trained.values()), "foreach")]


def optimizer_of(trained: list[nn.Parameter], kind: str) -> torch.optim.Optimizer:
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


def _clip(model: nn.Module, case: Case) -> float:
    """`clip_grad_norm_`; or what it does by its parts, where tensor parallelism has put some of the
    parameters on another mesh, as it takes those of one. Returns the norm before.
    """
    if "tp" not in case["mesh"]:
        total = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        return full(total).item()
    params = [param for param in model.parameters() if param.grad is not None]
    norms = [full(nn.utils.get_total_norm([param.grad])).float() for param in params]
    total = torch.stack(norms).norm()
    for param in params:
        nn.utils.clip_grads_with_norm_([param], MAX_NORM, total.to(param.grad.device))
    return total.item()


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
    norm: float | None = None  # of all gradients, before they were clipped
    arrived: dict[str, str] = field(default_factory=dict)  # types of unsharded float8 weights
    computed: list[str] = field(default_factory=list)  # whose scales a gather had to compute
    shard: tuple[torch.Tensor, ...] = ()  # for 8 bits, of one weight: before, gradient, after


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
    if case["precompute"] == "call":
        fp8dist.precompute_float8_dynamic_scale_for_fsdp(parts)
    steps = []
    for number in range(steps_of(case)):
        model.second.calls_layer = calls_layer(case, number)
        with scales_computed_at_gathers() as computed:
            steps.append(_step(model, parts, optimizers, case, number))
        steps[-1].computed = computed
    if dist.get_rank() > 0:
        for step in steps:
            step.before, step.after, step.gradients = {}, {}, {}
    return steps


def _step(
    model: Model,
    parts: list[Any],
    optimizers: list[torch.optim.Optimizer],
    case: Case,
    number: int,
) -> Step:
    tp = tensor_parallel(case)
    rank, ranks = dist.get_rank() // tp, dist.get_world_size() // tp
    step = Step(before=_values(model))
    for microbatch in range(microbatches(case)):
        last = microbatch == microbatches(case) - 1
        for part in parts:
            part.set_requires_gradient_sync(last or case["accumulation"] == "with sync")
        if case["unshard"] == "async_op" and number > 0:
            handles = [group.unshard(async_op=True) for group in _groups(model, called=True)]
            handles[0].wait()  # forward waits for the others
        loss = loss_of(model, batch_for(number, microbatch, rank, ranks))
        loss.backward()
        step.losses.append(loss.item())
    if case["clipping"] == "by norm":
        step.norm = _clip(model, case)
    step.gradients = {
        name_of(name): full(param.grad)
        for name, param in model.named_parameters()
        if param.grad is not None
    }
    step.arrived = _arrived(model)
    slow = optimizers[0].param_groups[0]["params"][0] if case["optimizer"] == "8 bits" else None
    if slow is not None:
        step.shard = (_local(slow), _local(slow.grad))
    take_step(optimizers, case)
    if slow is not None:
        step.shard += (_local(slow),)
    if case["precompute"] == "call":
        fp8dist.precompute_float8_dynamic_scale_for_fsdp(parts)
    if case["evaluation"] != "none":
        with evaluating(model, case):
            step.evaluation = loss_of(model, batch_for(number, 9, rank, ranks)).item()
        for group in _groups(model):  # where forward does not, as FSDP2's users must
            if case["reshard"] == "after backward":
                group.reshard()
    step.after = _values(model)
    return step


def _local(tensor: DTensor) -> torch.Tensor:
    """A copy of this rank's shard, on the CPU, with no subclass."""
    local = tensor.to_local().detach()
    return getattr(local, "_tensor", local).cpu().clone()


def _groups(model: Model, called: bool = False) -> list[Any]:
    """The modules that FSDP2 gathers the parameters of; or those of them that a forward calls."""
    left_out = set(model.second.layer.modules()) if called and not model.second.calls_layer else ()
    return [
        module
        for module in model.modules()
        if isinstance(module, FSDPModule) and module not in left_out
    ]


def _arrived(model: Model) -> dict[str, str]:
    """The types of float8 layers' weights, unsharded."""
    for group in _groups(model):
        group.unshard()
    types = {}
    for name, module in model.named_modules():
        if isinstance(module, fp8dist.Float8Linear):
            weight = module.weight
            local = weight.to_local() if isinstance(weight, DTensor) else weight
            types[name_of(name)] = type(local).__name__
    for group in _groups(model):
        group.reshard()
    return types


@contextmanager
def scales_computed_at_gathers() -> Iterator[list[str]]:
    """Collects the names of weights whose scales are computed where they are gathered, each with
    a collective of its own, as they were edited with no precompute after."""
    original, names = weight_state.update_scales, []

    def update_scales(states: list[Any], *args: Any, **kwargs: Any) -> None:
        names.extend(state.fqn for state in states)
        original(states, *args, **kwargs)

    weight_state.update_scales = update_scales
    try:
        yield names
    finally:
        weight_state.update_scales = original


def _values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name_of(name): full(param).clone() for name, param in model.named_parameters()}
