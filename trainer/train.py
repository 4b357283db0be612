"""`python -m trainer train CONFIG [--key value ...]`: from a data set to a trained model.

    for step in loader:   train_step -> [evaluate] -> [checkpoint] -> [rows to console, JSONL, TensorBoard]

A run whose directory holds a complete checkpoint goes on from it by itself. The order of data is a function
of (seed, epoch, step), so the number of finished steps is all there is to resume.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shared.config import load_config, to_dict
from shared.errors import UserError
from trainer.checkpoint import Checkpointer, load_checkpoint, remove_incomplete
from trainer.config import RunConfig
from trainer.console import Console
from trainer.data.loader import Loader, Step
from trainer.data.mixture import Mixture
from trainer.describe import describe_run, measures_of_run
from trainer.evaluate import Values, check_split, describe, evaluate_model
from trainer.guard import Guard, check_skipped
from trainer.metrics import Reporter
from trainer.optim import lr_factor, make_optimizer
from trainer.parallel.mesh import World, open_world
from trainer.parallel.parallelize import ParallelModel
from trainer.profile import Profiler, named
from trainer.run import (
    check_model,
    checkpoint_directory,
    find_checkpoint,
    hold_run,
    load_run_config,
    load_start,
    new_model,
    open_data,
    write_run,
)
from trainer.signals import Stopped, StopRequest, listen
from trainer.step import train_step
from trainer.trackers import is_finite


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trainer train", description="Train from a data set.", allow_abbrev=False
    )
    parser.add_argument("config", type=Path, help="TOML file; any of its keys can follow as --key value")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object, last")
    arguments, overrides = parser.parse_known_args(argv)
    config = load_config(RunConfig, arguments.config, overrides)
    # Signals are heard until the group is closed: torchrun sends SIGTERM to the others as soon as one process ends.
    with listen() as stop, open_world(config.device, config.dtype, config.parallel) as world:
        result = train(config, world, stop)
        if arguments.json and world.is_main:
            print(json.dumps(result, allow_nan=False), flush=True)


def train(config: RunConfig, world: World, stop: StopRequest) -> dict[str, Any]:
    """Train, or go on training, until `config.steps`; returns what the last step and evaluation measured."""
    data = open_data(config)
    check_split(data, config.eval)
    check_model(config, data, world)
    with hold_run(Path(config.out), world):
        console = Console(enabled=world.is_main)
        run = start_run(config, data, world, console)
        measures = measures_of_run(config, data.budget, data.sources, world.device)
        # Its thread must not outlive what fails after it: Python would abort, with another exit code.
        with closing(run.loader):
            reporter = Reporter(
                Path(config.out),
                world,
                console,
                measures,
                config.log,
                start_step=run.start_step,
                total_steps=config.steps,
                seen=run.state,
                config=to_dict(config),
            )
            directory = checkpoint_directory(Path(config.out))
            with (
                closing(reporter),
                Checkpointer(directory, world, keep=config.checkpoint.keep) as checkpointer,
            ):
                return train_loop(config, run, world, reporter, checkpointer, stop)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a run needs on this rank, ready at `start_step` finished steps."""

    model: ParallelModel
    optimizer: torch.optim.Optimizer
    guard: Guard
    data: Mixture
    loader: Loader
    start_step: int
    state: Mapping[str, int]
    """That of the checkpoint it goes on from: finished steps, tokens and images seen."""
    planned_steps: int
    """`steps` of the config that the run was started or last resumed with."""


def start_run(config: RunConfig, data: Mixture, world: World, console: Console) -> Run:
    """Build the model, and load the newest checkpoint of the run directory, or the weights to start from."""
    checkpoint = find_checkpoint(config, data.identity)
    model = new_model(config, data, world)
    optimizer, guard = make_optimizer(model.parts, config.optimizer), Guard(config.guard, world.device)
    state: dict[str, int] = {"step": 0}
    planned_steps = config.steps
    if checkpoint is not None:
        extra = guard.state_dict()
        state = load_checkpoint(checkpoint, model.parts, optimizer, world, extra)
        guard.load_state_dict(extra)
        planned_steps = load_run_config(Path(config.out)).steps
    else:
        for line in load_start(config, data, model.parts, world):
            console.print(line)
    start_step = state["step"]
    world.barrier()  # before the config that all have read is written over
    if world.is_main:
        write_run(config, data)
        remove_incomplete(checkpoint_directory(Path(config.out)))
    world.barrier()
    for line in describe_run(
        config,
        data.budget,
        world,
        data=data.describe("train", config.steps * config.batch.packs_per_step),
        start_step=start_step,
        planned_steps=planned_steps,
    ):
        console.print(line)
    # Last: its thread has to be closed.
    loader = Loader(
        data,
        split="train",
        seed=config.seed,
        packs_per_microbatch=config.batch.packs_per_microbatch,
        accumulation=config.batch.accumulation(world.dp_size),
        dp_rank=world.dp_rank,
        dp_size=world.dp_size,
        device=world.device,
        start_step=start_step,
        decode_threads=config.decode_threads,
        row_part=world.row_part,
        frames_per_row=config.encoder.frames_per_row,
    )
    return Run(
        model=model,
        optimizer=optimizer,
        guard=guard,
        data=data,
        loader=loader,
        start_step=start_step,
        state=state,
        planned_steps=planned_steps,
    )


