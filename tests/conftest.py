"""What tests of several packages use."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real and hostile inputs, in `shared/data` beside the checkout; its SOURCES.md says what is there."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.fail(
            f"{path}: no such directory; the tests on real inputs need `shared/data` beside the checkout"
        )
    return path
