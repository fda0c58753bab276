"""A dry run's figures are those of formulas, also on many ranks."""

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch.distributed as dist

from fp8dist.config import RECIPES
from fp8dist.plan import dry_run
from fp8dist.plan.dry_run import fake_mesh, microbatches, observe
from fp8dist.plan.figures import sent_by_purpose
from fp8dist.plan.step import Observed
from fp8dist.plan.variants import unconverted, with_recipes
from fp8dist.train.config import JobConfig, parse_config

BASE = "high precision"
ARGUMENTS = (
    "--model.flavor=debugmodel:2",
    "--training.seq_len=32",
    "--training.local_batch_size=1",
    "--quantize.linear.float8.filter_fqns=output",
    "--activation_checkpoint.mode=none",
)
# The debug model's sizes, as they are in its table of flavors, but for the layers.
LAYERS, DIM, KV, HIDDEN, VOCAB, HEAD = 2, 256, 128, 768, 256, 64
LINEARS = [(DIM, DIM)] * 2 + [(KV, DIM)] * 2 + [(HIDDEN, DIM)] * 2 + [(DIM, HIDDEN)]
NORMS = [(DIM, 1)] * 2
ROOT = [(VOCAB, DIM)] * 2 + [(DIM, 1)]
BF16, FP32 = 2, 4


def job_of(*more: str, recipe: str = BASE) -> JobConfig:
    job = parse_config([*ARGUMENTS, *more])
    return (
        unconverted(job)[1]
        if recipe == BASE
        else with_recipes(job, [recipe], experts=False)[recipe]
    )


def dry(job: JobConfig, ranks: int, *, all_layers: bool = False) -> Observed:
    with fake_mesh(job, ranks) as mesh:
        return observe(job, mesh, all_layers=all_layers)


def padded(shapes: list[tuple[int, int]], ranks: int) -> int:
    """Elements of rank 0's shards, which the others' are padded to."""
    return sum(math.ceil(rows / ranks) * columns for rows, columns in shapes)


