"""Norms and clipping of gradients spread over meshes in every way, against the same gradients on one process."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from tests.distributed.launch import launch
from trainer.gradients import clip_gradients
from trainer.guard import update_weights
from trainer.optim import OptimizerConfig, make_optimizer
from trainer.parallel.mesh import ParallelConfig, World, make_world

SHAPES = {
    "encoder.weight": (6, 4),
    "encoder.bias": (6,),
    "projector.weight": (4, 6),
    "decoder.weight": (8, 4),
    "decoder.bias": (5,),
}
MAX_NORM = 3.0


def full_gradient(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator) * (3 if name.startswith("decoder") else 1)


def tree(parameters: dict[str, nn.Parameter]) -> nn.Module:
    root = nn.Module()
    for name, parameter in parameters.items():
        part, leaf = name.split(".")
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root.get_submodule(part).register_parameter(leaf, parameter)
    return root


def spread(name: str, mesh: DeviceMesh | None, *placements: Placement) -> nn.Parameter:
    """A parameter of zeros with its gradient, on a mesh or whole on every rank."""
    full = full_gradient(name)
    if mesh is None:
        parameter, gradient = nn.Parameter(torch.zeros_like(full)), full
    else:
        parameter = nn.Parameter(distribute_tensor(torch.zeros_like(full), mesh, placements))
        gradient = distribute_tensor(full, mesh, placements)
    parameter.grad = gradient
    return parameter


ALONE = World(rank=0, size=1, device=torch.device("cpu"), mesh=None)


def world_of(**axes: int) -> World:
    return make_world(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), ParallelConfig(**axes))


def one_dimension() -> tuple[World, dict[str, nn.Parameter]]:
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("dp",))
    return world_of(), {
        "encoder.weight": spread("encoder.weight", mesh, Shard(0)),
        "encoder.bias": spread("encoder.bias", mesh, Replicate()),
        "projector.weight": spread("projector.weight", None),
        "decoder.weight": spread("decoder.weight", mesh, Shard(1)),
        # 5 values over 4 ranks: one holds nothing.
        "decoder.bias": spread("decoder.bias", mesh, Shard(0)),
    }


def two_dimensions() -> tuple[World, dict[str, nn.Parameter]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("dp_tp",))
    return world_of(tp=2), {
        "encoder.weight": spread("encoder.weight", flat, Shard(0)),
        "encoder.bias": spread("encoder.bias", None),
        "projector.weight": spread("projector.weight", mesh["dp"], Shard(0)),  # alike on both ranks of tp
        "decoder.weight": spread("decoder.weight", mesh, Shard(0), Shard(1)),
        "decoder.bias": spread("decoder.bias", mesh, Shard(0), Replicate()),
    }


def replicated_and_sharded() -> tuple[World, dict[str, nn.Parameter]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    parameters = {name: spread(name, mesh, Replicate(), Shard(0)) for name in SHAPES}
    return world_of(dp_replicate=2), parameters


def two_stages() -> tuple[World, dict[str, nn.Parameter]]:
    """The first stage holds encoder, projector and one parameter of the decoder, the second the other."""
    world = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    mesh = world["dp"]
    names = list(SHAPES)[:4] if world.get_local_rank("pp") == 0 else list(SHAPES)[4:]
    return world_of(pp=2), {name: spread(name, mesh, Shard(0)) for name in names}


def fsdp() -> tuple[World, dict[str, nn.Parameter]]:
    """Gradients as FSDP leaves them: the loss is <weight, gradient> on every rank, and FSDP averages."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("dp",))

    class Dot(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name, self.value = name, nn.Parameter(torch.zeros(SHAPES[name]))

        def forward(self) -> Tensor:
            return (self.value * full_gradient(self.name)).sum()

    parameters: dict[str, nn.Parameter] = {}
    for name in SHAPES:
        dot = Dot(name)
        fully_shard(dot, mesh=mesh)
        dot().backward()
        parameters[name] = dot.value
    return world_of(), parameters


LAYOUTS = {
    2: [one_dimension, fsdp],
    4: [one_dimension, two_dimensions, replicated_and_sharded, two_stages, fsdp],
}


def measure(num_processes: int) -> list[dict[str, Any]]:
    """Per layout: norms before clipping, gradients after it, and what a skipped and a real update changed."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo")
    try:
        return [measure_layout(*layout()) for layout in LAYOUTS[num_processes]]
    finally:
        dist.destroy_process_group()


def measure_layout(world: World, parameters: dict[str, nn.Parameter]) -> dict[str, Any]:
    parts = [tree(parameters)]
    norms = clip_gradients(parts, world, MAX_NORM)
    gradients = {name: whole(parameter.grad) for name, parameter in parameters.items()}
    sharded = {name: p for name, p in parameters.items() if isinstance(p, DTensor)}
    optimizer = make_optimizer([tree(sharded or parameters)], OptimizerConfig(lr=0.5, weight_decay=0.0))
    moved: list[float] = []
    for skip in (1.0, 0.0):
        kept = {name: parameter.grad for name, parameter in parameters.items()}
        update_weights(optimizer, 0.5, torch.tensor(skip))
        moved.append(max(whole(parameter.detach()).abs().max().item() for parameter in parameters.values()))
        for name, parameter in parameters.items():
            parameter.grad = kept[name]
    return {"norms": norms, "gradients": gradients, "moved": moved}


def whole(value: Tensor | None) -> Tensor:
    assert value is not None
    return value.full_tensor() if isinstance(value, DTensor) else value


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    gradients = {name: full_gradient(name) for name in SHAPES}
    norms = torch.stack(
        [
            torch.cat([g.flatten() for name, g in gradients.items() if name.startswith(part)]).norm()
            for part in ("encoder", "projector", "decoder")
        ]
    )
    factor = MAX_NORM / norms.norm()
    assert factor < 1
    return {"norms": norms, "gradients": {name: g * factor for name, g in gradients.items()}}


@pytest.mark.parametrize("num_processes", [2, 4])
def test_norms_and_clipped_gradients_equal_one_process_in_every_layout(
    num_processes: int, one_process: dict[str, Any]
) -> None:
    for results in launch(measure, num_processes, num_processes):
        for layout, result in zip(LAYOUTS[num_processes], results, strict=True):
            assert torch.allclose(result["norms"], one_process["norms"], rtol=1e-6), layout.__name__
            for name, gradient in result["gradients"].items():
                expected = one_process["gradients"][name]
                assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-6), (layout.__name__, name)
            # A skipped update moves nothing; the first one of AdamW moves every weight by the learning rate.
            assert result["moved"] == [0.0, pytest.approx(0.5)], layout.__name__


def test_one_process_without_a_mesh_clips_to_the_same(one_process: dict[str, Any]) -> None:
    result = measure_layout(ALONE, {name: spread(name, None) for name in SHAPES})
    assert torch.allclose(result["norms"], one_process["norms"])
    assert torch.allclose(result["gradients"]["decoder.bias"], one_process["gradients"]["decoder.bias"])


def test_gradients_below_the_limit_stay_as_they_are() -> None:
    parameters = {name: spread(name, None) for name in SHAPES}
    clip_gradients([tree(parameters)], ALONE, 1e3)
    for name, parameter in parameters.items():
        assert torch.equal(whole(parameter.grad), full_gradient(name))
