"""What only a CUDA device can show: asynchronous copies arrive whole, and bfloat16 stays near float32."""

from __future__ import annotations

import itertools
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from shared.dataset import open_dataset
from shared.geometry import Budget
from tests.trainer.batches import GEOMETRY, Picture, make_batch, num_labels, tiny_config
from tests.trainer.datasets import write_dataset
from trainer.data.batch import Batch
from trainer.data.loader import Loader
from trainer.data.mixture import single
from trainer.parallel.mesh import open_world
from trainer.parallel.parallelize import build_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BUDGET = Budget(S=16, N=1, L=16)
PACKS = [[[Picture(2, 2, seed=n), 10 + n], [20 + n]] for n in range(10)]


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_batches_on_the_device_equal_those_on_the_host(tmp_path: Path, codec: str) -> None:
    path = write_dataset(tmp_path / "data", {"train": PACKS}, BUDGET, codec=codec)
    steps: dict[str, list[Batch]] = {}
    for device in ("cpu", "cuda"):
        loader = Loader(
            single(open_dataset(path)),
            split="train",
            seed=0,
            packs_per_microbatch=4,
            accumulation=1,
            dp_rank=0,
            dp_size=1,
            device=torch.device(device),
            start_step=0,
            decode_threads=2,
        )
        steps[device] = [step.microbatches[0] for step in itertools.islice(loader, 20)]
        loader.close()
    for host, device in zip(steps["cpu"], steps["cuda"], strict=True):
        for field in fields(Batch):
            assert torch.equal(getattr(host, field.name), getattr(device, field.name).cpu())


def test_bfloat16_on_the_device_is_near_float32_on_the_host() -> None:
    batch = make_batch(PACKS[:2], BUDGET)
    losses: dict[str, float] = {}
    for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16")):
        with open_world(device, dtype) as world:
            model = build_model(tiny_config(), GEOMETRY, world, dtype=dtype, seed=0)
            nll_BS = model(batch.to(world.device))
            nll_BS.sum().backward()
            losses[device] = nll_BS.sum().item() / num_labels(batch)
            assert all(p.grad is not None for p in model.parameters())
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=2e-2)
