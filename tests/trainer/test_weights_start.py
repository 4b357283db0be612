"""`python -m trainer import`: a run that begins from published weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Siglip2VisionConfig, Siglip2VisionModel

from shared.geometry import Budget
from tests.trainer.batches import Picture
from tests.trainer.datasets import write_dataset
from tests.trainer.test_weights_load import LLAMA, SIGLIP2, save
from trainer.__main__ import main
from trainer.run import load_run_config
from trainer.weights.checkpoint_tensors import CheckpointTensors

PACKS = [[[7 + i, Picture(4, 2, seed=i), 8], [10, 11]] for i in range(4)]
CONFIG = """
steps = 1
device = "cpu"
dtype = "float32"
[encoder]
type = "siglip2"
hidden_size = 16
intermediate_size = 32
num_layers = 2
num_heads = 2
patch_size = 2
position_grid = 4
[projector]
hidden_size = 32
[decoder]
vocab_size = 40
hidden_size = 24
intermediate_size = 48
num_layers = 2
num_heads = 4
num_kv_heads = 2
head_dim = 6
tie_embeddings = false
[batch]
packs_per_step = 2
[optimizer]
lr = 1e-9
[schedule]
warmup_steps = 0
[eval]
packs = 1
"""


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A config and its options; the run directory is the last word."""
    write_dataset(tmp_path / "data", {"train": PACKS[:2], "validation": PACKS[2:]}, Budget(S=24, N=1, L=16))
    (tmp_path / "config.toml").write_text(CONFIG)
    save(Siglip2VisionModel(Siglip2VisionConfig(**SIGLIP2)), tmp_path / "encoder")
    save(LlamaForCausalLM(LlamaConfig(**LLAMA)), tmp_path / "decoder")
    options = {"dataset": "data", "start.encoder": "encoder", "start.decoder": "decoder", "out": "run"}
    named = [word for key, name in options.items() for word in (f"--{key}", str(tmp_path / name))]
    return [str(tmp_path / "config.toml"), *named]


def model_of(run: str, step: int) -> dict[str, torch.Tensor]:
    tensors = CheckpointTensors(Path(run, f"checkpoints/step_{step:08d}"), load_run_config(Path(run)).model)
    values = {name: torch.empty(shape) for name, shape in tensors.shapes.items()}
    tensors.read_into(values)
    return values


def test_an_imported_run_begins_with_the_published_weights(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = words[-1]
    assert main(["import", *words, "--json"]) == 0
    said = capsys.readouterr().out.splitlines()
    [encoder_line] = [line for line in said if line.startswith("encoder   0.00 M parameters from")]
    [decoder_line] = [line for line in said if line.startswith("decoder   0.01 M parameters from")]
    assert encoder_line.endswith("not used: 11 of the pooling head") and decoder_line.endswith(
        "not used: none"
    )
    assert json.loads(said[-1]) == {"checkpoint": f"{run}/checkpoints/step_00000000"}
    decoder = load_file(tmp_path / "decoder" / "model.safetensors")
    encoder = load_file(tmp_path / "encoder" / "model.safetensors")
    before = model_of(run, 0)
    assert torch.equal(before["decoder.lm_head.weight"], decoder["lm_head.weight"])
    assert torch.equal(before["encoder.post_layernorm.bias"], encoder["post_layernorm.bias"])
    # Training goes on from there: one step at a learning rate of 1e-9 changes next to nothing.
    for directory in ("encoder", "decoder"):
        (tmp_path / directory).rename(tmp_path / f"{directory}-gone")
    assert main(["train", *words]) == 0
    after = model_of(run, 1)
    for name, value in before.items():
        assert torch.allclose(after[name], value, atol=1e-7), name
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    assert main(["import", *words]) == 2
    assert "has checkpoints already" in capsys.readouterr().err


def test_training_loads_the_same_weights_by_itself(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = words[-1]
    assert main(["import", *words]) == 0 and main(["train", *words]) == 0
    capsys.readouterr()
    assert main(["train", *words[:-1], f"{run}-direct"]) == 0
    assert "decoder   0.01 M parameters from" in capsys.readouterr().out
    imported, direct = model_of(run, 1), model_of(f"{run}-direct", 1)
    for name, value in imported.items():
        assert torch.equal(direct[name], value), name


def test_an_import_of_nothing_and_of_another_model_is_refused(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["import", *words, "--start.encoder", "", "--start.decoder", ""]) == 2
    assert "nothing to import" in capsys.readouterr().err
    assert main(["import", *words, "--decoder.rope_theta", "1e4"]) == 2
    assert "decoder.rope_theta is 10000.0, set it to 500000.0" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoints/*"))
