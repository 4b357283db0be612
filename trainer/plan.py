"""`python -m trainer plan CONFIG --gpus N`: what a layout takes, and whether it fits, without any GPU or process.

The model is built on the meta device and cut as the ranks of a pipeline would; memory is that of trainer.memory,
FLOPs those of trainer.flops for packs without padding. Refused is what cannot be divided, and what does not fit
into the memory of --gpu, or --gpu-bytes: with it, leave room for what the estimate does not know (trainer.memory).

S, N and L are those of the data set if it is there, or given by --S, --N and --L.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.config import load_config
from shared.dataset import MANIFEST, open_dataset
from shared.errors import UserError
from shared.geometry import Budget, Geometry
from trainer.config import RunConfig
from trainer.data.counts import Counts
from trainer.flops import model_flops, peak_flops_of
from trainer.memory import Division, Memory, Positions, held_values, num_shards, rank_memory
from trainer.models.vlm import VisionLanguageModel
from trainer.optim import PARTS, check_names, freeze
from trainer.parallel.check import check_layout, vision_rows_note
from trainer.parallel.parallelize import DTYPES
from trainer.parallel.pipeline import cut_stage, stage_layers

# Memory of devices, by the vendors' data sheets; of the A100 there are two, the larger one is meant.
GPU_BYTES = {"A100": 80e9, "H100": 80e9, "H200": 141e9, "B200": 180e9, "L40S": 48e9, "MI300X": 192e9}
# What to change, by the part of the memory that is largest.
REMEDIES = {
    "states": "raise --gpus, or parallel.tp or pp, or lower parallel.dp_replicate",
    "gathered": "raise parallel.tp, or set parallel.pp = 1",
    "gradients": 'set compute.reduce = "microbatch", or raise batch.packs_per_microbatch, parallel.tp or pp',
    "activations": 'set compute.recompute = "selective" or "full", or raise parallel.cp or tp',
    "working": "raise parallel.cp or tp, or lower batch.packs_per_microbatch",
    "batches": "lower batch.packs_per_step",
}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trainer plan",
        allow_abbrev=False,
        description="What a layout takes; no GPU is needed.",
    )
    parser.add_argument("config", type=Path, help="TOML file; any of its keys can follow as --key value")
    parser.add_argument("--gpus", type=int, required=True, help="number of processes, one per device")
    parser.add_argument("--gpu", default="H100", help="device whose peak the step time is for (default H100)")
    parser.add_argument(
        "--gpu-bytes",
        type=float,
        help="memory of a device (default: that of --gpu); what does not fit is refused",
    )
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="share of the peak for the step time (default 0.4)"
    )
    for letter in ("S", "N", "L"):
        parser.add_argument(f"--{letter}", type=int, help=f"budget.{letter}, where there is no data set yet")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    arguments, overrides = parser.parse_known_args(argv)
    config = load_config(RunConfig, arguments.config, overrides)
    peak = peak_flops_of(arguments.gpu)
    if peak is None:
        raise UserError(f"--gpu {arguments.gpu!r}: its peak is not known; give a name such as H100, or A100")
    budget = find_budget(config, {letter: getattr(arguments, letter) for letter in ("S", "N", "L")})
    plan = plan_run(config, budget, arguments.gpus)
    step_s = plan["step"]["flops"] / (arguments.mfu * peak * arguments.gpus)
    plan["time"] = {"gpu": arguments.gpu, "mfu": arguments.mfu, "step_s": step_s}
    print(json.dumps(plan) if arguments.json else "\n".join(describe_plan(plan)), flush=True)
    gpu_bytes = arguments.gpu_bytes or GPU_BYTES.get(arguments.gpu)
    if gpu_bytes is not None:
        check_memory(plan["memory"], gpu_bytes)
    elif not arguments.json:
        print(
            f"note      whether it fits is not checked: give --gpu-bytes, that of {arguments.gpu} is not known"
        )


def find_budget(config: RunConfig, given: dict[str, int | None]) -> Budget:
    """S, N and L of the data set, with what is given in their place."""
    paths = [config.dataset] if config.dataset else [entry.path for entry in config.mixture.values()]
    if (Path(paths[0]) / MANIFEST).is_file():
        sizes = asdict(open_dataset(paths[0]).budget)
    else:
        sizes = {}
    sizes |= {letter: value for letter, value in given.items() if value is not None}
    missing = [f"--{letter}" for letter in given if letter not in sizes]
    if missing:
        raise UserError(f"data set {paths[0]}: not there; give {' '.join(missing)}, or preprocess it first")
    try:
        return Budget(**sizes)
    except ValueError as error:
        raise UserError(f"budget: {error}") from None


def plan_run(config: RunConfig, budget: Budget, gpus: int) -> dict[str, Any]:
    """Everything that `plan` prints.

    Raises:
        UserError: the processes, the layers or a batch cannot be divided that way.
    """
    try:
        axes = config.parallel.sizes(gpus)
        dp_size = axes["dp_replicate"] * axes["dp_shard"]
        accumulation = config.batch.accumulation(dp_size)
    except ValueError as error:
        raise UserError(f"{error}; change --gpus, [parallel] or [batch]") from None
    check_layout(
        config.model, config.parallel, config.compute, budget,
        device=config.device, dtype=config.dtype, accumulation=accumulation,
    )  # fmt: skip
    whole = meta_model(config)
    counts = full_counts(config, budget)
    rows = config.batch.packs_per_microbatch * budget.N
    return {
        "axes": axes,
        "budget": asdict(budget),
        "parameters": parameters_by_part(whole),
        "trained": list(config.trained),
        "batch": {
            "packs": config.batch.packs_per_step,
            "packs_per_microbatch": config.batch.packs_per_microbatch,
            "accumulation": accumulation,
            "data_parallel": dp_size,
        },
        "step": {
            "tokens": counts.tokens,
            "patches": counts.patches,
            "flops": model_flops(whole, config.projector.merge).of(counts),
        },
        "compute": {
            "dtype": config.dtype, "attention": config.compute.backend(config.device),
            "recompute": config.compute.recompute, "reduce": config.compute.reduce,
        },
        "memory": [
            {"pp_rank": rank, **ranks, "bytes": {**asdict(memory), "total": memory.total}}
            for rank, (ranks, memory) in enumerate(memory_of_ranks(config, budget, gpus))
        ],
        "note": vision_rows_note(config.parallel, rows),
    }  # fmt: skip


def meta_model(config: RunConfig) -> VisionLanguageModel:
    """The whole model without weights, frozen where it is not trained.

    Raises:
        UserError: an entry of `trained` or of the multipliers fits nothing.
    """
    geometry = Geometry(patch_size=config.encoder.patch_size, merge=config.projector.merge)
    with torch.device("meta"):
        model = VisionLanguageModel(config.model, geometry)
    check_names(model, config.trained, config.optimizer.lr_multipliers)
    freeze([model], config.trained)
    return model


def memory_of_ranks(config: RunConfig, budget: Budget, gpus: int) -> Iterator[tuple[dict[str, Any], Memory]]:
    """For each rank of axis pp: what it holds, and its memory."""
    parallel, axes = config.parallel, config.parallel.sizes(gpus)
    packs, count = config.batch.packs_per_microbatch, config.decoder.num_layers
    accumulation = config.batch.accumulation(axes["dp_replicate"] * axes["dp_shard"])
    division = Division(
        value_bytes=DTYPES[config.dtype].itemsize,
        tp=parallel.tp,
        cp=parallel.cp,
        sequence_parallel=parallel.sequence_parallel and parallel.tp > 1,
        repeated_keys=config.compute.backend(config.device) != "flex",
    )
    rows = -(-packs * budget.N // (parallel.cp * parallel.tp))
    stages, whole = stage_layers(count, parallel), meta_model(config)
    for rank in range(parallel.pp):
        own = stages[rank :: parallel.pp]
        parts = [meta_model(config) for _ in own]
        for part, layers in zip(parts, own, strict=True):
            cut_stage(part, layers, count)
        # Later stages of a pipeline read no pictures.
        own_rows = rows if parts[0].encoder is not None else 0
        positions = Positions(
            tokens=packs * budget.S // parallel.cp,
            all_tokens=packs * budget.S,
            patches=own_rows * budget.L,
            encoder_positions=own_rows * positions_per_row(whole, budget.L),
            patch_values=config.encoder.values_per_patch,
            microbatches=accumulation,
            in_flight=microbatches_in_flight(rank, parallel.pp, parallel.stages_per_rank, accumulation),
        )
        named = [(name, p) for part in parts for name, p in part.named_parameters()]
        holds = {
            "decoder_layers": sum(len(layers) for layers in own),
            "parameters": round(sum(held_values(*item, parallel.tp) for item in named)),
            "shard": round(sum(held_values(n, p, parallel.tp) / num_shards(n, axes) for n, p in named)),
        }
        compute = config.compute
        yield (
            holds,
            rank_memory(parts, axes, compute.recompute, division, positions, reduce=compute.reduce),
        )


def positions_per_row(whole: VisionLanguageModel, length: int) -> int:
    """Of a vision row of `length` patches inside the encoder."""
    assert whole.encoder is not None
    segments_NL = torch.empty(1, length, dtype=torch.int32, device="meta")
    return whole.encoder.attention_segments(segments_NL).shape[1]


def microbatches_in_flight(rank: int, pp: int, stages_per_rank: int, count: int) -> float:
    """Forwards that a rank has done before its first backward, in units of all its layers: those of the schedules."""
    if stages_per_rank == 1:
        return float(min(pp - rank, count))
    ahead = 2 * (pp - rank - 1) + (stages_per_rank - 1) * pp + 1
    return min(ahead, count * stages_per_rank) / stages_per_rank


def full_counts(config: RunConfig, budget: Budget) -> Counts:
    """A step of packs without padding, each one document of S tokens and N images of L patches."""
    packs = config.batch.packs_per_step
    tokens, images = packs * budget.S, packs * budget.N
    labels = max(0, tokens - images * budget.L // config.projector.merge**2)
    return Counts(
        labels=labels, tokens=tokens, patches=images * budget.L, images=images, documents=packs,
        token_pairs=packs * budget.S**2, patch_pairs=images * budget.L**2, labels_per_source=np.array([labels]),
    )  # fmt: skip


def parameters_by_part(model: VisionLanguageModel) -> dict[str, int]:
    return {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in PARTS}


def describe_plan(plan: dict[str, Any]) -> Iterator[str]:
    axes, batch, step, time = plan["axes"], plan["batch"], plan["step"], plan["time"]
    budget, compute = plan["budget"], plan["compute"]
    parameters = plan["parameters"]
    gpus = math.prod(axes.values())
    yield f"layout    {gpus} devices = " + " x ".join(f"{axis} {size}" for axis, size in axes.items())
    yield f"model     {describe_parameters(parameters)}; trained: {', '.join(plan['trained'])}"
    yield (
        f"compute   {compute['dtype']}, attention {compute['attention']}, recompute {compute['recompute']}, "
        f"reduced once per {compute['reduce']}"
    )
    yield (
        f"batch     {batch['packs']} packs of S {budget['S']}, N {budget['N']} x L {budget['L']} = "
        f"{batch['packs_per_microbatch']} per microbatch x {batch['accumulation']} accumulated x "
        f"{batch['data_parallel']} data-parallel ranks"
    )
    yield (
        f"step      {step['tokens']:,} tokens, {step['patches']:,} patches, {step['flops'] / 1e15:,.2f} PFLOP "
        "(full packs, one document each)"
    )
    yield (
        f"time      {time['step_s']:.2f} s per step, {step['tokens'] / time['step_s']:,.0f} tokens/s at "
        f"{time['mfu']:.0%} MFU of {time['gpu']}: an assumption, not a measurement"
    )
    names = list(plan["memory"][0]["bytes"])
    yield "memory    GB per rank, an estimate (trainer/memory.py)"
    yield "          pp  layers  parameters" + "".join(f"{name:>13}" for name in names)
    for rank in plan["memory"]:
        sizes = "".join(f"{rank['bytes'][name] / 1e9:>13.2f}" for name in names)
        yield f"          {rank['pp_rank']:>2}{rank['decoder_layers']:>8}{rank['parameters'] / 1e6:>10,.0f} M{sizes}"
    if plan["note"]:
        yield f"note      {plan['note']}"


def describe_parameters(parameters: dict[str, int]) -> str:
    parts = ", ".join(f"{part} {count / 1e6:,.2f} M" for part, count in parameters.items())
    return f"{sum(parameters.values()) / 1e6:,.2f} M parameters: {parts}"


def check_memory(ranks: Sequence[dict[str, Any]], gpu_bytes: float) -> None:
    """Refuse what does not fit.

    Raises:
        UserError: names the fullest rank, what fills it, and what to change.
    """
    fullest = max(ranks, key=lambda rank: rank["bytes"]["total"])
    sizes = dict(fullest["bytes"])
    total = sizes.pop("total")
    if total > gpu_bytes:
        largest = max(sizes, key=lambda name: sizes[name])
        raise UserError(
            f"memory: a rank of pipeline stage {fullest['pp_rank']} takes {total / 1e9:.1f} GB of "
            f"{gpu_bytes / 1e9:.1f} GB, most of it {largest} ({sizes[largest] / 1e9:.1f} GB); {REMEDIES[largest]}"
        )
