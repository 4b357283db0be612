"""Traces of chosen steps."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from trainer.parallel.mesh import World
from trainer.profile import ProfileConfig, Profiler, named

CPU = torch.device("cpu")


def run_steps(profiler: Profiler, steps: int) -> list[Path | None]:
    written = []
    for step in range(1, steps + 1):
        profiler.begin(step)
        with named("forward"):
            torch.mm(torch.ones(8, 8), torch.ones(8, 8))
        written.append(profiler.end(step))
    return written


def test_only_the_chosen_steps_are_traced_each_by_itself(tmp_path: Path) -> None:
    profiler = Profiler(ProfileConfig(steps=(2, 3)), tmp_path, World(rank=0, size=1, device=CPU, mesh=None))
    written = run_steps(profiler, 4)
    assert written[0] is None and written[3] is None
    assert [path.name for path in written if path] == ["step_2_rank_0.json", "step_3_rank_0.json"]
    for path in written[1:3]:
        assert path is not None
        names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
        assert names.count("forward") == 1 and names.count("aten::mm") == 1


@pytest.mark.parametrize(("all_ranks", "expected"), [(False, []), (True, ["step_1_rank_1.json"])])
def test_other_ranks_are_traced_only_if_asked_for(
    tmp_path: Path, all_ranks: bool, expected: list[str]
) -> None:
    config = ProfileConfig(steps=(1,), all_ranks=all_ranks)
    run_steps(Profiler(config, tmp_path, World(rank=1, size=2, device=CPU, mesh=None)), 1)
    assert sorted(path.name for path in tmp_path.rglob("*.json")) == expected


def test_without_a_profiler_a_name_is_no_operation() -> None:
    assert isinstance(named("data"), nullcontext)


def test_a_step_before_the_first_is_refused() -> None:
    with pytest.raises(ValueError, match=r"steps must be at least 1, got \[0\]"):
        ProfileConfig(steps=(0,))
