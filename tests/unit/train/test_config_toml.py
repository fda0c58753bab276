"""The trainer's configuration from TOML files, those that come with it and torchtitan's."""

import logging

import pytest

from fp8dist.train.config import SHIPPED_CONFIGS
from tests.unit.train.job_lines import FLOAT8, FLOAT8_TOML, parse, parse_toml, refusal, toml_refusal

# A job file with the sections and keys that torchtitan 0.2 users have.
TORCHTITAN_LLAMA3_8B = """
[job]
dump_folder = "./outputs"
description = "Llama 3 8B training"

[profiling]
enable_profiling = true
save_traces_folder = "profile_trace"
profile_freq = 100

[metrics]
log_freq = 10
enable_tensorboard = true
save_tb_folder = "tb"

[model]
name = "llama3"
flavor = "8B"
hf_assets_path = "./assets/hf/Llama-3.1-8B"
converters = []

[optimizer]
name = "AdamW"
lr = 3e-4
eps = 1e-8

[lr_scheduler]
warmup_steps = 200

[training]
local_batch_size = 1
seq_len = 8192
max_norm = 1.0
steps = 1000
dataset = "c4"

[training.dataloader]
num_workers = 0
pin_memory = false

[parallelism]
data_parallel_replicate_degree = 1
data_parallel_shard_degree = -1
tensor_parallel_degree = 1
pipeline_parallel_degree = 1
context_parallel_degree = 1

[checkpoint]
enable = false
folder = "checkpoint"
interval = 500
last_save_model_only = true
export_dtype = "float32"
async_mode = "disabled"

[compile]
enable = false
components = ["model", "loss"]

[activation_checkpoint]
mode = "selective"
selective_ac_option = "op"

[quantize.linear.float8]
enable_fsdp_float8_all_gather = false
precompute_float8_dynamic_scale_for_fsdp = false
filter_fqns = ["output"]

[quantize.linear.mx]
filter_fqns = ["output"]

[quantize.grouped_mm.float8]
fqns = ["experts"]

[validation]
enable = false
dataset = "c4_validation"
freq = 500
steps = 1200
"""


