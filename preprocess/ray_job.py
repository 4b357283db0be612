"""The passes on Ray. The only module that imports ray.

Only tasks' arguments (small records) and results (counts) cross the cluster: workers read inputs and write
shards themselves. At most `workers + queued` tasks exist at a time, so that a cluster never holds more than a
little of the job and an error stops it soon.

What a worker runs is this code, which travels with the job, on the libraries of its node, which do not: they must
have the versions of this process, because they decide the bytes of the shards.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from preprocess.config import RayConfig
from preprocess.executor import back_off
from preprocess.faults import Limits, limited, supervise
from preprocess.identity import made_by

# Before ray is imported: no usage statistics, no override of what devices a worker sees, no word on the errors of
# tasks that were given up because of the first.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")

import ray
import ray._private.worker
import ray.exceptions

from shared.errors import UserError

U = TypeVar("U")
R = TypeVar("R")

# A cluster that is just starting gets this long to answer.
CONNECT_SECONDS = 10.0
# How HTTP/2, which Ray's processes speak, begins: the client's preface with no settings, and its answer's fourth byte.
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")
HTTP2_SETTINGS = 4
# Nodes come and go: how often their number is asked for.
COUNT_SECONDS = 5.0
# A unit is no reason for its node to go, but one that takes this many of them along is suspect.
LOST_NODES = 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One unit on its way through the cluster. supervised: in a child process, because a worker died of it."""

    unit: Any
    number: int = 0
    lost_nodes: int = 0
    supervised: bool = False


class RayExecutor:
    """Tasks on a running cluster (`address`), or on a local one that lives as long as this object."""

    def __init__(self, config: RayConfig, retries: int, limits: Limits) -> None:
        self._config = config
        self._retries = retries
        self._limits = limits
        self._counted = -COUNT_SECONDS
        self._workers = 1
        # Ray prints what happens to its processes on standard output, `log_to_driver` or not; what matters to the
        # user comes as an exception, and standard output is for results.
        ray._private.worker._worker_logs_enabled = False  # type: ignore[reportPrivateUsage]
        options = _cluster_options(config)
        try:
            _await_listener(config.address)
            ray.init(
                address=config.address or "local",
                logging_level=logging.ERROR,
                log_to_driver=False,
                configure_logging=True,
                **options,
            )
        # Ray ends the process where another service listens, raises RuntimeError where it has other versions, and
        # RayError where a token is missing.
        except (ConnectionError, ValueError, RuntimeError, SystemExit, ray.exceptions.RayError) as error:
            raise _not_connected(config.address, error) from None
        self._require_memory()

    def map(self, function: Callable[[U], R], units: Sequence[U]) -> Iterator[R]:
        """Results in order of completion.

        OSError and lost workers are tried again, `retries` times; a unit whose worker died or ran out of memory
        is supervised from then on. A node that goes costs no try. All else is raised.
        """
        remote = ray.remote(_work).options(num_cpus=1, memory=self._config.worker_memory, max_retries=0)
        running: dict[Any, _Attempt] = {}

        def submit(attempt: _Attempt) -> None:
            running[remote.remote(function, attempt, self._limits, _libraries())] = attempt

        try:
            for unit in units:
                submit(_Attempt(unit))
                while len(running) >= self._count_workers() * (1 + self._config.queued_per_worker):
                    yield from self._next_results(running, submit)
            while running:
                yield from self._next_results(running, submit)
        finally:
            for reference in running:
                ray.cancel(reference)

    def close(self) -> None:
        ray.shutdown()

    def _count_workers(self) -> int:
        """How many tasks run at a time, as the cluster is now."""
        if time.monotonic() - self._counted >= COUNT_SECONDS:
            found = ray.cluster_resources()
            fit = found.get("memory", 0) // self._config.worker_memory
            self._workers = max(1, int(min(found.get("CPU", 0), fit)))
            self._counted = time.monotonic()
        return self._workers

    def _require_memory(self) -> None:
        """Ray lets a task wait for ever that fits no node.

        Raises:
            UserError: this machine is too small; of a cluster it is said, where larger nodes may come.
        """
        most = max((node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]), default=0)
        if most >= self._config.worker_memory:
            return
        found = f"ray.worker_memory is {self._config.worker_memory} bytes, the largest node has {most:.0f} to give"
        if not self._config.address:
            ray.shutdown()
            raise UserError(f"{found}; lower it, or run with --executor serial")
        _log.warning("%s: work begins when a larger one joins", found)

    def _next_results(
        self, running: dict[Any, _Attempt], submit: Callable[[_Attempt], None]
    ) -> Iterator[Any]:
        """Wait for one of the running units; yield its result, or submit it again."""
        (reference,), _ = ray.wait(list(running), num_returns=1)
        attempt = running.pop(reference)
        try:
            yield ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            self._after_error(attempt, submit, error)
        except ray.exceptions.RuntimeEnvSetupError as error:
            raise UserError(
                f"ray: a node cannot set up what travels with the job ({_in_one_line(error)})"
            ) from None
        except ray.exceptions.NodeDiedError:
            if attempt.lost_nodes >= LOST_NODES:
                raise UserError(f"{attempt.unit}: {LOST_NODES + 1} nodes went while it ran") from None
            submit(replace(attempt, lost_nodes=attempt.lost_nodes + 1))
        except ray.exceptions.RayError as error:  # the worker was lost: crash, out of memory
            reason = UserError(
                f"{attempt.unit}: its worker died {attempt.number + 1} times ({type(error).__name__}); take that "
                f"input out, or give the workers more memory"
            )
            self._try_again(attempt, submit, reason, supervised=True)

    def _after_error(
        self, attempt: _Attempt, submit: Callable[[_Attempt], None], error: ray.exceptions.RayTaskError
    ) -> None:
        """The function raised: a moment's fault is tried again, the rest is the caller's."""
        cause = error.cause
        if isinstance(cause, (OSError, MemoryError)):
            self._try_again(attempt, submit, cause, supervised=isinstance(cause, MemoryError))
            return
        if isinstance(cause, ImportError) or "failed to import" in str(cause):
            raise UserError(
                f"ray: a node cannot import what the job needs ({_import_error(cause)}); install "
                f"parquetry[preprocess] on every node, in the versions of this one"
            ) from None
        raise (cause if isinstance(cause, Exception) else error) from None

    def _try_again(
        self, attempt: _Attempt, submit: Callable[[_Attempt], None], error: Exception, *, supervised: bool
    ) -> None:
        if attempt.number >= self._retries:
            raise error from None
        supervised = attempt.supervised or supervised
        submit(replace(attempt, number=attempt.number + 1, supervised=supervised))


