"""The sections of a job's configuration: one dataclass each, torchtitan 0.2's names.

A docstring below a field is its text in `--help`, which keeps its lines: they end where sentences
do. What a value may be is its type (`Literal` for names) and, for numbers, its entry in `LIMITS`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from fp8dist.train.config_values import text_path_of

FLOAT8_CONVERTER = "quantize.linear.float8"
"""The name in `model.converters` that turns the float8 recipes on."""

MX_CONVERTER = "quantize.linear.mx"
"""The name in `model.converters` that turns the MXFP8 recipes on."""

GROUPED_FLOAT8_CONVERTER = "quantize.grouped_mm.float8"
"""The name in `model.converters` that turns experts into float8 ones, scaled by rows."""

GROUPED_MX_CONVERTER = "quantize.grouped_mm.mx"
"""The name in `model.converters` that turns experts into MXFP8 ones."""

BUILT_IN_DATASET = "stdlib"
"""Name of the data set that every machine with Python has."""

DATASETS = (BUILT_IN_DATASET, "text")
"""Names of the data sets this trainer ships a reader for."""

TORCH_DATASET = "torch"
"""Name of the validation text that every machine with this trainer has."""

VALIDATION_DATASETS = (TORCH_DATASET, "text")
"""Names of the validation sets this trainer ships a reader for."""

FETCHED_DATASETS = ("c4", "c4_test", "c4_validation")
"""torchtitan's data sets, which it downloads; this trainer downloads nothing."""

Dtype = Literal["float32", "bfloat16"]


@dataclass
class JobSection:
    """The run as a whole."""

    config_file: str | None = None
    """TOML file with the same sections and keys, read before the flags; flags override it."""
    dump_folder: str = "./outputs"
    """Folder for everything the run writes, the same on all nodes; made if missing.
    It gets run.json, loss.png and the folders that other sections name."""
    description: str = "default job"
    """One line about the run: the title of loss.png, kept in run.json."""


@dataclass
class ProfilingSection:
    """Traces of torch.profiler, one file per rank, for chrome://tracing or Perfetto."""

    enable_profiling: bool = False
    """Write traces of what runs on the CPU and the GPU."""
    save_traces_folder: str = "profile_traces"
    """Traces' folder, inside job.dump_folder; a trace is iteration_N/rankR_trace.json there."""
    profile_freq: int = 10
    """Steps between the ends of two traces."""
    profiler_active: int = 1
    """Steps in a trace: the last ones of each profile_freq."""
    profiler_warmup: int = 3
    """Steps before those, in which the profiler runs and its results are dropped."""


@dataclass
class MetricsSection:
    """What is reported while training."""

    log_freq: int = 10
    """Steps between two progress lines; the first and the last step have one too."""
    enable_tensorboard: bool = False
    """Write TensorBoard event files, a point per progress line."""
    save_tb_folder: str = "tb"
    """TensorBoard's folder, inside job.dump_folder."""


@dataclass
class ModelSection:
    """Which model, and what is done to it before sharding."""

    name: Literal["llama3"] = "llama3"
    """Model architecture."""
    flavor: str = "debugmodel"
    """Size: debugmodel (3 million parameters with a vocabulary of bytes), 8B, 70B or 405B.
    Or debugmoe: debugmodel as a mixture of experts."""
    hf_assets_path: str | None = None
    """Folder whose tokenizer.json is the tokenizer; none: one token per byte of text."""
    converters: list[str] = field(default_factory=list)
    """Conversions, comma-separated; sections of these names set them up. Empty: none.
    Of the linear layers: quantize.linear.float8 or quantize.linear.mx.
    Of experts: quantize.grouped_mm.float8 or quantize.grouped_mm.mx."""


@dataclass
class OptimizerSection:
    """The optimizer and its constants."""

    name: Literal["AdamW", "Adam"] = "AdamW"
    """Optimizer. AdamW: weight decay apart from the gradient; Adam: added to it."""
    lr: float = 8e-4
    """Learning rate after warmup and before decay, the highest of the run."""
    beta1: float = 0.9
    """Part of the running mean of gradients that a step keeps, at least 0 and below 1."""
    beta2: float = 0.95
    """Part of the running mean of squared gradients that a step keeps, at least 0 and below 1."""
    eps: float = 1e-8
    """Added to the denominator of the update, so that it is not 0."""
    weight_decay: float = 0.1
    """Fraction of each weight, times the learning rate, taken off per step."""


@dataclass
class LRSchedulerSection:
    """Learning rate over the steps: warm up, hold, decay to 0."""

    warmup_steps: int = 200
    """Steps of linear warmup from 0 to the peak."""
    decay_ratio: float | None = None
    """Part of all steps spent decaying, 0 to 1; none: from the end of warmup to the last step."""
    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """How the learning rate goes from the peak to 0."""


@dataclass
class DataloaderSection:
    """Who prepares the batches."""

    num_workers: int = 0
    """Worker processes of each rank, by torchdata's stateful loader; 0: a thread of the rank.
    A run goes on from a checkpoint with as many as it was saved with."""
    prefetch_factor: int | None = None
    """Steps that each worker prepares ahead; only with workers. none: 2."""


