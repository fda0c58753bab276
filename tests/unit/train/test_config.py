"""The trainer's configuration: TOML, command line, and what is refused."""

import ast
import inspect
import json
import logging
import re
import shlex
from pathlib import Path

import pytest

from fp8dist.train import config_sections
from fp8dist.train.config import SHIPPED_CONFIGS, JobConfig, key_types, parse_config, validate
from fp8dist.train.config_values import LIMITS
from fp8dist.train.torchtitan_keys import UNUSED

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

UNSET_IS_NOTHING = {
    "JobSection.config_file",
    "TrainingSection.dataset_path",
    "ValidationSection.dataset_path",
    "Float8LinearSection.enable_fsdp_float8_all_gather",
    "Float8LinearSection.precompute_float8_dynamic_scale_for_fsdp",
}
UNITS = r"[Pp]rocesses|[Ss]teps|[Ss]equences|[Tt]okens|[Rr]anks|[Rr]eplicas|[Ss]econds|Forwards"
NO_UNITS = {
    "DebugSection.seed",
    "ParallelismSection.pipeline_parallel_degree",
    "ParallelismSection.context_parallel_degree",
}

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


class TestKeys:
    def test_are_the_promised_ones(self):
        assert sorted(key_types()) == sorted(PROMISED)

    def test_no_key_is_both_used_and_unused(self):
        assert not UNUSED & key_types().keys()

    def test_limits_are_of_keys(self):
        assert not LIMITS.keys() - key_types().keys()

    def test_to_dict_goes_through_json(self):
        config = parse("--training.steps 7 --quantize.linear.float8.filter_fqns a,b")
        back = json.loads(json.dumps(config.to_dict()))
        assert back["training"]["steps"] == 7
        assert back["quantize"]["linear"]["float8"]["filter_fqns"] == ["a", "b"]
        assert back["quantize"]["linear"]["float8"]["enable_fsdp_float8_all_gather"] is None
        assert len(back) == 15