def amax_bytes(recipe: str, ranks: int) -> int:
    """What the all-reduce of a step carries."""
    even = all(rows % ranks == 0 for rows, _ in LINEARS)
    per_weight = {
        BASE: lambda rows, columns: 0,
        "tensorwise": lambda rows, columns: 4,
        "rowwise": lambda rows, columns: 4 * (rows + columns),
        "blockwise": lambda rows, columns: 4 * (rows // 128) * (columns // 128),
        # Exponents, 4 to a word, where they do not travel with the payload.
        "mxfp8_rceil": lambda rows, columns: 0 if even else rows * 4 * math.ceil(columns / 128),
    }
    return LAYERS * sum(per_weight[recipe](rows, columns) for rows, columns in LINEARS)


def scale_bytes(recipe: str, ranks: int) -> int:
    """What a rank keeps: scales and their reciprocals, or exponents."""
    if recipe == "mxfp8_rceil":
        even = all(rows % ranks == 0 for rows, _ in LINEARS)
        return 0 if even else LAYERS * sum(rows * columns // 32 for rows, columns in LINEARS)
    return 2 * amax_bytes(recipe, ranks)


@dataclass
class Fsdp:
    """What a step of two microbatches on `ranks` ranks hands over and holds, by formulas."""

    recipe: str
    ranks: int

    def __post_init__(self) -> None:
        n = self.ranks
        self.payload = padded(LINEARS, n)
        if self.recipe == BASE:
            self.payload *= BF16
        elif RECIPES[self.recipe].scale_format == "e8m0" and n == 8:
            self.payload += padded(LINEARS, n) // 32
        self.block = self.payload + padded(NORMS, n) * BF16
        self.root = padded(ROOT, n) * BF16
        # Microbatches, forward and backward.
        self.gathered = 2 * (2 * LAYERS * self.block + self.root)
        self.elements = LAYERS * padded(LINEARS + NORMS, n) + padded(ROOT, n)
        self.parameters = LAYERS * len(LINEARS + NORMS) + len(ROOT)

    def sent(self) -> Any:
        n, ring = self.ranks, 2 * (self.ranks - 1) / self.ranks
        return pytest.approx(
            {
                "weights": (n - 1) * self.gathered,
                "gradients": 2 * (n - 1) * self.elements * FP32,
                "activations": 0,
                "scales": ring * amax_bytes(self.recipe, n),
                "rest": ring * self.parameters * FP32,
            },
            rel=1e-12,  # of float64
        )


# 100 ranks have shards of different sizes. Where they are alike, MXFP8's exponents are elsewhere.
@pytest.mark.parametrize(
    ("ranks", "recipe"),
    [
        *((100, name) for name in (BASE, "tensorwise", "rowwise", "blockwise", "mxfp8_rceil")),
        (8, "mxfp8_rceil"),
    ],
)
def test_fsdp(ranks: int, recipe: str) -> None:
    job = job_of(f"--training.global_batch_size={2 * ranks}", recipe=recipe)
    found, n = dry(job, ranks), ranks
    expected = Fsdp(recipe, ranks)
    payload, block, root = expected.payload, expected.block, expected.root
    gathered, elements = expected.gathered, expected.elements
    assert found.microbatches == 2
    assert sent_by_purpose(found) == expected.sent()
    assert found.gathered == n * gathered

    table = 32 * HEAD // 2 * 2 * FP32  # of rotary positions: cosine and sine
    memory = dict(found.memory)
    assert memory.pop("unsharded") > n * (block + root)
    assert memory.pop("activations") > 32 * VOCAB * FP32  # the logits alone
    assert memory == {
        "parameters": elements * FP32 + table,
        "gradients": elements * FP32,
        "optimizer": 2 * elements * FP32 + expected.parameters * 4,  # a step count for each
        "payloads": 0 if recipe == BASE else LAYERS * payload,
        "scales": scale_bytes(recipe, n),
    }

    copies = 2 * (n + 1) * gathered
    in_hp = LAYERS * padded(NORMS, n) * 2 + padded(ROOT, n)
    if recipe == BASE:
        in_hp += LAYERS * padded(LINEARS, n) * 2
    casts = 2 * in_hp * (FP32 + BF16)
    if recipe != BASE:
        packed = payload != padded(LINEARS, n)
        reads = 1 if packed or recipe == "rowwise" else 2  # amaxes in the pass that casts
        casts += LAYERS * (reads * padded(LINEARS, n) * FP32 + payload)
    assert (found.passes.copies, found.passes.shards) == (copies, casts)


@pytest.mark.filterwarnings("error:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "mxfp8_rceil"])
def test_one_rank_gathers_nothing(recipe: str) -> None:
    found = dry(job_of("--training.global_batch_size=2", recipe=recipe), 1)
    assert found.microbatches == 2  # and so a second unshard
    assert sum(sent_by_purpose(found).values()) == found.gathered == found.passes.copies == 0
    # A block's gradients are laid out where they stay, not in a buffer.
    base = dry(job_of("--training.global_batch_size=2", recipe=BASE), 1)
    laid_out = FP32 * (padded(LINEARS, 1) + padded(NORMS, 1))
    assert found.memory["unsharded"] == base.memory["unsharded"] - laid_out


@pytest.mark.parametrize("flag", ["--training.enable_cpu_offload", "--training.dtype=bfloat16"])
def test_one_rank_that_copies_its_gradients_has_buffers(flag: str) -> None:
    flags = ("--training.global_batch_size=2", flag)
    found, base = (dry(job_of(*flags, recipe=recipe), 1) for recipe in ("tensorwise", BASE))
    assert found.memory["unsharded"] == base.memory["unsharded"]


def test_scales_that_are_not_precomputed_are_those_of_the_first_microbatch() -> None:
    off = "--quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp=false"
    job = job_of("--training.global_batch_size=16", off, recipe="rowwise")
    assert not job.precomputes_scales
    assert sent_by_purpose(dry(job, 8)) == Fsdp("rowwise", 8).sent()


def test_hsdp_reduces_gradients_between_replicas() -> None:
    job = job_of("--parallelism.data_parallel_replicate_degree=4", recipe="rowwise")
    found = dry(job, 8)
    elements = LAYERS * padded(LINEARS + NORMS, 2) + padded(ROOT, 2)
    # Two shards: 1/2 of all of both. Four replicas: 2 * 3/4 of a shard.
    assert sent_by_purpose(found)["gradients"] == elements * FP32 * (1 + 2 * 3 / 4)
    assert sent_by_purpose(found)["scales"] == amax_bytes("rowwise", 2)


@pytest.mark.parametrize("recipe", [BASE, "rowwise", "rowwise_with_gw_hp"])
def test_tensor_parallelism(recipe: str) -> None:
    found = dry(job_of("--parallelism.tensor_parallel_degree=2", recipe=recipe), 8)
    handed: Counter[tuple[str, str, str]] = Counter()
    for kind, count in found.handed.items():
        if kind.over == "tp" and kind.operation != "all_reduce":
            handed[kind.phase, kind.operation, kind.dtype] += count
    part = 32 // 2 * DIM  # of an activation
    whole = 2 * part
    expected = Counter(
        {
            # The output layer's input, and the gradient of the embedding.
            ("forward", "all_gather", "bfloat16"): part * BF16,
            ("backward", "all_gather", "bfloat16"): part * BF16,
            # Sums of wo and w2, and of what goes into attention and feed-forward; of the embedding
            # and the output layer.
            ("forward", "reduce_scatter", "bfloat16"): (2 * LAYERS + 1) * whole * BF16,
            ("backward", "reduce_scatter", "bfloat16"): (2 * LAYERS + 1) * whole * BF16,
        }
    )
    scales = 2 * LAYERS * 32 // 2 * FP32
    if recipe == BASE:
        for phase in ("forward", "backward"):
            expected[phase, "all_gather", "bfloat16"] += 2 * LAYERS * part * BF16
    else:
        expected["forward", "all_gather", "uint8"] += 2 * LAYERS * part
        expected["forward", "all_gather", "float32"] += scales
    if recipe == "rowwise":
        expected["backward", "all_gather", "uint8"] += 2 * LAYERS * part
        expected["backward", "all_gather", "float32"] += scales
    elif recipe == "rowwise_with_gw_hp":  # inputs once more, and gradients
        expected["backward", "all_gather", "bfloat16"] += 4 * LAYERS * part * BF16
    assert handed == expected


def test_experts_outputs_are_kept_as_a_gpu_keeps_them() -> None:
    """In bfloat16, also where they are dequantized and a CPU would multiply in float32."""
    job = parse_config(
        [
            "--model.flavor=debugmoe:2",
            "--training.seq_len=64",
            "--activation_checkpoint.mode=selective",
            "--activation_checkpoint.selective_ac_option=op",
        ]
    )
    base = dry(unconverted(job)[1], 2).memory["activations"]
    for recipe, other in with_recipes(job, ["rowwise", "mxfp8_rceil"], experts=True).items():
        assert 0.9 < dry(other, 2).memory["activations"] / base < 1.1, recipe


def test_two_short_models_tell_what_a_deep_one_does() -> None:
    """Of 2 and 4 layers, as every second recomputes its activations."""
    job = job_of(
        "--model.flavor=debugmodel:6",
        "--activation_checkpoint.mode=selective",
        "--parallelism.fsdp_reshard_after_forward=never",
        "--parallelism.tensor_parallel_degree=2",
        recipe="rowwise",
    )
    assert dry_run._period(job) == 2
    assert dry(job, 4) == dry(job, 4, all_layers=True)


def test_layers_that_are_not_alike_are_noticed() -> None:
    first = dry(job_of("--model.flavor=debugmodel:1"), 2)
    other = replace(first, calls={}, handed={})
    with pytest.raises(AssertionError, match="other kinds"):
        dry_run._continued(first, other, 2)


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="do not fit 3 ranks"):
        dry(job_of("--parallelism.tensor_parallel_degree=2"), 3)
    with pytest.raises(ValueError, match="does not divide the 4 heads"):
        dry(job_of("--parallelism.tensor_parallel_degree=3"), 3)
    with pytest.raises(ValueError, match="is not a multiple of"):
        microbatches(job_of("--training.global_batch_size=6"), 4)
    with pytest.raises(ValueError, match="does not exist"):
        dry_run.shape_of(job_of("--model.flavor=9B"))
    assert not dist.is_initialized()


def test_a_process_group_is_in_the_way() -> None:
    job = job_of()
    with fake_mesh(job, 2), pytest.raises(AssertionError, match="without a process group"):
        with fake_mesh(job, 2):
            pass
