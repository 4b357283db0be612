"""What a training step on a CPU spends outside forward, backward, optimizer and the ranks' communication.

    python benchmarks/step.py --json                              one process
    torchrun --nproc-per-node 2 benchmarks/step.py --json         two, FSDP over gloo

The loop is that of `trainer train` on made packs: loader, train step, and a reporter that reads every step, as the
demo does. Inside are the regions that a trace names forward, backward and optimizer, and the sums over ranks of host
and device numbers (ranks wait for each other there); all else of the loop is outside. Two models: that of
configs/train/demo.toml, and one about ten times larger.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from packs import write_packs

from shared.config import load_config
from shared.geometry import Budget
from trainer import step as step_module
from trainer.config import RunConfig
from trainer.console import Console
from trainer.data.loader import Loader
from trainer.data.mixture import Mixture
from trainer.describe import measures_of_run
from trainer.guard import Guard
from trainer.metrics import Reporter
from trainer.optim import make_optimizer
from trainer.parallel import parallelize
from trainer.parallel.mesh import World, open_world
from trainer.run import new_model, open_data

# That of the demo's data set.
BUDGET = Budget(S=256, N=2, L=128)
WIDER = ["hidden-size=448", "intermediate-size=1344"]
MODELS = {
    "demo": [],
    "ten times": [f"--{part}.{key.replace('=', ' ')}" for part in ("encoder", "decoder") for key in WIDER],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="measured steps, after five others")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    # One directory for all ranks: rank 0 makes it.
    with tempfile.TemporaryDirectory() as own, open_world("cpu", "float32") as world:
        directory = shared_directory(own, world)
        world.on_main(lambda: write_packs(directory / "packs", BUDGET, 64))
        for name, changes in MODELS.items():
            words = [word for change in changes for word in change.split()]
            figures[name] = measure(directory, name, words, world, options.steps)
            if world.is_main:
                print(describe(name, figures[name], world.size), flush=True)
        world.barrier()
    if options.json and world.is_main:
        print(json.dumps(figures))


def shared_directory(own: str, world: World) -> Path:
    path = [own]
    if world.mesh is not None:
        torch.distributed.broadcast_object_list(path, src=0)
    return Path(path[0])


def describe(name: str, figures: dict[str, float], processes: int) -> str:
    return (
        f"{name:<10} {processes} process(es), {figures['parameters'] / 1e6:5.1f} M parameters: "
        f"{figures['step_ms']:7.1f} ms per step, outside {figures['outside_ms']:5.2f} ms = {figures['outside']:.2%}"
    )


def measure(directory: Path, name: str, words: list[str], world: World, steps: int) -> dict[str, float]:
    config = load_config(
        RunConfig,
        Path("configs/train/demo.toml"),
        [*words, "--dataset", str(directory / "packs"), "--out", str(directory / name), "--steps", "100000",
         "--decoder.vocab-size", "1000", "--batch.packs-per-microbatch", str(4 // world.dp_size)],
    )  # fmt: skip
    (directory / name).mkdir(exist_ok=True)
    data = open_data(config)
    model = new_model(config, data, world)
    optimizer, guard = make_optimizer(model.parts, config.optimizer), Guard(config.guard, world.device)
    reporter = Reporter(
        directory / name, world, Console(enabled=False),
        measures_of_run(config, data.budget, data.sources, world.device), config.log,
        start_step=0, total_steps=config.steps,
    )  # fmt: skip
    loader = open_loader(config, data, world)
    loaded, inside = iter(loader), Stopwatch()

    def run(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            stats = step_module.train_step(
                model, optimizer, guard, next(loaded), world, lr=1e-4, max_grad_norm=1.0
            )
            reporter.add(stats)
            reporter.flush()
        return time.perf_counter() - begin

    try:
        run(5)
        with inside.timing():
            seconds = run(steps)
    finally:
        loader.close()
        reporter.close()
    parameters = sum(p.numel() for part in model.parts for p in part.parameters())
    outside = seconds - inside.seconds
    return {
        "parameters": parameters,
        "step_ms": 1e3 * seconds / steps,
        "outside_ms": 1e3 * outside / steps,
        "outside": outside / seconds,
    }


def open_loader(config: RunConfig, data: Mixture, world: World) -> Loader:
    return Loader(
        data, split="train", seed=0, packs_per_microbatch=config.batch.packs_per_microbatch,
        accumulation=config.batch.accumulation(world.dp_size), dp_rank=world.dp_rank, dp_size=world.dp_size,
        device=world.device, start_step=0, decode_threads=1, row_part=world.row_part,
    )  # fmt: skip


class Stopwatch:
    """Seconds inside the named regions of a step and the sums over ranks."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0

    @contextmanager
    def region(self, name: str = "") -> Iterator[None]:
        """`name` as in trainer.profile; a region inside a region is counted once."""
        begin, self.depth = time.perf_counter(), self.depth + 1
        yield
        self.depth -= 1
        if self.depth == 0:
            self.seconds += time.perf_counter() - begin

    @contextmanager
    def timing(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in (step_module, parallelize):
                stack.enter_context(patch.object(module, "named", self.region))
            for name in ("sum_on_host", "sum_on_device"):
                stack.enter_context(patch.object(World, name, self.timed(getattr(World, name))))
            yield

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with self.region():
                return function(*arguments)

        return call


if __name__ == "__main__":
    main()