class TestCommandLine:
    def test_no_flags_are_the_defaults(self):
        assert parse("") == JobConfig()

    def test_value_after_a_space_and_after_an_equals_sign(self):
        config = parse("--training.steps 7 --optimizer.lr=1e-3 --model.flavor 8B")
        assert config.training.steps == 7
        assert config.optimizer.lr == 1e-3
        assert config.model.flavor == "8B"

    def test_hyphens_are_underscores_in_keys_only(self):
        config = parse("--lr-scheduler.warmup-steps 3 --job.dump-folder=my-run")
        assert config.lr_scheduler.warmup_steps == 3
        assert config.job.dump_folder == "my-run"

    def test_values_keep_spaces_equals_signs_and_leading_dashes(self):
        config = parse(
            '--job.description="a = b, c" --job.dump_folder=--odd '
            "--training.global_batch_size -1 --parallelism.data_parallel_shard_degree=-1"
        )
        assert config.job.description == "a = b, c"
        assert config.job.dump_folder == "--odd"
        assert config.training.global_batch_size == -1

    def test_last_of_several_wins(self):
        assert parse("--training.steps 3 --training.steps=4").training.steps == 4

    @pytest.mark.parametrize(
        ("flag", "expected"),
        [
            ("--compile.enable", True),
            ("--compile.enable=true", True),
            ("--compile.enable=True", True),
            ("--compile.enable true", True),
            ("--compile.enable=false", False),
            ("--compile.enable False", False),
            ("--compile.no_enable", False),
            ("--compile.no-enable", False),
            ("--no-compile.enable", False),
        ],
    )
    def test_switches(self, tmp_path, flag, expected):
        toml = f"[compile]\nenable = {str(not expected).lower()}\n"
        config = parse_toml(tmp_path, toml, f"{flag} --training.steps 3")
        assert config.compile.enable is expected
        assert config.training.steps == 3

    @pytest.mark.parametrize(
        ("flag", "expected"),
        [
            ("", None),
            ("--{}", True),
            ("--{}=true", True),
            ("--{}=false", False),
            ("--{} false", False),
            ("--no-{}", False),
            ("--{}=none", None),
        ],
    )
    def test_switches_that_may_be_unset(self, flag, expected):
        config = parse(flag.format(f"{FLOAT8}.enable_fsdp_float8_all_gather"))
        assert config.quantize.linear.float8.enable_fsdp_float8_all_gather is expected

    def test_lists(self):
        config = parse('--model.converters="quantize.linear.float8," --compile.components loss')
        assert config.model.converters == ["quantize.linear.float8"]
        assert config.compile.components == ["loss"]

    def test_empty_list_and_empty_optional(self, tmp_path):
        toml = FLOAT8_TOML + '[training]\ndataset_path = "x"\n'
        config = parse_toml(tmp_path, toml, "--model.converters= --training.dataset_path=")
        assert config.model.converters == []
        assert config.training.dataset_path is None
        assert config.quantize.linear.float8.filter_fqns == ["output", "auto_filter_small_kn"]

    def test_optional_numbers(self, tmp_path):
        toml = "[lr_scheduler]\ndecay_ratio = 0.5\n[debug]\nseed = 3\n"
        assert parse_toml(tmp_path, toml).lr_scheduler.decay_ratio == 0.5
        config = parse_toml(tmp_path, toml, "--lr_scheduler.decay_ratio=none --debug.seed None")
        assert config.lr_scheduler.decay_ratio is None
        assert config.debug.seed is None

    def test_max_norm_may_be_infinite(self):
        assert parse("--training.max_norm inf").training.max_norm == float("inf")

    @pytest.mark.parametrize(
        ("line", "named"),
        [
            ("--trainning.steps 3", ["'trainning.steps'", "'training.steps'"]),
            ("--training.step=3", ["'training.step'", "'training.steps'"]),
            ("--training.seed 3", ["'training.seed'", "'debug.seed'"]),
            ("--steps 3", ["'steps'", "'training.steps'"]),
            ("--float8.emulate", ["'float8.emulate'", "'quantize.linear.float8.emulate'"]),
            ("--checkpoint.enable_checkpoint", ["'checkpoint.enable'"]),
            ("--profiling.enable_profling", ["'profiling.enable_profiling'"]),
            ("--no-training.steps", ["'no_training.steps'"]),
        ],
    )
    def test_unknown_key_is_refused_with_the_nearest(self, line, named):
        message = refusal(line)
        assert message.startswith("command line: unknown key")
        for name in named:
            assert name in message

    def test_far_off_key_is_refused_without_a_guess(self):
        assert refusal("--zzz=3") == "command line: unknown key 'zzz'"

    @pytest.mark.parametrize(
        "line", ["steps", "-s 3", "--compile.enable maybe", "--model.flavor a b"]
    )
    def test_stray_words_are_refused(self, line):
        assert "unexpected" in refusal(line)

    @pytest.mark.parametrize("line", ["--training.steps", "--training.steps --compile.enable"])
    def test_missing_value_is_refused(self, line):
        assert refusal(line) == "command line: --training.steps needs a value"

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("--training.steps=ten", "a whole number"),
            ("--training.steps=1.5", "a whole number"),
            ("--training.steps=", "a whole number"),
            ("--optimizer.lr=fast", "a number"),
            ("--compile.enable=maybe", "true or false"),
            ("--debug.seed=x", "a whole number"),
        ],
    )
    def test_value_of_another_type_is_refused(self, line, expected):
        message = refusal(line)
        key, value = line.removeprefix("--").split("=")
        assert f"command line: {key} is '{value}'; expected {expected}" in message

    def test_negated_flag_takes_no_value(self):
        assert "takes no value" in refusal("--compile.no_enable=true")

    @pytest.mark.parametrize("columns", ["80", "200"])
    def test_help_shows_every_key_with_its_meaning(self, capsys, monkeypatch, columns):
        monkeypatch.setenv("COLUMNS", columns)
        with pytest.raises(SystemExit) as caught:
            parse_config(["--training.steps=3", "--help"])
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        for key in PROMISED:
            assert re.search(rf"--{re.escape(key)}\s", shown), key
        assert "Gather weights as float8, one byte per element." in shown
        assert "(default: stdlib)" in shown

    def test_every_key_has_its_meaning_and_every_number_its_unit(self):
        """A docstring of its own below each field, as an AST sees it."""
        for node in ast.parse(inspect.getsource(config_sections)).body:
            if not (isinstance(node, ast.ClassDef) and node.name.endswith("Section")):
                continue
            for field, below in zip(node.body, [*node.body[1:], None], strict=True):
                kind = ast.unparse(getattr(field, "annotation", ast.Constant("")))
                if not isinstance(field, ast.AnnAssign) or "Section" in kind or "ClassVar" in kind:
                    continue
                place = f"{node.name}.{ast.unparse(field.target)}"
                assert isinstance(below, ast.Expr), place
                words = ast.literal_eval(below.value)
                assert words[0] == words[0].upper() or ":" in words, place
                # Help breaks where these lines do.
                assert re.fullmatch(r"(.*[.;:]\n)*.*\.", words), place
                # What is left unset by default, or -1 for all, is explained.
                if isinstance(field.value, ast.Constant) and field.value.value is None:
                    if place not in UNSET_IS_NOTHING:
                        assert "none:" in words, place
                elif ast.unparse(field.value) == "-1":
                    assert "-1:" in words, place
                if kind.startswith("int") and place not in NO_UNITS:
                    assert re.search(UNITS, words), place


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


