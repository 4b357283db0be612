"""The processes of a run, as the launcher made them.

    python -m trainer train            one process: no group, no mesh
    torchrun ... -m trainer train      one process per device: a mesh with axis "dp"

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

from shared.errors import UserError

DATA_AXIS = "dp"
# Host numbers travel by gloo and never wait for the device; see `World.sum_on_host`.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None
    """None: one process without a group."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        return 0 if self.mesh is None else self.mesh.get_local_rank(DATA_AXIS)

    @property
    def dp_size(self) -> int:
        return 1 if self.mesh is None else self.mesh[DATA_AXIS].size()

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


@contextmanager
def open_world(device: str, dtype: str) -> Generator[World, None, None]:
    """Join the processes that the launcher started; leave them at the end.

    Raises:
        UserError: the device that the config names is not in this machine.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
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
        mesh = init_device_mesh(device, (size,), mesh_dim_names=(DATA_AXIS,))
        yield World(rank=rank, size=size, device=place, mesh=mesh)
    finally:
        dist.destroy_process_group()


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
