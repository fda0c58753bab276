"""What the trainer's configuration makes of its values, and what it refuses."""

from pathlib import Path

import pytest

from fp8dist.train.config import JobConfig, validate
from tests.unit.train.job_lines import (
    FLOAT8,
    GROUPED_FLOAT8,
    GROUPED_MX,
    MX,
    parse,
    parse_toml,
    refusal,
)


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
            "--comm.train_timeout_seconds 1000000001",
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
        config.activation_checkpoint.mode = "selctive"
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