class TestFloat8Flags:
    @pytest.mark.parametrize(
        ("gather", "precompute", "resolved"),
        [
            (None, None, (True, True)),
            (True, None, (True, True)),
            (None, True, (True, True)),
            (True, True, (True, True)),
            (None, False, (True, False)),
            (True, False, (True, False)),
            (False, None, (False, False)),
            (False, False, (False, False)),
        ],
    )
    def test_resolve(self, gather, precompute, resolved):
        config = JobConfig()
        float8 = config.quantize.linear.float8
        float8.enable_fsdp_float8_all_gather = gather
        float8.precompute_float8_dynamic_scale_for_fsdp = precompute
        validate(config)
        assert (float8.float8_all_gather, float8.precompute_scales) == resolved

    def test_precompute_without_gather_is_refused(self):
        message = refusal(
            f"--{FLOAT8}.enable_fsdp_float8_all_gather=false "
            f"--{FLOAT8}.precompute_float8_dynamic_scale_for_fsdp"
        )
        assert "enable_fsdp_float8_all_gather is false" in message
        assert "Turn the gather on" in message

    def test_unknown_recipe_is_refused_with_the_nearest(self):
        message = refusal(f"--{FLOAT8}.recipe_name=tensorwsie")
        assert message.startswith(f"{FLOAT8}.recipe_name: ")
        assert "'tensorwsie'" in message
        assert "'tensorwise'" in message

    @pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp", "blockwise"])
    def test_every_recipe_goes_with_the_float8_gather(self, recipe):
        config = parse(
            f"--model.converters={FLOAT8} --{FLOAT8}.recipe_name {recipe} "
            f"--{FLOAT8}.enable_fsdp_float8_all_gather"
        )
        assert config.conversion is config.quantize.linear.float8
        assert config.conversion.recipe_name == recipe
        assert config.conversion.float8_all_gather
        assert config.conversion.precompute_scales


class TestMXFlags:
    @pytest.mark.parametrize("recipe", ["mxfp8", "mxfp8_rceil", "mxfp8_rceil_wgrad_with_hp"])
    def test_recipes(self, recipe):
        config = parse(
            f'--model.converters="{MX}" --{MX}.recipe_name {recipe} --{MX}.filter_fqns output,wk'
        )
        assert config.float8_enabled
        assert config.conversion is config.quantize.linear.mx
        assert config.conversion.recipe_name == recipe
        assert config.conversion.filter_fqns == ["output", "wk"]

    def test_gathers_in_float8_whatever_the_float8_section_says(self, tmp_path):
        toml = f"[{FLOAT8}]\nenable_fsdp_float8_all_gather = false\n"
        config = parse_toml(tmp_path, toml, f"--model.converters={MX}")
        assert config.conversion.recipe_name == "mxfp8_rceil"
        assert config.conversion.float8_all_gather
        assert config.conversion.precompute_scales

    @pytest.mark.parametrize("old", ["mxfp8_cublas", "mxfp8_cublas_rceil", "mxfp8_emulated"])
    def test_old_names_are_refused_with_the_new_one(self, old):
        message = refusal(f"--model.converters={MX} --{MX}.recipe_name={old}")
        assert message == f"{MX}.recipe_name: recipe {old!r} is called 'mxfp8_rceil' now"

    @pytest.mark.parametrize(
        ("section", "recipe", "right"),
        [
            (FLOAT8, "mxfp8", MX),
            (FLOAT8, "mxfp8_rceil_wgrad_with_hp", MX),
            (MX, "rowwise", FLOAT8),
            (MX, "blockwise", FLOAT8),
        ],
    )
    def test_recipe_of_the_other_section_is_refused_with_the_right_one(
        self, section, recipe, right
    ):
        message = refusal(f"--model.converters={section} --{section}.recipe_name={recipe}")
        assert message.startswith(f"{section}.recipe_name is {recipe!r}, a recipe of {right}: ")
        assert f"set {right}.recipe_name" in message

    def test_gather_cannot_be_turned_off(self):
        message = refusal(f"--{MX}.enable_fsdp_float8_all_gather=false")
        assert "unknown key" in message

    def test_both_converters_are_refused(self):
        message = refusal(f"--model.converters={FLOAT8},{MX}")
        assert f"has both {FLOAT8} and {MX}" in message
        assert "list of (filter, recipe)" in message

    def test_no_converter_converts_nothing(self):
        config = parse(f"--{MX}.recipe_name mxfp8")
        assert config.conversion is None
        assert not config.float8_enabled


