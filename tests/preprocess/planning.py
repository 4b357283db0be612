"""Small indexes made by hand, planned, and the plan read back."""

from __future__ import annotations

import pickle
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import xxhash

from preprocess.config import PlanConfig
from preprocess.executor import SerialExecutor
from preprocess.index import IndexedUnit, ScannedSample, open_index
from preprocess.plan import make_plan, planned_shards, read_shard_plan
from preprocess.samples import IMAGE, TEXT, IndexSegment, Reject
from preprocess.sources.base import SourceConfig
from shared.geometry import Budget
from shared.tokens import TokenIds
from tests.preprocess.inputs import BUDGET, GEOMETRY

IDS = TokenIds(
    bos=1, eos=2, pad=0, image=3, begin_image=4, end_image=5, vocabulary_size=262, tokenizer_sha256=""
)
Segment = tuple[int, int, int]  # tokens of text, or 0 and the grid of an image


def text(tokens: int) -> Segment:
    return (tokens, 0, 0)


def image(h: int, w: int) -> Segment:
    return (0, h, w)


def clip_segments(
    segments: Sequence[IndexSegment], ids: TokenIds, start: int, end: int
) -> list[IndexSegment]:
    """The slow and obvious way to the segments of tokens [start, end) of a stream, texts cut to what is needed."""
    clipped: list[IndexSegment] = []
    position = int(ids.bos is not None)
    for segment in segments:
        first, last = max(start, position), min(end, position + segment.tokens)
        if segment.kind == TEXT:
            last = min(end + 1, position + segment.tokens)
            if first < last:
                offset = segment.offset + first - position
                clipped.append(replace(segment, offset=offset, tokens=last - first))
        elif first < last:
            clipped.append(segment)
        position += segment.tokens
        if position > end:
            break
    return clipped


def write_index(
    path: Path, samples: Mapping[str, Sequence[Segment] | str], content: Mapping[str, int] | None = None
) -> None:
    """As the scan writes it. A sample is its segments, or the reason why it was rejected; `content` are hashes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_index(path) as index:
        for key, sample in samples.items():
            if isinstance(sample, str):
                index.reject(Reject(path.parent.name, key, sample, ""))
                continue
            segments = [
                IndexSegment(IMAGE, "x.tar", 512 * place, 100, tokens or h * w // 4 + 2, 8, 9, 1, h, w)
                if h
                else IndexSegment(TEXT, "", 0, 0, tokens)
                for place, (tokens, h, w) in enumerate(sample)
            ]
            texts = [np.zeros(segment.tokens, np.int32) for segment in segments if segment.kind == TEXT]
            hashed = (content or {}).get(key) or xxhash.xxh3_64_intdigest(f"{path}{key}".encode())
            index.append(ScannedSample(key, hashed, segments, texts))


class Planned:
    """What `make_plan` wrote, read back."""

    def __init__(self, directory: Path, summary: dict[str, Any]) -> None:
        self.summary = summary
        self.files = {path.name: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
        self.shards = list(planned_shards(summary))
        self.pieces = [
            {**row, "pack": (shard.name, row["pack"]), "split": shard.split, "window": shard.plan}
            for shard in self.shards
            for row in read_shard_plan(directory / shard.plan, shard.row_group).to_pylist()
        ]
        rejects = sorted(directory.glob("*.rejects.parquet"))
        self.rejects = [row for path in rejects for row in pq.read_table(path).to_pylist()]

    def packs(self) -> dict[Any, list[dict[str, Any]]]:
        """Pieces by (shard, pack), in the order of the files."""
        packs: defaultdict[Any, list[dict[str, Any]]] = defaultdict(list)
        for piece in self.pieces:
            packs[piece["pack"]].append(piece)
        return dict(packs)

    def members(self) -> set[frozenset[str]]:
        return {frozenset(piece["key"] for piece in pack) for pack in self.packs().values()}

    def uses(self, source: str = "web") -> Counter[str]:
        """How often each sample of a source is in the plan, its parts counted once."""
        own = (piece for piece in self.pieces if piece["source"] == source and piece["part"] == 0)
        return Counter(piece["key"] for piece in own)

    def counts(self, source: str = "web", *kinds: str) -> Any:
        line = self.summary["sources"][source]
        return tuple(line[kind] for kind in kinds or ("whole", "split", "parts"))


def run(function: Any, tasks: Sequence[Any], *, label: str, total: int) -> list[Any]:
    """One task after another, each with what a worker would get: pickled arguments."""
    executor = SerialExecutor(0)
    return list(executor.map(function, [pickle.loads(pickle.dumps(task)) for task in tasks]))


def plan(
    directory: Path,
    samples: Mapping[str, Mapping[str, Sequence[Segment] | str]],
    budget: Budget = BUDGET,
    seed: int = 0,
    too_long: Any = "split",
    content: Mapping[str, int] | None = None,
    rules: Mapping[str, Mapping[str, Any]] | None = None,
    run: Any = run,
    **options: Any,
) -> Planned:
    """`samples` by source, one file each, or by source/file. `rules`: settings of sources."""
    units = []
    for name, own in samples.items():
        source, _, file = name.partition("/")
        units.append(
            IndexedUnit(source, f"{name}.tar", directory / "index" / source / f"{file or 0}.parquet")
        )
        write_index(units[-1].path, own, content)
    sources = {
        unit.source: SourceConfig(
            **{"paths": ("x",), "too_long": too_long, **(rules or {}).get(unit.source, {})}
        )
        for unit in units
    }
    output = directory / "plan"
    summary = make_plan(
        units,
        sources,
        output,
        budget=budget,
        geometry=GEOMETRY,
        ids=IDS,
        config=PlanConfig(**options),
        seed=seed,
        run=run,
    )
    return Planned(output, summary)


def captioned(count: int, seed: int = 0) -> dict[str, Sequence[Segment]]:
    rng = np.random.default_rng(seed)
    return {
        f"{n:04d}": [image(*(2 * rng.integers(1, 3, 2)).tolist()), text(int(rng.integers(1, 40)))]
        for n in range(count)
    }


def patches_of(piece: Mapping[str, Any]) -> list[int]:
    return [s["t"] * s["h"] * s["w"] for s in piece["segments"] if s["kind"] == IMAGE]
