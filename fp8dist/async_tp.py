"""Asynchronous tensor parallelism: torch's compiler overlaps an all-gather with matmuls of it.

It is on with `torch._inductor.config._micro_pipeline_tp` and symmetric memory for the group.
"""

from fp8dist.tracing import is_tracing


def is_on() -> bool:
    """Whether the graph that is being traced will be searched for all-gathers to overlap.

    To be asked in functions that the compiler takes as they are.
    """
    if not is_tracing():
        return False
    from torch._inductor import config

    return config._micro_pipeline_tp


def is_on_for(group_name: str) -> bool:
    """Whether all-gathers of this group may be."""
    if not is_on():
        return False
    from torch.distributed._symmetric_memory import is_symm_mem_enabled_for_group

    # torch's stubs want a `GroupName`, which is a str at run time.
    return is_symm_mem_enabled_for_group(group_name)  # type: ignore[arg-type]
