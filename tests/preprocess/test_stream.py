"""The token stream of a sample and its cuts, by hand on small examples and by invariant on any."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from preprocess.packing import pack_pieces
from preprocess.samples import IMAGE, TEXT, IndexSegment
from preprocess.stream import (
    Part,
    image_starts,
    place_in_rows,
    split_sample,
    stream_length,
    token_stream,
)
from shared.geometry import Budget
from shared.tokens import TokenIds
from tests.preprocess.planning import clip_segments

PAD, BOS, EOS, IMG, BEGIN, END = range(6)
IDS = TokenIds(
    bos=BOS,
    eos=EOS,
    pad=PAD,
    image=IMG,
    begin_image=BEGIN,
    end_image=END,
    vocabulary_size=1000,
    tokenizer_sha256="",
)


def text(tokens: int) -> IndexSegment:
    return IndexSegment(TEXT, "", 0, 0, tokens)


def image(h: int, w: int) -> IndexSegment:
    """2 x 2 patches make one token."""
    return IndexSegment(IMAGE, "", 0, 0, h * w // 4 + 2, 1, 1, 1, h, w)


def encoded(segments: list[IndexSegment]) -> list[np.ndarray]:
    """Text tokens that are all different: 10, 11, 12 .. through the sample."""
    lengths = [s.tokens for s in segments if s.kind == TEXT]
    return np.split(np.arange(10, 10 + sum(lengths), dtype=np.int32), np.cumsum(lengths)[:-1])


def with_places(segments: list[IndexSegment]) -> list[IndexSegment]:
    """Texts placed one after another in a token file that holds 10, 11, 12 .."""
    offset, placed = 0, []
    for segment in segments:
        placed.append(replace(segment, offset=offset) if segment.kind == TEXT else segment)
        offset += segment.tokens if segment.kind == TEXT else 0
    return placed


def text_of(segments: list[IndexSegment]) -> list[np.ndarray]:
    return [
        np.arange(10 + s.offset, 10 + s.offset + s.tokens, dtype=np.int32) for s in segments if s.kind == TEXT
    ]


def test_unlearned_tokens_are_in_the_stream_and_label_nothing() -> None:
    tokens, labels = token_stream([text(4)], [np.array([~10, ~11, 12, 13], np.int32)], IDS)
    assert tokens.tolist() == [BOS, 10, 11, 12, 13, EOS]
    assert labels.tolist() == [-100, -100, 12, 13, EOS, -100]


def test_a_clipped_text_brings_the_token_behind_its_end_and_a_clipped_image_nothing() -> None:
    segments = with_places([text(5), image(2, 2), text(2)])  # bos, 10 .. 14, 3 of image, 15 16, eos
    assert clip_segments(segments, IDS, 0, 3) == [replace(segments[0], offset=0, tokens=3)]
    assert clip_segments(segments, IDS, 3, 6) == [replace(segments[0], offset=2, tokens=3)]
    assert clip_segments(segments, IDS, 6, 9) == [segments[1], replace(segments[2], tokens=1)]
    assert clip_segments(segments, IDS, 10, 12) == [replace(segments[2], offset=6, tokens=1)]


def test_tokens_and_labels_of_a_small_sample_are_those_written_by_hand() -> None:
    segments = [text(2), image(2, 4), text(1)]
    tokens, labels = token_stream(segments, encoded(segments), IDS)
    assert tokens.tolist() == [BOS, 10, 11, BEGIN, IMG, IMG, END, 12, EOS]
    # The next token where that is text or end of text; the last token has no next one.
    assert labels.tolist() == [10, 11, -100, -100, -100, -100, 12, EOS, -100]
    assert tokens.dtype == labels.dtype == np.int32
    assert stream_length(segments, IDS) == 9
    assert image_starts(segments, IDS) == [3]


def test_neighbouring_images_label_nothing_between_them() -> None:
    segments = [image(2, 2), image(2, 2)]
    tokens, labels = token_stream(segments, [], IDS)
    assert tokens.tolist() == [BOS, BEGIN, IMG, END, BEGIN, IMG, END, EOS]
    assert labels.tolist() == [-100, -100, -100, -100, -100, -100, EOS, -100]
    assert image_starts(segments, IDS) == [1, 4]


def test_a_tokenizer_without_a_begin_token_starts_with_the_first_segment() -> None:
    segments = [image(2, 2), text(1)]
    ids = replace(IDS, bos=None)
    tokens, labels = token_stream(segments, encoded(segments), ids)
    assert tokens.tolist() == [BEGIN, IMG, END, 10, EOS]
    assert labels.tolist() == [-100, -100, 10, EOS, -100]
    assert stream_length(segments, ids) == 5 and image_starts(segments, ids) == [0]


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        # bos + 6 + eos = 8 fits.
        pytest.param([text(6)], [Part(0, 8, 0, 0)], id="exactly S"),
        # 9 tokens in 2 parts: 5 and 4, equally long within one token.
        pytest.param([text(7)], [Part(0, 5, 0, 0), Part(5, 9, 0, 0)], id="one more than S"),
        # 22 tokens in 3 parts: cuts at 7 1/3 and 14 2/3.
        pytest.param([text(20)], [Part(0, 7, 0, 0), Part(7, 15, 0, 0), Part(15, 22, 0, 0)], id="three parts"),
        # bos, 3 of image, 4 of text, 3 of image, eos = 12: two halves alike.
        pytest.param(
            [image(2, 2), text(4), image(2, 2)], [Part(0, 6, 0, 1), Part(6, 12, 1, 2)], id="between images"
        ),
        # bos + 5 text + 4 of image + eos = 11: the image would end at 10 > S, so it goes to the next part.
        pytest.param([text(5), image(2, 4)], [Part(0, 6, 0, 0), Part(6, 11, 0, 1)], id="before an image"),
        # bos + 6 of images, 8 of text, 3 of image, eos = 19: three equal shares would be 4, 9 > S and 6 tokens, so
        # parts of 7; behind a cut all rows are free again.
        pytest.param(
            [image(2, 2), image(2, 2), text(8), image(2, 2)],
            [Part(0, 7, 0, 2), Part(7, 14, 2, 2), Part(14, 19, 2, 3)],
            id="rows are free behind a cut",
        ),
        # Three rows for N = 2: a part of two images, then the third.
        pytest.param(
            [image(2, 2)] * 2 + [image(2, 2)], [Part(0, 7, 0, 2), Part(7, 11, 2, 3)], id="rows run out"
        ),
    ],
)
def test_a_sample_is_cut_where_it_was_cut_by_hand(segments: list[IndexSegment], expected: list[Part]) -> None:
    # L holds one image of 4 or of 8 patches.
    assert split_sample(segments, IDS, Budget(S=8, N=2, L=8), images_per_row=1) == expected


def test_parts_are_equal_in_tokens_and_patches_together() -> None:
    # bos, 3 images of 6 tokens and 16 patches, 40 of text, eos. In shares of S * N * L = 50 * 32: 32 a token, 50 a
    # patch, 4320 in all. Half is 2160; the third image has its middle at 32 + 2.5 * 992 = 2512, behind it.
    segments = [image(4, 4)] * 3 + [text(40)]
    assert split_sample(segments, IDS, Budget(S=50, N=1, L=32)) == [Part(0, 13, 0, 2), Part(13, 60, 2, 3)]
    # 20 tokens of text before: 640 more, half is 2480; the middles of the second and third are at 2160 and 3152.
    longer = [text(20), *segments]
    assert split_sample(longer, IDS, Budget(S=50, N=1, L=32)) == [Part(0, 33, 0, 2), Part(33, 80, 2, 3)]


@pytest.mark.parametrize(
    ("segments", "budget", "name"),
    [
        ([image(4, 4)], Budget(S=100, N=4, L=15), "L"),
        ([text(1), image(4, 4)], Budget(S=5, N=4, L=16), "S"),  # 4 tokens + begin + end = 6
    ],
)
def test_what_fits_no_pack_names_the_budget(segments: list[IndexSegment], budget: Budget, name: str) -> None:
    assert split_sample(segments, IDS, budget) == name


SEGMENTS = st.lists(
    st.one_of(
        st.integers(1, 60).map(text),
        st.tuples(st.integers(1, 5), st.integers(1, 5)).map(lambda side: image(2 * side[0], 2 * side[1])),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=400, deadline=None)
@given(
    segments=SEGMENTS,
    budget=st.builds(Budget, S=st.integers(4, 70), N=st.integers(1, 4), L=st.integers(4, 60)),
    images_per_row=st.integers(0, 3),
    begins=st.booleans(),
)
# Patches 20, 12, 8, 16, 12, 12 fill two rows of 40 in this order; from large to small they need three.
@example(
    segments=[image(4, 5), image(2, 6), image(2, 4), image(4, 4), image(2, 6), image(2, 6)],
    budget=Budget(S=200, N=2, L=40),
    images_per_row=0,
    begins=True,
)
def test_parts_cover_the_stream_once_fit_their_budgets_and_leave_images_whole(
    segments: list[IndexSegment], budget: Budget, images_per_row: int, begins: bool
) -> None:
    ids = IDS if begins else replace(IDS, bos=None)
    images = [s for s in segments if s.kind == IMAGE]
    parts = split_sample(segments, ids, budget, images_per_row)
    if isinstance(parts, str):
        largest = {"S": max(s.tokens for s in images), "L": max(s.patches for s in images)}
        assert largest[parts] > getattr(budget, parts)
        return
    assert all(s.tokens <= budget.S and s.patches <= budget.L for s in images)
    tokens, labels = token_stream(segments, encoded(segments), ids)
    # One after another, without a gap, none empty.
    assert [p.start for p in parts] == [0, *(p.end for p in parts[:-1])] and parts[-1].end == len(tokens)
    assert [p.first_image for p in parts] == [0, *(p.last_image for p in parts[:-1])]
    assert parts[-1].last_image == len(images)
    assert all(0 < p.end - p.start <= budget.S for p in parts)
    starts = image_starts(segments, ids)
    for part in parts:
        own = slice(part.first_image, part.last_image)
        for start, segment in zip(starts[own], images[own], strict=True):
            assert part.start <= start and start + segment.tokens <= part.end
        patches = np.array([s.patches for s in images[own]], np.int64)
        packing = pack_pieces(
            np.array([part.end - part.start]), np.array([0, len(patches)]), patches, budget, images_per_row
        )
        assert packing.num_packs == 1
    placed = with_places(segments)
    for part in parts:
        # Each part is made from its own clipped segments, and equals its slice of the whole.
        clipped = clip_segments(placed, ids, part.start, part.end)
        assert [s for s in clipped if s.kind == IMAGE] == images[part.first_image : part.last_image]
        own = token_stream(
            clipped, text_of(clipped), ids, first=part.start == 0, last=part.end >= len(tokens) - 1
        )
        length = part.end - part.start
        assert len(own[0]) in (length, length + 1)
        for found, whole in zip(own, (tokens, labels), strict=True):
            np.testing.assert_array_equal(found[:length], whole[part.start : part.end])
    # Every text token and the end of text is learned once, whatever the cuts; the very first token is not.
    learned = labels[labels != -100]
    skipped = 0 if begins or segments[0].kind == IMAGE else 1
    text_tokens = sum(s.tokens for s in segments if s.kind == TEXT)
    assert learned.tolist() == [*range(10 + skipped, 10 + text_tokens), EOS]


@settings(max_examples=400, deadline=None)
@given(
    segments=SEGMENTS,
    budget=st.builds(Budget, S=st.integers(4, 40), N=st.integers(1, 3), L=st.integers(4, 60)),
    images_per_row=st.integers(0, 3),
    begins=st.booleans(),
)
# bos + 3 of image + 4 = 8 = S, and <eos> alone.
@example(segments=[image(2, 2), text(4)], budget=Budget(S=8, N=1, L=4), images_per_row=0, begins=True)
def test_a_part_has_no_label_only_where_no_cut_before_it_gives_it_one(
    segments: list[IndexSegment], budget: Budget, images_per_row: int, begins: bool
) -> None:
    ids = IDS if begins else replace(IDS, bos=None)
    parts = split_sample(segments, ids, budget, images_per_row)
    if isinstance(parts, str):
        return
    tokens, labels = token_stream(segments, encoded(segments), ids)
    inside = np.isin(tokens, (IMG, END))  # no cut before these
    sizes = dict(zip(image_starts(segments, ids), (s.patches for s in segments if s.patches), strict=True))

    def fits(start: int, end: int) -> bool:
        rows: list[list[int]] | None = []
        for size in (size for begin, size in sizes.items() if start <= begin < end):
            rows = None if rows is None else place_in_rows(rows, size, budget, images_per_row)
        return rows is not None and end - start <= budget.S

    def learns(start: int, end: int) -> bool:
        return bool((labels[start:end] != -100).any())

    for before, part in pairwise(parts):
        if learns(part.start, part.end):
            continue
        assert not fits(before.start, part.end)
        for cut in range(before.start + 1, part.start):
            helps = learns(before.start, cut) and learns(cut, part.end)
            assert inside[cut] or not helps or not fits(cut, part.end)


@given(segments=SEGMENTS)
def test_a_sample_that_fits_is_not_cut(segments: list[IndexSegment]) -> None:
    length = stream_length(segments, IDS)
    images = sum(s.kind == IMAGE for s in segments)
    budget = Budget(S=length, N=max(1, images), L=100)
    assert split_sample(segments, IDS, budget, 1) == [Part(0, length, 0, images)]


@given(tokens=st.integers(1, 2000), room=st.integers(2, 200))
def test_parts_of_plain_text_are_as_few_as_can_be_and_equally_long(tokens: int, room: int) -> None:
    parts = split_sample([text(tokens)], IDS, Budget(S=room, N=1, L=4))
    assert isinstance(parts, list)
    lengths = [p.end - p.start for p in parts]
    assert len(lengths) == -(-(tokens + 2) // room)  # bos and eos
    assert max(lengths) - min(lengths) <= 1
    assert lengths[-1] > 1  # never <eos> alone
