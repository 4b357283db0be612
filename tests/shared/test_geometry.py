"""Resize targets, patch order and offsets, each against an independent computation."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.geometry import (
    Budget,
    Geometry,
    patch_positions,
    patchify,
    resize_grid,
    row_offsets,
    unpatchify,
    visual_tokens,
    write_patches,
)

# Both sides of every border of 16 and 32 pixels, and pictures far longer than high.
SIDES = [1, 2, 15, 16, 17, 31, 32, 33, 100, 255, 256, 257, 640, 1000, 2047, 2999, 3000]


def grid_of(height: int, width: int, geometry: Geometry) -> tuple[int, int]:
    [[h, w]] = resize_grid(np.array([height]), np.array([width]), geometry).tolist()
    return h, w


def score(a: int, b: int, height: int, width: int) -> Fraction:
    """stretch**2 * unused without the constant "available": stretch**2 / (a * b), exactly."""
    x, y = a * width, b * height
    return Fraction(max(x, y), min(x, y)) ** 2 / (a * b)


def best_native_score_ref(height: int, width: int, geometry: Geometry) -> Fraction:
    """Try every grid of cells inside the cap that does not scale up, but for the one cell that must be."""
    cap = geometry.max_patches_per_image // geometry.merge**2
    rows = [a for a in range(1, cap + 1) if a == 1 or a * geometry.cell <= height]
    columns = [b for b in range(1, cap + 1) if b == 1 or b * geometry.cell <= width]
    return min(score(a, b, height, width) for a in rows for b in columns if a * b <= cap)


def check_native(height: int, width: int, geometry: Geometry) -> None:
    h, w = grid_of(height, width, geometry)
    p, m = geometry.patch_size, geometry.merge
    assert h % m == 0 and w % m == 0 and m * m <= h * w <= geometry.max_patches_per_image
    assert h == m or h * p <= height, "scaled up"
    assert w == m or w * p <= width, "scaled up"
    found, best = score(h // m, w // m, height, width), best_native_score_ref(height, width, geometry)
    # The rule compares quotients of doubles: two grids that differ by less than 1e-12 are one to it.
    assert found <= best * (1 + Fraction(1, 10**12)), (h, w)


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    patch_size=st.sampled_from([1, 4, 7]),
    merge=st.sampled_from([1, 2]),
    cells=st.integers(1, 40),
    rest=st.integers(0, 3),
)
@settings(max_examples=300, deadline=None)
def test_native_takes_the_best_of_all_grids(
    height: int, width: int, patch_size: int, merge: int, cells: int, rest: int
) -> None:
    # A cap that is no multiple of m * m is used up to the last whole cell.
    cap = cells * merge**2 + min(rest, merge**2 - 1)
    geometry = Geometry(patch_size=patch_size, merge=merge, max_patches_per_image=cap)
    check_native(height, width, geometry)


@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("cap", [4, 64, 256])
def test_native_takes_the_best_of_all_grids_at_extreme_sizes(merge: int, cap: int) -> None:
    geometry = Geometry(merge=merge, max_patches_per_image=cap)
    for height, width in itertools.product(SIDES[::2], SIDES[1::2]):
        check_native(height, width, geometry)
        check_native(width, height, geometry)


def test_native_by_hand() -> None:
    geometry = Geometry(patch_size=16, merge=2, max_patches_per_image=64)  # cells of 32 pixels, 16 at most
    assert grid_of(1, 1, geometry) == (2, 2)  # one cell is reached by scaling up
    assert grid_of(31, 1000, geometry) == (2, 32)  # 1 x 16 cells, the whole cap
    assert grid_of(64, 96, geometry) == (4, 6)  # fits as it is: 2 x 3 cells
    # 95 x 95 holds 2 x 2 whole cells; 3 x 3 would scale up.
    assert grid_of(95, 95, geometry) == (4, 4)
    assert grid_of(96, 96, geometry) == (6, 6)
    # 3 : 4 at 16 cells: 3 x 4 is true and uses 12 (1 / 12 = 0.0833); 3 x 5 bends by 1.25, 1.5625 / 15 = 0.104;
    # 4 x 4 bends by 4 / 3, 1.7778 / 16 = 0.111.
    assert grid_of(3000, 4000, geometry) == (6, 8)
    # Square at the whole cap.
    assert grid_of(1000, 1000, geometry) == (8, 8)


@pytest.mark.parametrize("resize", ["native", "fill"])
def test_a_size_is_solved_alike_alone_and_among_thousands(resize: str) -> None:
    # More unique sizes than one block of 4096 holds, and every one twice.
    geometry = replace(Geometry(max_patches_per_image=256), resize=resize)
    generator = np.random.default_rng(0)
    heights, widths = np.tile(generator.integers(1, 3000, (2, 5000)), 2)
    grids_n2 = resize_grid(heights, widths, geometry)
    assert grids_n2.shape == (10000, 2) and grids_n2.dtype == np.int32
    assert np.array_equal(grids_n2[:5000], grids_n2[5000:])
    for index in range(0, 5000, 100):
        assert grid_of(heights[index], widths[index], geometry) == tuple(grids_n2[index].tolist())


@pytest.mark.parametrize("resize", ["native", "fill"])
def test_each_picture_may_have_a_cap_of_its_own(resize: str) -> None:
    # 900 x 1600 under three caps in one call; the least holds one cell.
    geometry = replace(Geometry(max_patches_per_image=4096), resize=resize)
    sides, caps = np.full(4, 900), np.array([1024, 4, 64, 1024])
    grids_n2 = resize_grid(sides, np.full(4, 1600), geometry, caps)
    alone = [grid_of(900, 1600, replace(geometry, max_patches_per_image=int(cap))) for cap in caps]
    assert [tuple(grid) for grid in grids_n2.tolist()] == alone
    assert alone[1] == (2, 2) and alone[2] == (6, 10)
    with pytest.raises(ValueError, match="one cell, 4 patches"):
        resize_grid(sides[:1], sides[:1], geometry, np.array([3]))


@pytest.mark.parametrize("resize", ["native", "fill"])
def test_no_pictures_give_no_grids(resize: str) -> None:
    empty = np.zeros(0, np.int64)
    assert resize_grid(empty, empty, replace(Geometry(), resize=resize)).shape == (0, 2)


def check_fill(sizes: list[tuple[int, int]], merge: int, cap: int) -> None:
    from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

    geometry = Geometry(patch_size=16, merge=merge, max_patches_per_image=cap, resize="fill")
    heights, widths = np.array(sizes).T
    pixels_n2 = resize_grid(heights, widths, geometry) * geometry.patch_size
    # For m = 2 the same rule on cells of 2p, of which the cap holds a quarter.
    expected_n2 = [get_image_size_for_max_num_patches(*size, 16 * merge, cap // merge**2) for size in sizes]
    np.testing.assert_array_equal(pixels_n2, expected_n2)


@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("cap", [4, 64, 256, 1024])
def test_fill_equals_the_hugging_face_processor(merge: int, cap: int) -> None:
    check_fill(list(itertools.product(SIDES, SIDES)), merge, cap)


@pytest.mark.parametrize(("merge", "cap"), [(1, 256), (2, 1024)])
def test_fill_equals_the_hugging_face_processor_for_every_side(merge: int, cap: int) -> None:
    # Every side from 1 to 3000 once as height and once as width, each against a side of its own.
    others = np.random.default_rng(merge).integers(1, 3001, 3000).tolist()
    check_fill(
        [*zip(range(1, 3001), others, strict=True), *zip(others, range(1, 3001), strict=True)], merge, cap
    )


@pytest.mark.slow
@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("cap", [4, 64, 256, 1024])
def test_fill_equals_the_hugging_face_processor_for_every_side_against_many(merge: int, cap: int) -> None:
    others = [*SIDES, *np.random.default_rng(cap).integers(1, 3001, 33).tolist()]
    for other in others:
        check_fill([(side, other) for side in range(1, 3001)], merge, cap)
        check_fill([(other, side) for side in range(1, 3001)], merge, cap)


@given(height=st.integers(1, 3000), width=st.integers(1, 3000), merge=st.sampled_from([1, 2]))
@settings(deadline=None)
def test_fill_stays_within_the_cap(height: int, width: int, merge: int) -> None:
    geometry = Geometry(merge=merge, max_patches_per_image=256, resize="fill")
    h, w = grid_of(height, width, geometry)
    assert h % merge == 0 and w % merge == 0 and merge**2 <= h * w <= 256


@pytest.mark.parametrize("sides", [(0, 10), (10, 0), (-1, 10)])
def test_a_side_below_one_pixel_is_an_error(sides: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1 pixel"):
        grid_of(*sides, Geometry())


def patchify_ref(frames: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Frame by frame, cell by cell, patch by patch: cut the patch out and lay it flat."""
    p, m, pt = geometry.patch_size, geometry.merge, geometry.temporal_patch_size
    patches = []
    for t, y, x in itertools.product(
        range(0, frames.shape[0], pt), range(0, frames.shape[1], m * p), range(0, frames.shape[2], m * p)
    ):
        for top, left in itertools.product(range(y, y + m * p, p), range(x, x + m * p, p)):
            patches.append(frames[t : t + pt, top : top + p, left : left + p].reshape(-1))
    return np.stack(patches)


