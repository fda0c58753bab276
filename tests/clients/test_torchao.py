"""Programs written for `torchao.float8` run with another import: its names, its examples' losses
and bytes, and the checks that it ships.
"""

import contextlib
import copy
import importlib
import inspect
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.fsdp import fully_shard

import fp8dist
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.test_tp_torchao import AsBytes
from tests.distributed.wire import collectives
from tests.environment import ROOT

STEPS = 8  # of both examples
EXAMPLES = ROOT / "scripts/clients"
MARK = "  # <- for "  # before the module that an example's import was of

# Of `torchao.float8.__all__` and its module of tensor-parallel styles: torchao's own object; what
# is called as torchao's is; and what is not here, with the reason.
ITS_OWN = (
    "CastConfig",
    "Float8GemmConfig",
    "Float8LinearConfig",
    "Float8LinearRecipeName",
    "ScalingGranularity",
    "ScalingType",
)
CALLED_ALIKE = (
    "convert_to_float8_training",
    "precompute_float8_dynamic_scale_for_fsdp",
    "Float8ColwiseParallel",
    "Float8RowwiseParallel",
    "PrepareFloat8ModuleInput",
)
NOT_HERE = {
    "_auto_filter_for_recipe": "float8_module_filter(recipe, [*fqns, 'auto_filter_small_kn'])",
    "FP8Granularity": "of inference",
}


def in_torchao(name: str) -> Any:
    import torchao.float8
    import torchao.float8.float8_tensor_parallel as styles

    return getattr(torchao.float8, name, None) or getattr(styles, name)


def test_every_public_name_of_torchao_is_accounted_for() -> None:
    import torchao.float8
    import torchao.float8.float8_tensor_parallel as styles

    public = {*torchao.float8.__all__}
    public |= {name for name, found in vars(styles).items() if is_style_of(styles, found)}
    assert public == {*ITS_OWN, *CALLED_ALIKE, *NOT_HERE}
    assert not [name for name in NOT_HERE if hasattr(fp8dist, name)]


def is_style_of(module: Any, found: Any) -> bool:
    return inspect.isclass(found) and found.__module__ == module.__name__


@pytest.mark.parametrize("name", ITS_OWN)
def test_names_that_are_torchaos_own(name: str) -> None:
    assert getattr(fp8dist, name) is in_torchao(name)


def keywords(function: Any) -> dict[str, Any]:
    """Its keyword-only parameters with their defaults, those of the classes above it too."""
    functions = (
        [cls.__init__ for cls in function.__mro__] if inspect.isclass(function) else [function]
    )
    found: dict[str, Any] = {}
    for one in functions:
        parameters = inspect.signature(one).parameters.values()
        found = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | found
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def positional(function: Any) -> int:
    parameters = inspect.signature(function).parameters.values()
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


@pytest.mark.parametrize("name", CALLED_ALIKE)
def test_names_that_are_called_as_torchaos_are(name: str) -> None:
    """Ours may take more, by keywords that have defaults."""
    ours, theirs = getattr(fp8dist, name), in_torchao(name)
    assert positional(ours) == positional(theirs)
    assert keywords(theirs).items() <= keywords(ours).items()


def run_example(name: str, library: str) -> tuple[list[float], Counter[tuple[str, str, int]]]:
    """The losses of an example of this rank, and its all-gathers as (dtype, elements)."""
    path = EXAMPLES / name
    source = path.read_text()
    if library == "torchao":
        source = with_torchaos_imports(source)
    scope = {"__name__": "__main__", "__file__": str(path)}
    seed = torch.random.get_rng_state()
    # The group is there, and outlives the example.
    group = patch.multiple(
        dist, init_process_group=lambda: None, destroy_process_group=lambda: None
    )
    as_bytes = AsBytes() if DEVICE == "cpu" else contextlib.nullcontext()
    with group, collectives() as found, as_bytes:
        exec(compile(source, str(path), "exec"), scope)
    torch.random.set_rng_state(seed)
    return scope["losses"], Counter((c.name, wire_dtype(c.dtype), c.numel) for c in found)


def wire_dtype(dtype: torch.dtype) -> str:
    """float8 is what it is to NCCL, and bytes to gloo."""
    return "uint8" if dtype.itemsize == 1 else str(dtype).removeprefix("torch.")


def with_torchaos_imports(source: str) -> str:
    """An example as it was before: each import from the module that its mark says."""
    lines = []
    for line in source.splitlines():
        if MARK in line:
            line = line.replace(line.split()[1], line.partition(MARK)[2], 1)
        lines.append(line)
    return "\n".join(lines)


@pytest.mark.parametrize("name", ["torchao_fsdp2.py", "torchao_tp.py"])
def test_examples_differ_from_torchaos_in_the_import_alone(name: str) -> None:
    source = (EXAMPLES / name).read_text()
    ours = [line for line in source.splitlines() if "fp8dist" in line]
    assert ours and all(line.startswith("from fp8dist") and MARK in line for line in ours)
    assert "fp8dist" not in with_torchaos_imports(source)


