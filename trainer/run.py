"""The run directory: what a run wrote, whether it may go on, and how to get its model back.

OUT/
  config.toml      the resolved config
  run.json         which data set it trains on, and what of it the weights depend on
  metrics.jsonl    one row per step and per evaluation
  tensorboard/
  checkpoints/     see trainer.checkpoint
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from shared.config import load_config, to_dict, to_toml
from shared.dataset import DataSet
from shared.errors import UserError
from shared.files import atomic_path, lock_directory, read_json, write_json
from trainer.checkpoint import complete_checkpoints, load_checkpoint
from trainer.config import RunConfig
from trainer.models.vlm import VisionLanguageModel, check_fit
from trainer.parallel.mesh import World
from trainer.parallel.parallelize import build_model

# What a resumed run may change: where things are, how long it trains, what it reports, how it splits a batch.
# Keys, or whole sections.
MAY_CHANGE = {"dataset", "out", "device", "steps", "checkpoint", "eval", "log", "batch.packs_per_microbatch"}


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


def find_checkpoint(config: RunConfig, dataset: DataSet) -> Path | None:
    """The newest complete checkpoint of `config.out`, or None where there is nothing to resume.

    Raises:
        UserError: the run there is another one: its data or its config differ; names what differs.
    """
    out = Path(config.out)
    checkpoints = complete_checkpoints(checkpoint_directory(out))
    if not checkpoints:
        return None
    if _read_run(out)["dataset_identity"] != dataset.identity:
        raise UserError(
            f"run {out} was trained on another data set than {dataset.path}; "
            "give its own data set, or another --out"
        )
    old, new = (_flat(to_dict(each)) for each in (load_run_config(out), config))
    fixed = [key for key in sorted(old.keys() | new.keys()) if not {key, key.partition(".")[0]} & MAY_CHANGE]
    changed = [key for key in fixed if old.get(key) != new.get(key)]
    if changed:
        raise UserError(
            f"run {out} cannot go on with another config: "
            + ", ".join(f"{key} was {old.get(key)}, now {new.get(key)}" for key in changed)
            + "; give another --out"
        )
    return checkpoints[-1]


def write_run(config: RunConfig, dataset: DataSet) -> None:
    """Write config.toml and run.json. Only rank 0 calls it, after `find_checkpoint`."""
    out = Path(config.out)
    with atomic_path(out / "config.toml") as temporary:
        temporary.write_text(to_toml(config), encoding="utf-8")
    write_json(
        out / "run.json",
        {
            "fingerprint": dataset.fingerprint,
            "dataset_identity": dataset.identity,
            "tokens": dataset.manifest["tokens"],
            "geometry": dataset.manifest["geometry"],
        },
    )


def check_meaning(out: Path, dataset: DataSet) -> None:
    """Refuse a data set whose token ids or patch values mean something else than those the run learned.

    S, N, L, the sizes of pictures and the samples may be others.

    Raises:
        UserError: names what differs.
    """
    run = _read_run(out)
    old, new = (
        _flat({name: each[name] for name in ("tokens", "geometry")}) for each in (run, dataset.manifest)
    )
    names = sorted(name for name in old.keys() | new.keys() if name.partition(".")[2] not in SIZES)
    different = [
        f"{name} was {old.get(name)}, is {new.get(name)} here"
        for name in names
        if old.get(name) != new.get(name)
    ]
    if different:
        raise UserError(
            f"run {out} was trained with other tokens or patches than data set {dataset.path}: "
            f"{', '.join(different)}; preprocess the data again with the tokenizer and geometry of the run"
        )


def _read_run(out: Path) -> dict[str, Any]:
    run = read_json(out / "run.json", mend="restore it, or train again with another --out")
    missing = [name for name in ("dataset_identity", "tokens", "geometry") if name not in run]
    if missing:
        raise UserError(f"{out / 'run.json'}: lacks {', '.join(missing)}; train again with another --out")
    return run


def load_run_config(out: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """The config a run was made with, `overrides` on top. `out` is where the run is now, moved or not."""
    if not (out / "config.toml").is_file():
        raise UserError(f"run {out}: no config.toml there; give the --out of a training run")
    return load_config(RunConfig, out / "config.toml", (*overrides, "--out", str(out)))


def check_model(config: RunConfig, dataset: DataSet) -> None:
    """Refuse a model that cannot read the data set."""
    check_fit(config.model, dataset.geometry, dataset.budget, dataset.tokens.vocabulary_size)


def new_model(config: RunConfig, dataset: DataSet, world: World) -> VisionLanguageModel:
    """The initialized model of a config, checked against the data set."""
    check_model(config, dataset)
    return build_model(config.model, dataset.geometry, world, dtype=config.dtype, seed=config.seed)


def restore_model(config: RunConfig, dataset: DataSet, world: World) -> tuple[VisionLanguageModel, int]:
    """The model of the newest checkpoint of `config.out`, and its number of finished steps."""
    checkpoints = complete_checkpoints(checkpoint_directory(Path(config.out)))
    if not checkpoints:
        raise UserError(f"run {config.out}: no complete checkpoint there; train it first")
    check_meaning(Path(config.out), dataset)
    model = new_model(config, dataset, world)
    state = load_checkpoint(checkpoints[-1], model, None, world)
    return model, state["step"]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
