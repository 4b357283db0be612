"""Whose work lies in an output directory: what each pass depends on, kept beside what it wrote.

    index/identity.json   inputs, tokenizer, geometry, limits, video, library versions   a change makes all again
    plan/identity.json    all that, budget, packing rules and seed                a change keeps the index

An input is known by its path, size and time of change. Work of another identity is refused, or thrown away
with `on_change = "rebuild"`.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from preprocess.budgets import AUTO
from preprocess.config import PreprocessConfig
from preprocess.index import IndexedUnit
from preprocess.inputs import file_states
from shared.codecs import codec_settings
from shared.config import to_dict
from shared.dataset import MANIFEST
from shared.errors import UserError
from shared.files import canonical_json, exists, list_tree, read_json, remove, remove_tree, sha256, write_json
from shared.remote import is_remote
from shared.schema import FORMAT_VERSION

IDENTITY = "identity.json"
# The command that writes each.
STEPS = {"index": "scan", "plan": "plan"}
# Settings of the geometry that decide pixels, and no size.
PIXELS = ("filter", "mean", "std")


def scan_identity(
    config: PreprocessConfig, units: Sequence[IndexedUnit], tokenizer_sha256: str
) -> dict[str, Any]:
    """Everything that the index depends on."""
    settings = to_dict(config)
    # Ceilings stop a job and rules cut samples later: neither changes what the scan writes. Nor does `bad_file`: a job
    # that stops at a file writes nothing of it; a file that was rejected stays so.
    later = ("max_reject_rate", "too_long", "repeat", "weight", "bad_file")
    # What a worker may take decides whether work ends, not its bytes. What ended under less is kept as `crashed`.
    limits = {
        key: value for key, value in settings["limits"].items() if key not in ("max_seconds", "max_memory")
    }
    # How pixels are resized and centred: the scan needs sizes alone.
    geometry = {key: value for key, value in settings["geometry"].items() if key not in PIXELS}
    return {
        "geometry": geometry,
        "limits": limits,
        **{key: settings[key] for key in ("tokens", "video")},
        "sources": {
            name: {key: value for key, value in source.items() if key not in later}
            for name, source in settings["sources"].items()
        },
        "hash_content": config.plan.duplicates != "ignore",
        "tokenizer_sha256": tokenizer_sha256,
        "inputs": _inputs(config, units),
        "made_by": made_by(),
    }


def _inputs(config: PreprocessConfig, units: Sequence[IndexedUnit]) -> list[list[int | str]]:
    """Source, path and state of every raw file, and of what else decides how they are read."""
    files = [(unit.source, unit.unit) for unit in units] + [
        (name, str(file))
        for name, source in config.sources.items()
        # Of a tokenizer in a store its own hash tells.
        for file in ([] if is_remote(config.tokenizer) else source.files(Path(config.tokenizer)))
    ]
    states = file_states([path for _, path in files])
    return [[*file, *state] for file, state in zip(files, states, strict=True)]


def made_by() -> dict[str, str]:
    """Versions of what decides the bytes of a data set."""
    found = {"python": platform.python_version(), "format": str(FORMAT_VERSION)}
    names = "parquetry pyarrow numpy torch pillow av simplejpeg tokenizers jinja2 zstandard"
    for name in names.split():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def plan_identity(config: PreprocessConfig, scan: dict[str, Any]) -> dict[str, Any]:
    """Everything that plan and shards depend on."""
    settings = to_dict(config)
    # What only a choice depends on: the GPU that S is chosen by, the rules that N and L are.
    memory = {"memory": settings["memory"]} if config.budget.S == AUTO else {}
    fixed = config.budget.fixed
    return {
        "scan": scan,
        **memory,
        "budget": settings["budget"] if fixed is None else to_dict(fixed),
        "rules": {
            name: {key: source[key] for key in ("too_long", "bad_media", "repeat", "weight")}
            for name, source in settings["sources"].items()
        },
        "pixels": {key: settings["geometry"][key] for key in PIXELS},
        **{key: settings[key] for key in ("plan", "cost", "seed", "codec", "images")},
        "codec_settings": codec_settings(
            config.codec, jpeg_quality=config.jpeg_quality, zstd_level=config.zstd_level
        ),
    }


def short_hash(identity: dict[str, Any]) -> str:
    """What the results of a plan carry, so that those of another plan are never taken for its own."""
    return sha256(canonical_json(identity))[:16]


def claim(
    output: Path,
    step: str,
    identity: dict[str, Any],
    *,
    stale: Sequence[str],
    on_change: Literal["refuse", "rebuild"],
) -> None:
    """Make the directory of a step this run's own; `stale` are the directories that a change makes worthless.

    They go in this order, each after what was made from it: a removal that is cut short leaves nothing unclaimed.

    Raises:
        UserError: another run's work lies there and is to be kept; names the first setting that differs.
    """
    if changed := _changed(output / step, identity, [output / name for name in stale]):
        if on_change == "refuse":
            raise UserError(
                f"{output}: holds a run with other settings or inputs ({changed}); choose another output, "
                f"or throw that work away with --on_change rebuild"
            )
        remove(output / MANIFEST)  # first: no data set without its shards
        for name in stale:
            remove_tree(output / name)
    write_json(output / step / IDENTITY, identity)


def require_same(output: Path, step: str, identity: dict[str, Any]) -> None:
    """For what reads the work of a step and claims nothing.

    Raises:
        UserError: it is of other settings or inputs; names the first that differs.
    """
    if changed := _changed(output / step, identity, [output / step]):
        raise UserError(
            f"{output / step}: is of other settings or inputs ({changed}); run `{STEPS[step]}` again"
        )


def _changed(directory: Path, identity: dict[str, Any], stale: Sequence[Path]) -> str:
    """What differs from the run whose work lies in the directory of a step; "" when nothing does, or no work does."""
    path = directory / IDENTITY
    before = read_json(path) if exists(path) else None
    if before == identity or all(set(list_tree(place)) <= {IDENTITY} for place in stale):
        return ""
    if before is None:
        return f"{directory.name}/{IDENTITY} is gone"  # work that nobody claims
    return _difference(before, identity)


def _difference(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> str:
    """The first key that differs, with both values when they are short."""
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            return _difference(old, new, f"{prefix}{key}.")
        short = f"{old!r}, now {new!r}"
        return f"{prefix}{key}: {short}" if len(short) < 120 else f"{prefix}{key}"
    return "nothing"
