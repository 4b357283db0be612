"""`python -m trainer COMMAND ...`. What a user can mend is one line and exit code 2, a defect a traceback.

The other exit codes: trainer.signals.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from shared.errors import UserError, closest
from trainer.signals import EXIT_STOPPED, Stopped

# Read by GNU OpenMP when torch is imported, so before any command is. Threads that spin at every barrier make a
# training step on 2 cores up to 20 times slower as soon as another process wants a core; threads that sleep at
# once cost a quarter of the speed on an idle machine. Spinning for about 10 microseconds has neither fault.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Command -> the module whose `main(argv)` runs it; only that one is imported.
COMMANDS = {
    "train": "trainer.train",
    "eval": "trainer.evaluate",
    "plan": "trainer.plan",
    "import": "trainer.weights.start",
    "export": "trainer.weights.export",
    "check-export": "trainer.weights.check",
}
USAGE = f"usage: [torchrun ... -m | python -m] trainer {{{','.join(COMMANDS)}}} ... ; each takes --help"


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    command, *rest = argv
    try:
        if command not in COMMANDS:
            raise UserError(f"unknown command {command!r}; {closest(command, COMMANDS)}")
        importlib.import_module(COMMANDS[command]).main(rest)
    except UserError as error:
        # Mostly every rank meets the same error; a damaged shard may be met by one alone.
        rank = os.environ.get("RANK", "0")
        print(f"trainer: {f'rank {rank}: ' if rank != '0' else ''}{error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"trainer: {stopped}", file=sys.stderr)
        return EXIT_STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
