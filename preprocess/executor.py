"""How the units of a pass are run: one after another here, or on Ray (`ray_job`). Results are the same."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

U = TypeVar("U")
R = TypeVar("R")


class Executor(Protocol):
    """Runs a module-level function over units and yields small results in order of completion."""

    def map(self, function: Callable[[U], R], units: Sequence[U]) -> Iterator[R]: ...

    def close(self) -> None: ...


def back_off(attempt: int) -> None:
    """Wait before another attempt: 0.1, 0.2, 0.4 .. seconds, up to half more so that workers do not come together."""
    time.sleep(min(30.0, 0.1 * 2**attempt) * random.uniform(1.0, 1.5))


class SerialExecutor:
    """Everything in this process: for small jobs, debuggers and tests.

    A sample that kills the process ends the job; the limits of time and memory need a process of their own.
    """

    def __init__(self, retries: int) -> None:
        self._retries = retries

    def map(self, function: Callable[[U], R], units: Sequence[U]) -> Iterator[R]:
        for unit in units:
            yield self._attempt(function, unit)

    def close(self) -> None:
        pass

    def _attempt(self, function: Callable[[U], R], unit: U) -> R:
        for attempt in range(self._retries):
            try:
                return function(unit)
            except (OSError, MemoryError):
                back_off(attempt)  # transient; the last attempt's error is the caller's
        return function(unit)
