"""`trainer plan`: what it computes, prints and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import ScheduleInterleaved1F1B

from shared.config import load_config
from shared.errors import UserError
from shared.geometry import Budget
from tests.trainer.datasets import write_dataset
from trainer.config import RunConfig
from trainer.flops import model_flops
from trainer.memory import Division, Positions, rank_memory
from trainer.plan import (
    main,
    memory_of_ranks,
    meta_model,
    microbatches_in_flight,
    plan_run,
    positions_per_row,
)

BUDGET = Budget(S=32, N=2, L=16)
WORDS = (
    "--dataset data --out runs/x --steps 200 --dtype bfloat16 --encoder.type siglip2 --encoder.hidden-size 16 "
    "--encoder.intermediate-size 32 --encoder.num-layers 2 --encoder.num-heads 2 --encoder.patch-size 2 "
    "--projector.hidden-size 32 --decoder.vocab-size 40 --decoder.hidden-size 32 "
    "--decoder.intermediate-size 48 --decoder.num-layers 4 --decoder.num-heads 4 --decoder.num-kv-heads 2 "
    "--decoder.head-dim 8 --decoder.tie-embeddings false --batch.packs-per-step 16"
).split()
SIZES = ["--S", "32", "--N", "2", "--L", "16"]


def config_of(*words: str) -> RunConfig:
    return load_config(RunConfig, None, [*WORDS, *words])


@pytest.fixture
def path(tmp_path: Path) -> str:
    config = tmp_path / "config.toml"
    config.write_text(
        "dataset = 'data'\nout = 'runs/x'\nsteps = 200\n"
        "[encoder]\ntype = 'siglip2'\nhidden_size = 16\nintermediate_size = 32\nnum_layers = 2\nnum_heads = 2\n"
        "patch_size = 2\n[projector]\nhidden_size = 32\n[decoder]\nvocab_size = 40\nhidden_size = 32\n"
        "intermediate_size = 48\nnum_layers = 4\nnum_heads = 4\nnum_kv_heads = 2\nhead_dim = 8\n"
        "tie_embeddings = false\n[batch]\npacks_per_step = 16\n"
    )
    return str(config)


def test_a_plan_counts_the_step_and_what_each_rank_holds() -> None:
    config = config_of("--parallel.tp", "2", "--parallel.cp", "2")
    plan = plan_run(config, BUDGET, 8)
    assert plan["axes"] == {"pp": 1, "dp_replicate": 1, "dp_shard": 2, "cp": 2, "tp": 2}
    assert plan["batch"] == {"packs": 16, "packs_per_microbatch": 1, "accumulation": 8, "data_parallel": 2}
    whole = meta_model(config)
    rates = model_flops(whole, 2)
    # 16 packs of 32 tokens, of which 2 * 16 / 4 = 8 are visual; pairs of a document that attend: 32 * 33 / 2.
    flops = (
        rates.per_token * 512
        + rates.per_token_pair * 16 * 32 * 33 / 2
        + rates.per_label * 16 * 24
        + rates.per_patch * 512
        + rates.per_patch_pair * 32 * 16**2
    )
    assert plan["step"] == {"tokens": 512, "patches": 512, "flops": flops}
    [rank] = plan["memory"]
    division = Division(value_bytes=2, tp=2, cp=2, sequence_parallel=True)
    # Half a pack of tokens; 2 rows on 4 ranks of cp and tp are one each, of which two are padding.
    positions = Positions(
        tokens=16, all_tokens=32, patches=16, encoder_positions=16, patch_values=12, microbatches=8
    )
    memory = rank_memory([whole], plan["axes"], "none", division, positions)
    assert rank["bytes"] == {**asdict(memory), "total": memory.total}
    assert "2 vision rows of a microbatch on 4 ranks" in plan["note"]
    decoder = {name: p.numel() for name, p in whole.decoder.named_parameters()}
    vectors = sum(count for name, count in decoder.items() if "norm" in name)
    halves = (sum(decoder.values()) - vectors) // 2
    vision = sum(plan["parameters"][part] for part in ("encoder", "projector"))
    assert rank["parameters"] == vision + halves + vectors
    assert rank["shard"] == round(vision / 8 + (halves + vectors) / 4)


def test_class_and_register_tokens_are_positions_of_the_encoder() -> None:
    config = config_of("--encoder.type", "dinov3", "--encoder.frames-per-row", "3")
    # A class token and four registers for each of 3 frames.
    assert positions_per_row(meta_model(config), 16) == 16 + 3 * 5
    assert positions_per_row(meta_model(config_of()), 16) == 16


def test_stages_of_a_pipeline_hold_their_parts_and_the_first_has_most_in_flight() -> None:
    config = config_of("--parallel.pp", "2")
    (first, early), (last, late) = memory_of_ranks(config, BUDGET, 2)
    plan = plan_run(config, BUDGET, 2)["parameters"]
    table = 40 * 32
    assert (first["decoder_layers"], last["decoder_layers"]) == (2, 2)
    assert (
        first["parameters"] - last["parameters"] == plan["encoder"] + plan["projector"] - 32
    )  # the last norm
    assert first["parameters"] + last["parameters"] == sum(plan.values()) and plan["decoder"] > 2 * table
    assert early.activations > late.activations
    # Of two rows of 16 patches: 12 bytes of pixels and 24 of places each, held for 4 steps of 16 microbatches.
    assert early.batches - late.batches == 4 * 16 * 32 * (12 + 24)


def most_in_flight(rank: int, pp: int, stages_per_rank: int, count: int) -> float:
    """By the order that torch's own schedule computes."""
    stages: list[Any] = [
        SimpleNamespace(
            stage_index=rank + i * pp, num_stages=pp * stages_per_rank, group_size=pp, group_rank=rank
        )
        for i in range(stages_per_rank)
    ]
    alive = most = 0
    schedule = ScheduleInterleaved1F1B(stages, count, loss_fn=lambda output, target: output)
    for action in schedule.pipeline_order[rank]:
        name = "" if action is None else action.computation_type.name
        alive += (name == "FORWARD") - (name == "FULL_BACKWARD")
        most = max(most, alive)
    return most / stages_per_rank


