"""Evaluation: loss with the right pictures, loss with the wrong ones, and their difference, the vision gain.

    vision gain = loss(wrong pictures) - loss(right pictures), in nats per label token

A model that ignores pictures has a gain of 0, however low its loss. Where fewer than two documents have
pictures there is no wrong one to show, and no gain to measure; a source without pictures has none either.

    the first packs of the split -> dealt to the ranks in turn -> forward -> sums of nll per source -> all ranks
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.errors import UserError
from shared.schema import Pack
from trainer.config import EvalConfig, RunConfig
from trainer.data.batch import Batch, BatchShape, assemble_batch
from trainer.data.counts import Counts, count_packs
from trainer.data.mixture import Mixture
from trainer.data.wrong_pictures import Donor, deal_wrong_pictures, owners_of, with_pictures
from trainer.parallel.mesh import World, open_world
from trainer.parallel.parallelize import ParallelModel
from trainer.run import load_run_config, open_data, restore_model
from trainer.step import forward

# Nats per label token, and counts of what was evaluated; None is not measurable.
Values = dict[str, float | None]

Forward = Callable[[Sequence[Batch]], Tensor]
"""Microbatches -> sums of nll per source, float [sources]; this rank's share, the sum over all ranks is the whole."""

HOW_TO_MEASURE = "it takes pictures in two of the evaluated documents; raise --eval.packs"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m trainer eval", description="Evaluate a run's newest checkpoint."
    )
    parser.add_argument(
        "run", type=Path, help="run directory; any key of its config can follow as --key value"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    arguments, overrides = parser.parse_known_args(argv)
    config = load_run_config(arguments.run, tuple(overrides))
    with open_world(config.device, config.dtype, config.parallel) as world:
        data = open_data(config)
        model, step = restore_model(config, data, world)
        values = evaluate_model(model, data, config, world)
        if world.is_main:
            for line in [json.dumps({"step": step, **values})] if arguments.json else describe(step, values):
                print(line)


def describe(step: int, values: Values) -> list[str]:
    loss, wrong, gain = (values[name] for name in ("loss", "loss_wrong_pictures", "vision_gain"))
    lines = [f"after step {step}: loss {loss:.4f}", f"vision gain not measurable: {HOW_TO_MEASURE}"]
    if gain is not None:
        lines = [
            f"{lines[0]}, with wrong pictures {wrong:.4f}",
            f"vision gain {gain:.4f} nats per label token",
        ]
    sources = [name.removeprefix("loss/") for name in values if name.startswith("loss/")]
    for source in sources if len(sources) > 1 else []:
        of_source, its_gain = values[f"loss/{source}"], values[f"vision_gain/{source}"]
        if of_source is not None:
            shown = "" if its_gain is None else f", vision gain {its_gain:.4f}"
            lines.append(f"  {source}: loss {of_source:.4f}{shown}")
    return [*lines, f"  of {values['tokens']:,.0f} tokens and {values['images']:,.0f} images"]


def check_split(data: Mixture, config: EvalConfig) -> None:
    """Refuse at the start of a run what would fail at its end."""
    if config.split not in data.splits:
        raise UserError(
            f"data set {', '.join(str(dataset.path) for dataset in data.datasets)}: no split {config.split!r} to "
            f"evaluate on (it has {', '.join(data.splits)}); preprocess with plan.validation_fraction, or set "
            f"--eval.split"
        )


def evaluate_model(model: ParallelModel, data: Mixture, config: RunConfig, world: World) -> Values:
    """`evaluate` a model as it is spread over the ranks."""
    pipelined = model.pipeline is not None
    return evaluate(
        lambda batches: forward(model, batches, world, num_sources=len(data.sources)),
        data,
        config.eval,
        world,
        row_part=world.row_part,
        frames_per_row=config.encoder.frames_per_row,
        # A schedule has a fixed number of microbatches.
        microbatches=config.batch.accumulation(world.dp_size) if pipelined else 1,
    )


def evaluate(
    forward: Forward,
    data: Mixture,
    config: EvalConfig,
    world: World,
    *,
    row_part: tuple[int, int] | None = (0, 1),
    frames_per_row: int | None = None,
    microbatches: int = 1,
) -> Values:
    """Losses in nats per label token over the first packs of the split, in the shares of the mixture.

    Every rank calls it and gets the same numbers. Packs are dealt in turn; ranks without one left run on padding,
    so that all call `forward` equally often, each time with `microbatches`. For each source: `loss/SOURCE` and
    `vision_gain/SOURCE`.
    """
    check_split(data, config)
    numbers = data.first_packs(config.split, config.packs).tolist()
    packs = [data.pack(config.split, number) for number in numbers]
    spans = [data.document_spans(config.split, number) for number in numbers]
    donors = deal_wrong_pictures(packs, spans)
    shape = BatchShape(
        packs=config.packs_per_microbatch,
        budget=data.budget,
        geometry=data.geometry,
        pad_token=data.tokens.pad,
        row_part=row_part,
        frames_per_row=frames_per_row,
    )
    variants = [None] if donors is None else [None, donors]
    sums_VX = torch.zeros(len(variants), len(data.sources), dtype=torch.float64, device=world.device)
    for wrong, sums_X in zip(variants, sums_VX, strict=True):
        for dealt in _deal_in_turn(len(packs), shape.packs, microbatches, world):
            batches = [_assemble(chosen, packs, spans, wrong, shape).to(world.device) for chosen in dealt]
            sums_X += forward(batches)
    owners = [of_pack["source"][owners_of(pack, of_pack)] for pack, of_pack in zip(packs, spans, strict=True)]
    return summarize(
        world.sum_on_device(sums_VX).tolist(),
        count_packs(packs, spans, len(data.sources)),
        data.sources,
        pictured={data.sources[number] for number in np.concatenate(owners).tolist()},
    )


def _deal_in_turn(
    num_packs: int, packs_per_microbatch: int, microbatches: int, world: World
) -> Iterator[list[range]]:
    """For every call of `forward`, the packs of each of this rank's microbatches."""
    together = microbatches * packs_per_microbatch * world.dp_size
    for first in range(0, num_packs, together):
        own = range(num_packs)[first : first + together][world.dp_rank :: world.dp_size]
        yield [
            own[i : i + packs_per_microbatch]
            for i in range(0, together // world.dp_size, packs_per_microbatch)
        ]


def _assemble(
    chosen: range,
    packs: Sequence[Pack],
    spans: Sequence[npt.NDArray[Any]],
    wrong: Sequence[Sequence[Donor]] | None,
    shape: BatchShape,
) -> Batch:
    shown = [packs[n] for n in chosen]
    if wrong is not None:
        rows = [shape.rows_of_pack(b) for b in range(len(chosen))]
        own = zip(shown, chosen, rows, strict=True)
        shown = [with_pictures(pack, packs, wrong[n], shape.geometry, own_rows) for pack, n, own_rows in own]
    return assemble_batch(shown, [spans[n] for n in chosen], shape)


def summarize(
    sums: Sequence[Sequence[float]], counts: Counts, sources: Sequence[str], *, pictured: set[str]
) -> Values:
    """Values of the sums of nll per source, with the right pictures and, where there are any, with wrong ones.

    `pictured`: sources with pictures.
    """
    losses = [sum(variant) / max(1, counts.labels) for variant in sums]
    values: Values = {
        "loss": losses[0],
        "loss_wrong_pictures": losses[1] if len(losses) > 1 else None,
        "vision_gain": losses[1] - losses[0] if len(losses) > 1 else None,
    }
    for source, labels, *nll in zip(sources, counts.labels_per_source.tolist(), *sums, strict=True):
        losses = [value / labels for value in nll] if labels else []
        values[f"loss/{source}"] = losses[0] if losses else None
        measurable = len(losses) > 1 and source in pictured
        values[f"vision_gain/{source}"] = losses[1] - losses[0] if measurable else None
    return values | {name: float(getattr(counts, name)) for name in ("labels", "tokens", "images")}