def gathered(wire: Counter[tuple[str, str, int]]) -> Counter[tuple[str, str, int]]:
    return Counter({sent: times for sent, times in wire.items() if sent[0] == "all_gather"})


def test_fsdp2_example_has_torchaos_losses_and_bytes() -> None:
    """On a CPU the same sums in the same order. A GPU's matmuls of other strides add in another
    order, as `test_tp_torchao` says of its own.
    """
    theirs, ours = (
        run_on_ranks(2, run_example, "torchao_fsdp2.py", library)
        for library in ("torchao", "fp8dist")
    )
    for (losses, wire), (expected, their_wire) in zip(ours, theirs, strict=True):
        assert losses == (expected if DEVICE == "cpu" else pytest.approx(expected, rel=2e-3))
        assert losses[-1] < 0.8 * losses[0]
        assert gathered(wire) == gathered(their_wire)
        converted = (64 * 64 * 3 + 64 * 64) + 2 * (64 * 256)  # of a block
        rest = 2 * 64 + (3 * 64 + 64) + (256 + 64)  # its norms and biases, in bfloat16
        blocks = 2 * 2 * STEPS  # forward and backward
        assert wire["all_gather", "uint8", (converted + 2 * rest) // 2] == blocks
        # Scales: one collective a step, as torchao's, and at first one for each weight.
        assert wire["all_reduce", "int32", 8] == STEPS


def test_tensor_parallel_example_has_torchaos_losses_and_bytes() -> None:
    theirs, ours = (
        run_on_ranks(2, run_example, "torchao_tp.py", library) for library in ("torchao", "fp8dist")
    )
    for (losses, wire), (expected, their_wire) in zip(ours, theirs, strict=True):
        assert losses == pytest.approx(expected, rel=1e-6 if DEVICE == "cpu" else 2e-3)
        assert losses[-1] < 0.8 * losses[0]
        assert gathered(wire) == gathered(their_wire)
        # Scales of whole activations and gradients: of 4 bytes each, and no more than torchao has.
        ours_of, theirs_of = (
            sum(times for (_, of, numel), times in one.items() if of == dtype and numel == 1)
            for one, dtype in ((wire, "int32"), (their_wire, "float64"))
        )
        assert 0 < ours_of <= theirs_of


# torchao ships the checks of its own tests: a layer of tensor parallelism against one without, and
# training under FSDP2 against training without. They are run on this library by their imports.


def shipped_check(module_name: str, name: str) -> Any:
    """A function of torchao, from its source with another import."""
    module = importlib.import_module(module_name)
    source = inspect.getsource(module)
    for line in source.splitlines():
        if line.startswith("from torchao.float8.") and ".config" not in line:
            source = source.replace(line, f"from fp8dist import{line.partition(' import')[2]}")
    scope = {"__name__": module_name}
    exec(compile(source, module_name, "exec"), scope)
    assert not [line for line in source.splitlines() if line.startswith("from torchao.float8.f")]
    return scope[name]


def check_tensor_parallelism(recipe: str) -> None:
    check = shipped_check(
        "torchao.testing.training.dtensor_utils", "_test_lowp_mlp_tensor_parallelism_base"
    )
    torch.manual_seed(1)  # the same on all ranks
    mesh = dist.init_device_mesh(DEVICE, (dist.get_world_size(),))
    check(mesh, recipe, size=32, allgather_in_lowp=True)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_torchaos_check_of_tensor_parallelism(recipe: str) -> None:
    """Also by rows, where torchao's gathers are in high precision."""
    run_on_ranks(2, check_tensor_parallelism, recipe)


class Blocks(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)) for _ in range(2)))


def check_fsdp2(precompute: bool) -> None:
    check = shipped_check("torchao.testing.training.fsdp2_utils", "check_parity_no_mp")
    torch.manual_seed(1)
    reference = Blocks().to(DEVICE)
    sharded = copy.deepcopy(reference)
    config = fp8dist.Float8LinearConfig(enable_fsdp_float8_all_gather=True, emulate=True)
    for model in (reference, sharded):
        fp8dist.convert_to_float8_training(model, config=config)
    for block in sharded:
        fully_shard(block)
    fully_shard(sharded)
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (reference, sharded)]
    torch.manual_seed(2 + dist.get_rank())
    input = torch.randn(16, 32, device=DEVICE)
    # What the check asks of a test case.
    case: Any = SimpleNamespace(
        assertEqual=lambda a, b, msg: torch.testing.assert_close(a, b, msg=msg)
    )
    check(
        case, reference, optimizers[0], sharded, optimizers[1], input, config, precompute=precompute
    )


@pytest.mark.parametrize("precompute", [False, True])
def test_torchaos_check_of_fsdp2(precompute: bool) -> None:
    run_on_ranks(2, check_fsdp2, precompute)