class TestToml:
    def test_the_float8_file(self, tmp_path, caplog):
        config = parse_toml(tmp_path, FLOAT8_TOML)
        float8 = config.quantize.linear.float8
        assert config.float8_enabled
        assert float8.enable_fsdp_float8_all_gather is True
        assert float8.precompute_float8_dynamic_scale_for_fsdp is True
        assert float8.filter_fqns == ["output", "auto_filter_small_kn"]
        assert config.compile.enable
        assert config.compile.components == ["model", "loss"]
        assert config.job.config_file == str(tmp_path / "job.toml")
        assert not caplog.records

    def test_torchtitan_file_parses_with_one_warning(self, tmp_path, caplog):
        with caplog.at_level(logging.WARNING, "fp8dist"):
            config = parse_toml(tmp_path, TORCHTITAN_LLAMA3_8B)
        assert config.model.flavor == "8B"
        assert config.model.hf_assets_path == "./assets/hf/Llama-3.1-8B"
        assert config.optimizer.lr == 3e-4
        assert config.training.seq_len == 8192
        assert config.activation_checkpoint.selective_ac_option == "op"
        assert config.quantize.linear.float8.float8_all_gather is False
        assert config.quantize.linear.float8.precompute_scales is False
        assert config.quantize.linear.mx.filter_fqns == ["output"]
        (record,) = caplog.records
        listed = record.getMessage().partition(": ")[2].split(", ")
        assert sorted(listed) == sorted(
            [
                "training.dataloader.pin_memory",
                "checkpoint.last_save_model_only",
                "checkpoint.export_dtype",
            ]
        )
        assert record.name == "fp8dist"
        assert "\n" not in record.getMessage()

    def test_unused_flags_join_the_warning(self, tmp_path, caplog):
        toml = "[metrics]\nenable_wandb = true\n"
        line = (
            "--profiling.enable_memory_snapshot --metrics.enable_wandb "
            "--checkpoint.no_initial_load_model_only --comm.trace_buf_size=0 --training.steps 5"
        )
        with caplog.at_level(logging.WARNING, "fp8dist"):
            config = parse_toml(tmp_path, toml, line)
        assert config.training.steps == 5
        (record,) = caplog.records
        assert record.getMessage().partition(": ")[2].split(", ") == [
            "metrics.enable_wandb",
            "profiling.enable_memory_snapshot",
            "checkpoint.initial_load_model_only",
            "comm.trace_buf_size",
        ]

    def test_flags_override_the_file_wherever_they_stand(self, tmp_path):
        (tmp_path / "job.toml").write_text("[training]\nsteps = 3\nseq_len = 64\n")
        config = parse(f"--training.steps 9 --job.config-file={tmp_path}/job.toml")
        assert config.training.steps == 9
        assert config.training.seq_len == 64

    def test_lists_may_be_text_and_numbers_may_be_whole(self, tmp_path):
        config = parse_toml(
            tmp_path,
            '[model]\nconverters = "quantize.linear.float8"\n[training]\nmax_norm = 2\n'
            "[activation_checkpoint]\nselective_ac_option = 3\n",
        )
        assert config.model.converters == ["quantize.linear.float8"]
        assert config.training.max_norm == 2.0
        assert config.activation_checkpoint.selective_ac_option == "3"

    @pytest.mark.parametrize(
        ("toml", "named"),
        [
            ("[training]\nstep = 3", ["'training.step'", "'training.steps'"]),
            ("[trainning]\nsteps = 3", ["'trainning.steps'", "'training.steps'"]),
            ("[training]\nseed = 3", ["'training.seed'", "'debug.seed'"]),
            ("[float8]\nfilter_fqns = []", [f"'{FLOAT8}.filter_fqns'"]),
            ("[profiling]\nprofile_frequ = 3", ["'profiling.profile_freq'"]),
            ("[trainning]", ["'trainning'"]),
            ("steps = 3", ["'steps'", "'training.steps'"]),
        ],
    )
    def test_unknown_key_is_refused_with_the_nearest(self, tmp_path, toml, named):
        message = toml_refusal(tmp_path, toml)
        assert message.startswith(f"{tmp_path}/job.toml: unknown key")
        for name in named:
            assert name in message

    @pytest.mark.parametrize(
        ("toml", "named"),
        [
            ('[training]\nsteps = "ten"', "training.steps is 'ten'; expected a whole number"),
            ("[training]\nsteps = 1.5", "training.steps is 1.5; expected a whole number"),
            ("[training]\nsteps = true", "training.steps is True; expected a whole number"),
            ("[training]\nsteps = []", "training.steps is []; expected a whole number"),
            ("[compile]\nenable = 1", "compile.enable is 1; expected true or false"),
            ("[optimizer]\nlr = [1]", "optimizer.lr is [1]; expected a number"),
            ("[job]\ndescription = 1.5", "job.description is 1.5; expected text"),
            ("[model]\nconverters = 3", "model.converters is 3; expected a list"),
            ("[model]\nconverters = [[]]", "model.converters is []; expected text"),
            ("compile = true", "compile is True; expected a section, [compile]"),
            ("[quantize]\nlinear = 3", "quantize.linear is 3; expected a section"),
            ("[training", "not a TOML file"),
        ],
    )
    def test_wrong_value_is_refused_naming_the_file(self, tmp_path, toml, named):
        message = toml_refusal(tmp_path, toml)
        assert message.startswith(f"{tmp_path}/job.toml: ")
        assert named in message

    def test_file_that_is_no_text_is_refused(self, tmp_path):
        (tmp_path / "job.toml").write_bytes(b"\xff\xfe")
        assert "not a TOML file" in refusal(f"--job.config_file {tmp_path}/job.toml")

    def test_missing_file_is_refused_with_those_shipped(self, tmp_path):
        for name in (f"{tmp_path}/nope.toml", str(tmp_path)):
            message = refusal(f"--job.config_file {name}")
            assert repr(name) in message
            for shipped in ("debugmodel.toml", "llama3_8b.toml", "llama3_70b.toml"):
                assert shipped in message

    def test_missing_file_is_refused_with_its_neighbours_where_none_are_shipped(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.setattr("fp8dist.train.config.SHIPPED_CONFIGS", tmp_path / "absent")
        (tmp_path / "mine.toml").touch()
        message = refusal(f"--job.config_file {tmp_path}/mien.toml")
        assert message.endswith(f"those in {tmp_path}: mine.toml")


class TestShippedJobs:
    def test_debug_model_has_every_gather_in_float8_and_needs_no_compiler(self, caplog):
        config = parse(f"--job.config_file {SHIPPED_CONFIGS}/debugmodel.toml")
        assert config.model.flavor == "debugmodel"
        assert config.float8_enabled
        assert config.quantize.linear.float8.recipe_name == "tensorwise"
        assert config.quantize.linear.float8.float8_all_gather
        assert config.quantize.linear.float8.precompute_scales
        assert not config.compile.enable
        assert config.training.text_path is None
        assert not caplog.records

    @pytest.mark.parametrize("flavor", ["8B", "70B"])
    def test_large_models_leave_float8_and_compile_to_the_command_line(self, flavor, caplog):
        config = parse(f"--job.config_file {SHIPPED_CONFIGS}/llama3_{flavor.lower()}.toml")
        assert config.model.flavor == flavor
        assert config.model.converters == []
        assert not config.compile.enable
        assert config.training.seq_len == 8192
        assert config.training.text_path is None
        assert not caplog.records

    def test_documented_command_line(self):
        config = parse(
            f"--job.config_file {SHIPPED_CONFIGS}/llama3_8b.toml "
            '--model.converters="quantize.linear.float8" '
            "--quantize.linear.float8.enable_fsdp_float8_all_gather "
            "--quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp "
            "--compile.enable"
        )
        assert config.model.flavor == "8B"
        assert config.float8_enabled
        assert config.quantize.linear.float8.enable_fsdp_float8_all_gather is True
        assert config.quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp is True
        assert config.compile.enable

    @pytest.mark.parametrize(
        ("flag", "expected"),
        [
            (
                '--quantize.linear.float8.filter_fqns="attention.wk,attention.wv,output"',
                ["attention.wk", "attention.wv", "output"],
            ),
            (
                '--quantize.linear.float8.filter_fqns="auto_filter_small_kn"',
                ["auto_filter_small_kn"],
            ),
        ],
    )
    def test_documented_filters(self, flag, expected):
        config = parse(f"--job.config_file {SHIPPED_CONFIGS}/llama3_8b.toml {flag}")
        assert config.quantize.linear.float8.filter_fqns == expected
