"""A job's configuration: `JobConfig`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from fp8dist.train.config_sections import (
    FLOAT8_CONVERTER,
    ActivationCheckpointSection,
    CheckpointSection,
    CommSection,
    CompileSection,
    DebugSection,
    JobSection,
    LRSchedulerSection,
    MetricsSection,
    ModelSection,
    OptimizerSection,
    ParallelismSection,
    QuantizeSection,
    TrainingSection,
)


@dataclass
class JobConfig:
    """Train a Llama under FSDP2, with float8 communication where asked."""

    job: JobSection = field(default_factory=JobSection)
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

    @property
    def float8_enabled(self) -> bool:
        """Whether `model.converters` asks for float8 linear layers."""
        return FLOAT8_CONVERTER in self.model.converters

    def to_dict(self) -> dict[str, Any]:
        """Every section and key as nested plain dicts, ready for JSON."""
        return dataclasses.asdict(self)
