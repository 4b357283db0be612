"""The passes on Ray. The only module that imports ray.

Only tasks' arguments (small records) and results (counts) cross the cluster: workers read inputs and write
shards themselves. At most `workers + queued` tasks exist at a time, so that a cluster never holds more than a
little of the job and an error stops it soon.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from preprocess.config import RayConfig
from preprocess.executor import back_off
from preprocess.faults import Limits, limited, supervise

# Before ray is imported: no usage statistics, and no override of what devices a worker sees.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import ray.exceptions

from shared.errors import UserError

U = TypeVar("U")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One unit on its way through the cluster. supervised: in a child process, because a worker died of it."""

    unit: Any
    number: int = 0
    supervised: bool = False


class RayExecutor:
    """Tasks on a running cluster (`address`), or on a local one that lives as long as this object."""

    def __init__(self, config: RayConfig, retries: int, limits: Limits) -> None:
        self._config = config
        self._retries = retries
        self._limits = limits
        try:
            ray.init(
                address=config.address or "local",
                logging_level=logging.ERROR,
                log_to_driver=False,
                configure_logging=True,
                **_cluster_options(config),
            )
        except (ConnectionError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(
                f"ray: no cluster at {config.address or 'this machine'} ({reason}); correct --ray.address, or run "
                f"with --executor serial"
            ) from None

    def map(self, function: Callable[[U], R], units: Sequence[U]) -> Iterator[R]:
        """Results in order of completion.

        OSError and lost workers are tried again, `retries` times; a unit whose worker died or ran out of memory
        is supervised from then on. All else is raised.
        """
        remote = ray.remote(_work).options(num_cpus=1, max_retries=0)
        workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
        limit = workers * (1 + self._config.queued_per_worker)
        running: dict[Any, _Attempt] = {}

        def submit(attempt: _Attempt) -> None:
            running[remote.remote(function, attempt, self._limits)] = attempt

        try:
            for unit in units:
                submit(_Attempt(unit))
                while len(running) >= limit:
                    yield from self._next_results(running, submit)
            while running:
                yield from self._next_results(running, submit)
        finally:
            for reference in running:
                ray.cancel(reference)

    def close(self) -> None:
        ray.shutdown()

    def _next_results(
        self, running: dict[Any, _Attempt], submit: Callable[[_Attempt], None]
    ) -> Iterator[Any]:
        """Wait for one of the running units; yield its result, or submit it again."""
        (reference,), _ = ray.wait(list(running), num_returns=1)
        attempt = running.pop(reference)
        try:
            yield ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if not isinstance(cause, (OSError, MemoryError)):
                raise (cause if isinstance(cause, Exception) else error) from None
            self._try_again(attempt, submit, cause, supervised=isinstance(cause, MemoryError))
        except ray.exceptions.RayError as error:  # the worker was lost: crash, out of memory, node gone
            reason = UserError(
                f"{attempt.unit}: its worker died {attempt.number + 1} times ({type(error).__name__}); take that "
                f"input out, or give the workers more memory"
            )
            self._try_again(attempt, submit, reason, supervised=True)

    def _try_again(
        self, attempt: _Attempt, submit: Callable[[_Attempt], None], error: Exception, *, supervised: bool
    ) -> None:
        if attempt.number >= self._retries:
            raise error from None
        submit(_Attempt(attempt.unit, attempt.number + 1, attempt.supervised or supervised))


def _cluster_options(config: RayConfig) -> dict[str, Any]:
    """Arguments of `ray.init` for a local cluster, or for a running one."""
    if not config.address:
        return {"num_cpus": config.workers or None, "include_dashboard": False}
    # The nodes of a cluster need the libraries, not this checkout: the packages travel with the job.
    root = Path(__file__).resolve().parents[1]
    return {"runtime_env": {"py_modules": [str(root / name) for name in ("preprocess", "shared")]}}


def _work(function: Callable[[Any], R], attempt: _Attempt, limits: Limits) -> R:
    """On a worker: one attempt at one unit."""
    if attempt.number:
        back_off(attempt.number - 1)
    if attempt.supervised:
        return supervise(function, attempt.unit, limits)
    with limited(limits):
        return function(attempt.unit)