def train_loop(
    config: RunConfig,
    run: Run,
    world: World,
    reporter: Reporter,
    checkpointer: Checkpointer,
    stop: StopRequest,
) -> dict[str, Any]:
    def packs_of(step: int) -> str:
        return run.data.show_packs("train", run.loader.packs_of_step(step - 1))

    result: dict[str, Any] = {"run": config.out, "steps": max(run.start_step, config.steps)}
    clip, peak = config.optimizer.max_grad_norm, config.optimizer.lr
    steps, profiler = iter(run.loader), Profiler(config.profile, Path(config.out), world)
    coming = next_step(steps, world, stop, checkpointer) if run.start_step < config.steps else None
    for finished in range(run.start_step + 1, config.steps + 1):
        assert coming is not None
        lr = peak * lr_factor(finished - 1, config.steps, config.schedule)
        profiler.begin(finished)
        step = coming.get()
        reporter.add(train_step(run.model, run.optimizer, run.guard, step, world, lr=lr, max_grad_norm=clip))
        last = finished == config.steps
        coming = Coming() if last else next_step(steps, world, stop, checkpointer)
        if trace := profiler.end(finished):
            reporter.console.print(f"profile   {trace}")
        save = last or coming.must_save or finished % config.checkpoint.every == 0
        evaluation = last or (config.eval.every > 0 and finished % config.eval.every == 0)
        if save or evaluation or finished % config.log.every == 0:
            rows = reporter.flush()
            # Before a checkpoint keeps what went wrong.
            check_skipped(rows, config.guard, packs_of, config.out)
            result["train"] = rows[-1]
        if evaluation:  # first: a checkpoint that is resumed from has its evaluation behind it
            result["eval"] = evaluate_and_report(config, run, world, reporter, finished)
        if save:
            state = {"step": finished, **reporter.seen}
            waited_s = checkpointer.save(run.model.parts, run.optimizer, state, run.guard.state_dict())
            reporter.write_row(finished, {"wait_s": waited_s}, kind="checkpoint")
        if coming.stopping:
            checkpointer.finish()
            raise Stopped(
                f"stopped after step {finished} of {config.steps} as asked, with a checkpoint; "
                "the same command goes on from it"
            )
        if save or evaluation:
            reporter.restart_interval()
    if run.start_step >= config.steps:  # asking again for a finished run shows what it reached
        result["eval"] = evaluate_and_report(config, run, world, reporter, run.start_step)
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class Coming:
    """What follows a step, the same decision on every rank."""

    step: Step | None = None
    failure: UserError | None = None
    """This rank, or another one, cannot read its packs of the next step."""
    stopping: bool = False
    """A rank was asked to stop."""

    @property
    def must_save(self) -> bool:
        """The run ends with this step: what it has learned is kept."""
        return self.stopping or self.failure is not None

    def get(self) -> Step:
        if self.failure is not None:
            raise self.failure
        assert self.step is not None
        return self.step


def next_step(steps: Iterator[Step], world: World, stop: StopRequest, checkpointer: Checkpointer) -> Coming:
    """This rank's part of the next global batch, and whether the run goes on.

    Ranks learn of a signal, a failed writer or unreadable data at different times: one sum on the host lets all act
    on it at the same step, so that none waits for one that has ended.

    Raises:
        UserError: on every rank, where the checkpoint that was being written failed.
    """
    step, failure = None, None
    try:
        with named("data"):
            step = next(steps)
    except UserError as error:
        failure = error
    stopping, unwritten, unread = world.sum_on_host([stop.wanted, checkpointer.failed, failure is not None])
    if unwritten:
        checkpointer.finish()
    if unread and failure is None:
        failure = UserError(
            "another rank cannot read its packs, its own message says why; mend that and run again"
        )
    return Coming(step=step, failure=failure, stopping=stopping > 0)


def evaluate_and_report(config: RunConfig, run: Run, world: World, reporter: Reporter, step: int) -> Values:
    """Measure, write and print.

    Raises:
        UserError: the loss is not finite: the last update ruined the weights.
    """
    values = evaluate_model(run.model, run.data, config, world)
    reporter.write_row(step, values, kind="eval")
    if not is_finite(values["loss"]):
        raise UserError(
            f"run {config.out}: diverged: the validation loss after step {step} is {values['loss']}; try a lower "
            f"optimizer.lr or a longer schedule.warmup_steps with another --out"
        )
    for line in describe(step, values):
        reporter.console.print(line)
    return values