@pytest.mark.parametrize("pt", [1, 2])
@pytest.mark.parametrize("merge", [1, 2, 3])
@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 3), (4, 1)])
def test_patchify_equals_three_loops_and_unpatchify_undoes_it(pt: int, merge: int, a: int, b: int) -> None:
    geometry = Geometry(patch_size=4, temporal_patch_size=pt, merge=merge, max_patches_per_image=4096)
    t, h, w = 3, a * merge, b * merge
    frames = np.random.default_rng(0).integers(0, 256, (t * pt, h * 4, w * 4, 3), np.uint8)
    view = patchify(frames, geometry)
    assert view.shape == (t, a, b, merge, merge, pt, 4, 4, 3)
    assert np.shares_memory(view, frames)
    patches_NP = view.reshape(-1, geometry.values_per_patch)
    np.testing.assert_array_equal(patches_NP, patchify_ref(frames, geometry))
    np.testing.assert_array_equal(unpatchify(patches_NP, t, h, w, geometry), frames)
    written_NP = np.zeros_like(patches_NP)
    write_patches(frames, geometry, written_NP)
    np.testing.assert_array_equal(written_NP, patches_NP)


def test_one_picture_for_all_frames_of_a_patch_and_a_picture_seen_from_the_right_are_written_as_they_are() -> (
    None
):
    geometry = Geometry(patch_size=4, temporal_patch_size=2, merge=2)
    frame = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    for frames in (np.broadcast_to(frame, (2, *frame.shape)), np.stack([frame, frame])[:, :, ::-1]):
        out_NP = np.zeros((24, geometry.values_per_patch), np.uint8)
        write_patches(frames, geometry, out_NP)
        np.testing.assert_array_equal(out_NP, patchify_ref(frames, geometry))


