"""A lock in an object store: an object with its owner and a time, made only where there is none.

Stores have no locks that end with their process. The owner writes the time again every RENEW_SECONDS; a lock that
was not renewed for STALE_SECONDS, or whose process is known to be dead, is taken over. Two that take over the same
lock in the same moment may both hold it, and a process that is stopped for minutes may wake up to a lost lock: what
two jobs of one config write is the same, and objects appear whole, so that neither damages the data set.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared import remote
from shared.errors import UserError
from shared.remote import shown

RENEW_SECONDS = 30.0
STALE_SECONDS = 180.0


@contextmanager
def lock_object(uri: str, what: str) -> Generator[None, None, None]:
    """Hold the lock object `uri` for this process.

    Raises:
        UserError: another process holds it; `what` is what is going on there.
    """
    owner = {"id": secrets.token_hex(8), "machine": _machine(), "process": os.getpid()}
    _take(uri, owner, what)
    stop = threading.Event()
    renewing = threading.Thread(target=_renew, args=(uri, owner, stop), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        stop.set()
        renewing.join()
        _release(uri, owner)


def _take(uri: str, owner: dict[str, Any], what: str) -> None:
    while not remote.write_bytes(uri, _record(owner), create=True):
        held = _read(uri)
        if held is None:  # released meanwhile
            continue
        if held.get("id") == owner["id"]:  # written by an attempt whose answer was lost
            return
        age = time.time() - float(held.get("renewed", 0))
        if age < STALE_SECONDS and not _is_dead(held):
            raise UserError(
                f"{shown(uri)}: another process is {what} there (process {held.get('process')} on "
                f"{held.get('machine')}, {age:.0f} s ago); wait for it, or choose another output; if it is dead, its "
                f"lock ends {STALE_SECONDS:.0f} s after its last sign"
            )
        logging.getLogger(__name__).warning(
            "%s: taken over, its owner gave no sign for %.0f s", shown(uri), age
        )
        remote.remove(uri)


def _renew(uri: str, owner: dict[str, Any], stop: threading.Event) -> None:
    log = logging.getLogger(__name__)
    while not stop.wait(RENEW_SECONDS):
        try:
            held = _read(uri)
            if held is None or held.get("id") != owner["id"]:
                log.error("%s: lost to another process; end one of the two", shown(uri))
                return
            remote.write_bytes(uri, _record(owner))
        except (OSError, UserError) as error:
            log.warning("%s: cannot be renewed now (%s)", shown(uri), error)


def _release(uri: str, owner: dict[str, Any]) -> None:
    try:
        held = _read(uri)
        if held is not None and held.get("id") == owner["id"]:
            remote.remove(uri)
    except (OSError, UserError) as error:  # what went wrong in the block matters more
        logging.getLogger(__name__).warning(
            "%s: cannot be removed (%s); it ends by itself", shown(uri), error
        )


def _record(owner: dict[str, Any]) -> bytes:
    return json.dumps({**owner, "renewed": time.time()}).encode()


def _read(uri: str) -> dict[str, Any] | None:
    """What a lock says; None where there is none, {} where it is no lock of ours."""
    if (data := remote.read_bytes(uri)) is None:
        return None
    try:
        held = json.loads(data)
    except ValueError:
        return {}
    return held if isinstance(held, dict) else {}


def _machine() -> str:
    """A name that another machine, or a container on it, does not have."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot.read_text().strip()[:8] if boot.exists() else ''}"


def _is_dead(held: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine that is no more."""
    if held.get("machine") != _machine():
        return False
    try:
        os.kill(int(held.get("process", 0)), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False
