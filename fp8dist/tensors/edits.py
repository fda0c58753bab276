"""Whether a sharded weight was edited since its scales were computed."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

# [Note: noticing edits]
# The scales and the payload of a shard are computed once per optimizer step and must not be used
# after the shard was edited. No single signal sees every edit:
#   - `Float8ShardedWeight.__torch_dispatch__` sees eager optimizers (for-loop, foreach, fused),
#     `copy_`, edits through `.data` and `load_state_dict`. It counts them on an `Edits` object
#     that all views of a parameter share.
#   - a compiled optimizer step moves the `_version` of the DTensor parameter only;
#   - code that edits the plain tensors of a state dict in place (`dcp.load`) moves the `_version`
#     of the inner tensor only. It writes nothing where a shard has no elements: such a weight
#     counts as edited wherever a state dict was taken since, and an edit of one that was taken
#     before is refused: a rank that does not notice it would be waited for.
#   - a compiled function that edits `to_local()` moves the `_version` of the local tensor only.
# An all-gather, or without FSDP2 a forward, compares all of them with what `Seen` recorded when the
# scales were computed. Not seen are edits of a state dict's tensors that move no version: by
# foreach functions, through `.data`, numpy or a collective. And those of a compiled function that
# is given `.data` or `detach().to_local()`, of which it moves the versions, which are their own.
# (That it takes the plain tensor out of such a view could be seen; but so does one that only reads
# it, and FSDP2 makes the local tensors of short ranks, and of those only, such views, too.)
#
# Whether to communicate must not depend on the rank. FSDP2's lazy initialisation moves the shard
# to a padded buffer on the ranks whose shard is short, and on those only. Such a buffer's `Edits`
# know from which parameter it was made; the copy that fills it changes no value and does not count,
# and the versions are compared on the tensors that were seen, whether or not they are still the
# parameter's.


def is_sharded(param: torch.Tensor | None) -> bool:
    """Whether this is a parameter that FSDP2 or tensor parallelism has sharded, to be float8."""
    return isinstance(param, DTensor) and hasattr(param._local_tensor, "_edits")


def local_shard(param: DTensor) -> Any:
    """This rank's `Float8ShardedWeight` of a parameter."""
    return param._local_tensor


class Edits:
    """Counts in-place writes to one parameter, shared by all views of it.

    Args:
        moved_from: the edits of the parameter for which this storage was made, to be filled by
            one copy of it (see [Note: noticing edits]).
    """

    def __init__(self, moved_from: "Edits | None" = None) -> None:
        self.count = 0
        self.moved_from = moved_from
        self.filled_at: int | None = None  # what `moved_from` counted when it was copied

    def fill(self, source: "Edits") -> bool:
        """Whether a copy of `source`'s parameter fills this storage, which it does once."""
        if self.moved_from is not source or self.filled_at is not None or self.count > 0:
            return False
        self.filled_at = source.count
        return True

    def is_same_as(self, seen: "Edits") -> bool:
        """Whether this counts for the parameter as seen, or as moved since without an edit."""
        edits: Edits | None = self
        while edits is not None and edits is not seen:
            source = edits.moved_from
            # A copy of what was edited since is another parameter, as it was before.
            same = source is not None and edits.count == 0 and edits.filled_at == source.count
            edits = source if same else None
        return edits is seen


@dataclass(slots=True)
class Seen:
    """A parameter as it was when its scales were computed."""

    param: DTensor
    param_version: int
    shard: torch.Tensor  # the Float8ShardedWeight
    shard_version: int
    inner: torch.Tensor  # the plain shard
    inner_version: int
    edits: Edits
    edit_count: int

    @classmethod
    def now(cls, param: DTensor) -> "Seen":
        shard = local_shard(param)
        inner, edits = shard._tensor, shard._edits
        return cls(
            param,
            param._version,
            shard,
            shard._version,
            inner,
            inner._version,
            edits,
            edits.count,
        )

    def still_holds(self, param: DTensor) -> bool:
        return (
            self.param is param
            and self.param_version == param._version
            and self.shard_version == self.shard._version
            and self.inner_version == self.inner._version
            and local_shard(param)._edits.is_same_as(self.edits)
            and self.edit_count == self.edits.count
        )

    def inner_alone_was_edited(self, param: DTensor) -> bool:
        """Whether this does not hold because of an edit of a state dict's tensor, and only that."""
        version = self.inner._version
        return version != self.inner_version and replace(self, inner_version=version).still_holds(
            param
        )