@dataclass
class TrainingSection:
    """Data, batch, length of the run, and dtypes."""

    dataset: str = BUILT_IN_DATASET
    """Data set.
    stdlib: the source text of Python's standard library, on every machine.
    text, and torchtitan's c4 and c4_test: the files at training.dataset_path, never a download."""
    dataset_path: str | None = None
    """File, or folder of files, to train on, whatever training.dataset says.
    A .txt is one text; a .jsonl and a .parquet (needs pyarrow) have one in "text" of each row."""
    local_batch_size: int = 8
    """Sequences in one forward pass of a data-parallel rank."""
    global_batch_size: int = -1
    """Sequences per optimizer step over all ranks; gradients of several forwards are accumulated.
    -1: local_batch_size times the data-parallel ranks."""
    seq_len: int = 2048
    """Tokens per sequence."""
    max_norm: float = 1.0
    """Gradients whose norm over all parameters is above this are scaled down to it; inf: never."""
    steps: int = 10000
    """Optimizer steps in the run, with those before the checkpoint from which it goes on."""
    dtype: Dtype = "float32"
    """Dtype of sharded parameters, gradients and optimizer state."""
    mixed_precision_param: Dtype = "bfloat16"
    """Dtype in which FSDP gathers parameters that are not gathered in float8, and computes."""
    enable_cpu_offload: bool = False
    """Keep sharded parameters, gradients and optimizer state in main memory.
    The optimizer runs there: slower, for models that do not fit otherwise."""
    dataloader: DataloaderSection = field(default_factory=DataloaderSection)

    @property
    def text_path(self) -> Path | None:
        """File or folder to read; None is the standard library's own source text.

        Raises ValueError if `dataset` names text that is not on this machine and `dataset_path`
        does not say where it is.
        """
        return text_path_of("training", self.dataset, self.dataset_path, BUILT_IN_DATASET)


@dataclass
class ParallelismSection:
    """How the ranks are arranged: their number is the product of the degrees."""

    data_parallel_replicate_degree: int = 1
    """Replicas of the sharded model (HSDP); 1: FSDP alone."""
    data_parallel_shard_degree: int = -1
    """Ranks that share one copy of the parameters (FSDP); -1: all remaining ranks."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Free gathered parameters after forward, and gather them again for backward.
    default: in the blocks, not in the layers around them; always: everywhere; never: nowhere."""
    tensor_parallel_degree: int = 1
    """Ranks that share the work of each layer, and a batch (tensor parallelism).
    It must divide the model's heads, its kv heads and training.seq_len."""
    pipeline_parallel_degree: int = 1
    """Pipeline parallelism is not supported: must be 1."""
    context_parallel_degree: int = 1
    """Context parallelism is not supported: must be 1."""

    def shard_degree(self, world_size: int) -> int:
        """Ranks over which FSDP shards each parameter, out of `world_size` ranks.

        Raises ValueError if replicas times shards times tensor-parallel ranks is not the number of
        ranks.
        """
        replicas, shards = self.data_parallel_replicate_degree, self.data_parallel_shard_degree
        others = replicas * self.tensor_parallel_degree
        if shards == -1 and world_size % others == 0:
            return world_size // others
        if shards * others == world_size:
            return shards
        raise ValueError(
            f"parallelism.data_parallel_replicate_degree={replicas}, "
            f"parallelism.data_parallel_shard_degree={shards} and "
            f"parallelism.tensor_parallel_degree={self.tensor_parallel_degree} do not fit "
            f"{world_size} ranks: their product must be {world_size}, or the shard degree -1 and "
            f"the product of the other two a divisor of {world_size}"
        )


@dataclass
class CheckpointSection:
    """Saving the run, and resuming from the newest save."""

    enable: bool = False
    """Save checkpoints, and go on from the newest complete one that is there."""
    folder: str = "checkpoint"
    """Checkpoints' folder, inside job.dump_folder; one is step-STEP there. All are kept."""
    interval: int = 500
    """Steps between two checkpoints; the last step is always saved."""
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """What training waits for.
    disabled: until all is written.
    async: until it is copied to main memory, from where it is written while training goes on.
    async_with_pinned_mem: the same, faster: page-locked memory is kept for the copy."""


@dataclass
class CompileSection:
    """torch.compile; on GPUs float8 needs it to be fast."""

    enable: bool = False
    """Compile what compile.components names."""
    components: list[Literal["model", "loss"]] = field(default_factory=lambda: ["model", "loss"])
    """What to compile, comma-separated: model (block by block), loss."""


@dataclass
class ActivationCheckpointSection:
    """Activations recomputed in backward instead of kept."""

    mode: Literal["none", "selective", "full"] = "selective"
    """none: keep all activations; full: recompute every block.
    selective: as activation_checkpoint.selective_ac_option says."""
    selective_ac_option: str = "2"
    """op: keep the results of matmuls and attention, and recompute the rest.
    A number N: recompute every N-th block."""


