"""The passes on Ray. The only module that imports ray.

Only tasks' arguments (small records) and results (counts) cross the cluster: workers read inputs and write
shards themselves. At most `workers + queued` tasks exist at a time, so that a cluster never holds more than a
little of the job and an error stops it soon.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from preprocess.config import RayConfig

# Before ray is imported: no usage statistics, and no override of what devices a worker sees.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import ray.exceptions

from shared.errors import UserError

U = TypeVar("U")
R = TypeVar("R")


class RayExecutor:
    """Tasks on a running cluster (`address`), or on a local one that lives as long as this object."""

    def __init__(self, config: RayConfig, retries: int) -> None:
        self._config = config
        self._retries = retries
        local: dict[str, Any] = {"num_cpus": config.workers or None, "include_dashboard": False}
        try:
            ray.init(
                address=config.address or "local",
                logging_level=logging.ERROR,
                log_to_driver=False,
                configure_logging=True,
                **({} if config.address else local),
            )
        except (ConnectionError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(
                f"ray: no cluster at {config.address or 'this machine'} ({reason}); correct --ray.address, or run "
                f"with --executor serial"
            ) from None

    def map(self, function: Callable[[U], R], units: Sequence[U]) -> Iterator[R]:
        """Results in order of completion. OSError, MemoryError and lost workers are tried again, the rest is raised."""
        remote = ray.remote(function).options(
            num_cpus=1,
            max_retries=self._retries,
            retry_exceptions=[OSError, MemoryError],
        )
        workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
        limit = workers * (1 + self._config.queued_per_worker)
        running: dict[Any, U] = {}
        try:
            for unit in units:
                running[remote.remote(unit)] = unit
                if len(running) >= limit:
                    yield self._next_result(running)
            while running:
                yield self._next_result(running)
        finally:
            for reference in running:
                ray.cancel(reference)

    def close(self) -> None:
        ray.shutdown()

    def _next_result(self, running: dict[Any, Any]) -> Any:
        """Wait for one of the running units, take it out and return its result."""
        (reference,), _ = ray.wait(list(running), num_returns=1)
        unit = running.pop(reference)
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, Exception) else error) from None
        except ray.exceptions.RayError as error:  # the worker was lost: crash, out of memory, node gone
            raise UserError(
                f"{unit}: its worker died {self._retries + 1} times ({type(error).__name__}); take that input out, or "
                f"give the workers more memory"
            ) from None
