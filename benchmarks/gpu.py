"""Everything that only a GPU can show, in one command, on a machine with torch and its usual companions (no Ray).

    PYTHONPATH=. python benchmarks/gpu.py --out gpu.json            some minutes; not yet run on a GPU
    PYTHONPATH=. python benchmarks/gpu.py --dry-run --out dry.json  the same on a CPU, tiny: proves that it runs

First what must agree: attention by flex, varlen and sdpa, and compiled layers against plain ones, in loss and
gradients of one microbatch. Then what training reaches, through the loader and the train step that `trainer
train` runs, on packed data made for it (benchmarks/packs.py): tokens per second, useful MFU (FLOPs of tokens
and patches without padding, over the device's dense bfloat16 peak), peak memory, and the wait for data.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packs import GEOMETRY, write_packs

from shared.config import load_config
from shared.dataset import open_dataset
from shared.geometry import Budget
from trainer.config import RunConfig
from trainer.data.loader import Loader
from trainer.data.mixture import Mixture, single
from trainer.flops import model_flops, peak_flops
from trainer.guard import Guard
from trainer.models.vlm import VisionLanguageModel
from trainer.optim import freeze, make_optimizer
from trainer.parallel.mesh import World, open_world
from trainer.parallel.parallelize import ComputeConfig, ParallelModel, build_model
from trainer.step import forward_backward, train_step

# Two bfloat16 computations of one gradient in different orders: some 1 % apart, a wrong mask some 100 %.
CLOSE = 0.05


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model under one way of computing it."""

    name: str
    encoder: str
    decoder: str
    compute: ComputeConfig
    packs_per_microbatch: int = 1
    accumulation: int = 1


ONE = {"encoder": "siglip2-base-patch16-naflex", "decoder": "llama-3.2-1b"}
THREE = {"encoder": "siglip2-so400m-patch16-naflex", "decoder": "llama-3.2-3b"}


def compute(attention: str, recompute: str, compiled: bool) -> ComputeConfig:
    return ComputeConfig(attention=attention, recompute=recompute, compile=compiled)  # pyright: ignore[reportArgumentType]


CASES = [
    Case(name="1b flex, not compiled", **ONE, compute=compute("flex", "none", False)),
    Case(name="1b flex", **ONE, compute=compute("flex", "none", True)),
    Case(name="1b varlen", **ONE, compute=compute("varlen", "none", True)),
    Case(
        name="1b flex selective x2", **ONE, compute=compute("flex", "selective", True), packs_per_microbatch=2
    ),
    Case(name="3b flex selective", **THREE, compute=compute("flex", "selective", True)),
    Case(name="3b varlen full", **THREE, compute=compute("varlen", "full", True)),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON file to write; renewed after every case"
    )
    parser.add_argument("--steps", type=int, default=10, help="measured steps of a case, after three others")
    parser.add_argument("--only", default="", help="measure the cases whose name begins with this")
    parser.add_argument("--skip-checks", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU, attention by sdpa")
    parser.add_argument("--json", action="store_true", help="print the same JSON object last")
    options = parser.parse_args()
    device, dtype = ("cpu", "float32") if options.dry_run else ("cuda", "bfloat16")
    figures: dict[str, Any] = {"machine": machine(device), "checks": {}, "cases": {}}
    with tempfile.TemporaryDirectory() as directory, open_world(device, dtype) as world:
        if not options.skip_checks:
            figures["checks"] = checks(Path(directory) / "check", world, dtype)
            write(options.out, figures)
        budget = Budget(S=256, N=2, L=256) if options.dry_run else Budget(S=8192, N=9, L=1792)
        data = single(open_dataset(write_packs(Path(directory) / "packs", budget, 16)))
        for case in dry_cases() if options.dry_run else CASES:
            if case.name.startswith(options.only):
                figures["cases"][case.name] = attempt(case, data, world, dtype, options.steps)
                print(f"{case.name}: {json.dumps(figures['cases'][case.name])}", flush=True)
                write(options.out, figures)
    if options.json:
        print(json.dumps(figures))


def machine(device: str) -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "torch": torch.__version__, "commit": commit.stdout.strip() or "unknown"}


def write(path: Path, figures: dict[str, Any]) -> None:
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def config_of(encoder: list[str], decoder: list[str]) -> RunConfig:
    fixed = [
        "--dataset",
        "made",
        "--out",
        "nowhere",
        "--steps",
        "1000",
        "--projector.merge",
        str(GEOMETRY.merge),
    ]
    return load_config(RunConfig, None, [*fixed, *encoder, *decoder])


def tiny() -> RunConfig:
    """Heads of 64 values, as all attention kernels take them."""
    sizes = {"hidden-size": 128, "intermediate-size": 256, "num-layers": 2, "num-heads": 2}
    encoder = ["--encoder.type", "siglip2", *words("encoder", sizes)]
    more = {"num-kv-heads": 1, "head-dim": 64, "vocab-size": 1024}
    return config_of(encoder, words("decoder", sizes | more))


def words(section: str, values: dict[str, int]) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{section}.{key}", str(value))]


def dry_cases() -> list[Case]:
    return [
        Case(name="tiny", encoder="", decoder="", compute=compute("sdpa", "selective", False), accumulation=2)
    ]


