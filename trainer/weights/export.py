"""`python -m trainer export RUN OUT`: the newest checkpoint as a directory that transformers loads.

    RUN/checkpoints/step_*   --tensor by tensor, renamed-->   OUT/model-0000i-of-0000n.safetensors + index
    RUN/config.toml          --settings-->                    OUT/config.json, generation_config.json
    DATASET/tokenizer/       --copied-->                      OUT/tokenizer.json, ..
    DATASET/dataset.json     --guide-->                       OUT/preprocessor_config.json, README.md

The model is the composition `lfm2_vl`: a SigLIP2 NaFlex tower, a projector and a decoder. No model is built: the
checkpoint's tensors are read by name, and the host holds one output file at a time. OUT is written beside its
place and renamed when it is complete.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from shared.dataset import DataSet
from shared.errors import UserError
from shared.files import write_json
from shared.tokens import TEMPLATE_FILES, TOKENIZER_FILES
from trainer.config import RunConfig
from trainer.data.mixture import Mixture
from trainer.models.siglip2 import Siglip2Config
from trainer.models.vlm import ModelConfig
from trainer.run import check_meaning, load_run_config, newest_checkpoint, open_data
from trainer.weights.check import EXPORTED
from trainer.weights.checkpoint_tensors import CheckpointTensors
from trainer.weights.guide import write_guide
from trainer.weights.hub import INDEX, ONE_FILE
from trainer.weights.names import NAMES
from trainer.weights.settings import write_decoder, write_siglip2

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What a download that fails has to fetch again.
SHARD_BYTES = 5_000_000_000


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m trainer export",
        description="Write a run's newest checkpoint for transformers (AutoModelForImageTextToText).",
    )
    parser.add_argument(
        "run", type=Path, help="run directory; any key of its config can follow as --key value"
    )
    parser.add_argument("out", type=Path, help="directory to make")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the files")
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="largest size of one file")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object, last")
    arguments, overrides = parser.parse_known_args(argv)
    config = load_run_config(arguments.run, tuple(overrides))
    result = export_run(config, open_data(config), arguments.out, arguments.dtype, arguments.shard_bytes)
    print(
        f"{arguments.out}: {result['parameters'] / 1e6:.2f} M parameters of step {result['step']} as "
        f"{result['dtype']}, {result['files']} file(s); compare with `python -m trainer check-export "
        f"{arguments.run} {arguments.out}`"
    )
    if arguments.json:
        print(json.dumps(result))


def export_run(
    config: RunConfig, data: Mixture, out: Path, dtype: str, shard_bytes: int = SHARD_BYTES
) -> dict[str, Any]:
    """Write `out`, complete or absent; what was written.

    Raises:
        UserError: the run has no checkpoint, its model cannot be expressed, or `out` is taken.
    """
    run = Path(config.out)
    if shard_bytes < 1:
        raise UserError(f"--shard-bytes must be at least 1, got {shard_bytes}")
    exportable_encoder(config.model)  # before anything is read
    check_meaning(run, data)
    dataset = data.datasets[0]  # they agree in their tokens and in what a patch means
    checkpoint = newest_checkpoint(run)
    step = int(checkpoint.name.removeprefix("step_"))
    tensors = CheckpointTensors(checkpoint, config.model)
    with _directory(out) as temporary:
        _copy_tokenizer(dataset, temporary)
        write_guide(temporary, dataset, step)
        write_json(temporary / "config.json", hub_config(config.model, dataset, dtype))
        tokens = dataset.tokens
        ids = {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad}
        write_json(temporary / "generation_config.json", ids)
        write_json(temporary / EXPORTED, {"step": step, "dtype": dtype, "fingerprint": dataset.fingerprint})
        files, parameters = _write_weights(temporary, tensors, config.model, DTYPES[dtype], shard_bytes)
    return {"step": step, "files": files, "parameters": parameters, "dtype": dtype}


def exportable_encoder(config: ModelConfig) -> Siglip2Config:
    """The encoder, if `lfm2_vl` of transformers can express the model.

    Raises:
        UserError: it cannot.
    """
    encoder = config.encoder
    if not isinstance(encoder, Siglip2Config):
        raise UserError(
            f"export: encoder.type is {encoder.type!r}; transformers composes only 'siglip2' with a decoder"
        )
    if encoder.temporal_patch_size != 1:
        raise UserError(
            f"export: encoder.temporal_patch_size is {encoder.temporal_patch_size}; the tower of transformers takes "
            "patches of one frame"
        )
    return encoder


def hub_config(config: ModelConfig, dataset: DataSet, dtype: str) -> dict[str, Any]:
    """config.json of the export."""
    encoder, decoder, tokens = exportable_encoder(config), config.decoder, dataset.tokens
    scaling = decoder.rope_scaling
    stretched = int(scaling.factor * scaling.original_max_positions) if scaling else 0
    return {
        "architectures": ["Lfm2VlForConditionalGeneration"],
        "model_type": "lfm2_vl",
        "dtype": dtype,
        "image_token_id": tokens.image,
        "tie_word_embeddings": decoder.tie_embeddings,
        "downsample_factor": config.projector.merge,
        "projector_hidden_size": config.projector.hidden_size,
        "projector_hidden_act": "gelu",
        "projector_bias": True,
        "projector_use_layernorm": config.projector.layer_norm,
        "vision_config": write_siglip2(encoder),
        "text_config": {
            **write_decoder(decoder),
            # What it was trained on, or what its rotary positions are stretched to.
            "max_position_embeddings": max(dataset.budget.S, stretched),
            "bos_token_id": tokens.bos,
            "eos_token_id": tokens.eos,
            "pad_token_id": tokens.pad,
        },
    }


def hub_name(name: str, config: ModelConfig) -> str:
    """Name in `lfm2_vl` of one of our parameters."""
    part, _, inside = name.partition(".")
    if part == "projector":
        return f"model.multi_modal_projector.{inside}"
    if part == "encoder":
        return NAMES[config.encoder.type].theirs(inside, "model.vision_tower.")
    return NAMES[config.decoder.type].theirs(inside, "model.language_model.")


def _write_weights(
    out: Path, tensors: CheckpointTensors, config: ModelConfig, dtype: torch.dtype, shard_bytes: int
) -> tuple[int, int]:
    """Number of files and of parameters."""
    sizes = {name: shape.numel() * dtype.itemsize for name, shape in tensors.shapes.items()}
    groups = _group(sizes, shard_bytes)
    places: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = ONE_FILE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        values = {name: torch.empty(tensors.shapes[name], dtype=dtype) for name in group}
        tensors.read_into(values)
        named = {hub_name(name, config): value for name, value in values.items()}
        save_file(named, out / file, metadata={"format": "pt"})
        (out / file).chmod(0o644)  # safetensors makes it readable by its owner alone
        places |= dict.fromkeys(named, file)
    if len(groups) > 1:
        total = sum(sizes.values())
        write_json(
            out / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        )
    return len(groups), sum(sizes.values()) // dtype.itemsize


def _group(sizes: dict[str, int], shard_bytes: int) -> list[list[str]]:
    """Names in order, as many per group as fit; one that is larger alone is a group of its own."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if groups[-1] and used + size > shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def _copy_tokenizer(dataset: DataSet, out: Path) -> None:
    directory = dataset.path / "tokenizer"
    if not (directory / "tokenizer.json").is_file():
        raise UserError(
            f"data set {dataset.path}: no tokenizer/tokenizer.json there; copy the data set again"
        )
    for pattern in (*TOKENIZER_FILES, *TEMPLATE_FILES):
        for path in directory.glob(pattern):
            copy = out / path.relative_to(directory)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


@contextmanager
def _directory(out: Path) -> Generator[Path, None, None]:
    """A directory beside `out` that becomes it on success and goes on an exception."""
    if out.exists():
        raise UserError(f"{out}: exists already; give another directory, or remove it")
    temporary = out.with_name(f"{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.rglob("*"):
            _flush(path)
        _flush(temporary)
        temporary.rename(out)
        _flush(out.parent)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error}); mend that and export again") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
