"""Long documents cut where a part is full, or into equal parts: how full packs are then.

    python benchmarks/cuts.py --lengths ../shared/lengths.py

70 % captioned pictures (CC12M-like), 30 % interleaved documents (OBELICS-like) with their text evenly around their
images; whatever does not fit one pack is cut by `preprocess.stream`, once each way. Both sets of pieces are packed
whole, in the same two random orders.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from geometry import load_module
from packing import SETTINGS

from preprocess.packing import pack_pieces
from preprocess.samples import IMAGE, TEXT, IndexSegment
from preprocess.stream import Part, cut_where_full, split_sample
from shared.geometry import Budget, Geometry, resize_grid
from shared.tokens import TokenIds

IDS = TokenIds(
    bos=1,
    eos=2,
    pad=0,
    image=3,
    begin_image=4,
    end_image=5,
    vocabulary_size=1000,
    tokenizer_sha256="",
)
CRUMB = 0.05
Piece = tuple[int, list[int]]  # tokens, patches of each image


@dataclass(slots=True)
class Cut:
    """Pieces of the documents that were cut, one way."""

    name: str
    pieces: list[Piece]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=Path, required=True, help="module with the length tables")
    parser.add_argument("--samples", type=int, default=130_000)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    tables = load_module(options.lengths)
    rows: list[dict[str, Any]] = []
    for merge, cap, budget in SETTINGS:
        geometry = Geometry(merge=merge, max_patches_per_image=cap)
        documents = [
            *make_documents(tables.cc12m(options.samples * 7 // 10, 0), geometry),
            *make_documents(tables.obelics(options.samples * 3 // 10, 0), geometry),
        ]
        whole, cuts = cut_both_ways(documents, budget)
        share = sum(n for n, _ in cuts[0].pieces) / sum(n for n, _ in whole + cuts[0].pieces)
        print(f"m={merge}, cap {cap}, {budget}: {share:.1%} of the tokens are in documents that are cut")
        print("  cut              parts  under 5 %   packs  tokens  patches")
        for cut in cuts:
            rows.append({"merge": merge, "S": budget.S, "N": budget.N, "L": budget.L, "cut": cut.name})
            rows[-1] |= measure(whole, cut.pieces, budget)
            print(
                "  {cut:15} {parts:6,} {crumbs:10.1%} {packs:7,} {tokens:7.2%} {patches:8.2%}".format(
                    **rows[-1]
                )
            )
    if options.json:
        print(json.dumps({"rows": rows}))


def make_documents(table: Any, geometry: Geometry) -> list[list[IndexSegment]]:
    grids = resize_grid(table.image_hw[:, 0], table.image_hw[:, 1], geometry).tolist()
    documents: list[list[IndexSegment]] = []
    for sample, tokens in enumerate(table.n_text_tokens.tolist()):
        own = grids[table.image_offsets[sample] : table.image_offsets[sample + 1]]
        texts = np.diff(np.linspace(0, tokens, len(own) + 2).astype(int)).tolist()
        segments = [IndexSegment(TEXT, "", 0, 0, texts[0])]
        for (h, w), text in zip(own, texts[1:], strict=True):
            segments.append(IndexSegment(IMAGE, "", 0, 0, h * w // geometry.merge**2 + 2, 1, 1, 1, h, w))
            segments.append(IndexSegment(TEXT, "", 0, 0, text))
        documents.append([segment for segment in segments if segment.tokens])
    return documents


def cut_both_ways(documents: list[list[IndexSegment]], budget: Budget) -> tuple[list[Piece], list[Cut]]:
    """The documents that stay whole, and the pieces of the others."""
    whole: list[Piece] = []
    full, equal = Cut("where full", []), Cut("equal parts", [])
    for segments in documents:
        patches = [segment.patches for segment in segments if segment.kind != TEXT]

        def pieces_of(parts: list[Part] | str, patches: list[int] = patches) -> list[Piece]:
            assert isinstance(parts, list), "no picture is larger than a row"
            return [(part.end - part.start, patches[part.first_image : part.last_image]) for part in parts]

        first = pieces_of(cut_where_full(segments, IDS, budget, 0))
        if len(first) == 1:
            whole += first
        else:
            full.pieces += first
            equal.pieces += pieces_of(split_sample(segments, IDS, budget))
    return whole, [full, equal]


def measure(whole: list[Piece], parts: list[Piece], budget: Budget) -> dict[str, Any]:
    """Parts, those below CRUMB of both budgets, packs of both orders together, and how full they are."""
    pieces = whole + parts
    packs = 0
    for seed in (0, 1):
        own = [pieces[number] for number in np.random.default_rng(seed).permutation(len(pieces)).tolist()]
        offsets = np.cumsum([0, *(len(patches) for _, patches in own)])
        flat = np.array([count for _, patches in own for count in patches])
        packs += pack_pieces(np.array([n for n, _ in own]), offsets, flat, budget).num_packs
    vision = budget.N * budget.L
    return {
        "parts": len(parts),
        "crumbs": sum(max(n / budget.S, sum(p) / vision) < CRUMB for n, p in parts) / len(parts),
        "packs": packs,
        "tokens": 2 * sum(n for n, _ in pieces) / budget.S / packs,
        "patches": 2 * sum(sum(p) for _, p in pieces) / vision / packs,
    }


if __name__ == "__main__":
    main()
