"""One sample must not end the job: limits on the work for each, and finding the one that kills its worker.

A decoder that crashes, never returns or takes all memory cannot be caught in its own process. A worker therefore
runs under limits that end it (`limited`), and a unit whose worker died is run again in a child process that notes
which sample it is working on (`supervise`). The sample at which two children died is left out, counted as
`crashed`, and the unit is run again without it; what comes out depends on the samples alone.
"""

from __future__ import annotations

import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from shared.errors import UserError

U = TypeVar("U")
R = TypeVar("R")

# What a unit does outside of its samples: reading its plan, closing its files.
NO_ITEM = -1
# How often a child must die at one sample: once may be chance, such as a machine short of memory.
DEATHS = 2
# Deaths of one unit, each at another sample: then it is not the samples, but what the process gathers.
MOST_SCATTERED = 6
# Samples of one unit that kill: every one costs two runs of it, and so many are no accident.
MOST_CRASHED = 50
# Long enough to cost nothing, short enough that a decoder fills some hundred megabytes in between.
WATCH_SECONDS = 0.03
# How often a child looks for its worker.
PARENT_SECONDS = 0.5
# Exit code of a process that holds too much memory.
OUT_OF_MEMORY = 86


@dataclass(frozen=True, slots=True)
class Limits:
    """seconds: for each sample. memory: bytes that a worker may hold."""

    seconds: float
    memory: int


@dataclass(frozen=True, slots=True)
class Death:
    """A child that did not return: at which sample, and how."""

    item: int
    detail: str


_seconds = 0.0
_progress: mmap.mmap | None = None


def begin(item: int, patience: float = 1.0) -> None:
    """The work on a sample begins; the one before it has ended. `patience` multiplies its time."""
    if _progress is not None:
        _progress[:8] = item.to_bytes(8, "little", signed=True)
    if _seconds:
        signal.setitimer(signal.ITIMER_REAL, _seconds * patience if item != NO_ITEM else 0)


@contextmanager
def limited(limits: Limits) -> Generator[None, None, None]:
    """Let the process end when a sample takes too long or the process too much memory.

    The clock is the system's, which stops a decoder that never returns to Python. Memory is looked at by a
    thread: RLIMIT_DATA would count what allocators reserve and never touch (1 GiB for Arrow's).
    """
    global _seconds
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    stop = threading.Event()
    watch = threading.Thread(target=_watch_memory, args=(limits.memory, stop), daemon=True)
    watch.start()
    _seconds = limits.seconds
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _seconds = 0.0
        stop.set()
        watch.join()


def _watch_memory(most: int, stop: threading.Event) -> None:
    while not stop.wait(WATCH_SECONDS):
        if _held_bytes() > most:
            os._exit(OUT_OF_MEMORY)


def _held_bytes() -> int:
    """Memory of this process that is not a file's; 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return 1024 * sum(
        int(line.split()[1]) for line in status.splitlines() if line.startswith(("RssAnon:", "RssShmem:"))
    )


def supervise(function: Callable[[U], R], unit: U, limits: Limits) -> R:
    """`function(unit)` in a child process, without the samples that kill it.

    Units are dataclasses with a field `crashed`: what to leave out, sample number -> why.

    Raises:
        UserError: the child dies outside of any sample, or the unit has none.
    """
    deaths: Counter[int] = Counter()
    crashed: dict[int, str] = {}
    while True:
        attempt = replace(unit, crashed=dict(crashed)) if _has_samples(unit) else unit  # type: ignore[type-var]
        outcome = _run_child(function, attempt, limits)
        if not isinstance(outcome, Death):
            return outcome
        deaths[outcome.item] += 1
        if deaths.total() - DEATHS * len(crashed) > MOST_SCATTERED or len(crashed) == MOST_CRASHED:
            raise UserError(
                f"{unit}: its worker died {deaths.total()} times, at {len(deaths)} places (at last: {outcome.detail}); "
                f"give the workers more memory (limits.max_memory), or take that input out"
            )
        if deaths[outcome.item] < DEATHS:
            continue
        if outcome.item == NO_ITEM or not _has_samples(unit):
            raise UserError(
                f"{unit}: its worker died {DEATHS} times ({outcome.detail}); take that input out, or give the "
                f"workers more memory"
            )
        crashed[outcome.item] = outcome.detail


def _has_samples(unit: Any) -> bool:
    return is_dataclass(unit) and any(field.name == "crashed" for field in fields(unit))


def _run_child(function: Callable[[U], R], unit: U, limits: Limits) -> R | Death:
    with tempfile.TemporaryDirectory(prefix="parquetry-") as name:
        progress, result = Path(name) / "progress", Path(name) / "result"
        progress.write_bytes(NO_ITEM.to_bytes(8, "little", signed=True))
        task = pickle.dumps((function, unit, limits, progress, result))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "preprocess.faults"]
        code = subprocess.run(command, input=task, env=environment, check=False).returncode
        if result.exists():
            outcome = pickle.loads(result.read_bytes())
            if isinstance(outcome, MemoryError):
                code = OUT_OF_MEMORY
            elif isinstance(outcome, Exception):
                raise outcome
            else:
                return outcome
        return Death(int.from_bytes(progress.read_bytes(), "little", signed=True), _describe(code, limits))


def _describe(code: int, limits: Limits) -> str:
    if code == OUT_OF_MEMORY:
        return f"more than {limits.memory} bytes of memory"
    if code == -signal.SIGALRM:
        return f"no result within its time (limits.max_seconds = {limits.seconds:g})"
    return f"the process ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"


def _end_with(parent: int) -> None:
    """A worker that is killed, with its job or its node, leaves no child behind."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


def run_child() -> None:
    """Run the task on standard input; its result or its exception goes to a file."""
    global _progress
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    function, unit, limits, progress, result = pickle.load(sys.stdin.buffer)
    with open(progress, "r+b") as file:
        _progress = mmap.mmap(file.fileno(), 8)
    try:
        with limited(limits):
            outcome = function(unit)
    except Exception as error:
        outcome = error
    temporary = result.with_suffix(".tmp")
    temporary.write_bytes(pickle.dumps(outcome))
    temporary.rename(result)


if __name__ == "__main__":
    # Under its own name, so that the functions it runs see the same module.
    from preprocess import faults

    faults.run_child()
