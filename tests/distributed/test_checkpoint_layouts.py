"""A checkpoint saved under any layout loads under any other, bit for bit.

The weights and moments of `Small` are a function of their names, so every layout can be asked whether it holds the
right values without another one to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from shared.errors import UserError
from tests.distributed.launch import launch
from trainer.checkpoint import Checkpointer, load_checkpoint
from trainer.checkpoint_state import named_tensors, start_moments
from trainer.parallel.mesh import World, open_world

STATE = {"step": 3, "skipped": 1}


class Layer(nn.Module):
    """`frozen` is not trained, and its first dim divides by no number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6, bias=False)
        self.up, self.down = nn.Linear(6, 8, bias=False), nn.Linear(8, 6, bias=False)
        self.frozen = nn.Linear(6, 5, bias=False).requires_grad_(False)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(self.up(self.norm(h)))


class Small(nn.Module):
    """Four layers between an embedding and a head; a pipeline stage has `layers` of them."""

    def __init__(self, layers: Sequence[int] = range(4), *, embeds: bool = True, heads: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6) if embeds else None
        self.layers = nn.ModuleDict({str(i): Layer() for i in layers})
        self.head = nn.Linear(6, 10, bias=False) if heads else None

    def forward(self, tokens: Tensor) -> Tensor:
        assert self.embed is not None and self.head is not None
        h = self.embed(tokens)
        for layer in self.layers.values():
            h = layer(h)
        return self.head(h)


def shard_all(model: Small, **settings: Any) -> Small:
    for unit in [*model.layers.values(), model]:
        fully_shard(unit, **settings)
    return model


def one(_rank: int) -> list[Small]:
    return [Small()]


def fsdp(_rank: int, size: int) -> list[Small]:
    return [shard_all(Small(), mesh=init_device_mesh("cpu", (size,)))]


def hsdp(_rank: int) -> list[Small]:
    return [shard_all(Small(), mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))]


