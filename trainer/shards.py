"""What a rank holds of a parameter: the one place that asks a DTensor where its part lies."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local_part(parameter: nn.Parameter) -> tuple[Tensor, tuple[slice, ...]]:
    """The values here, and where in the whole parameter they lie, one slice per dimension."""
    if not isinstance(parameter, DTensor):
        return parameter, tuple(slice(0, length) for length in parameter.shape)
    # The protocol by which torch's own checkpoints find it, for every kind of placement.
    [chunk] = parameter.__create_chunk_list__()
    places = zip(chunk.offsets, chunk.sizes, strict=True)
    return parameter.to_local(), tuple(slice(start, start + length) for start, length in places)
