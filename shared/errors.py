"""The one error a person can cause and can mend.

A `UserError` message is a single line that says what is wrong, where, what was expected and what to do.
The command lines print it without a traceback and end with exit code 2; every other exception is a defect
of the program and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A wrong input, path, config or data set; the message is one line and says what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def closest(word: str, candidates: Iterable[str]) -> str:
    """`did you mean X?` for the candidate nearest to `word`, or the list of all when none is near."""
    known = sorted(candidates)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