class TestExperts:
    def test_converters_of_layers_and_of_experts(self):
        config = parse(
            f'--model.converters="{FLOAT8},{GROUPED_FLOAT8}" --{GROUPED_FLOAT8}.fqns="moe,experts"'
        )
        assert config.conversion is config.quantize.linear.float8
        assert config.conversion_of_experts is config.quantize.grouped_mm.float8
        assert config.conversion_of_experts.fqns == ["moe", "experts"]
        assert config.conversion_of_experts.recipe_name == "rowwise"

    def test_experts_alone(self):
        config = parse(f"--model.converters={GROUPED_MX}")
        assert config.conversion is None
        assert config.conversion_of_experts.recipe_name == "mxfp8"
        assert config.conversion_of_experts.fqns == ["experts"]
        assert config.float8_enabled
        assert config.precomputes_scales

    def test_layers_that_do_not_precompute_beside_experts_that_do(self):
        off = f"--{FLOAT8}.precompute_float8_dynamic_scale_for_fsdp=false"
        assert not parse(f"--model.converters={FLOAT8} {off}").precomputes_scales
        assert parse(f"--model.converters={FLOAT8},{GROUPED_FLOAT8} {off}").precomputes_scales


class TestRefusedValues:
    @pytest.mark.parametrize("kind", ["pipeline", "context"])
    def test_degrees_it_cannot_honour(self, kind):
        key = f"parallelism.{kind}_parallel_degree"
        assert f"{key} is 2: {kind} parallelism is not supported" in refusal(f"--{key} 2")

    @pytest.mark.parametrize(
        "line",
        [
            "--training.steps 0",
            "--training.local_batch_size -1",
            "--training.global_batch_size 0",
            "--training.global_batch_size -2",
            "--training.seq_len 0",
            "--training.max_norm 0",
            "--training.max_norm nan",
            "--optimizer.lr -1",
            "--optimizer.lr nan",
            "--optimizer.beta1 1",
            "--optimizer.beta2 -0.1",
            "--optimizer.eps -1",
            "--optimizer.weight_decay -0.1",
            "--lr_scheduler.warmup_steps -1",
            "--lr_scheduler.decay_ratio 1.5",
            "--parallelism.data_parallel_replicate_degree 0",
            "--parallelism.data_parallel_shard_degree 0",
            "--parallelism.data_parallel_shard_degree -2",
            "--parallelism.tensor_parallel_degree 0",
            "--checkpoint.interval 0",
            "--metrics.log_freq 0",
            "--debug.seed -1",
            "--comm.train_timeout_seconds 0",
        ],
    )
    def test_numbers_out_of_range(self, line):
        key, value = line.removeprefix("--").split()
        message = refusal(line)
        assert message.startswith(f"{key} is ")
        assert "it must be" in message

    @pytest.mark.parametrize(
        ("line", "nearest"),
        [
            ("--activation_checkpoint.mode=selctive", "selective"),
            ("--training.dtype=bfloat", "bfloat16"),
            ("--training.mixed_precision_param=float23", "float32"),
            ("--lr_scheduler.decay_type=linaer", "linear"),
            ("--parallelism.fsdp_reshard_after_forward=alway", "always"),
            ("--optimizer.name=AdamX", "Adam"),
            ("--compile.components=model,los", "loss"),
            ("--model.name=llama", "llama3"),
        ],
    )
    def test_unknown_names_with_the_nearest(self, line, nearest):
        message = refusal(line)
        assert line.removeprefix("--").split("=")[0] in message
        assert f"did you mean '{nearest}" in message

    @pytest.mark.parametrize("option", ["ops", "0", "-1", "1.5", ""])
    def test_selective_option(self, option):
        message = refusal(f"--activation_checkpoint.selective_ac_option={option}")
        assert "selective_ac_option" in message
        assert "'op' or a whole number" in message

    def test_unknown_converter(self):
        message = refusal("--model.converters=float8")
        assert "'float8'" in message
        assert "did you mean 'quantize.linear.float8'?" in message

    def test_two_recipes_for_experts(self):
        message = refusal(f"--model.converters={GROUPED_FLOAT8},{GROUPED_MX}")
        assert f"has both {GROUPED_FLOAT8} and {GROUPED_MX}" in message

    def test_recipe_that_is_not_for_experts(self):
        message = refusal(f"--{GROUPED_MX}.recipe_name=rowwise")
        assert f"{GROUPED_MX}.recipe_name is 'rowwise'; expected mxfp8" in message

    def test_names_and_numbers_set_in_python_are_checked_too(self):
        config = JobConfig()
        config.activation_checkpoint.mode = "selctive"  # type: ignore[assignment]
        with pytest.raises(ValueError, match="did you mean 'selective'"):
            validate(config)


