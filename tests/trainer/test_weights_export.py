"""Export: a trained model in transformers. Its logits, its text, its files, and the check that finds a wrong one."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from shared.errors import UserError
from shared.geometry import Budget, Geometry, resize_grid
from tests.trainer.batches import Picture
from tests.trainer.datasets import TOKENS, make_pack, spans_of, write_dataset
from trainer.__main__ import main
from trainer.data.mixture import Mixture, open_mixture
from trainer.models.dinov3 import Dinov3Config
from trainer.run import load_run_config
from trainer.weights.check import check_export, read_samples
from trainer.weights.export import export_run, exportable_encoder
from trainer.weights.guide import describe_inputs, transformers_resizes

BUDGET = Budget(S=48, N=2, L=24)
# Several documents and pictures in a pack: what is compared is packed here and alone there.
PACKS = [
    [[7 + i, Picture(4, 2, seed=i), 8, Picture(2, 6, seed=i), 10], [11, 12], [Picture(2, 2, t=2, seed=i), 12]]
    for i in range(6)
]
CONFIG = """
steps = 2
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
vocab_size = 44
hidden_size = 24
intermediate_size = 48
num_layers = 2
num_heads = 4
num_kv_heads = 2
head_dim = 8
[batch]
packs_per_step = 4
[optimizer]
lr = 0.01
[schedule]
warmup_steps = 0
[eval]
packs = 1
"""
LLAMA3 = ["--decoder.rope_scaling.factor", "8", "--decoder.rope_scaling.original_max_positions", "16"]
MODELS = {
    "llama": [*LLAMA3, "--decoder.tie_embeddings", "false"],
    "qwen3": ["--decoder.type", "qwen3", "--projector.layer_norm", "false"],
}


def write_tokenizer(path: Path) -> None:
    special = ["<|pad|>", "<|image|>", "<|boi|>", "<|eoi|>", "<|eos|>"]
    vocabulary = {word: number for number, word in enumerate([*special, *(f"w{i}" for i in range(5, 40))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w39"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export")
    write_dataset(path / "data", {"train": PACKS[:4], "validation": PACKS[4:]}, BUDGET)
    write_tokenizer(path / "data" / "tokenizer")
    (path / "config.toml").write_text(CONFIG)
    for kind, options in MODELS.items():
        words = ["--dataset", str(path / "data"), "--out", str(path / kind), *options]
        assert main(["train", str(path / "config.toml"), *words]) == 0
    return path


@pytest.fixture(scope="module")
def data(directory: Path) -> Mixture:
    return open_mixture({"": (str(directory / "data"), 1.0)})


def export(directory: Path, kind: str, out: Path, *options: str) -> Path:
    assert main(["export", str(directory / kind), str(out), *options]) == 0
    return out


@pytest.fixture(scope="module")
def exported(directory: Path) -> Path:
    return export(directory, "llama", directory / "llama-export")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MODELS)
def test_transformers_computes_the_logits_of_the_trained_model(
    directory: Path, data: Mixture, tmp_path: Path, kind: str, dtype: str
) -> None:
    out = export(directory, kind, tmp_path / "out", "--dtype", dtype)
    weights = load_file(out / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {getattr(torch, dtype)}
    assert ("lm_head.weight" in weights) == (kind == "llama")
    result = check_export(load_run_config(directory / kind), data, out)
    assert result["difference"] < 1e-5
    # Both validation packs: three documents each, with two pictures and a video of two frames.
    assert (result["documents"], result["pictures"]) == (6, 6)
    assert result["scale"] > 0.1


def test_a_model_that_learned_otherwise_fails_the_check(
    directory: Path, data: Mixture, exported: Path, tmp_path: Path
) -> None:
    """Negative controls: one change in weights or settings is found."""
    config = load_run_config(directory / "llama")
    check_export(config, data, exported)

    def spoil(name: str, change: Callable[[Path], None]) -> Path:
        copy = tmp_path / name
        copy.mkdir()
        for path in exported.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        change(copy)
        return copy

    def swap_patches(path: Path) -> None:
        weights = load_file(path / "model.safetensors")
        name = "model.vision_tower.embeddings.patch_embedding.weight"
        weights[name] = weights[name].flip(1).contiguous()
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})

    def other_activation(path: Path) -> None:
        settings = (path / "config.json").read_text()
        assert '"gelu"' in settings
        (path / "config.json").write_text(settings.replace('"gelu"', '"gelu_pytorch_tanh"'))

    for change in (swap_patches, other_activation):
        with pytest.raises(UserError, match="is not the model of run"):
            check_export(config, data, spoil(change.__name__, change))

    def drop_a_weight(path: Path) -> None:
        weights = load_file(path / "model.safetensors")
        del weights["model.multi_modal_projector.linear_2.bias"]
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(UserError, match=r"transformers does not take all of it: .*linear_2\.bias"):
        check_export(config, data, spoil("drop_a_weight", drop_a_weight))


def test_the_check_is_a_command_with_an_exit_code(
    directory: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-export", str(directory / "llama"), str(exported)]) == 0
    assert "same: largest difference" in capsys.readouterr().out
    assert main(["check-export", str(directory / "qwen3"), str(exported)]) == 2
    assert "is not the model of run" in capsys.readouterr().err


def test_documents_that_only_the_reference_gets_wrong_are_passed_over() -> None:
    """One patch wide and several high: see read_samples. One patch alone, and one row, are right."""
    pack, entries = make_pack([[Picture(4, 2), 7], [Picture(2, 2), 8], [9, 10], [Picture(2, 4), 11]], BUDGET)
    images = pack.images.copy()
    images["h"], images["w"] = (8, 1, 1), (1, 1, 8)
    narrow: Any = SimpleNamespace(
        num_packs=lambda split: 1,
        pack=lambda split, number: replace(pack, images=images),
        document_spans=lambda split, number: spans_of(entries),
    )
    assert [sample.images for sample in read_samples(narrow, "validation")] == [[1], [], [2]]


def test_without_transformers_the_check_says_what_to_install(
    directory: Path, data: Mixture, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="needs transformers; install it"):
        check_export(load_run_config(directory / "llama"), data, exported)


def test_a_checkpoint_that_is_gone_and_one_that_is_damaged_are_named(
    directory: Path, data: Mixture, exported: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(directory / "llama", run)
    config = load_run_config(run)
    [file] = (run / "checkpoints" / "step_00000002").glob("*.distcp")
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=rf"is damaged .*{file.name} has checksum"):
        export_run(config, data, tmp_path / "out", "float32")
    (run / "checkpoints" / "step_00000002").rename(run / "checkpoints" / "step_00000001")
    with pytest.raises(UserError, match=r"step_00000002, which .* was made from, is gone"):
        check_export(config, data, exported)


def test_many_files_hold_what_one_holds(directory: Path, exported: Path, tmp_path: Path) -> None:
    out = export(directory, "llama", tmp_path / "out", "--shard-bytes", "20000")
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 3 and not (out / "model.safetensors").exists()
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    one = load_file(exported / "model.safetensors")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in one.values())
    found = {}
    for file in files:
        assert (
            file.stat().st_size < 20000 + 5000
        )  # the largest tensor has 4224 bytes, a header takes some too
        for name, value in load_file(file).items():
            assert index["weight_map"][name] == file.name
            found[name] = value
    assert found.keys() == one.keys()
    assert all(torch.equal(found[name], one[name]) for name in one)
    AutoModelForImageTextToText.from_pretrained(out)


def test_the_lines_of_its_readme_run(exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (exported / "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace('directory = "."', f"directory = {str(exported)!r}")
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), names)
    # 9 x 13 pixels hold 2 x 3 cells of 4 x 4, of which each is a token.
    assert (names["h"], names["w"]) == (4, 6)
    assert names["ids"][:8] == [2, 1, 1, 1, 1, 1, 1, 3]  # pyright: ignore[reportIndexIssue]
    assert printed.getvalue().strip()


def test_its_processor_makes_our_patches_in_raster_order(exported: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(exported)
    pixels_hwc = np.random.default_rng(1).integers(0, 256, (8, 4, 3), dtype=np.uint8)
    made = processor(images=[Image.fromarray(pixels_hwc)], return_tensors="pt")
    assert made["spatial_shapes"].tolist() == [[4, 2]]
    # Row 1, column 1 of the patches of 2 x 2 pixels.
    expected = (pixels_hwc[2:4, 2:4].reshape(-1) / 255 - 0.5) / 0.5
    assert np.abs(made["pixel_values"][0, 3].numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("size", [(9, 13), (100, 20), (33, 64), (640, 480)])
def test_transformers_resizes_by_itself_only_where_it_gives_our_sizes(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    geometry = Geometry(patch_size=16, merge=1, max_patches_per_image=64, resize="fill")
    assert transformers_resizes(geometry)
    assert "resize_grid([" not in describe_inputs(geometry, TOKENS, "f", 1)
    settings = {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 16, "max_num_patches": 64}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lfm2_vl"}))
    made = AutoImageProcessor.from_pretrained(tmp_path)(
        images=[Image.new("RGB", size[::-1])], return_tensors="pt"
    )
    ours = resize_grid(np.array(size[:1]), np.array(size[1:]), geometry)
    assert made["spatial_shapes"].tolist() == ours.tolist()
    for other in (replace(geometry, resize="native"), replace(geometry, merge=2)):
        assert not transformers_resizes(other)
        assert "resize_grid([" in describe_inputs(other, TOKENS, "f", 1)


def test_its_tokenizer_and_settings_are_those_of_the_data_set(exported: Path, data: Mixture) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.encode("w7 w8", add_special_tokens=False) == [7, 8]
    assert (exported / "tokenizer.json").read_bytes() == (
        data.datasets[0].path / "tokenizer/tokenizer.json"
    ).read_bytes()
    model = AutoModelForImageTextToText.from_pretrained(exported)
    assert model.generation_config.eos_token_id == 4 and model.generation_config.pad_token_id == 0
    text = model.config.text_config
    assert text.max_position_embeddings == 8 * 16  # factor times the original context, above S
    assert text.rope_parameters["rope_type"] == "llama3"
    assert text.vocab_size == 44 and model.config.image_token_id == 1


# What is refused, and what a failure leaves


def test_an_export_is_complete_or_absent(
    directory: Path, data: Mixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    config = load_run_config(directory / "llama")
    monkeypatch.setattr("trainer.weights.export.save_file", fail)  # all but the weights is written
    with pytest.raises(UserError, match=r"cannot be written .*No space left"):
        export_run(config, data, tmp_path / "out", "float32")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export_run(config, data, tmp_path / "out", "float32")


def test_only_what_transformers_composes_is_exported(directory: Path) -> None:
    model = load_run_config(directory / "llama").model
    with pytest.raises(UserError, match=r"encoder\.type is 'dinov3'; transformers composes only 'siglip2'"):
        exportable_encoder(replace(model, encoder=Dinov3Config()))
    with pytest.raises(UserError, match="temporal_patch_size is 2"):
        exportable_encoder(replace(model, encoder=replace(model.encoder, temporal_patch_size=2)))


def test_a_run_without_a_checkpoint_and_a_config_of_another_model_are_refused(
    directory: Path, data: Mixture, tmp_path: Path
) -> None:
    config = load_run_config(directory / "llama")
    deeper = replace(config, decoder=replace(config.decoder, num_layers=3))
    with pytest.raises(UserError, match=r"another model than the config's, see decoder\.layers\.2"):
        export_run(deeper, data, tmp_path / "out", "float32")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "run.json").write_bytes((directory / "llama" / "run.json").read_bytes())
    with pytest.raises(UserError, match="no complete checkpoint"):
        export_run(replace(config, out=str(empty)), data, tmp_path / "out", "float32")