def fsdp_tp(_rank: int) -> list[Small]:
    """Norms and the frozen layers are the same on both tensor-parallel ranks, the head divided over 4."""
    mesh, model = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), Small()
    for layer in model.layers.values():
        parallelize_module(layer, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    parallelize_module(model, mesh["tp"], {"head": ColwiseParallel()})
    return [shard_all(model, mesh=mesh["dp"])]


def interleaved_pipeline(rank: int, mesh: Any) -> list[Small]:
    """Rank 0 has layers 0 and 2, rank 1 layers 1 and 3: two parts each."""
    stages = [Small([i], embeds=i == 0, heads=i == 3) for i in (rank, rank + 2)]
    return stages if mesh is None else [shard_all(stage, mesh=mesh) for stage in stages]


def pp(rank: int) -> list[Small]:
    return interleaved_pipeline(rank, None)


def pp_fsdp(rank: int) -> list[Small]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    return interleaved_pipeline(rank // 2, mesh["dp"])


LAYOUTS: dict[str, tuple[int, Callable[[int], list[Small]]]] = {
    "one": (1, one),
    "fsdp2": (2, lambda rank: fsdp(rank, 2)),
    "pp2": (2, pp),
    "fsdp4": (4, lambda rank: fsdp(rank, 4)),
    "hsdp2x2": (4, hsdp),
    "fsdp2 x tp2": (4, fsdp_tp),
    "pp2 x fsdp2": (4, pp_fsdp),
}


def value_of(name: str, shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=generator)


def part_of(tensor: Tensor, name: str) -> Tensor:
    """What this rank should hold of the value."""
    value = value_of(name, tensor.shape)
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
    return value


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def build(layout: str, world: World) -> tuple[list[Small], torch.optim.AdamW, dict[str, Tensor]]:
    torch.manual_seed(world.rank)
    parts = LAYOUTS[layout][1](world.rank)
    return parts, optimizer_of(parts), {"guard": torch.zeros(3)}


def optimizer_of(parts: list[Small]) -> torch.optim.AdamW:
    trained = [p for part in parts for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    start_moments(optimizer)
    return optimizer


def save_and_load(directory: str, layouts: list[str], others: list[str]) -> dict[str, Any]:
    """Save under each of `layouts`; load what was saved under them and `others`: wrong names by (from, to)."""
    with open_world("cpu", "float32") as world:
        for layout in layouts:
            parts, optimizer, extra = build(layout, world)
            for name, tensor in named_tensors(parts, optimizer, extra).items():
                local(tensor).copy_(part_of(tensor, name))
            if len(parts) == 1:  # an evaluation just before: FSDP leaves the root's parameters gathered
                with torch.no_grad():
                    parts[0](torch.arange(10))
            with Checkpointer(Path(directory, layout), world, keep=1) as checkpointer:
                checkpointer.save(parts, optimizer, STATE, extra)
        results: dict[str, Any] = {}
        for source in [*others, *layouts]:
            for target in layouts:
                parts, optimizer, extra = build(target, world)
                path = Path(directory, source, "step_00000003")
                state = load_checkpoint(path, parts, optimizer, world, extra)
                tensors = named_tensors(parts, optimizer, extra)
                wrong = [name for name, t in tensors.items() if not torch.equal(local(t), part_of(t, name))]
                results[f"{source} -> {target}"] = (state, wrong, sorted(tensors))
        return results


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def results(directory: Path) -> dict[str, list[Any]]:
    """By (from, to), what each rank found: one process first, then four, then two, then one again."""
    of_size = {size: [name for name, (needed, _) in LAYOUTS.items() if needed == size] for size in (1, 2, 4)}
    done, found = [], {}
    for size in (1, 4, 2, 1):
        words = (str(directory), of_size[size], [name for name in done if name not in of_size[size]])
        ranks = [save_and_load(*words)] if size == 1 else launch(save_and_load, size, *words)
        found |= {pair: [rank[pair] for rank in ranks] for pair in ranks[0]}
        done += of_size[size]
        for name in of_size[1] if size == 2 else []:  # saved again by the last round
            (directory / name / "step_00000003").rename(directory / f"{name}.old")
    return found


NAMES = [
    *("model.embed.weight", "model.head.weight"),
    *(f"model.layers.{i}.{n}" for i in range(4) for n, _ in Layer().named_parameters()),
]
PAIRS = [
    f"{source} -> {target}"
    for source, (source_size, _) in LAYOUTS.items()
    for target, (target_size, _) in LAYOUTS.items()
    if (source_size, target_size) != (2, 4)  # each is tested with one process in between
]


@pytest.mark.parametrize("pair", PAIRS)
def test_a_checkpoint_of_one_layout_loads_bit_for_bit_under_another(
    results: dict[str, list[Any]], pair: str
) -> None:
    names: set[str] = set()
    for state, wrong, held in results[pair]:
        assert state == STATE and wrong == []
        names |= set(held)
    assert {name for name in names if name.startswith("model.")} == set(NAMES)
    trained = [name.removeprefix("model.") for name in NAMES if ".frozen." not in name]
    moments = {f"optimizer.{name}.{key}" for name in trained for key in ("step", "exp_avg", "exp_avg_sq")}
    assert names - set(NAMES) == moments | {"extra.guard"}


def refused(directory: str) -> list[str]:
    """What two pipeline ranks say to checkpoints that one of them, or neither, knows all of."""
    said: list[str] = []
    with open_world("cpu", "float32") as world:
        parts, optimizer, extra = build("pp2", world)
        if world.rank == 1:
            parts, optimizer = parts[:1], optimizer_of(parts[:1])  # nobody has layer 3 and the head
        other, other_optimizer, _ = build("pp2", world)
        if world.rank == 0:
            other[0].layers["0"].register_parameter("more", nn.Parameter(torch.zeros(2)))
        path = Path(directory, "pp2", "step_00000003")
        for model, its_optimizer in ((parts, optimizer), (other, other_optimizer)):
            with pytest.raises(UserError) as caught:
                load_checkpoint(path, model, its_optimizer, world, extra)
            said.append(str(caught.value))
    return said


def test_what_the_parts_of_a_pipeline_together_lack_is_named_on_every_rank(
    results: dict[str, list[Any]], directory: Path
) -> None:
    assert "pp2 -> pp2" in results
    ranks = launch(refused, 2, str(directory))
    assert ranks[0] == ranks[1]
    unknown, lacks = ranks[0]
    assert "has unknown model.head.weight, model.layers.3." in unknown and "another model config" in unknown
    assert "lacks model.layers.0.more;" in lacks


def damaged(directory: str) -> str:
    with open_world("cpu", "float32") as world:
        parts, optimizer, extra = build("fsdp2", world)
        with pytest.raises(UserError) as caught:
            load_checkpoint(Path(directory), parts, optimizer, world, extra)
        return str(caught.value)


def test_a_flipped_bit_that_one_rank_finds_is_told_by_both(
    results: dict[str, list[Any]], directory: Path
) -> None:
    assert "fsdp2 -> fsdp2" in results
    path = directory / "fsdp2" / "step_00000003"
    path.rename(directory / "broken")
    file = directory / "broken" / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[1000] ^= 16
    file.write_bytes(content)
    said = launch(damaged, 2, str(directory / "broken"))
    assert said[0] == said[1] and "__1_0.distcp has checksum" in said[0] and "delete it" in said[0]


def half_full(directory: str) -> list[str]:
    """Rank 1's disk is full: what each rank hears at the next call, and that training's own sums still work."""
    with open_world("cpu", "float32") as world:
        parts, optimizer, extra = build("fsdp2", world)
        target = Path(directory, "step_00000003.tmp")
        if world.is_main:
            target.mkdir(parents=True)
            (target / "__1_0.distcp").symlink_to("/dev/full")
        world.barrier()
        with pytest.raises(UserError) as caught:
            with Checkpointer(Path(directory), world, keep=1) as checkpointer:
                checkpointer.save(parts, optimizer, STATE, extra)
                sums = [world.sum_on_host([world.rank + i])[0] for i in range(50)]
                checkpointer.finish()
        return [str(caught.value), str(sums == [1 + 2 * i for i in range(50)])]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_the_full_disk_of_one_rank_is_told_by_both_and_no_checkpoint_appears(tmp_path: Path) -> None:
    said = launch(half_full, 2, str(tmp_path / "checkpoints"))
    assert said[0] == said[1] and said[0][1] == "True"
    assert "step_00000003 cannot be written" in said[0][0] and "No space left" in said[0][0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000003.tmp"]
