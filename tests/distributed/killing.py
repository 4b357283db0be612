"""Two real processes that save step after step, and are killed with SIGKILL somewhere in the middle of it.

    python -m tests.distributed.killing DIRECTORY '[trial, ...]'       prints what each trial left, as JSON lines

Every tensor of step n holds n everywhere, so a mixture of two steps shows. Trials are forked from one process that
has torch loaded: a tenth of the time of a fresh start.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.distributed.launch import free_port
from trainer.checkpoint import Checkpointer, complete_checkpoints, load_checkpoint, remove_incomplete
from trainer.checkpoint_state import named_tensors, start_moments
from trainer.parallel.mesh import World, open_world

# What Python reports of a process that touches files; `open` also of every file that is read again for its checksum.
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
ALONE = World(rank=0, size=1, device=torch.device("cpu"), mesh=None)


def make(mesh: Any) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    start_moments(optimizer)
    return model, optimizer


def shard_mesh(world: World) -> Any:
    assert world.mesh is not None
    return world.mesh["dp_shard"]


def fill(tensors: dict[str, Tensor], step: int) -> None:
    for tensor in tensors.values():
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(step)


def values(tensors: dict[str, Tensor]) -> list[float]:
    return sorted({float(value) for tensor in tensors.values() for value in tensor.detach().flatten()})


class Killer:
    """Ends this process at its `at`-th touch of a file under `directory`, after `pause_s`; 0 only counts."""

    def __init__(self, directory: Path, at: int, pause_s: float = 0.0) -> None:
        self.directory, self.at, self.pause_s = str(directory), at, pause_s
        self.touched: list[str] = []
        self.armed = False
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed or event not in EVENTS or not str(arguments[0]).startswith(self.directory):
            return
        self.touched.append(f"{event} {Path(str(arguments[0])).name}")
        if len(self.touched) == self.at:
            time.sleep(self.pause_s)
            os.kill(os.getpid(), signal.SIGKILL)


def save_steps(directory: Path, trial: dict[str, Any]) -> list[str]:
    """Save step 1 whole, then 2, 3, ..; the rank of the trial dies at its touch `at` of a file while it saves 2."""
    with open_world("cpu", "float32") as world:
        model, optimizer = make(shard_mesh(world))
        tensors = named_tensors([model], optimizer, {})
        killer = Killer(directory, trial["at"] if world.rank == trial["rank"] else 0)
        with Checkpointer(directory, world, keep=1) as checkpointer:
            for step in range(1, trial["steps"] + 1):
                fill(tensors, step)
                killer.armed = step == 2
                checkpointer.save([model], optimizer, {"step": step})
                fill(tensors, -step)  # training goes on
                if step <= 2:
                    checkpointer.finish()
                    (directory.parent / f"{directory.name}-{step}").touch()
        return killer.touched


def save_in_place(directory: Path, trial: dict[str, Any]) -> list[str]:
    """What torch does by itself, into one directory. Rank 1 dies when rank 0 has written its part of step 2."""
    with open_world("cpu", "float32") as world:
        model, optimizer = make(shard_mesh(world))
        tensors = named_tensors([model], optimizer, {})
        killer = Killer(directory / "__1_0.distcp", 1 if world.rank == 1 else 0, pause_s=2)
        for step in (1, 2):
            fill(tensors, step)
            killer.armed = step == 2
            save(tensors, checkpoint_id=directory)
        return killer.touched


def start(rank: int, port: int, directory: Path, trial: dict[str, Any]) -> int:
    """Fork one rank; returns its process id."""
    if child := os.fork():
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        touched = (save_in_place if trial.get("in_place") else save_steps)(directory, trial)
        (directory.parent / f"{directory.name}.{rank}").write_text(json.dumps(touched))
        code = 0
    except Exception as error:
        print(f"rank {rank}: {error!r}", file=sys.stderr)
    finally:
        os._exit(code)


def run(directory: Path, trial: dict[str, Any]) -> dict[str, Any]:
    """One trial and what it left: for every complete checkpoint its step and the values of its tensors."""
    port = free_port()
    ranks = [start(rank, port, directory, trial) for rank in range(2)]
    if "seconds" in trial:  # after step 1, at any moment
        while not (directory.parent / f"{directory.name}-1").exists():
            time.sleep(0.01)
        time.sleep(trial["seconds"])
    else:
        os.waitpid(-1, 0)
    for rank in ranks:  # as a machine goes: all of it
        try:
            os.kill(rank, signal.SIGKILL)
        except ProcessLookupError:
            continue
    while ranks:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    files = (directory.parent / f"{directory.name}.{rank}" for rank in range(2))
    touched = [json.loads(file.read_text()) for file in files if file.exists()]
    if trial.get("in_place"):
        model, optimizer = make(None)
        tensors = named_tensors([model], optimizer, {})
        load(tensors, checkpoint_id=directory, no_dist=True)
        return {"found": [[2, values(tensors)]]}
    left = sorted(path.name for path in directory.iterdir())
    found: list[Any] = []
    for path in complete_checkpoints(directory):
        model, optimizer = make(None)
        state = load_checkpoint(path, [model], optimizer, ALONE)
        found.append([state["step"], values(named_tensors([model], optimizer, {}))])
    remove_incomplete(directory)
    kept = sorted(path.name for path in directory.iterdir())
    return {"found": found, "left": left, "kept": kept, "touched": touched}


if __name__ == "__main__":
    assert not dist.is_initialized()
    torch.set_num_threads(1)
    for number, each in enumerate(json.loads(sys.argv[2])):
        print(json.dumps(run(Path(sys.argv[1], f"trial{number}", "checkpoints"), each)), flush=True)
