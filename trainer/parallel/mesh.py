"""The processes of a run, as the launcher made them, and the axes along which they divide the work.

    python -m trainer train            one process: no group, no mesh
    torchrun ... -m trainer train      one process per device, on a mesh of five axes (sizes of 1 are fine)

    axis           divides                                   slowest link
    pp             decoder layers                            between nodes
    dp_replicate   packs; parameters are copies of each other
    dp_shard       packs; parameters are shards              v
    cp             the positions of a pack
    tp             heads, feed-forward width, vocabulary     inside a node

Encoder and projector know no tp: the ranks of cp and tp share the vision rows of their packs instead.

Mixed precision needs FSDP, which keeps float32 weights beside their bfloat16 copies; a single bfloat16
process therefore forms a group of its own, in memory, and takes the same path as many.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shared.config import require_at_least
from shared.errors import UserError

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
# Host numbers travel by gloo and never wait for the device; see `World.sum_on_host`.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Sizes of the mesh axes. What they leave of the processes shards data and parameters (dp_shard)."""

    pp: int = 1
    """Pipeline ranks."""
    dp_replicate: int = 1
    """Copies of the sharded parameters: shard inside a node, replicate across nodes (HSDP)."""
    cp: int = 1
    """Ranks that share the positions of a pack."""
    tp: int = 1
    """Ranks that share every product of the decoder."""
    sequence_parallel: bool = True
    """With tp: norms and residuals on a part of the positions each, instead of all positions on every rank."""
    stages_per_rank: int = 1
    """Pipeline stages on one rank: 1 is the 1F1B schedule, more the interleaved one (smaller bubble)."""
    stage_layers: tuple[int, ...] = ()
    """Decoder layers of each stage, first to last; empty: as even as they go."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "pp", "dp_replicate", "cp", "tp", "stages_per_rank")
        if self.stages_per_rank > 1 and self.pp == 1:
            raise ValueError(f"stages_per_rank {self.stages_per_rank} needs pp above 1")
        if self.stage_layers and len(self.stage_layers) != self.num_stages:
            raise ValueError(
                f"stage_layers has {len(self.stage_layers)} entries, expected {self.num_stages} = pp x stages_per_rank"
            )

    @property
    def num_stages(self) -> int:
        return self.pp * self.stages_per_rank

    def sizes(self, num_ranks: int) -> dict[str, int]:
        """Size of every axis for a number of processes.

        Raises:
            ValueError: they cannot be divided that way.
        """
        fixed = self.pp * self.dp_replicate * self.cp * self.tp
        if num_ranks % fixed:
            raise ValueError(
                f"{num_ranks} processes are no multiple of {fixed} = pp {self.pp} x dp_replicate "
                f"{self.dp_replicate} x cp {self.cp} x tp {self.tp}"
            )
        return {
            "pp": self.pp,
            "dp_replicate": self.dp_replicate,
            "dp_shard": num_ranks // fixed,
            "cp": self.cp,
            "tp": self.tp,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None
    """Over AXES; None: one process without a group."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def axis_size(self, axis: str) -> int:
        return 1 if self.mesh is None else self.mesh.size(AXES.index(axis))

    def axis_rank(self, axis: str) -> int:
        return 0 if self.mesh is None else self.mesh.get_local_rank(axis)

    @property
    def pp_size(self) -> int:
        return self.axis_size("pp")

    @property
    def cp_size(self) -> int:
        return self.axis_size("cp")

    @property
    def tp_size(self) -> int:
        return self.axis_size("tp")

    @property
    def pp_rank(self) -> int:
        return self.axis_rank("pp")

    @property
    def cp_rank(self) -> int:
        return self.axis_rank("cp")

    @property
    def tp_rank(self) -> int:
        return self.axis_rank("tp")

    @property
    def dp_size(self) -> int:
        """Ranks that train on different packs."""
        return self.axis_size("dp_replicate") * self.axis_size("dp_shard")

    @property
    def dp_rank(self) -> int:
        return self.axis_rank("dp_replicate") * self.axis_size("dp_shard") + self.axis_rank("dp_shard")

    @property
    def row_part(self) -> tuple[int, int] | None:
        """(index, count): which share of the vision rows of its packs this rank encodes.

        None in a later pipeline stage: the encoder is in the first.
        """
        if self.pp_rank > 0:
            return None
        index = self.cp_rank * self.tp_size + self.tp_rank
        return index, self.cp_size * self.tp_size

    @property
    def is_counting(self) -> bool:
        """True on one rank of those that share packs: only it adds what it counts of them to a sum over all."""
        return self.pp_rank == self.cp_rank == self.tp_rank == 0

    @property
    def loss_factor(self) -> int:
        """FSDP averages gradients over the ranks that see different positions, where the loss is a sum over them.

        Encoder and projector are averaged over tp as well, but the gather of visual tokens has summed the tp copies
        of their gradients before (trainer.parallel.context): the factor is the same.
        """
        return self.dp_size * self.cp_size

    @property
    def stage_ranks(self) -> int:
        """Ranks that hold the parameters of one pipeline stage together."""
        return self.size // self.pp_size

    def sum_on_host(self, values: Sequence[int]) -> list[int]:
        """Sums over all ranks of numbers that the host already has, without touching the device."""
        if self.mesh is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(total)
        return total.tolist()

    def sum_on_device(self, values: Tensor) -> Tensor:
        """Sums over all ranks of a tensor on the device; queued there, nothing waits."""
        if self.mesh is not None:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def on_main(self, action: Callable[[], object]) -> None:
        """Run `action` on rank 0, while the others wait for it.

        Raises:
            UserError: `action` raised it; on every rank, so that none waits for one that has ended.
        """
        failure = [""]
        if self.is_main:
            try:
                action()
            except UserError as error:
                failure = [str(error)]
        if self.mesh is not None:
            dist.broadcast_object_list(failure, src=0, device=torch.device("cpu"))
        if failure[0]:
            raise UserError(failure[0])

    def barrier(self) -> None:
        if self.mesh is not None:
            self.sum_on_host([0])