def test_patch_order_by_hand() -> None:
    # Pixels of one channel numbered 0 .. 7 in a picture of 2 x 4 patches of one pixel.
    numbers = np.arange(8, dtype=np.uint8).reshape(1, 2, 4, 1).repeat(3, axis=3)
    raster = patchify(numbers, Geometry(patch_size=1, merge=1)).reshape(-1, 3)[:, 0]
    assert raster.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    by_cell = patchify(numbers, Geometry(patch_size=1, merge=2)).reshape(-1, 3)[:, 0]
    assert by_cell.tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


@pytest.mark.parametrize("merge", [1, 2])
def test_patch_positions_equal_the_patches_of_a_picture_of_coordinates(merge: int) -> None:
    sizes = [(1, 2, 4), (3, 4, 2), (1, 2, 2), (2, 6, 8)]
    expected = []
    for t, h, w in sizes:
        # The three channels of a pixel say which frame, row and column it is; a patch is one pixel.
        picture = np.stack(np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij"), axis=-1)
        geometry = Geometry(patch_size=1, merge=merge)
        expected.append(patchify(picture.astype(np.uint8), geometry).reshape(-1, 3))
    positions = patch_positions(np.array(sizes), merge)
    assert positions.dtype == np.int32
    np.testing.assert_array_equal(positions, np.concatenate(expected))


def test_patch_positions_of_no_picture() -> None:
    assert patch_positions(np.zeros((0, 3), np.int32), 2).shape == (0, 3)


def test_row_offsets_by_hand() -> None:
    # Row 0 holds images 0, 2 and 3 (4, 8 and 4 patches), row 1 holds images 1 and 4.
    offsets = row_offsets(np.array([0, 1, 0, 0, 1]), np.array([4, 16, 8, 4, 4]))
    assert offsets.tolist() == [0, 0, 4, 12, 16]
    assert row_offsets(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []


def test_visual_tokens_by_hand() -> None:
    assert visual_tokens(1, 4, 6, 2) == 6  # 24 patches, 4 each
    assert visual_tokens(3, 2, 2, 2) == 3
    assert visual_tokens(2, 3, 5, 1) == 30


def test_derived_numbers_by_hand() -> None:
    geometry = Geometry(patch_size=14, temporal_patch_size=2, merge=2)
    assert geometry.cell == 28
    assert geometry.values_per_patch == 1176  # 2 * 14 * 14 * 3
    assert geometry.patches_per_token == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"temporal_patch_size": 0}, "temporal_patch_size must be at least 1, got 0"),
        ({"merge": -1}, "merge must be at least 1, got -1"),
        ({"max_patches_per_image": 3}, "max_patches_per_image 3 is below one cell of 2 x 2"),
        ({"mean": (0.5,)}, "mean and std need 3 values"),
        ({"std": (0.5, 0.5, 0.0)}, "std above 0"),
    ],
)
def test_an_impossible_geometry_is_an_error_with_its_value(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Geometry(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["S", "N", "L"])
def test_a_budget_below_one_is_an_error_with_its_letter(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be at least 1, got 0"):
        Budget(**{"S": 1, "N": 1, "L": 1, name: 0})