def _await_listener(address: str) -> None:
    """Give a cluster that is just starting some seconds: Ray itself tries for minutes, and is loud about it.

    Raises:
        ConnectionError: nobody listens there, or something that is no cluster.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # no address, or one that Ray has something to say about
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            _knock(host.strip("[]"), int(port), max(1.0, deadline - time.monotonic()))
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ConnectionError(error.strerror or str(error)) from None
        time.sleep(0.5)


def _knock(host: str, port: int, seconds: float) -> None:
    """Raises OSError where nobody listens, or nobody who speaks HTTP/2."""
    with socket.create_connection((host, port), timeout=seconds) as connection:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return
        connection.sendall(HTTP2_PREFACE)
        answer = connection.recv(9)
    if len(answer) < 4 or answer[3] != HTTP2_SETTINGS:
        raise OSError("what listens there is no cluster: a head's port is 6379 as a rule, ray:// has 10001")


def _cluster_options(config: RayConfig) -> dict[str, Any]:
    """Arguments of `ray.init` for a local cluster, or for a running one.

    Raises:
        UserError: a variable that the workers are to have is not set.
    """
    if not config.address:
        return {"num_cpus": config.workers or None, "include_dashboard": False}
    if missing := [name for name in config.forward_env if name not in os.environ]:
        raise UserError(f"ray.forward_env: {missing[0]} is not set here; set it, or take it out")
    # The nodes of a cluster need the libraries, not this checkout: the packages travel with the job.
    root = Path(__file__).resolve().parents[1]
    environment = {
        "py_modules": [str(root / name) for name in ("preprocess", "shared")],
        "excludes": ["__pycache__"],
        "env_vars": {name: os.environ[name] for name in config.forward_env},
    }
    return {"runtime_env": environment}


def _not_connected(address: str, error: BaseException) -> UserError:
    if "merge the Job's runtime env" in str(error):
        return UserError(
            "ray: the job was submitted with py_modules, excludes or variables that it sends to its workers itself; "
            "give `ray job submit` only --working-dir, and name variables in --ray.forward_env"
        )
    return UserError(
        f"ray: no cluster at {address or 'this machine'} ({_in_one_line(error)}); correct --ray.address, or run "
        f"with --executor serial"
    )


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "who listens there does not answer as Ray's head does"
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line)[:300]


def _import_error(cause: object) -> str:
    """The last line of a traceback in a message, which names the module."""
    lines = [line.strip() for line in str(cause).splitlines() if "Error: " in line]
    return lines[-1] if lines else str(cause)


@lru_cache(maxsize=1)
def _libraries() -> dict[str, str]:
    """Versions of what decides the bytes of a shard; this project's own code comes from one place anyway."""
    return {name: version for name, version in made_by().items() if name != "parquetry"}


def _work(function: Callable[[Any], R], attempt: _Attempt, limits: Limits, libraries: Mapping[str, str]) -> R:
    """On a worker: one attempt at one unit.

    Raises:
        UserError: this node has other libraries than the process that started the job.
    """
    for name, own in _libraries().items():
        if own != libraries[name]:
            raise UserError(
                f"ray: node {platform.node()} has {name} {own}, this one {libraries[name]}; the bytes of the shards "
                f"depend on it: install the same version on all"
            )
    if attempt.number:
        back_off(attempt.number - 1)
    if attempt.supervised:
        return supervise(function, attempt.unit, limits)
    with limited(limits):
        return function(attempt.unit)
