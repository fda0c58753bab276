"""What tensor parallelism may cut, and which style each layer gets."""

import pytest
import torch
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel

import fp8dist
from fp8dist.train.config import JobConfig, parse_config
from fp8dist.train.model import Llama, ModelShape, model_shape
from fp8dist.train.parallelize import convert
from fp8dist.train.tensor_parallel import _check_layers, check_shape, plan

FLOAT8 = "--model.converters=quantize.linear.float8"


def job_of(*flags: str) -> JobConfig:
    return parse_config([FLOAT8, "--training.seq_len=32", *flags])


def model_of(job: JobConfig) -> Llama:
    with torch.device("meta"):
        model = Llama(model_shape("debugmodel:1"), 32)
    convert(model, job)
    return model


@pytest.mark.parametrize("degree", [1, 2])
def test_degrees_that_divide_are_taken(degree: int) -> None:
    check_shape(job_of(f"--parallelism.tensor_parallel_degree={degree}"), model_shape("debugmodel"))


@pytest.mark.parametrize(
    ("degree", "sizes", "message"),
    [
        (4, {}, "=4 does not divide the 2 kv heads of model.flavor 'debugmodel': .* one of 1, 2$"),
        (3, {"n_kv_heads": 3}, "=3 does not divide the 4 heads .* choose one of 1$"),
        (2, {"hidden_dim": 97}, "=2 does not divide the 97 features of the feed-forward"),
        (2, {"vocab_size": 257}, "=2 does not divide the 257 entries of the vocabulary"),
    ],
)
def test_degrees_that_do_not_divide_the_model(degree: int, sizes: dict, message: str) -> None:
    shape = ModelShape(**{**vars(model_shape("debugmodel")), **sizes})
    job = job_of(f"--parallelism.tensor_parallel_degree={degree}")
    with pytest.raises(ValueError, match=f"parallelism.tensor_parallel_degree{message}"):
        check_shape(job, shape)


def test_degrees_that_do_not_divide_the_sequence() -> None:
    job = job_of("--parallelism.tensor_parallel_degree=2", "--training.seq_len=31")
    with pytest.raises(ValueError, match="=2 does not divide training.seq_len=31"):
        check_shape(job, model_shape("debugmodel"))
    job.training.seq_len, job.validation.seq_len = 32, 31
    check_shape(job, model_shape("debugmodel"))  # not enabled
    job.validation.enable = True
    with pytest.raises(ValueError, match="=2 does not divide validation.seq_len=31"):
        check_shape(job, model_shape("debugmodel"))


def test_parts_that_a_recipe_does_not_take_are_refused_with_what_helps() -> None:
    flags = (
        "--parallelism.tensor_parallel_degree=2",
        "--quantize.linear.float8.recipe_name=blockwise",
    )
    job = job_of(*flags)
    with pytest.raises(ValueError) as caught:
        _check_layers(model_of(job), job)
    assert str(caught.value) == (
        "layers.0.attention.wk: its weight is 128 x 256, of which "
        "parallelism.tensor_parallel_degree=2 leaves a rank 64 rows, and blockwise takes multiples "
        "of 128: add attention.wk to quantize.linear.float8.filter_fqns, or choose a smaller degree"
    )
    job = job_of(*flags, "--quantize.linear.float8.filter_fqns=attention.wk,attention.wv")
    _check_layers(model_of(job), job)
    # hidden_dim is 768: columns of w2, and rows of w1 and w3.
    job = job_of(*flags, "--quantize.linear.float8.filter_fqns=attention,w1,w3,output")
    job.parallelism.tensor_parallel_degree = 4
    with pytest.raises(ValueError, match=r"w2: its weight is 256 x 768, .* a rank 192 columns"):
        _check_layers(model_of(job), job)


def test_styles_by_what_is_converted() -> None:
    columns, rows = fp8dist.Float8ColwiseParallel, fp8dist.Float8RowwiseParallel
    prepare = fp8dist.PrepareFloat8ModuleInput
    for recipe in ("tensorwise", "rowwise", "rowwise_with_gw_hp"):
        styles = plan(model_of(job_of(f"--quantize.linear.float8.recipe_name={recipe}")))
        for name in ("attention.wq", "attention.wk", "feed_forward.w1", "feed_forward.w3"):
            assert type(styles[f"layers.0.{name}"]) is columns
        for name in ("attention.wo", "feed_forward.w2"):
            assert type(styles[f"layers.0.{name}"]) is rows
        assert type(styles["output"]) is columns
        assert type(styles["layers.0.attention"]) is prepare
    # What a layer in high precision takes must not have been cast for the others.
    left = "wk,wv,w2,output"
    styles = plan(model_of(job_of(f"--quantize.linear.float8.filter_fqns={left}")))
    assert type(styles["layers.0.attention"]) is PrepareModuleInput
    assert type(styles["layers.0.attention.wq"]) is columns
    assert type(styles["layers.0.attention.wk"]) is ColwiseParallel
    assert type(styles["layers.0.attention.wo"]) is rows
    assert type(styles["layers.0.feed_forward"]) is prepare
    assert type(styles["layers.0.feed_forward.w2"]) is RowwiseParallel
    assert type(styles["output"]) is ColwiseParallel


def test_every_parameter_has_a_style() -> None:
    model = model_of(job_of())
    names = {name.removesuffix(".weight") for name, _ in model.named_parameters()}
    # The norm of all gradients can only be taken of parameters on one mesh.
    assert names <= plan(model).keys()