def checks(path: Path, world: World, dtype: str) -> dict[str, Any]:
    """Loss and gradients of one microbatch in every way of computing it, against sdpa without compiling.

    Raises:
        SystemExit: two of them differ.
    """
    data = single(open_dataset(write_packs(path, Budget(S=1024, N=2, L=512), 4)))
    ways = {"sdpa": compute("sdpa", "none", False), "sdpa selective": compute("sdpa", "selective", False)}
    if world.device.type == "cuda":
        for attention in ("flex", "varlen"):
            ways[attention] = compute(attention, "none", False)
            ways[f"{attention} compiled"] = compute(attention, "none", True)
            ways[f"{attention} compiled selective"] = compute(attention, "selective", True)
    results = {name: loss_and_gradient(way, data, world, dtype) for name, way in ways.items()}
    loss, gradient = results["sdpa"]
    found: dict[str, Any] = {}
    for name, (other_loss, other) in results.items():
        off = float((other - gradient).norm() / gradient.norm())
        found[name] = {"loss": other_loss, "gradient_difference": off}
        print(f"check {name}: loss {other_loss:.5f}, gradients {off:.1e} apart", flush=True)
        if not (off < CLOSE and abs(other_loss - loss) < CLOSE):
            raise SystemExit(f"{name} does not compute what sdpa computes")
    return found


def loss_and_gradient(
    way: ComputeConfig, data: Mixture, world: World, dtype: str
) -> tuple[float, torch.Tensor]:
    config = tiny()
    model = build_model(config.model, GEOMETRY, world, dtype=dtype, seed=0, compute=way)
    with closing_loader(data, world, 4, 1) as steps:
        step = next(steps)
        labels = step.counts.labels
        nll = forward_backward(model, step.microbatches, world, num_labels=labels, num_sources=1)
    flat = [gradient_of(p).flatten() for part in model.parts for p in part.parameters()]
    return float(nll.sum()) / labels, torch.cat(flat)


def gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return getattr(parameter.grad, "full_tensor", lambda: parameter.grad)().float()


@contextmanager
def closing_loader(
    data: Mixture, world: World, packs_per_microbatch: int, accumulation: int
) -> Iterator[Iterator[Any]]:
    loader = Loader(
        data, split="train", seed=0, packs_per_microbatch=packs_per_microbatch, accumulation=accumulation,
        dp_rank=0, dp_size=1, device=world.device, start_step=0, decode_threads=1,
    )  # fmt: skip
    try:
        yield iter(loader)
    finally:
        loader.close()


def attempt(case: Case, data: Mixture, world: World, dtype: str, steps: int) -> dict[str, Any]:
    """The figures of a case, or what kept it from running: the others go on."""
    try:
        return measure(case, data, world, dtype, steps)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        return {"failed": str(error).splitlines()[0]}
    finally:
        torch.compiler.reset()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()


def measure(case: Case, data: Mixture, world: World, dtype: str, steps: int) -> dict[str, Any]:
    named = (["--encoder.preset", case.encoder], ["--decoder.preset", case.decoder])
    config = config_of(*named) if case.encoder else tiny()
    with torch.device("meta"):
        whole = VisionLanguageModel(config.model, GEOMETRY)
    freeze([whole], config.trained)
    flops = model_flops(whole, GEOMETRY.merge)
    parameters = sum(p.numel() for p in whole.parameters())
    model = build_model(config.model, GEOMETRY, world, dtype=dtype, seed=0, compute=case.compute)
    optimizer, guard = make_optimizer(model.parts, config.optimizer), Guard(config.guard, world.device)
    with closing_loader(data, world, case.packs_per_microbatch, case.accumulation) as loaded:
        run(3, model, optimizer, guard, loaded, world)  # compiling, and the first touch of all memory
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds, stats = run(steps, model, optimizer, guard, loaded, world)
    useful = sum(flops.of(each.counts) for each in stats)
    peak = peak_flops(world.device)
    memory = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else None
    tokens = sum(each.counts.tokens for each in stats)
    return {
        **dataclasses.asdict(case.compute),
        "parameters": parameters,
        "packs_per_step": case.packs_per_microbatch * case.accumulation,
        "step_s": seconds / steps,
        "tokens_per_s": tokens / seconds,
        "patches_per_s": sum(each.counts.patches for each in stats) / seconds,
        "tflops_per_s": useful / seconds / 1e12,
        "useful_mfu": None if peak is None else useful / seconds / peak,
        "peak_memory_gb": None if memory is None else memory / 1e9,
        "data_wait_share": sum(each.wait_s for each in stats) / seconds,
        "last_loss": float(stats[-1].source_nll.sum()) / stats[-1].counts.labels,
    }


def run(
    steps: int,
    model: ParallelModel,
    optimizer: torch.optim.Optimizer,
    guard: Guard,
    loaded: Iterator[Any],
    world: World,
) -> tuple[float, list[Any]]:
    """Seconds of some steps, the device's included, and their stats."""
    synchronize(world)
    begin = time.perf_counter()
    stats = [
        train_step(model, optimizer, guard, step, world, lr=1e-4, max_grad_norm=1.0)
        for step in itertools.islice(loaded, steps)
    ]
    synchronize(world)
    return time.perf_counter() - begin, stats


def synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
