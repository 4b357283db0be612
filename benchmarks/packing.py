"""How full packs are, in tokens and in patches, and how fast they are planned; beside how others pack.

    python benchmarks/packing.py --lengths ../shared/lengths.py

70 % captioned pictures (CC12M-like), 30 % interleaved documents (OBELICS-like), resized by the rule `native`, one
token per m x m patches, two more per image, one per sample. A document beyond a budget is cut into equal parts.
Windows are packed one by one, as the plan does. Bound: max(tokens / S, patches / (N * L)) packs. One thread;
speed is of processor time, sorting and checks included.
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from geometry import load_module
from packing_rivals import (
    best_fit_decreasing,
    best_fit_decreasing_on_both,
    first_fit_in_eight,
    next_fit_decreasing,
    worst_fit_balanced,
)

from preprocess.packing import pack_pieces
from shared.geometry import Budget, Geometry, resize_grid

Ints = npt.NDArray[np.int64]

# merge, cap, budget. N * L by hand: near what the samples need beside S tokens.
SETTINGS = [
    (2, 1024, Budget(S=8192, N=1, L=18304)),
    (2, 1024, Budget(S=8192, N=3, L=6144)),
    (2, 1024, Budget(S=8192, N=18, L=1024)),
    (1, 256, Budget(S=4096, N=1, L=2432)),
    (1, 256, Budget(S=4096, N=1, L=2500)),
    (1, 256, Budget(S=4096, N=2, L=1280)),
]


@dataclass(slots=True)
class Pieces:
    tokens_n: Ints
    offset_n: Ints
    patches_i: Ints

    @property
    def vision_n(self) -> Ints:
        return np.diff(np.concatenate([[0], np.cumsum(self.patches_i)])[self.offset_n])

    def window(self, begin: int, end: int) -> Pieces:
        offset_n = self.offset_n[begin : end + 1]
        images = slice(int(offset_n[0]), int(offset_n[-1]))
        return Pieces(self.tokens_n[begin:end], offset_n - offset_n[0], self.patches_i[images])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=Path, required=True, help="module with the length tables")
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--window", type=int, default=65_536)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    tables = load_module(options.lengths)
    rows: list[dict[str, Any]] = []
    for merge, cap, budget in SETTINGS:
        pieces = make_pieces(tables, options.samples, merge, cap, budget)
        print(f"m={merge}, cap {cap}, {budget}: {len(pieces.tokens_n):,} pieces")
        large = float((pieces.patches_i >= cap * 15 // 16).mean())
        print(f"  pictures: {pieces.patches_i.mean():.0f} patches; {large:.0%} have {cap * 15 // 16} or more")
        print("  packer                           tokens  patches  packs/bound  over budget  pieces/s")
        for name, packer, window in packers(budget, options.window, len(pieces.tokens_n)):
            rows.append({"merge": merge, "S": budget.S, "N": budget.N, "L": budget.L, "packer": name})
            rows[-1] |= measure(pieces, packer, budget, window)
            print(
                "  {packer:31} {tokens:7.2%} {patches:8.2%} {bound:12.4f} {over:12.2%} {speed:9,.0f}".format(
                    **rows[-1]
                )
            )
    memory = peak_bytes(pieces, SETTINGS[-1][2])
    print(f"peak memory beyond the inputs, the result included: {memory:.0f} bytes per piece")
    if options.json:
        print(json.dumps({"rows": rows, "bytes_per_piece": memory}))


def make_pieces(tables: Any, samples: int, merge: int, cap: int, budget: Budget) -> Pieces:
    """Pieces of all samples in random order; those of one document stay neighbours."""
    geometry = Geometry(merge=merge, max_patches_per_image=cap)
    tokens: list[int] = []
    images: list[Ints] = []
    for table in (tables.cc12m(samples * 7 // 10, 0), tables.obelics(samples * 3 // 10, 0)):
        patches_i = resize_grid(table.image_hw[:, 0], table.image_hw[:, 1], geometry).astype(np.int64).prod(1)
        cost_n = np.diff(np.concatenate([[0], np.cumsum(patches_i // merge**2 + 2)])[table.image_offsets])
        length_n = table.n_text_tokens + cost_n + 1
        for sample, length in enumerate(length_n.tolist()):
            own = patches_i[table.image_offsets[sample] : table.image_offsets[sample + 1]]
            if length <= budget.S and (len(own) <= budget.N or (budget.N == 1 and own.sum() <= budget.L)):
                tokens.append(length)
                images.append(own)
                continue
            for text, part in equal_parts(length, own, merge, budget):
                tokens.append(text)
                images.append(part)
    order = np.random.default_rng(0).permutation(len(tokens))
    images = [images[number] for number in order.tolist()]
    offset_n = np.concatenate([[0], np.cumsum([len(part) for part in images])])
    return Pieces(np.array(tokens)[order], offset_n, np.concatenate(images))


def equal_parts(length: int, patches: Ints, merge: int, budget: Budget) -> list[tuple[int, Ints]]:
    """(tokens, patches of its images) of as few parts as fit, equal in the sum of both shares.

    Text lies evenly around the images; an image goes to the part that holds its middle.
    """
    tokens = patches // merge**2 + 2
    text = np.diff(np.linspace(0, length - tokens.sum(), len(patches) + 2).astype(np.int64))
    share = np.zeros(2 * len(patches) + 1)
    share[::2], share[1::2] = text / budget.S, tokens / budget.S + patches / (budget.N * budget.L)
    ends = np.cumsum(share)
    # Tokens of text before a point: none are added along an image.
    text_before = np.concatenate([[0], np.repeat(np.cumsum(text), 2)])[:-1]
    points = np.concatenate([[0.0], ends])
    middle = ends[1::2] - share[1::2] / 2
    for count in range(1, len(patches) + length // budget.S + 2):
        edges = np.linspace(0, ends[-1], count + 1)
        part_i = np.minimum(np.searchsorted(edges, middle, side="right") - 1, count - 1)
        part_text = np.diff(
            np.interp(edges, points, np.append(text_before, text_before[-1])[: len(points)]).astype(np.int64)
        )
        parts = [(int(part_text[k] + tokens[part_i == k].sum()), patches[part_i == k]) for k in range(count)]
        if all(fits(n, part, budget) for n, part in parts):
            return [(n, part) for n, part in parts if n]
    raise AssertionError("one image fits")


def fits(tokens: int, patches: Ints, budget: Budget) -> bool:
    if tokens > budget.S:
        return False
    free = [budget.L] * budget.N
    for count in sorted(patches.tolist(), reverse=True):
        rows = [row for row in range(budget.N) if free[row] >= count]
        if not rows:
            return False
        free[min(rows, key=free.__getitem__)] -= count
    return True


def packers(
    budget: Budget, window: int, everything: int
) -> list[tuple[str, Callable[[Pieces], tuple[Ints, Ints | None]], int]]:
    """Name, packer (pack of each piece, row of each image) and pieces that it sees at once."""

    def ours(pieces: Pieces) -> tuple[Ints, Ints]:
        packing = pack_pieces(pieces.tokens_n, pieces.offset_n, pieces.patches_i, budget)
        return packing.pack_n, packing.row_i

    S, patches = budget.S, budget.N * budget.L
    return [
        (f"ours, windows of {window:,}", ours, window),
        ("ours, one window", ours, everything),
        ("next fit decreasing, 100", lambda p: (next_fit_decreasing(p.tokens_n, S), None), everything),
        ("first fit, 8 open", lambda p: (first_fit_in_eight(p.tokens_n, S), None), everything),
        ("best fit decreasing, tokens", lambda p: (best_fit_decreasing(p.tokens_n, S), None), window),
        ("worst fit balanced, tokens", lambda p: (worst_fit_balanced(p.tokens_n, S), None), window),
        (
            "best fit decreasing, both",
            lambda p: (best_fit_decreasing_on_both(p.tokens_n, p.vision_n, S, patches), None),
            window,
        ),
    ]


def measure(
    pieces: Pieces, packer: Callable[[Pieces], tuple[Ints, Ints | None]], budget: Budget, window: int
) -> dict[str, Any]:
    """Fills, packs to the bound, packs over a budget (rows where a packer gives them, else N * L), pieces/s."""
    packer(pieces.window(0, 1000))  # compiled
    packs, over, seconds, placed = 0, 0, 0.0, 0
    for begin in range(0, len(pieces.tokens_n), window):
        own = pieces.window(begin, min(begin + window, len(pieces.tokens_n)))
        start = time.process_time()
        pack_n, row_i = packer(own)
        seconds += time.process_time() - start
        number = int(pack_n.max()) + 1
        bad = np.bincount(pack_n, own.tokens_n, number) > budget.S
        image_pack_i = np.repeat(pack_n, np.diff(own.offset_n))
        if row_i is None:
            bad |= np.bincount(image_pack_i, own.patches_i, number) > budget.N * budget.L
        else:
            assert row_i.min() >= 0 and row_i.max() < budget.N
            filled = np.bincount(image_pack_i * budget.N + row_i, own.patches_i, number * budget.N)
            bad |= (filled > budget.L).reshape(number, budget.N).any(axis=1)
        packs, over, placed = packs + number, over + int(bad.sum()), placed + int((pack_n >= 0).sum())
    assert placed == len(pieces.tokens_n), "every piece is placed"
    shares = pieces.tokens_n.sum() / budget.S, pieces.patches_i.sum() / (budget.N * budget.L)
    return {
        "tokens": float(shares[0] / packs),
        "patches": float(shares[1] / packs),
        "bound": float(packs / max(shares)),
        "over": over / packs,
        "speed": len(pieces.tokens_n) / seconds,
    }


def peak_bytes(pieces: Pieces, budget: Budget) -> float:
    tracemalloc.start()
    pack_pieces(pieces.tokens_n, pieces.offset_n, pieces.patches_i, budget)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / len(pieces.tokens_n)


if __name__ == "__main__":
    main()
