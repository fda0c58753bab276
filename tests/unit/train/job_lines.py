"""Command lines and TOML as the tests of the configuration give them to it."""

import shlex
from pathlib import Path

import pytest

from fp8dist.train.config import JobConfig, parse_config

# The keys that users were promised: written out, not derived from the dataclasses.
PROMISED = """
    job.config_file job.dump_folder job.description
    profiling.enable_profiling profiling.save_traces_folder profiling.profile_freq
    profiling.profiler_active profiling.profiler_warmup
    metrics.log_freq metrics.enable_tensorboard metrics.save_tb_folder
    model.name model.flavor model.hf_assets_path model.converters
    optimizer.name optimizer.lr optimizer.beta1 optimizer.beta2 optimizer.eps optimizer.weight_decay
    lr_scheduler.warmup_steps lr_scheduler.decay_ratio lr_scheduler.decay_type
    training.dataset training.dataset_path training.local_batch_size training.global_batch_size
    training.seq_len training.max_norm training.steps training.dtype training.mixed_precision_param
    training.enable_cpu_offload
    training.dataloader.num_workers training.dataloader.prefetch_factor
    parallelism.data_parallel_replicate_degree parallelism.data_parallel_shard_degree
    parallelism.fsdp_reshard_after_forward parallelism.tensor_parallel_degree
    parallelism.pipeline_parallel_degree parallelism.context_parallel_degree
    checkpoint.enable checkpoint.folder checkpoint.interval checkpoint.async_mode
    compile.enable compile.components
    activation_checkpoint.mode activation_checkpoint.selective_ac_option
    quantize.linear.float8.enable_fsdp_float8_all_gather
    quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp
    quantize.linear.float8.recipe_name quantize.linear.float8.filter_fqns
    quantize.linear.float8.emulate
    quantize.linear.mx.recipe_name quantize.linear.mx.filter_fqns
    quantize.grouped_mm.float8.fqns
    quantize.grouped_mm.mx.recipe_name quantize.grouped_mm.mx.fqns
    debug.seed debug.deterministic
    comm.train_timeout_seconds
    validation.enable validation.dataset validation.dataset_path validation.local_batch_size
    validation.seq_len validation.freq validation.steps
""".split()

FLOAT8_TOML = """
[model]
converters = ["quantize.linear.float8"]
[quantize.linear.float8]
enable_fsdp_float8_all_gather = true
precompute_float8_dynamic_scale_for_fsdp = true
filter_fqns = ["output", "auto_filter_small_kn"]
[compile]
enable = true
components = ["model", "loss"]
"""

FLOAT8 = "quantize.linear.float8"
MX = "quantize.linear.mx"
GROUPED_FLOAT8, GROUPED_MX = "quantize.grouped_mm.float8", "quantize.grouped_mm.mx"


def parse(line: str) -> JobConfig:
    """What a shell hands over for this command line, parsed."""
    return parse_config(shlex.split(line))


def parse_toml(tmp_path: Path, toml: str, line: str = "") -> JobConfig:
    file = tmp_path / "job.toml"
    file.write_text(toml)
    return parse(f"--job.config_file {file} {line}")


def refusal(line: str) -> str:
    with pytest.raises(ValueError) as caught:
        parse(line)
    return str(caught.value)


def toml_refusal(tmp_path: Path, toml: str) -> str:
    with pytest.raises(ValueError) as caught:
        parse_toml(tmp_path, toml)
    return str(caught.value)