@dataclass
class Float8LinearSection:
    """Linear layers in float8; on when model.converters has quantize.linear.float8."""

    enable_fsdp_float8_all_gather: bool | None = None
    """Gather weights as float8, one byte per element. none: on."""
    precompute_float8_dynamic_scale_for_fsdp: bool | None = None
    """All scales of a step in one all-reduce, after the optimizer. none: on if the gather is."""
    recipe_name: str = "tensorwise"
    """Which elements share a scale: tensorwise (all), rowwise, or blockwise (128 x 128).
    Or rowwise_with_gw_hp: rowwise, with gradients of weights in high precision."""
    filter_fqns: list[str] = field(default_factory=list)
    """Layers left unconverted, comma-separated parts of their names, such as output.
    auto_filter_small_kn among them: also those that are too small to gain.
    That is known of tensorwise and rowwise, on H200 also of rowwise_with_gw_hp and blockwise."""
    emulate: bool = False
    """Cast to float8, but multiply in high precision also where the hardware has float8: slow."""

    @property
    def float8_all_gather(self) -> bool:
        """Whether weights are gathered in float8: `enable_fsdp_float8_all_gather`, unset is on."""
        return self.enable_fsdp_float8_all_gather is not False

    @property
    def precompute_scales(self) -> bool:
        """Whether scales are precomputed: never without the float8 gather; unset is on."""
        return self.float8_all_gather and self.precompute_float8_dynamic_scale_for_fsdp is not False


@dataclass
class MXLinearSection:
    """Linear layers in MXFP8; on when model.converters has quantize.linear.mx. Weights are always
    gathered in float8."""

    recipe_name: str = "mxfp8_rceil"
    """mxfp8_rceil (short: mxfp8): 32 elements of a row share a scale.
    mxfp8_rceil_wgrad_with_hp: the same, with gradients of weights in high precision."""
    filter_fqns: list[str] = field(default_factory=list)
    """Layers left unconverted, comma-separated parts of their names, such as output."""

    # What the float8 section lets one choose.
    float8_all_gather: ClassVar[bool] = True
    precompute_scales: ClassVar[bool] = True
    emulate: ClassVar[bool] = False


@dataclass
class QuantizeLinearSection:
    """Quantization of linear layers."""

    float8: Float8LinearSection = field(default_factory=Float8LinearSection)
    mx: MXLinearSection = field(default_factory=MXLinearSection)


@dataclass
class GroupedFloat8Section:
    """Experts in float8, scaled by rows; on when model.converters has
    quantize.grouped_mm.float8."""

    fqns: list[str] = field(default_factory=lambda: ["experts"])
    """Experts to convert, comma-separated parts of their names."""

    recipe_name: ClassVar[str] = "rowwise"


@dataclass
class GroupedMXSection:
    """Experts in MXFP8; on when model.converters has quantize.grouped_mm.mx."""

    recipe_name: str = "mxfp8"
    """Recipe: mxfp8, or mxfp8_rceil, the same."""
    fqns: list[str] = field(default_factory=lambda: ["experts"])
    """Experts to convert, comma-separated parts of their names."""


@dataclass
class QuantizeGroupedSection:
    """Quantization of experts."""

    float8: GroupedFloat8Section = field(default_factory=GroupedFloat8Section)
    mx: GroupedMXSection = field(default_factory=GroupedMXSection)


@dataclass
class QuantizeSection:
    """Quantization."""

    linear: QuantizeLinearSection = field(default_factory=QuantizeLinearSection)
    grouped_mm: QuantizeGroupedSection = field(default_factory=QuantizeGroupedSection)


@dataclass
class DebugSection:
    """Reproducibility."""

    seed: int | None = None
    """Seed of initialisation and shuffling; none: 0."""
    deterministic: bool = False
    """Deterministic algorithms of torch only, an error where an op has none; slower."""


@dataclass
class CommSection:
    """Collectives."""

    train_timeout_seconds: int = 100
    """Seconds that a collective may wait for a rank before the job ends."""


@dataclass
class ValidationSection:
    """The loss on text that is not trained on, now and then."""

    enable: bool = False
    """Validate. Training is bitwise the same with and without."""
    dataset: str = TORCH_DATASET
    """Data set.
    torch: the Python source text of the installed torch.
    text, and torchtitan's c4_validation: the files at validation.dataset_path."""
    dataset_path: str | None = None
    """File, or folder of files, as in training.dataset_path, whatever validation.dataset says."""
    local_batch_size: int | None = None
    """Sequences in one forward pass of a data-parallel rank; none: training.local_batch_size."""
    seq_len: int | None = None
    """Tokens per sequence; none: training.seq_len."""
    freq: int = 10
    """Training steps between two validations; there is one after the last step, too."""
    steps: int = -1
    """Forwards of each rank in a validation, on text that is the same every time.
    -1: as many as there are whole global batches of it."""

    @property
    def text_path(self) -> Path | None:
        """File or folder to read, None: torch's source text. Raises as that of training does."""
        return text_path_of("validation", self.dataset, self.dataset_path, TORCH_DATASET)
