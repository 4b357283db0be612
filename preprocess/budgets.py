"""What a pack may hold: S, N and L as the config gives them, or "auto" where the lengths of the data decide.

The choice itself is `preprocess.plan.budget`; here is what bounds it, and what a given budget is held to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shared.config import require_at_least
from shared.geometry import Budget, Geometry
from shared.shard_writer import MAX_BLOB_BYTES

Auto = Literal["auto"]
AUTO: Auto = "auto"

# What a worker holds beside its pack, and how often it holds a pack while that is written (measured: the pack, and
# twice in Arrow's encoder).
WORKER_BYTES = 350_000_000
PACK_COPIES = 3
# Of a token, its label and its position, each.
TOKEN_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetConfig:
    """S decoder tokens, and N vision rows of L patches, per pack; "auto" is chosen when the data set is planned."""

    # "auto" needs memory.gpu_bytes, and N or L "auto": as many tokens as fit one GPU with the patches they bring along.
    S: int | Auto
    N: int | Auto
    L: int | Auto
    # N is a multiple of this, the number of ranks that share the rows of a pack (context times tensor parallel).
    rows_multiple: int = 1
    # What is chosen fills vision rows to this share, if anything does: a patch costs few FLOPs beside a token, but as
    # much bandwidth and a third of its memory.
    least_vision: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.least_vision <= 1:
            raise ValueError(f"least_vision must lie in [0, 1], got {self.least_vision}")
        given = [name for name in "SNL" if getattr(self, name) != AUTO]
        require_at_least(self, 1, "rows_multiple", *given)
        if self.N != AUTO and self.N % self.rows_multiple:
            raise ValueError(f"N {self.N} is not a multiple of rows_multiple {self.rows_multiple}")
        if given == ["N", "L"]:
            raise ValueError('S is "auto" with N and L given: leave N or L to be chosen, too, or give S')
        if self.S != AUTO and TOKEN_BYTES * self.S >= MAX_BLOB_BYTES:
            raise ValueError(
                f"S {self.S} is too large: {TOKEN_BYTES} bytes a token, and a Parquet value holds less than "
                f"{MAX_BLOB_BYTES}"
            )

    @property
    def fixed(self) -> Budget | None:
        """The budget where nothing of it is to be chosen."""
        if self.S == AUTO or self.N == AUTO or self.L == AUTO:
            return None
        return Budget(S=self.S, N=self.N, L=self.L)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """The GPU that S = "auto" fills, with the model of [cost]: float32 weights, gradients and Adam, bfloat16 work."""

    # Bytes of one GPU: 80_000_000_000 of an H100. 0: not told.
    gpu_bytes: int = 0
    # Ranks that weights, gradients and optimizer are sharded over.
    shards: int = 8
    packs_per_microbatch: int = 1
    # What of a layer is computed again in the backward pass: nothing, or all of it.
    recompute: Literal["none", "full"] = "none"
    # Share of the memory left to the allocator, kernels and communication.
    reserve: float = 0.15

    def __post_init__(self) -> None:
        require_at_least(self, 0, "gpu_bytes")
        require_at_least(self, 1, "shards", "packs_per_microbatch")
        if not 0 <= self.reserve < 1:
            raise ValueError(f"reserve must lie in [0, 1), got {self.reserve}")


@dataclass(frozen=True, slots=True)
class BudgetLimits:
    """What N and L are held to: pictures and videos fit one row, and a pack fits a Parquet value and a worker."""

    geometry: Geometry
    patches_per_video: int
    max_memory: int

    @property
    def least_row(self) -> int:
        """The shortest row that takes every picture and every video."""
        return max(self.geometry.max_patches_per_image, self.patches_per_video)

    def max_patches(self) -> int:
        """The most patches of one pack."""
        most = min(MAX_BLOB_BYTES - 1, (self.max_memory - WORKER_BYTES) // PACK_COPIES)
        return most // self.geometry.values_per_patch

    def check(self, S: int | Auto, N: int | Auto, L: int | Auto) -> None:
        """Raises ValueError: what is given of S, N and L can hold no data set of this geometry."""
        geometry, cap = self.geometry, self.patches_per_video
        if L != AUTO and geometry.max_patches_per_image > L:
            raise ValueError(
                f"geometry.max_patches_per_image {geometry.max_patches_per_image} is above budget.L {L}: an image "
                "must fit one vision row"
            )
        if cap < geometry.patches_per_token or (L != AUTO and cap > L):
            raise ValueError(
                f"video.max_patches_per_video {cap} must lie between one cell of {geometry.patches_per_token} "
                f"patches and budget.L {L}: a video must fit one vision row"
            )
        if L != AUTO and L % geometry.patches_per_token:
            raise ValueError(
                f"budget.L {L} is not a multiple of merge * merge = {geometry.patches_per_token}"
            )
        blob = (1 if N == AUTO else N) * (self.least_row if L == AUTO else L) * geometry.values_per_patch
        if blob >= MAX_BLOB_BYTES:
            raise ValueError(
                f"budget.N * budget.L patches of {geometry.values_per_patch} bytes are {blob} bytes per pack; "
                f"a Parquet value holds less than {MAX_BLOB_BYTES}: lower N or L"
            )
        tokens = 0 if S == AUTO else 3 * TOKEN_BYTES * S
        if (needed := WORKER_BYTES + PACK_COPIES * (tokens + blob)) > self.max_memory:
            raise ValueError(
                f"budget.S tokens are {tokens} and budget.N * budget.L patches {blob} bytes per pack; a worker that "
                f"writes a full one holds {needed}, above limits.max_memory {self.max_memory}: lower S, N or L, or "
                "raise the limit"
            )