def sub_mesh(mesh: DeviceMesh, *axes: str) -> DeviceMesh:
    """One axis over the product of `axes` (neighbours, in the order of AXES)."""
    if len(axes) == 1:
        return mesh[axes[0]]
    return mesh[axes]._flatten("_".join(axes))


@contextmanager
def open_world(
    device: str, dtype: str, parallel: ParallelConfig | None = None
) -> Generator[World, None, None]:
    """Join the processes that the launcher started; leave them at the end.

    Raises:
        UserError: the device that the config names is not in this machine, or the processes cannot be divided.
    """
    parallel = parallel or ParallelConfig()
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        parallel.sizes(size)
    except ValueError as error:
        raise UserError(
            f"[parallel] {error}; start another number with torchrun, or change the axes"
        ) from None
    place = _local_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    launched = "WORLD_SIZE" in os.environ
    if not launched and dtype == "float32":
        yield World(rank=0, size=1, device=place, mesh=None)
        return
    if launched:
        dist.init_process_group(BACKENDS[device])
    else:
        # A store in memory: one process has nobody to meet, and needs no port for it.
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  # documented, not in __all__
        dist.init_process_group(BACKENDS[device], store=store, rank=0, world_size=1)
    try:
        yield make_world(rank, size, place, parallel)
    finally:
        dist.destroy_process_group()


def make_world(rank: int, size: int, device: torch.device, parallel: ParallelConfig) -> World:
    """The world of a process group that exists."""
    sizes = parallel.sizes(size)
    mesh = init_device_mesh(device.type, tuple(sizes[axis] for axis in AXES), mesh_dim_names=AXES)
    return World(rank=rank, size=size, device=device, mesh=mesh)


def _local_device(device: str, local_rank: int) -> torch.device:
    if device == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"device cuda: process {local_rank} of this machine has no CUDA device ({count} found); "
            "start at most that many, or use --device cpu --dtype float32"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
