"""The run directory: what a run wrote, whether it may go on, and how to get its model back.

OUT/
  config.toml      the resolved config
  run.json         which data it trains on, and what of it the weights depend on
  metrics.jsonl    one row per step and per evaluation
  tensorboard/
  checkpoints/     see trainer.checkpoint
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from shared.config import load_config, to_dict, to_toml
from shared.errors import UserError
from shared.files import atomic_path, lock_directory, read_json, write_json
from trainer.checkpoint import complete_checkpoints, load_checkpoint
from trainer.config import RunConfig
from trainer.data.mixture import Mixture, open_mixture
from trainer.models.vlm import check_fit
from trainer.optim import freeze
from trainer.parallel.check import check_layout
from trainer.parallel.mesh import World
from trainer.parallel.parallelize import ParallelModel, build_model
from trainer.parallel.pipeline import Microbatches
from trainer.plan import meta_model
from trainer.weights.load import load_start_weights

# What a resumed run may change, keys or whole sections: where things are (run.json knows which data, and in which
# shares), how long it trains, what it keeps and reports, and on what it computes. Never what is learned.
MAY_CHANGE = {
    *("dataset", "mixture", "out", "start"),
    *("steps", "checkpoint", "eval", "log", "profile"),
    *("device", "parallel", "compute", "decode_threads", "batch.packs_per_microbatch"),
}
# The sections that say what the weights compute.
MODEL_SECTIONS = ("encoder", "projector", "decoder")

# What says how large pictures are, not what a patch means: another data set to evaluate on may differ in it.
SIZES = {"max_patches_per_image", "resize"}


def checkpoint_directory(out: Path) -> Path:
    return out / "checkpoints"


@contextmanager
def hold_run(out: Path, world: World) -> Generator[None, None, None]:
    """Keep every other training run out of `out`, from before it is read until the last row is written.

    Raises:
        UserError: on every rank, where rank 0 cannot have it.
    """
    with ExitStack() as stack:
        world.on_main(lambda: stack.enter_context(lock_directory(out, "training")))
        yield


def find_checkpoint(config: RunConfig, data: str) -> Path | None:
    """The newest complete checkpoint of `config.out`, or None where there is nothing to resume.

    `data` is the identity of what is trained on: of one data set, or of several and their weights.

    Raises:
        UserError: the run there is another one: its data or its config differ; names what differs.
    """
    out = Path(config.out)
    checkpoints = complete_checkpoints(checkpoint_directory(out))
    if not checkpoints:
        return None
    if _read_run(out)["data"] != data:
        raise UserError(
            f"run {out} was trained on other data, or with other weights between data sets; "
            "give its own, or another --out"
        )
    old, new = (_flat(to_dict(each)) for each in (load_run_config(out), config))
    changed = [line for key, line in _changes(old, new) if not {key, key.partition(".")[0]} & MAY_CHANGE]
    if changed:
        raise UserError(
            f"run {out} cannot go on with another config: {', '.join(changed)}; give another --out"
        )
    return checkpoints[-1]


def load_start(config: RunConfig, data: Mixture, parts: Sequence[nn.Module], world: World) -> list[str]:
    """Load the weights of `[start]` into a new model; returns what to tell of it, a line each.

    Raises:
        UserError: they do not fit; names what differs.
    """
    start = config.start
    if not start.run:
        return load_start_weights(start.encoder, start.decoder, parts, config.model, data.geometry)
    checkpoint = _load_run(Path(start.run), config, data, parts, world)
    return [f"start     weights of {checkpoint}"]


def _load_run(run: Path, config: RunConfig, data: Mixture, parts: Sequence[nn.Module], world: World) -> Path:
    """The model of the newest checkpoint of another run, all of it; returns which.

    The optimizer and the order of data start anew, and what is trained may be something else.
    """
    checkpoint = newest_checkpoint(run)
    check_meaning(run, data)
    old, new = (_model_keys(each) for each in (load_run_config(run), config))
    if changed := [line for _, line in _changes(old, new)]:
        raise UserError(
            f"start.run {run} has another model: {', '.join(changed)}; "
            "set these keys to what they were there, or start from another run"
        )
    load_checkpoint(checkpoint, parts, None, world)
    return checkpoint


def newest_checkpoint(run: Path) -> Path:
    """The newest complete checkpoint of a run that must have one."""
    checkpoints = complete_checkpoints(checkpoint_directory(run))
    if not checkpoints:
        raise UserError(f"run {run}: no complete checkpoint there; train it first")
    return checkpoints[-1]


def write_run(config: RunConfig, data: Mixture) -> None:
    """Write config.toml and run.json. Only rank 0 calls it, after `find_checkpoint`."""
    out = Path(config.out)
    with atomic_path(out / "config.toml") as temporary:
        temporary.write_text(to_toml(config), encoding="utf-8")
    write_json(
        out / "run.json",
        {"data": data.identity, **_meaning(data)},
    )


def _meaning(data: Mixture) -> dict[str, Any]:
    """What token ids and patch values mean: the data sets of a mixture agree in it."""
    manifest = data.datasets[0].manifest
    return {"tokens": manifest["tokens"], "geometry": manifest["geometry"]}


def check_meaning(out: Path, data: Mixture) -> None:
    """Refuse a data set whose token ids or patch values mean something else than those the run learned.

    S, N, L, the sizes of pictures and the samples may be others.

    Raises:
        UserError: names what differs.
    """
    run = _read_run(out)
    old, new = (
        _flat({name: each[name] for name in ("tokens", "geometry")}) for each in (run, _meaning(data))
    )
    different = [line for name, line in _changes(old, new) if name.partition(".")[2] not in SIZES]
    if different:
        where = ", ".join(str(dataset.path) for dataset in data.datasets)
        raise UserError(
            f"run {out} was trained with other tokens or patches than data set {where}: "
            f"{', '.join(different)}; preprocess the data again with the tokenizer and geometry of the run"
        )


def _read_run(out: Path) -> dict[str, Any]:
    run = read_json(out / "run.json", mend="restore it, or train again with another --out")
    missing = [name for name in ("data", "tokens", "geometry") if name not in run]
    if missing:
        raise UserError(f"{out / 'run.json'}: lacks {', '.join(missing)}; train again with another --out")
    return run


def load_run_config(out: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """The config a run was made with, `overrides` on top. `out` is where the run is now, moved or not."""
    if not (out / "config.toml").is_file():
        raise UserError(f"run {out}: no config.toml there; give the --out of a training run")
    return load_config(RunConfig, out / "config.toml", (*overrides, "--out", str(out)))


def open_data(config: RunConfig) -> Mixture:
    """The data sets of a config, opened and checked against each other."""
    if config.dataset:
        return open_mixture({"": (config.dataset, 1.0)})
    return open_mixture({name: (entry.path, entry.weight) for name, entry in config.mixture.items()})


def check_model(config: RunConfig, data: Mixture, world: World) -> None:
    """Refuse a model that cannot read the data, lacks what is to be trained, or cannot be spread over the ranks."""
    check_fit(config.model, data.geometry, data.budget, data.tokens.vocabulary_size)
    check_layout(
        config.model,
        config.parallel,
        config.compute,
        data.budget,
        device=world.device.type,
        dtype=config.dtype,
        accumulation=_accumulation(config, world),
    )
    meta_model(config)


def _accumulation(config: RunConfig, world: World) -> int:
    try:
        return config.batch.accumulation(world.dp_size)
    except ValueError as error:
        raise UserError(f"{error}; change one of them, or the number of processes") from None


def new_model(config: RunConfig, data: Mixture, world: World) -> ParallelModel:
    """The initialized model of a config, checked against the data."""
    check_model(config, data, world)
    return build_model(
        config.model,
        data.geometry,
        world,
        dtype=config.dtype,
        seed=config.seed,
        parallel=config.parallel,
        compute=config.compute,
        microbatches=Microbatches(
            budget=data.budget,
            packs=config.batch.packs_per_microbatch,
            count=_accumulation(config, world),
        ),
        z_loss=config.z_loss,
        prepare=lambda parts: freeze(parts, config.trained),
    )


def restore_model(config: RunConfig, data: Mixture, world: World) -> tuple[ParallelModel, int]:
    """The model of the newest checkpoint of `config.out`, and its number of finished steps."""
    checkpoint = newest_checkpoint(Path(config.out))
    check_meaning(Path(config.out), data)
    model = new_model(config, data, world)
    return model, load_checkpoint(checkpoint, model.parts, None, world)["step"]


def _model_keys(config: RunConfig) -> dict[str, Any]:
    """What the weights compute, without the names of presets: what they stand for is there too."""
    sections = {name: value for name, value in to_dict(config).items() if name in MODEL_SECTIONS}
    return {key: value for key, value in _flat(sections).items() if not key.endswith(".preset")}


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, str]]:
    """Every key whose value differs, and what to say of it."""
    keys = sorted(old.keys() | new.keys())
    return [
        (key, f"{key} was {old.get(key)}, is {new.get(key)} here")
        for key in keys
        if old.get(key) != new.get(key)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
