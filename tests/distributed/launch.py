"""Run one function on several processes of this machine, as torchrun would start them (gloo, CPU)."""

from __future__ import annotations

import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

# Above what compiling a dozen graphs takes on two busy cores; only a test that hangs waits for it.
TIMEOUT_S = 500


def launch(function: Callable[..., Any], num_processes: int, *arguments: Any) -> list[Any]:
    """`function(*arguments)` on every rank; returns what each returned. It must be importable by name."""
    context, port = mp.get_context("spawn"), free_port()
    with tempfile.TemporaryDirectory() as directory:
        workers = [
            context.Process(target=_work, args=(function, rank, num_processes, port, directory, arguments))
            for rank in range(num_processes)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=TIMEOUT_S)
            if worker.is_alive():
                worker.kill()
        results: list[Any] = []
        for rank in range(num_processes):
            path = Path(directory, f"{rank}.pt")
            assert path.exists(), f"rank {rank} did not come back"
            value, failure = torch.load(path, weights_only=False)
            assert not failure, f"rank {rank} failed:\n{failure}"
            results.append(value)
        return results


def _work(
    function: Callable[..., Any], rank: int, size: int, port: int, directory: str, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), **address}
    value, failure = None, ""
    try:
        value = function(*arguments)
    except BaseException:
        failure = traceback.format_exc()
    # By file: tensors in a queue would live in this process, which ends.
    torch.save((value, failure), Path(directory, f"{rank}.pt"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
