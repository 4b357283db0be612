"""Lines for a person: some stay, and on a terminal one is redrawn in place."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


class Console:
    """Where nothing is to be printed (other ranks, tests) `enabled` is False, and calls do nothing."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.terminal = enabled and sys.stdout.isatty()
        self.redrawing = False

    def print(self, text: str) -> None:
        """A line that stays; a line being redrawn stays above it as it is."""
        if self.enabled:
            print(f"\n{text}" if self.redrawing else text, flush=True)
        self.redrawing = False

    def print_over(self, text: str) -> None:
        """A line that stays, in the place of the line being redrawn."""
        if self.enabled:
            print(f"\r\x1b[2K{text}" if self.terminal else text, flush=True)
        self.redrawing = False

    def redraw(self, text: str) -> None:
        """Replace the line being redrawn; elsewhere than on a terminal, nothing."""
        if self.terminal:
            print(f"\r\x1b[2K{text}", end="", flush=True)
            self.redrawing = True


def progress_line(row: Mapping[str, Any], *, step: int, total_steps: int, step_s: float) -> str:
    """One line about the newest `row` that was read; `step` is how far the run is, `step_s` a mean."""
    left = round((total_steps - step) * step_s)
    words = [
        f"step {row['step']:>{len(str(total_steps))}}/{total_steps}",
        f"loss {row['loss']:.4f}",
        f"grad {row['grad_norm']:.3f}",
        f"lr {row['lr']:.2e}",
        f"{row['tokens_per_s']:,.0f} tok/s",
        f"{row['patches_per_s']:,.0f} patch/s",
        "" if row["mfu"] is None else f"mfu {row['mfu']:.1%}",
        f"mem {row['memory_gb']:.1f} GB",
        f"wait {1000 * row['data_wait_s']:.1f} ms",
        f"skipped {row['skipped_in_all']}" if row["skipped_in_all"] else "",
        f"left {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        if left >= 3600
        else f"left {left // 60}:{left % 60:02}",
        f"(step {step} done, not read yet)" if step != row["step"] else "",
    ]
    return "  ".join(word for word in words if word)
