"""The run config: derived values and what it refuses."""

from __future__ import annotations

import pytest

from shared.config import load_config, to_toml
from shared.errors import UserError
from trainer.config import BatchConfig, RunConfig

REQUIRED = ("--dataset", "data", "--out", "runs/x", "--steps", "200")


def test_resolved_config_loads_back_equal(tmp_path) -> None:
    config = load_config(
        RunConfig, None, [*REQUIRED, "--decoder.num-layers", "3", "--optimizer.betas", "0.8", "0.9"]
    )
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load_config(RunConfig, tmp_path / "config.toml") == config
    assert config.model.decoder.num_layers == 3


def test_accumulation_fills_the_global_batch() -> None:
    batch = BatchConfig(packs_per_step=24, packs_per_microbatch=3)
    assert [batch.accumulation(ranks) for ranks in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(
        ValueError, match="packs_per_step 24 is no multiple of 15 = 3 packs_per_microbatch x 5 ranks"
    ):
        batch.accumulation(5)


SIGLIP2 = ["--encoder.type", "siglip2"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            ["--decoder.head-dim", "7"],
            r"\[decoder\] head_dim 7 must be even: rotary positions turn pairs",
        ),
        (["--decoder.num-kv-heads", "5"], r"\[decoder\] num_heads 32 is no multiple of num_kv_heads 5"),
        (
            [*SIGLIP2, "--encoder.num-heads", "5"],
            r"\[encoder\] hidden_size 768 is no multiple of num_heads 5",
        ),
        (["--projector.merge", "0"], r"\[projector\] merge must be at least 1, got 0"),
        (["--optimizer.lr", "0"], r"\[optimizer\] lr must be above 0"),
        (["--optimizer.betas", "0.9"], r"betas must be two numbers"),
        (["--schedule.warmup-steps", "200"], r"warmup_steps 200 \+ decay_steps 0 leave nothing of 200 steps"),
        (["--dtype", "float16"], r"'float16' is not one of float32, bfloat16"),
        (["--checkpoint.keep", "0"], r"\[checkpoint\] keep must be at least 1"),
        (["--batch.packs-per-step", "0"], r"\[batch\] packs_per_step must be at least 1, got 0"),
        (["--log.print-every", "0"], r"\[log\] print_every must be at least 1, got 0"),
        (["--eval.every", "-1"], r"\[eval\] every must be at least 0, got -1"),
        (["--decoder.num-kv-heads", "0"], r"\[decoder\] num_kv_heads must be at least 1, got 0"),
        (
            [*SIGLIP2, "--encoder.position-grid", "0"],
            r"\[encoder\] position_grid must be at least 1, got 0",
        ),
        (["--optimizer.weight-decay", "-0.5"], r"\[optimizer\] weight_decay must be at least 0, got -0.5"),
    ],
)
def test_a_wrong_value_is_named(words: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        load_config(RunConfig, None, [*REQUIRED, *words])
