"""What is printed before the first step, and what rows are computed with."""

from __future__ import annotations

import torch

from tests.trainer.test_plan import BUDGET, config_of
from trainer.config import RunConfig
from trainer.describe import describe_run, measures_of_run
from trainer.parallel.mesh import World
from trainer.plan import memory_of_ranks

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, device=CPU, mesh=None)


def lines_of(config: RunConfig, start_step: int = 0, planned_steps: int = 200) -> dict[str, str]:
    lines = describe_run(
        config, BUDGET, ALONE, data=["data: 9 packs"], start_step=start_step,
        planned_steps=planned_steps,
    )  # fmt: skip
    return {line.split()[0]: line for line in lines}


def test_the_arithmetic_of_a_run_is_printed() -> None:
    config = config_of("--trained", "projector", "decoder", "--compute.recompute", "full")
    lines = lines_of(config)
    assert lines["data"] == "data set  data: 9 packs"
    assert lines["packs"] == "packs     of S 32, N 2 x L 16"
    assert "; trained: projector, decoder; 0.05 M on a rank" in lines["model"]
    assert lines["device"] == "device    1 process on cpu, bfloat16, attention sdpa, recompute full"
    assert lines["batch"] == (
        "batch     16 packs = 1 per microbatch x 16 accumulated x 1 ranks: room for 512 tokens and 512 patches"
    )
    [(_, memory)] = memory_of_ranks(config, BUDGET, 1)
    assert lines["memory"].startswith(
        f"memory    about {memory.total / 1e9:.2f} GB on the fullest rank: states"
    )
    assert lines["length"] == "length    200 steps, from step 0"
    assert "schedule" not in lines


def test_a_longer_cosine_says_what_changes_and_a_longer_stable_rate_changes_nothing() -> None:
    longer = lines_of(config_of("--steps", "400"), start_step=150)
    assert longer["length"] == "length    400 steps, resumed after step 150"
    # 100 steps of warmup; step 149 is half of a cosine over 99 more steps, step 150 a sixth of one over 299.
    assert longer["schedule"] == (
        "schedule  the cosine now ends at step 400, it was on its way to 200: the learning rate goes from "
        "5.57e-04 to 9.39e-04"
    )
    stable = ["--schedule.kind", "wsd", "--schedule.decay-steps", "20", "--steps", "400"]
    assert "schedule" not in lines_of(config_of(*stable), start_step=150)
    assert "to 1.00e-03" in lines_of(config_of(*stable), start_step=190)["schedule"]


def test_rows_are_computed_with_the_room_of_a_step_and_the_multipliers_in_use() -> None:
    config = config_of(
        "--trained", "projector", "decoder", "--optimizer.lr-multipliers.decoder", "0.5",
        "--optimizer.lr-multipliers.encoder", "0.1", "--log.peak-flops", "1e12",
    )  # fmt: skip
    measures = measures_of_run(config, BUDGET, ["captions"], CPU)
    # The encoder is frozen: no group has its multiplier.
    assert list(measures.lr_multipliers) == [0.5, 1.0]
    assert (measures.step_tokens, measures.step_patches, measures.peak_flops) == (512, 512, 1e12)
    assert list(measures.sources) == ["captions"]
