"""`python -m trainer import CONFIG [--key value ...]`: a run that begins from published weights.

Training loads what `[start]` names by itself where a run has no checkpoint yet. What this command adds is to do it
once and ahead: the run directory then holds a checkpoint of step 0, and needs the published files no more.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from shared.config import load_config
from shared.errors import UserError
from trainer.checkpoint import Checkpointer, complete_checkpoints
from trainer.config import RunConfig, StartConfig
from trainer.console import Console
from trainer.parallel.mesh import World, open_world
from trainer.run import checkpoint_directory, hold_run, open_data
from trainer.train import start_run


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m trainer import",
        description="Write step 0 of a run from the weights that [start] names.",
    )
    parser.add_argument("config", type=Path, help="TOML file; any of its keys can follow as --key value")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object, last")
    arguments, overrides = parser.parse_known_args(argv)
    config = load_config(RunConfig, arguments.config, overrides)
    with open_world(config.device, config.dtype, config.parallel) as world:
        checkpoint = import_weights(config, world)
        if world.is_main:
            print(
                json.dumps({"checkpoint": str(checkpoint)}) if arguments.json else f"wrote     {checkpoint}"
            )


def import_weights(config: RunConfig, world: World) -> Path:
    """Write the checkpoint of step 0, with the optimizer as it is before the first step.

    Raises:
        UserError: nothing to import, or the run has begun already.
    """
    directory = checkpoint_directory(Path(config.out))
    if config.start == StartConfig():
        raise UserError("nothing to import: set start.encoder or start.decoder to a Hugging Face directory")
    with hold_run(Path(config.out), world):
        if complete_checkpoints(directory):
            raise UserError(f"run {config.out}: has checkpoints already; give another --out")
        run = start_run(config, open_data(config), world, Console(enabled=world.is_main))
        run.loader.close()
        with Checkpointer(directory, world, keep=1) as checkpointer:
            checkpointer.save(run.model.parts, run.optimizer, {"step": 0}, run.guard.state_dict())
    return complete_checkpoints(directory)[-1]
