"""A run that is asked to stop: SIGTERM and SIGUSR1 end it after the step it is in, with a checkpoint.

    0            done
    1            a defect, with its traceback
    2            something that the user can mend, in one line
    EXIT_STOPPED stopped when asked to; the same command goes on from there

A launcher sends SIGTERM to every process that it started, a scheduler sends SIGUSR1 some time before it takes the
machines back. The signal may reach one rank alone or reach two in different steps: the loop adds the `wanted` of
all ranks once per step, on the host, and all stop after the same one.

torchrun itself ends with 1 then and shows the 75 of its workers in its report. After a signal of its own it kills
what is still there after 30 seconds (`--shutdown-timeout`, where torch has it); SIGUSR1 it passes on only with
`--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1` and dies of it otherwise.
"""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# EX_TEMPFAIL of sysexits.h: no success, no failure, try again. Neither Python nor a shell gives it by itself.
EXIT_STOPPED = 75


class Stopped(Exception):  # noqa: N818  # no error: a run that ended as it was asked to
    """The run has ended early, with a checkpoint of everything; the message says after which step."""


class StopRequest:
    """Whether a signal has asked this process to stop."""

    def __init__(self) -> None:
        self.wanted = False


@contextmanager
def listen() -> Generator[StopRequest, None, None]:
    """Note SIGTERM and SIGUSR1 instead of dying of them. Only the main thread may call this."""
    request = StopRequest()

    def note(_signal: int, _frame: FrameType | None) -> None:
        request.wanted = True  # and nothing else: the process may be in the middle of anything

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