class TestDataset:
    def test_default_is_the_built_in_text(self):
        assert parse("").training.text_path is None

    @pytest.mark.parametrize("name", ["stdlib", "text", "c4", "my_corpus"])
    def test_path_is_read_whatever_the_name(self, name):
        config = parse(f"--training.dataset {name} --training.dataset_path data/x.txt")
        assert config.training.text_path == Path("data/x.txt")

    @pytest.mark.parametrize("name", ["c4", "c4_test", "text"])
    def test_without_a_path_is_refused_when_the_data_is_opened(self, name):
        config = parse(f"--training.dataset {name}")
        with pytest.raises(ValueError) as caught:
            _ = config.training.text_path
        assert f"training.dataset is {name!r}" in str(caught.value)
        assert "training.dataset_path" in str(caught.value)
        assert "'stdlib'" in str(caught.value)

    def test_unknown_name_is_refused_with_the_nearest(self):
        message = refusal("--training.dataset stdlb")
        assert "training.dataset is 'stdlb'" in message
        assert "did you mean 'stdlib'?" in message


class TestShardDegree:
    @pytest.mark.parametrize(
        ("replicas", "shards", "tensor", "ranks", "expected"),
        [
            (1, -1, 1, 4, 4),
            (2, -1, 1, 4, 2),
            (4, -1, 1, 4, 1),
            (1, 4, 1, 4, 4),
            (2, 3, 1, 6, 3),
            (1, -1, 1, 1, 1),
            (1, -1, 2, 4, 2),
            (1, 1, 2, 2, 1),
            (2, -1, 2, 8, 2),
            (2, 3, 4, 24, 3),
        ],
    )
    def test_fits(self, replicas, shards, tensor, ranks, expected):
        config = JobConfig()
        config.parallelism.data_parallel_replicate_degree = replicas
        config.parallelism.data_parallel_shard_degree = shards
        config.parallelism.tensor_parallel_degree = tensor
        assert config.parallelism.shard_degree(ranks) == expected

    @pytest.mark.parametrize(
        ("replicas", "shards", "tensor", "ranks"),
        [(3, -1, 1, 4), (1, 2, 1, 4), (8, -1, 1, 4), (1, -1, 3, 4), (1, 4, 2, 4), (4, -1, 2, 4)],
    )
    def test_does_not_fit(self, replicas, shards, tensor, ranks):
        config = JobConfig()
        config.parallelism.data_parallel_replicate_degree = replicas
        config.parallelism.data_parallel_shard_degree = shards
        config.parallelism.tensor_parallel_degree = tensor
        with pytest.raises(ValueError, match=f"do not fit {ranks} ranks"):
            config.parallelism.shard_degree(ranks)
