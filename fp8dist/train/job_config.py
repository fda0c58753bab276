"""A job's configuration: its sections, and what they say together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from fp8dist.train.config_sections import (
    FLOAT8_CONVERTER,
    GROUPED_FLOAT8_CONVERTER,
    GROUPED_MX_CONVERTER,
    MX_CONVERTER,
    ActivationCheckpointSection,
    CheckpointSection,
    CommSection,
    CompileSection,
    DebugSection,
    Float8LinearSection,
    GroupedFloat8Section,
    GroupedMXSection,
    JobSection,
    LRSchedulerSection,
    MetricsSection,
    ModelSection,
    MXLinearSection,
    OptimizerSection,
    ParallelismSection,
    ProfilingSection,
    QuantizeSection,
    TrainingSection,
    ValidationSection,
)


@dataclass
class JobConfig:
    """Train a Llama under FSDP2, with float8 communication where asked."""

    job: JobSection = field(default_factory=JobSection)
    profiling: ProfilingSection = field(default_factory=ProfilingSection)
    metrics: MetricsSection = field(default_factory=MetricsSection)
    model: ModelSection = field(default_factory=ModelSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    lr_scheduler: LRSchedulerSection = field(default_factory=LRSchedulerSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    parallelism: ParallelismSection = field(default_factory=ParallelismSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    compile: CompileSection = field(default_factory=CompileSection)
    activation_checkpoint: ActivationCheckpointSection = field(
        default_factory=ActivationCheckpointSection
    )
    quantize: QuantizeSection = field(default_factory=QuantizeSection)
    debug: DebugSection = field(default_factory=DebugSection)
    comm: CommSection = field(default_factory=CommSection)
    validation: ValidationSection = field(default_factory=ValidationSection)

    @property
    def conversion(self) -> Float8LinearSection | MXLinearSection | None:
        """The section that says how linear layers are converted; None: they are not."""
        if FLOAT8_CONVERTER in self.model.converters:
            return self.quantize.linear.float8
        return self.quantize.linear.mx if MX_CONVERTER in self.model.converters else None

    @property
    def conversion_of_experts(self) -> GroupedFloat8Section | GroupedMXSection | None:
        """The section that says how experts are converted; None: they are not."""
        if GROUPED_FLOAT8_CONVERTER in self.model.converters:
            return self.quantize.grouped_mm.float8
        mx = GROUPED_MX_CONVERTER in self.model.converters
        return self.quantize.grouped_mm.mx if mx else None

    @property
    def float8_enabled(self) -> bool:
        """Whether `model.converters` asks for float8 layers or experts, of whatever recipe."""
        return self.conversion is not None or self.conversion_of_experts is not None

    @property
    def precomputes_scales(self) -> bool:
        """Whether all scales of a step are computed in one all-reduce after the optimizer."""
        linear = self.conversion is not None and self.conversion.precompute_scales
        return linear or self.conversion_of_experts is not None

    def to_dict(self) -> dict[str, Any]:
        """Every section and key as nested plain dicts, ready for JSON."""
        return dataclasses.asdict(self)
