"""`python -m trainer COMMAND ...`. What a user can mend is one line and exit code 2, a defect a traceback."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from shared.errors import UserError, closest

# Read by OpenMP when torch is imported, so before any command is. Threads that spin at every barrier make a
# training step on 2 cores 5 to 20 times slower as soon as another process wants a core; threads that sleep
# cost a third of the speed on an idle machine. (GPU training does not feel either.)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Command -> the module whose `main(argv)` runs it; only that one is imported.
COMMANDS = {"train": "trainer.train", "eval": "trainer.evaluate"}
USAGE = "usage: [torchrun ... -m | python -m] trainer {train,eval} ... ; each takes --help"


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
        # Every rank meets the same error; one of them says it.
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
