"""Where rows go: `metrics.jsonl`, TensorBoard, and Weights & Biases if a project is named.

JSON knows no nan and no infinity: what was not measured or is not finite is null, and no point of a curve.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.files import atomic_path

ROWS = "metrics.jsonl"


class Trackers:
    """Only rank 0 has one. Rows of steps after `start_step` are those of a killed run: they are dropped."""

    def __init__(
        self,
        directory: Path,
        *,
        start_step: int,
        wandb_project: str = "",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        # Imported here: it takes a second, which runs on other ranks and tests need not pay.
        from torch.utils.tensorboard import SummaryWriter

        self.wandb = open_wandb(wandb_project, directory, dict(config or {})) if wandb_project else None
        self.rows = open(directory / ROWS, "a", encoding="utf-8")  # closed by close()
        self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=start_step + 1)

    def write(self, row: Mapping[str, Any], *, kind: str) -> None:
        """Append one row; `kind` ("train" or "eval") groups its curves."""
        values = {name: value if is_finite(value) else None for name, value in row.items()}
        self.rows.write(json.dumps({"kind": kind, **values}, allow_nan=False) + "\n")
        self.rows.flush()
        step = int(row["step"])
        points = {
            f"{kind}/{name}": value for name, value in values.items() if name != "step" and value is not None
        }
        for name, value in points.items():
            self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log({**points, "step": step})

    def close(self) -> None:
        self.rows.close()
        self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def open_wandb(project: str, directory: Path, config: dict[str, Any]) -> Any:
    """A run there, named after the run directory; one that is resumed from the same place goes on in its curves.

    Raises:
        UserError: the package is not installed, or nobody is logged in.
    """
    try:
        import wandb  # pyright: ignore[reportMissingImports]  # of the extra `wandb`
    except ImportError:
        raise UserError(
            f"log.wandb_project {project!r}: the package wandb is not installed; "
            'pip install "parquetry[wandb]", or leave the key out'
        ) from None
    place = directory.resolve()
    name = "-".join(place.parts[-2:])  # many a directory is called "run"
    identity = f"{place.name}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"
    try:
        run = wandb.init(
            project=project, name=name, id=identity, resume="allow", dir=str(directory), config=config
        )
    except wandb.Error as error:
        raise UserError(
            f"log.wandb_project {project!r}: wandb cannot begin ({error}); mend that, set WANDB_MODE=offline, or leave "
            "the key out"
        ) from None
    # Its own step must never fall, ours does when a killed run goes on: points carry ours, and curves use it.
    run.define_metric("*", step_metric="step")
    return run


def keep_rows(path: Path, step: int, *, evaluated_again: bool) -> int:
    """Drop the rows after `step`, and the evaluation of `step` if it is about to be done again.

    Returns how many damaged lines were dropped as well; a kill leaves one at most, the last.
    """
    if not path.exists():
        return 0
    kept: list[bytes] = []
    damaged = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
            kind, at = row["kind"], int(row["step"])
        except (ValueError, KeyError, TypeError):
            damaged += 1
            continue
        if at < step or (at == step and not (evaluated_again and kind == "eval")):
            kept.append(line if line.endswith(b"\n") else line + b"\n")
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"".join(kept))
    return damaged


def is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
