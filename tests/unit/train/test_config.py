"""The trainer's configuration: its keys, and the command line."""

import ast
import inspect
import json
import re

import pytest

from fp8dist.train import config_sections
from fp8dist.train.config import JobConfig, key_types, parse_config
from fp8dist.train.config_values import LIMITS
from fp8dist.train.torchtitan_keys import UNUSED
from tests.unit.train.job_lines import FLOAT8, FLOAT8_TOML, parse, parse_toml, refusal

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
