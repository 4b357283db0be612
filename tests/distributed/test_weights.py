"""Weights in and out of sharded models on four processes: equal to one process to the bit, under every layout."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.distributed.launch import launch
from tests.distributed.layouts import BUDGET, whole
from tests.trainer.batches import GEOMETRY, tiny_config
from trainer.checkpoint import Checkpointer
from trainer.models.init import init_parameters
from trainer.models.vlm import VisionLanguageModel
from trainer.optim import OptimizerConfig, make_optimizer
from trainer.parallel.mesh import ParallelConfig, World, make_world
from trainer.parallel.parallelize import build_model
from trainer.parallel.pipeline import Microbatches
from trainer.weights.checkpoint_tensors import CheckpointTensors
from trainer.weights.hub import HubFiles
from trainer.weights.load import load_start_weights

# 42 rows of tokens on four ranks: 11, 11, 11 and 9, of which the checkpoint has 40.
CONFIG = tiny_config(vocab_size=42, num_layers=4)
LAYOUTS = {
    "fsdp": ParallelConfig(),
    "hsdp": ParallelConfig(dp_replicate=2),
    "tensor": ParallelConfig(tp=2),
    "pipeline": ParallelConfig(pp=2, tp=2),
    "interleaved": ParallelConfig(pp=2, stages_per_rank=2),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Here, for the four processes import this module too, and do without.
    from transformers import LlamaConfig, LlamaForCausalLM, Siglip2VisionConfig, Siglip2VisionModel

    path = tmp_path_factory.mktemp("hub")
    vision = Siglip2VisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=2,
        num_patches=16,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.manual_seed(0)
    for model, name in ((Siglip2VisionModel(vision), "encoder"), (LlamaForCausalLM(text), "decoder")):
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        model.to(torch.bfloat16).save_pretrained(path / name)
    return path


def load_and_save(world: World, parallel: ParallelConfig, hub: Path, out: Path) -> dict[str, Any]:
    """What this rank holds after an import, and how many values it read; then a checkpoint of it."""
    model = build_model(
        CONFIG,
        GEOMETRY,
        world,
        dtype="float32",
        seed=1,
        parallel=parallel,
        microbatches=Microbatches(budget=BUDGET, packs=1, count=2),
    )
    read: list[int] = []
    original = HubFiles.read

    def counted(self: HubFiles, name: str, box: tuple[slice, ...]) -> Tensor:
        value = original(self, name, box)
        read.append(value.numel())
        return value

    with patch.object(HubFiles, "read", counted):
        lines = load_start_weights(str(hub / "encoder"), str(hub / "decoder"), model.parts, CONFIG, GEOMETRY)
    with Checkpointer(out, world, keep=1) as checkpointer:
        checkpointer.save(model.parts, make_optimizer(model.parts, OptimizerConfig()), {"step": 0})
    held = {name: whole(p).detach().clone() for part in model.parts for name, p in part.named_parameters()}
    return {"held": held, "lines": lines, "read": sum(read)}


def all_layouts(hub: str, out: str) -> dict[str, dict[str, Any]]:
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # full_tensor() takes two gathers
    dist.init_process_group("gloo")
    results: dict[str, dict[str, Any]] = {}
    for name, parallel in LAYOUTS.items():
        world = make_world(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), parallel)
        results[name] = load_and_save(world, parallel, Path(hub), Path(out, name))
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def one_process(hub: Path) -> tuple[dict[str, Tensor], list[str]]:
    model = VisionLanguageModel(CONFIG, GEOMETRY)
    init_parameters(model, CONFIG, seed=1)
    lines = load_start_weights(str(hub / "encoder"), str(hub / "decoder"), [model], CONFIG, GEOMETRY)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, lines


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def ranks(hub: Path, saved: Path) -> list[dict[str, dict[str, Any]]]:
    return launch(all_layouts, 4, str(hub), str(saved))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_parameters_are_filled_as_those_of_one_process(
    layout: str, ranks: list[dict[str, dict[str, Any]]], one_process: tuple[dict[str, Tensor], list[str]]
) -> None:
    expected, lines = one_process
    held = {name for rank in ranks for name in rank[layout]["held"]}
    assert held == expected.keys()
    for rank in ranks:
        assert rank[layout]["lines"] == lines
        for name, value in rank[layout]["held"].items():
            assert torch.equal(value, expected[name]), name


def test_a_rank_reads_its_own_slices_and_no_more(
    ranks: list[dict[str, dict[str, Any]]], one_process: tuple[dict[str, Tensor], list[str]]
) -> None:
    # All but the projector, and the two times two rows of tokens that no file has.
    sizes = {name: value.numel() for name, value in one_process[0].items() if "projector" not in name}
    values = sum(sizes.values()) - 2 * 2 * 24
    read = {layout: [rank[layout]["read"] for rank in ranks] for layout in LAYOUTS}
    assert sum(read["fsdp"]) == values
    assert sum(read["hsdp"]) == 2 * values
    # Norms of 24 rows are on both tensor-parallel ranks, and little else.
    assert values < sum(read["tensor"]) < 1.05 * values
    assert all(0 < of_rank < 0.6 * values for of_layout in read.values() for of_rank in of_layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_any_layout_is_read_by_name_in_one_process(
    layout: str,
    ranks: list[dict[str, dict[str, Any]]],
    saved: Path,
    one_process: tuple[dict[str, Tensor], list[str]],
) -> None:
    assert len(ranks) == 4
    tensors = CheckpointTensors(saved / layout / "step_00000000", CONFIG)
    values = {name: torch.empty(shape) for name, shape in tensors.shapes.items()}
    tensors.read_into(values)
    assert values.keys() == one_process[0].keys()
    for name, value in one_process[0].items():
        assert torch.equal(values[name], value), name