@pytest.mark.parametrize(("pp", "stages_per_rank", "count"), [(2, 2, 4), (4, 2, 8), (4, 3, 4), (2, 4, 2)])
def test_microbatches_in_flight_are_those_of_the_schedule(pp: int, stages_per_rank: int, count: int) -> None:
    for rank in range(pp):
        expected = most_in_flight(rank, pp, stages_per_rank, count)
        assert microbatches_in_flight(rank, pp, stages_per_rank, count) == pytest.approx(expected)


def test_one_stage_per_rank_has_as_many_in_flight_as_stages_follow() -> None:
    assert [microbatches_in_flight(rank, 4, 1, 8) for rank in range(4)] == [4, 3, 2, 1]
    assert [microbatches_in_flight(rank, 4, 1, 2) for rank in range(4)] == [2, 2, 2, 1]


def test_the_command_prints_lines_or_json_and_needs_no_data_set(
    path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main([path, "--gpus", "4", *SIZES])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "layout    4 devices = pp 1 x dp_replicate 1 x dp_shard 4 x cp 1 x tp 1"
    assert "16 packs of S 32, N 2 x L 16 = 1 per microbatch x 4 accumulated x 4" in lines[3]
    main([path, "--gpus", "4", *SIZES, "--json", "--mfu", "0.5", "--gpu", "A100"])
    plan = json.loads(capsys.readouterr().out)
    # FLOPs of a step on 4 devices at half of 312 TFLOPS.
    assert plan["time"]["step_s"] == pytest.approx(plan["step"]["flops"] / (0.5 * 312e12 * 4))


def test_sizes_come_from_the_data_set_if_it_is_there(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(tmp_path / "data", {"train": [[[5, 6]]]}, Budget(S=8, N=1, L=4))
    for words, S in (([], 8), (["--S", "16"], 16)):
        main([path, "--gpus", "1", "--dataset", str(dataset), "--json", *words])
        assert json.loads(capsys.readouterr().out)["budget"] == {"S": S, "N": 1, "L": 4}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "4"], "data set data: not there; give --S --N --L, or preprocess it first"),
        (["--gpus", "3", *SIZES], "packs_per_step 16 is no multiple of 3"),
        (["--gpus", "3", *SIZES, "--parallel.tp", "2"], "3 processes are no multiple of 2"),
        (["--gpus", "4", *SIZES, "--parallel.tp", "4"], "decoder.num_kv_heads 2 is no multiple of parallel.tp 4"),
        (["--gpus", "3", *SIZES, "--parallel.cp", "3"], "S 32 of the data set is no multiple of 2 x parallel.cp = 6"),
        (["--gpus", "2", *SIZES, "--parallel.pp", "2", "--compute.reduce", "microbatch"], "'microbatch': torch's"),
        (["--gpus", "8", *SIZES, "--parallel.pp", "8"], "4 decoder layers cannot be divided into stages"),
        (["--gpus", "1", *SIZES, "--gpu", "T2000"], "--gpu 'T2000': its peak is not known"),
        (["--gpus", "1", *SIZES, "--trained", "encodr"], "'encodr' fits no parameter; did you mean 'encoder'?"),
        (["--gpus", "1", *SIZES, "--gpu-byte", "1"], "unknown key --gpu-byte"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(path: str, words: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        main([path, *words])
    assert message in str(error.value)


def test_what_does_not_fit_is_refused_with_what_fills_it_and_exit_code_2(path: str) -> None:
    words = ["plan", path, "--gpus", "1", *SIZES, "--gpu-bytes", "1e6", "--json"]
    result = subprocess.run(
        [sys.executable, "-m", "trainer", *words], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    [rank] = json.loads(result.stdout)["memory"]
    working = rank["bytes"]["working"] / 1e9
    # A chunk of logits is the largest thing of so small a model.
    assert result.stderr == (
        f"trainer: memory: a rank of pipeline stage 0 takes {rank['bytes']['total'] / 1e9:.1f} GB of 0.0 GB, most of "
        f"it working ({working:.1f} GB); raise parallel.cp or tp, or lower batch.packs_per_microbatch\n"
    )


@pytest.mark.parametrize("gpus", [8, 64, 256])
def test_the_shipped_configs_quote_what_the_plan_says(
    gpus: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    path = f"configs/train/{gpus}-gpus.toml"
    opening = Path(path).read_text().partition("\n\n")[0].replace("\\\n#", "").splitlines()
    [command] = [line for line in opening if "trainer plan" in line]
    main(command.partition("trainer plan ")[2].split())
    said = capsys.readouterr().out.splitlines()
    quoted = [
        line.removeprefix("#   ") for line in opening[opening.index(command) + 1 :] if line.startswith("#   ")
    ]
    assert len(quoted) >= 6 and set(quoted) <= set(said)


def test_the_named_device_sets_the_limit_unless_one_is_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = str(Path(__file__).parents[2] / "configs" / "train" / "64-gpus.toml")
    words = [config, "--gpus", "1", "--S", "8192", "--N", "8", "--L", "2048"]
    with pytest.raises(UserError, match=r"GB of 80\.0 GB, most of it"):  # 8.5 B parameters with their moments
        main(words)
    with pytest.raises(UserError, match=r"GB of 141\.0 GB, most of it"):
        main([*words, "--gpu", "H200"])
    main([*words, "--gpu", "H200", "--gpu-bytes", "1e12"])
    capsys.readouterr()
    main([*words, "--gpu", "RTX 4090"])
    assert "whether it fits is not checked: give --gpu-bytes" in capsys.readouterr().out
