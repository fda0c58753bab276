"""torchtitan 0.2.2's own trainer with `fp8dist` as its converter, on 2 ranks and on one."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.environment import ROOT, cpu_environment

# Not `importorskip`: torchtitan imports Triton, which a CPU has no use for.
if importlib.util.find_spec("torchtitan") is None:
    pytest.skip("needs torchtitan==0.2.2", allow_module_level=True)

CONFIG = ROOT / "scripts/clients/torchtitan_llama3.toml"
LAYERS = 6  # of the debug model

TENSORWISE = ["--quantize.linear.float8.recipe_name=tensorwise"]
# torchtitan's converter. Its float8 gathers with a recipe's name are refused, even tensorwise.
TORCHAO = [
    "--model.converters=quantize.linear.float8",
    "--quantize.linear.float8.emulate",
    "--quantize.linear.float8.recipe_name=None",
]
TENSOR_PARALLEL = [
    "--parallelism.tensor_parallel_degree=2",
    "--activation_checkpoint.mode=none",  # gathers are repeated otherwise
]
NOTHING_CONVERTED = ["--quantize.linear.float8.filter_fqns=layers,output"]
CHECKPOINT = ["--checkpoint.enable", "--checkpoint.interval=2"]

# Name -> (ranks, steps, flags).
JOBS = {
    "torchao": (2, 3, [*TORCHAO, *CHECKPOINT]),
    "tensorwise": (2, 3, TENSORWISE),
    "resumed": (2, 3, [*TENSORWISE, *CHECKPOINT, "--checkpoint.load_step=2"]),
    "tensor parallel": (2, 2, TENSOR_PARALLEL),
    "tensor parallel, high precision": (2, 2, [*TENSOR_PARALLEL, *NOTHING_CONVERTED]),
    "torchao, one rank": (1, 2, TORCHAO),
    "tensorwise, one rank": (1, 2, TENSORWISE),
}


def common_flags(folder: Path) -> list[str]:
    """The example's job, small enough for a CPU."""
    return [
        f"--job.config_file={CONFIG}",
        f"--job.dump_folder={folder / 'outputs'}",
        "--model.flavor=debugmodel",
        f"--model.hf_assets_path={folder}",
        "--training.dataset=c4_test",
        f"--training.dataset_path={folder / 'text'}",
        "--training.seq_len=32",
        "--training.mixed_precision_param=float32",
        "--lr_scheduler.warmup_steps=0",
        "--compile.no-enable",
        "--debug.seed=1",
    ]


def write_text_and_tokenizer(folder: Path) -> None:
    """This file's lines, and a tokenizer of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "text").mkdir()
    lines = [json.dumps({"text": line}) for line in Path(__file__).read_text().splitlines() if line]
    (folder / "text" / "lines.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank, what `torchtitan_cpu` saw of all jobs."""
    folder = tmp_path_factory.mktemp("torchtitan")
    write_text_and_tokenizer(folder)
    jobs = {
        name: {"ranks": ranks, "flags": [*common_flags(folder), f"--training.steps={steps}", *own]}
        for name, (ranks, steps, own) in JOBS.items()
    }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program = ["-m", "tests.clients.torchtitan_cpu", folder / "jobs.json", folder]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", *program],
        env=cpu_environment(GLOO_SOCKET_IFNAME="lo", HF_HOME=str(folder / "hf")),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def losses(seen: list[dict[str, Any]], job: str) -> list[list[float]]:
    return [of_rank[job]["losses"] for of_rank in seen if job in of_rank]


def elements(step: list[Any], name: str, dtype: str) -> list[int]:
    """Of each of this rank's collectives of that kind, how many it sent."""
    return [sent for kind, _, of, sent in step if (kind, of) == (name, f"torch.{dtype}")]


def test_losses_are_those_of_torchtitans_own_converter(seen: list[dict[str, Any]]) -> None:
    """The same sums in the same order."""
    theirs, ours = losses(seen, "torchao"), losses(seen, "tensorwise")
    assert [len(of_rank) for of_rank in ours] == [3, 3]
    assert ours == theirs
    assert sum(rank[-1] for rank in ours) < sum(rank[0] for rank in ours)


def test_one_rank_has_the_losses_of_torchtitans_own_converter(seen: list[dict[str, Any]]) -> None:
    ours = losses(seen, "tensorwise, one rank")
    assert [len(of_rank) for of_rank in ours] == [2]
    assert ours == losses(seen, "torchao, one rank")


def test_weights_are_gathered_one_byte_per_element(seen: list[dict[str, Any]]) -> None:
    sizes = seen[0]["tensorwise"]["sizes"]
    blocks = {name: size for name, size in sizes.items() if name.startswith("layers.")}
    converted = sum(numel for numel, is_float8 in blocks.values() if is_float8)
    norms = sum(numel for numel, is_float8 in blocks.values() if not is_float8)
    assert converted > 0.8 * sum(numel for numel, _ in sizes.values())
    for step in seen[0]["tensorwise"]["wire"]:
        gathered = elements(step, "all_gather", "uint8")
        assert len(gathered) == 2 * LAYERS  # forward and backward
        assert sum(gathered) == 2 * (converted + 4 * norms) // 2  # half of it is this rank's


def test_gathers_are_those_of_torchtitans_own_converter(seen: list[dict[str, Any]]) -> None:
    for ours, theirs in zip(seen[0]["tensorwise"]["wire"], seen[0]["torchao"]["wire"], strict=True):
        for dtype in ("uint8", "float32"):
            assert elements(ours, "all_gather", dtype) == elements(theirs, "all_gather", dtype)


def test_scales_are_computed_by_the_hook_after_the_optimizer(seen: list[dict[str, Any]]) -> None:
    """From the second step on: in the first no optimizer has called it yet."""
    for step in seen[0]["tensorwise"]["wire"][1:]:
        amaxes = [sent for kind, op, of, sent in step if (op, of) == ("MAX", "torch.int32")]
        assert amaxes == [7 * LAYERS]  # one collective, with an amax per weight


def test_resumes_a_run_of_torchtitans_own_converter(seen: list[dict[str, Any]]) -> None:
    last_step = [of_rank[2:] for of_rank in losses(seen, "torchao")]
    assert losses(seen, "resumed") == last_step


def test_tensor_parallelism_gathers_activations_in_float8(seen: list[dict[str, Any]]) -> None:
    """As often as in high precision; embedding and output are not converted."""
    ours, theirs = (
        seen[0][name]["wire"][-1] for name in ("tensor parallel", "tensor parallel, high precision")
    )
    gathers = elements(theirs, "all_gather", "float32")
    in_float8 = elements(ours, "all_gather", "uint8")
    assert set(in_float8) == set(gathers)
    tokens = 32 // 2  # of this rank, each with a scale
    in_high_precision = [n for n in elements(ours, "all_gather", "float32") if n != tokens]
    assert len(in_float8) == 4 * LAYERS and len(gathers) == 4 * LAYERS + 2
    assert len(in_high_precision) == 2
    # Weights are cut, but not gathered: their scales are all that is exchanged.
    amaxes = [sent for kind, op, of, sent in ours if (op, of) == ("MAX", "torch.int32")]
    assert len(amaxes) == 1


def test_tensor_parallelism_learns_as_in_high_precision(seen: list[dict[str, Any]]) -> None:
    """Rounding to 3 bits of mantissa averages out over the 256 products of each sum."""
    (ours, *_), (theirs, *_) = (
        losses(seen, name) for name in ("tensor parallel", "tensor parallel, high precision")
    )
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert ours != theirs
