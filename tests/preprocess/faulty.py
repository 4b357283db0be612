"""Work that goes wrong, for processes that import nothing else: they start in a moment."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from preprocess.faults import NO_ITEM, begin
from shared.errors import UserError


@dataclass(frozen=True)
class Unit:
    """Numbers to add up; `bad` says what the work on some of them does."""

    numbers: list[int]
    bad: dict[int, str]
    calls: Path
    crashed: dict[int, str] = field(default_factory=dict[int, str])


def add_up(unit: Unit) -> tuple[int, dict[int, str]]:
    (unit.calls / f"{len(list(unit.calls.iterdir()))}").touch()
    total = 0
    for item, number in enumerate(unit.numbers):
        begin(item)
        if item in unit.crashed:
            continue
        how = unit.bad.get(item, "")
        misbehave(how if how != "scattered" or item == len(list(unit.calls.iterdir())) else "", unit.calls)
        total += number
    begin(NO_ITEM)
    misbehave(unit.bad.get(NO_ITEM, ""), unit.calls)
    return total, unit.crashed


def misbehave(how: str, calls: Path) -> None:
    match how:
        case "segfault":
            ctypes.string_at(0)
        case "endless":
            while True:
                time.sleep(0.01)
        case "bloat":
            held = b"x" * (900 << 20)
            time.sleep(1)
            del held
        case "exit":
            os._exit(3)
        case "user":
            raise UserError("a mistake")
        case "scattered":  # at another number each time, as memory that fills up would have it
            os._exit(3)
        case "once" if len(list(calls.iterdir())) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        case _:
            pass
