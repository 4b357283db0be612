"""The budget of a data set: given by its config, or found by packing a sample of the index at many N and L.

The sample is drawn block by block from all sources, in the shares in which the mixture uses them, and packed by the
packer of the plan itself: what is reported of a budget is not estimated from averages, but measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from preprocess.budgets import AUTO
from preprocess.config import PreprocessConfig
from preprocess.cost import attention_cost, linear_cost
from preprocess.index import ROWS_PER_BLOCK, IndexedUnit, read_blocks, read_counts
from preprocess.inputs import REQUESTS
from preprocess.packing import pack_pieces
from preprocess.packing.budgets import BudgetPoint, Search, search_budget
from preprocess.plan.files import Ints
from preprocess.plan.memory import fitting_tokens, pack_memory
from preprocess.plan.mixture import source_repeats
from preprocess.plan.pieces import Pieces, Samples, cut_into_pieces, sample_images
from preprocess.plan.survey import sample_tokens
from preprocess.samples import SEGMENTS_TYPE, TEXT
from shared.arrays import runs
from shared.errors import UserError
from shared.geometry import Budget
from shared.tokens import TokenIds

# Samples that the last decision is made on, and those that show where to look; fewer where they fill so many packs:
# long documents. Fill differs by less than 0.2 % between a sample and all (benchmarks/budgets.py).
LARGE, SMALL = 65_536, 16_384
LARGE_PACKS, SMALL_PACKS = 8192, 2048


@dataclass(frozen=True, slots=True)
class Choice:
    """The budget, and why: `record` is plan/budget.json, with the curve of everything that was looked at."""

    budget: Budget
    record: dict[str, Any]


def choose_budget(
    units: Sequence[IndexedUnit], config: PreprocessConfig, ids: TokenIds, beside: Budget | None = None
) -> Choice:
    """Measure and choose what the config leaves open of S, N and L. The same index and config give the same budget.

    `beside` is measured too, for comparison.

    Raises:
        UserError: the index is damaged, holds nothing, or no budget fits the memory.
    """
    samples, names = draw_samples(units, config, ids)
    if not len(samples):
        raise UserError(
            f"{config.output}: the index holds no sample to choose a budget by; see the rejects there"
        )
    tokens = int(sample_tokens(samples.segments, ids).sum())
    patches = int(sample_images(samples.segments)[1].sum())
    search = _search(config, tokens, patches)
    per_pack = search.S * len(samples) / tokens
    many = _subset(samples, min(LARGE, 1 + round(LARGE_PACKS * per_pack)), config.seed)
    few = _subset(samples, min(SMALL, 1 + round(SMALL_PACKS * per_pack)), config.seed)

    def packed(budget: Budget, large: bool) -> BudgetPoint:
        return measure(many if large else few, names, budget, config, ids)

    best, curve = search_budget(search, packed)
    if not best.packs:
        raise UserError(
            f"{config.output}: no sample of {len(many)} fits a pack of S = {search.S} tokens; raise budget.S"
        )
    record = {
        "budget": asdict(best.budget),
        "chosen": describe(best),
        "beside": describe(packed(beside, True)) if beside is not None else None,
        "samples": len(many),
        "demand": round(search.demand, 1),
        "least_vision": search.least_vision,
        "gpu_bytes": config.memory.gpu_bytes,
        "memory_bytes": pack_memory(best.budget, config.memory, config.cost)
        if config.memory.gpu_bytes
        else None,
        "curve": [describe(point) for point in curve],
    }
    return Choice(best.budget, record)


def _search(config: PreprocessConfig, tokens: int, patches: int) -> Search:
    """What may be chosen for data of so many tokens and patches."""
    asked, limits = config.budget, config.budget_limits
    most, least = limits.max_patches(), limits.least_row
    rows = asked.rows_multiple if asked.N == AUTO else asked.N
    row_length = least if asked.L == AUTO else asked.L
    if asked.S == AUTO:
        length, patches_left = fitting_tokens(config.memory, config.cost, patches / tokens, rows * row_length)
        most = min(most, patches_left)
    else:
        length = asked.S
    if rows * row_length > most:
        raise UserError(
            f"budget: {rows} vision rows of {row_length} patches, the least that may be chosen, are more than the "
            f"{most} that a pack may hold; lower budget.rows_multiple, N or L, or "
            "geometry.max_patches_per_image"
        )
    return Search(
        S=length,
        N=None if asked.N == AUTO else asked.N,
        L=None if asked.L == AUTO else asked.L,
        rows_multiple=asked.rows_multiple,
        demand=length * patches / tokens,
        least_row=least,
        most=most,
        merge=config.geometry.merge,
        least_vision=asked.least_vision,
    )


def describe(point: BudgetPoint) -> dict[str, Any]:
    """A line of the curve, as written to files."""
    figures = {
        name: round(getattr(point, name), 6) for name in ("tokens", "vision", "waste", "bound", "rejected")
    }
    return {**asdict(point.budget), **figures, "packs": point.packs}


def draw_samples(
    units: Sequence[IndexedUnit], config: PreprocessConfig, ids: TokenIds
) -> tuple[Samples, list[str]]:
    """About LARGE samples in the shares of the mixture, and the names of the sources that `unit_n` numbers.

    Of every source as many blocks are read as would fill the whole sample. Duplicates are not told apart here.
    """
    rng = np.random.default_rng([config.seed, 1])
    names = list(config.sources)
    with ThreadPoolExecutor(REQUESTS) as pool:
        rows_u = np.array(
            [c["samples"] for c in pool.map(read_counts, [unit.path for unit in units])], np.int64
        )
    drawn: list[pa.ListArray] = []
    total_s = np.zeros(len(names))
    tokens: dict[str, int] = {}
    for number, name in enumerate(names):
        own = np.array([place for place, unit in enumerate(units) if unit.source == name], np.int64)
        total_s[number] = rows_u[own].sum()
        segments = _draw_blocks([units[place] for place in own.tolist()], rows_u[own], rng)
        drawn.append(segments)
        mean = sample_tokens(segments, ids).mean() if len(segments) else 0.0
        tokens[name] = round(float(mean) * int(total_s[number]))
    repeats = source_repeats(config.sources, tokens, config.plan.least_repeat)
    wanted = total_s * np.array([repeats[name] for name in names])
    wanted *= min(1.0, LARGE / max(1.0, wanted.sum()))
    chosen = [
        _choose(segments, round(count), rng) for segments, count in zip(drawn, wanted.tolist(), strict=True)
    ]
    return as_samples(list(enumerate(chosen))), names


def _draw_blocks(
    units: Sequence[IndexedUnit], rows_u: npt.NDArray[np.int64], rng: np.random.Generator
) -> pa.ListArray:
    """The segments of up to LARGE samples of one source, in whole blocks of any of its units."""
    blocks_u = -(-rows_u // ROWS_PER_BLOCK)
    numbers = rng.permutation(int(blocks_u.sum()))[: -(-LARGE // ROWS_PER_BLOCK)]
    ends = np.cumsum(blocks_u)
    unit_b = np.searchsorted(ends, numbers, side="right")
    groups = numbers - (ends - blocks_u)[unit_b]

    def read(unit: int) -> list[pa.ListArray]:
        own = np.sort(groups[unit_b == unit]).tolist()
        return [
            table["segments"].combine_chunks() for table in read_blocks(units[unit].path, ["segments"], own)
        ]

    with ThreadPoolExecutor(REQUESTS) as pool:
        found = [array for arrays in pool.map(read, np.unique(unit_b).tolist()) for array in arrays]
    return pa.concat_arrays([pa.array([], SEGMENTS_TYPE), *found])


def _choose(segments: pa.ListArray, count: int, rng: np.random.Generator) -> pa.ListArray:
    """`count` of the samples: each as often as every other, within one."""
    if not len(segments):
        return segments
    times, rest = divmod(count, len(segments))
    order = np.concatenate([np.tile(np.arange(len(segments)), times), rng.permutation(len(segments))[:rest]])
    return segments.take(pa.array(order.astype(np.int64)))


def as_samples(arrays: Sequence[tuple[int, pa.ListArray]]) -> Samples:
    """Samples without keys, from segments and the number of the unit that they are of."""
    segments = pa.concat_arrays([pa.array([], SEGMENTS_TYPE), *(array for _, array in arrays)])
    units = np.array([unit for unit, _ in arrays], np.int32)
    unit_n = np.repeat(units, [len(array) for _, array in arrays])
    zeros = np.zeros(len(segments), np.int32)
    return Samples(pa.nulls(len(segments), pa.string()), segments, unit_n, zeros, zeros)


def _subset(samples: Samples, count: int, seed: int) -> Samples:
    order = np.random.default_rng([seed, 2]).permutation(len(samples))[:count]
    zeros = np.zeros(len(order), np.int32)
    chosen = pa.array(order)
    return Samples(
        samples.key.take(chosen), samples.segments.take(chosen), samples.unit_n[order], zeros, zeros
    )


def measure(
    samples: Samples, names: Sequence[str], budget: Budget, config: PreprocessConfig, ids: TokenIds
) -> BudgetPoint:
    """Pack the samples under a budget as the plan would."""
    rules: dict[str, Literal["split", "reject"]] = {
        name: source.too_long for name, source in config.sources.items()
    }
    per_row = config.plan.images_per_row
    pieces, rejects = cut_into_pieces(samples, list(names), rules, budget, ids, per_row)
    tokens_n, offset_n, images = _lengths(samples, pieces)
    patches_i = sample_images(samples.segments)[1][images]
    packing = pack_pieces(tokens_n, offset_n, patches_i, budget, per_row)
    packs = max(1, packing.num_packs)
    tokens, patches = int(tokens_n.sum()), int(patches_i.sum())
    shares = tokens / budget.S, patches / (budget.N * budget.L)
    useful = linear_cost(tokens, patches, config.cost) + attention_cost(
        int((tokens_n**2).sum()), _frame_pairs(samples, images), config.cost
    )
    padding = linear_cost(
        packs * budget.S - tokens, packs * budget.N * budget.L - patches, config.cost
    ) + _rejected_cost(samples, [sample for sample, _ in rejects], config, ids)
    return BudgetPoint(
        budget=budget,
        tokens=shares[0] / packs,
        vision=shares[1] / packs,
        waste=padding / max(1, useful),
        bound=packs / max(*shares, 1e-9),
        rejected=len(rejects) / len(samples),
        packs=packing.num_packs,
    )


def _lengths(samples: Samples, pieces: Pieces) -> tuple[Ints, Ints, Ints]:
    """Tokens of the pieces, offsets into their images, and the numbers of these among all images of the samples."""
    image_start, _ = sample_images(samples.segments)
    images = runs(image_start[pieces.sample] + pieces.first_image, pieces.num_images)
    return pieces.end - pieces.start, np.concatenate([[0], np.cumsum(pieces.num_images)]), images


def _frame_pairs(samples: Samples, images: Ints) -> int:
    """Sum of the squared patches of all frames of the images."""
    flat = samples.segments.flatten()
    is_image = flat.field("kind").to_numpy() != TEXT
    t, h, w = (flat.field(name).to_numpy().astype(np.int64)[is_image][images] for name in ("t", "h", "w"))
    return int((t * (h * w) ** 2).sum())


def _rejected_cost(samples: Samples, rejected: Sequence[int], config: PreprocessConfig, ids: TokenIds) -> int:
    """What training on the rejected samples would have cost: losing them is the worst of wastes."""
    if not rejected:
        return 0
    lost = samples.segments.take(pa.array(rejected, pa.int64()))
    return linear_cost(int(sample_tokens(lost, ids).sum()), int(sample_images(lost)[1].sum()), config.cost)
