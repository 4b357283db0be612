"""Videos to frames at their patch grid: which frames, which way up, which colours; and what is refused, and why."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from preprocess.config import ImageLimits, VideoConfig
from preprocess.images import ImageError, resize
from preprocess.video import decode, load_video, num_temporal_patches, patches_per_frame, read_video_header
from preprocess.video.header import VideoHeader
from preprocess.video.sampling import frames_on_screen
from shared.geometry import Geometry
from tests.preprocess.inputs import noise
from tests.preprocess.videos import encode_sound, encode_video, frame_numbers, greys

GEOMETRY = Geometry(patch_size=4, merge=2, max_patches_per_image=64)
FASTSTART, FRAGMENTED = {"movflags": "faststart"}, {"movflags": "frag_keyframe+empty_moov"}
KINDS = [
    ("libx264", "mp4"),
    ("libx264", "mov"),
    ("libx264", "matroska"),
    ("libx265", "mp4"),
    ("libvpx-vp9", "webm"),
    ("libvpx", "webm"),
    ("libsvtav1", "mp4"),
    ("mpeg4", "mp4"),
    ("mpeg4", "avi"),
]


def header_of(data: bytes, **changes: Any) -> VideoHeader:
    return read_video_header(io.BytesIO(data), limits=ImageLimits(), config=VideoConfig(**changes))


def load(
    data: bytes, t: int, h: int = 2, w: int = 2, geometry: Geometry = GEOMETRY, **changes: Any
) -> np.ndarray:
    limits, config = ImageLimits(), VideoConfig()
    header = read_video_header(io.BytesIO(data), limits=limits, config=config)
    settings: dict[str, Any] = {
        "size": (header.height, header.width),
        "grid": (t, h, w),
        "geometry": geometry,
        "limits": limits,
        "config": config,
        "background": (255, 255, 255),
        **changes,
    }
    return load_video(data, **settings)


def reason_of(data: bytes, **changes: Any) -> str:
    with pytest.raises(ImageError) as error:
        header_of(data, **changes)
    return error.value.reason


def moving(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Noise that slides by three pixels a frame: every frame differs, and is worth predicting from the others."""
    wall = noise(1, height // 4, width // 4 + count).repeat(4, axis=0).repeat(4, axis=1)
    return np.stack([wall[:, 3 * number : 3 * number + width] for number in range(count)])


# Which frames


def test_the_frame_on_screen_at_the_middle_of_each_part_is_taken() -> None:
    # Middles of 4 parts of 10 ticks: 1.25, 3.75, 6.25, 8.75.
    assert frames_on_screen(np.arange(10), 10, 4).tolist() == [1, 3, 6, 8]
    # As many as there are: each once, whatever the clock. Twice as many: each twice.
    assert frames_on_screen(7 + 512 * np.arange(5), 7 + 512 * 5, 5).tolist() == [0, 1, 2, 3, 4]
    assert frames_on_screen(np.array([0, 3]), 6, 4).tolist() == [0, 0, 1, 1]
    # Middles of 4 parts of 53 ticks: 6.625, 19.875, 33.125, 46.375; one frame stays from 30 to 50.
    assert frames_on_screen(np.array([0, 1, 2, 3, 10, 20, 30, 50, 51, 52]), 53, 4).tolist() == [3, 4, 6, 6]


@pytest.mark.parametrize(
    ("seconds", "frames", "changes", "t"),
    [
        pytest.param(10, 300, {}, 20, id="two a second"),
        pytest.param(0.5, 15, {}, 4, id="at least 4"),
        pytest.param(60, 1800, {}, 32, id="at most 32"),
        pytest.param(0.1, 3, {}, 3, id="no more than there are"),
        pytest.param(10, 300, {"max_patches_per_video": 48}, 12, id="a cell for each"),
        pytest.param(10, 300, {"fps": 0.73}, 7, id="7.3 is 7"),
        pytest.param(10, 300, {"fps": 0.75}, 8, id="7.5 is 8"),
    ],
)
def test_how_many_frames_are_taken(seconds: float, frames: int, changes: dict[str, Any], t: int) -> None:
    config = VideoConfig(**{"max_patches_per_video": 1024, **changes})
    header = VideoHeader(9, 16, Fraction(seconds), frames)
    assert num_temporal_patches(header, config, GEOMETRY) == t


def test_frames_come_in_whole_temporal_patches() -> None:
    two, config = replace(GEOMETRY, temporal_patch_size=2), VideoConfig(min_frames=5, max_frames=11)
    # 7 frames would be 3.5 patches; 5 at least are 3 patches, 11 at most are 5, 3 frames there are fill 2.
    for seconds, frames, t in ((3.5, 99, 4), (0.1, 99, 3), (99, 999, 5), (1, 3, 2)):
        assert num_temporal_patches(VideoHeader(9, 16, Fraction(seconds), frames), config, two) == t


def test_the_patches_of_a_video_are_shared_out_and_none_gets_more_than_a_picture() -> None:
    assert patches_per_frame(4, VideoConfig(), GEOMETRY) == 16
    assert patches_per_frame(4, VideoConfig(max_patches_per_video=200), GEOMETRY) == 50
    assert patches_per_frame(2, VideoConfig(max_patches_per_video=200), GEOMETRY) == 64


@pytest.mark.parametrize(("codec", "container"), KINDS)
def test_the_right_frames_come_out_of_every_codec(codec: str, container: str) -> None:
    data = encode_video(greys(40), codec, container, key_every=8)
    assert header_of(data) == VideoHeader(32, 48, Fraction(4), 40)
    # Middles of 4 parts of 40 frames.
    assert frame_numbers(load(data, 4)) == [5, 15, 25, 35]
    assert frame_numbers(load(data, 40)) == list(range(40))


def test_frames_of_a_variable_rate_are_taken_by_time() -> None:
    data = encode_video(greys(10), times=[0, 1, 2, 3, 10, 20, 30, 50, 51, 52])
    assert header_of(data) == VideoHeader(32, 48, Fraction(53, 10), 10)
    assert frame_numbers(load(data, 4)) == [3, 4, 6, 6]


def test_a_fragmented_mp4_has_no_table_and_is_read_through() -> None:
    data = encode_video(greys(40), container_options=FRAGMENTED)
    assert header_of(data) == VideoHeader(32, 48, Fraction(4), 40)
    assert frame_numbers(load(data, 4)) == [5, 15, 25, 35]


def test_a_video_of_one_frame_is_a_video() -> None:
    data = encode_video(greys(1))
    assert header_of(data).frames == 1
    assert frame_numbers(load(data, 1)) == [0]
    two = replace(GEOMETRY, temporal_patch_size=2)
    assert frame_numbers(load(data, 1, geometry=two)) == [0, 0]


@pytest.mark.parametrize(
    ("codec", "options"), [("libx264", {"bf": "3"}), ("libx265", {}), ("mpeg4", {"bf": "2"})]
)
@pytest.mark.parametrize("n", [3, 7, 20])
def test_skipping_frames_and_starting_at_key_frames_changes_no_pixel(
    codec: str, options: dict[str, str], n: int
) -> None:
    data = encode_video(moving(60), codec, key_every=9, options=options)
    with av.open(io.BytesIO(data)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    expected = [resize(every[int(60 * (2 * i + 1) / (2 * n))], 6, 8, GEOMETRY) for i in range(n)]
    assert len(every) == 60
    assert np.array_equal(load(data, n, 6, 8), np.stack(expected))


def places_of_packets(data: bytes) -> list[tuple[int, int]]:
    with av.open(io.BytesIO(data)) as container:
        return [(packet.pos or 0, packet.size) for packet in container.demux(video=0) if packet.size]


def test_what_no_chosen_frame_is_predicted_from_is_not_decoded() -> None:
    data = bytearray(encode_video(greys(40), "mpeg4", key_every=8, options={"sc_threshold": "1000000000"}))
    places = places_of_packets(bytes(data))
    # Chosen are 10 and 30, predicted from key frames 8 and 24.
    for number in (*range(1, 8), *range(11, 24), *range(31, 40)):
        start, size = places[number]
        data[start : start + size] = bytes(size)
    assert frame_numbers(load(bytes(data), 2)) == [10, 30]
    start, size = places[9]
    data[start : start + size] = bytes(size)
    with pytest.raises(ImageError) as error:
        load(bytes(data), 2)
    assert error.value.reason == "video_corrupt"


def test_a_decoder_that_cannot_skip_is_never_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    # dav1d takes the setting once, for all frames: asked to skip, it would lose chosen ones.
    data = encode_video(greys(40), "libsvtav1", key_every=8)
    monkeypatch.setattr(decode, "SKIPPING", ("libdav1d",))
    with pytest.raises(ImageError):
        load(data, 4)


# As a player shows it

QUADRANTS = {"a": (230, 20, 20), "b": (20, 220, 20), "c": (20, 20, 230), "d": (240, 240, 240)}
ONE = 65536


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        pytest.param((ONE, 0, 0, ONE), "ab cd", id="as stored"),
        # What phones write when held upright: the right side of what is stored points down.
        pytest.param((0, ONE, -ONE, 0), "ca db", id="clockwise"),
        pytest.param((-ONE, 0, 0, -ONE), "dc ba", id="upside down"),
        pytest.param((0, -ONE, ONE, 0), "bd ac", id="counterclockwise"),
        pytest.param((-ONE, 0, 0, ONE), "ba dc", id="mirrored"),
        pytest.param((0, ONE, ONE, 0), "ac bd", id="mirrored and turned"),
    ],
)
def test_a_display_matrix_turns_size_and_pixels(matrix: tuple[int, ...], shown: str) -> None:
    rows = [[QUADRANTS[name] for name in row] for row in ("ab", "cd")]
    stored = np.array(rows, np.uint8).repeat(16, axis=0).repeat(32, axis=1)[None]
    a, b, c, d = matrix
    data = encode_video(stored, matrix=(a, b, 0, c, d, 0, 0, 0, 1 << 30))
    turned = a == 0
    header = header_of(data)
    assert (header.height, header.width) == ((64, 32) if turned else (32, 64))
    h, w = (4, 2) if turned else (2, 4)
    [picture] = load(data, 1, h, w)
    assert picture.shape == (4 * h, 4 * w, 3)
    for row, names in enumerate(shown.split()):
        for column, name in enumerate(names):
            pixel = picture[h + row * 2 * h - 1, w + column * 2 * w - 1].astype(int)
            assert np.abs(pixel - QUADRANTS[name]).max() < 30, (row, column, pixel)


def test_pixels_that_are_not_square_make_the_picture_wider() -> None:
    header = header_of(encode_video(greys(4), aspect=Fraction(4, 3)))
    assert (header.height, header.width) == (32, 64)


@pytest.mark.parametrize(("height", "width"), [(33, 47), (1, 1), (2, 301)])
def test_odd_sizes_come_whole(height: int, width: int) -> None:
    data = encode_video(greys(4, height, width), "ffv1", "matroska", pixel_format="yuv420p")
    assert (header_of(data).height, header_of(data).width) == (height, width)
    assert frame_numbers(load(data, 4)) == [0, 1, 2, 3]


def test_ten_bits_become_eight() -> None:
    data = encode_video(greys(4), pixel_format="yuv420p10le")
    assert frame_numbers(load(data, 4)) == [0, 1, 2, 3]


@pytest.mark.parametrize(("height", "standard"), [(720, "ITU709"), (576, "ITU601")])
def test_colours_without_a_name_are_those_of_the_resolution(height: int, standard: str) -> None:
    green = np.broadcast_to(np.array((40, 200, 60), np.uint8), (1, height, 96, 3))
    data = encode_video(green, dst_colorspace=standard)
    assert np.abs(load(data, 1)[0, 4, 4].astype(int) - (40, 200, 60)).max() <= 3


def test_what_is_transparent_shows_the_background() -> None:
    red = np.broadcast_to(np.array((255, 0, 0, 128), np.uint8), (1, 16, 16, 4))
    data = encode_video(red, "png", "mov", pixel_format="rgba")
    # 128 of 255 red over white: 255 * 127 / 255.
    assert load(data, 1)[0, 4, 4].tolist() == [255, 127, 127]
    assert load(data, 1, background=(0, 0, 100))[0, 4, 4].tolist() == [128, 0, 50]


# What is refused


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", "video_empty", id="empty"),
        pytest.param(b"no video " * 99, "video_unreadable", id="text"),
        pytest.param(encode_sound(), "video_no_stream", id="sound alone"),
        pytest.param(
            encode_video(greys(4)).replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC"),
            "video_codec_missing",
            id="a codec that nobody knows",
        ),
        pytest.param(encode_video(greys(4))[:600], "video_unreadable", id="without its table"),
        pytest.param(
            encode_video(greys(4), container_options=FRAGMENTED).partition(b"moof")[0][:-4],
            "video_no_frames",
            id="no frames",
        ),
    ],
)
def test_what_is_no_video_is_refused_with_a_reason(data: bytes, reason: str) -> None:
    assert reason_of(data) == reason


@pytest.mark.parametrize(
    ("codec", "container", "options"),
    [("libx264", "mp4", FRAGMENTED), ("libvpx-vp9", "webm", None), ("mpeg4", "avi", None)],
)
def test_a_file_that_ends_early_is_refused_by_its_header(
    codec: str, container: str, options: dict[str, str] | None
) -> None:
    data = encode_video(moving(40), codec, container, container_options=options)
    assert reason_of(data[: len(data) * 2 // 3]) == "video_truncated"


def test_a_last_frame_that_is_cut_off_is_found_where_no_table_tells() -> None:
    data = encode_video(moving(40), container_options=FRAGMENTED)
    start, size = places_of_packets(data)[-1]
    # A tenth of a second is missing: by its length alone the file could be whole.
    assert reason_of(data[: start + size // 2]) == "video_truncated"


def test_an_mp4_with_its_table_in_front_that_ends_early_is_refused(tmp_path: Path) -> None:
    # The table is moved to the front when the file is closed, which takes a file with a name.
    data = encode_video(moving(40))
    with (
        av.open(io.BytesIO(data)) as source,
        av.open(str(tmp_path / "a.mp4"), "w", container_options=FASTSTART) as output,
    ):
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                output.mux(packet)
    data = (tmp_path / "a.mp4").read_bytes()
    assert header_of(data).frames == 40
    assert reason_of(data[: len(data) * 2 // 3]) == "video_truncated"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_seconds_of_video": 3.9}, "video_too_long"),
        ({"max_pixels": 32 * 48 - 1}, "video_too_many_pixels"),
        ({"max_bytes": 100}, "video_too_many_bytes"),
    ],
)
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_video_beyond_a_limit_is_refused(container: str, changes: dict[str, Any], reason: str) -> None:
    data = encode_video(greys(40), container=container)
    assert header_of(data).duration == 4
    assert reason_of(data, **changes) == reason


def test_ten_hours_of_two_frames_are_too_long() -> None:
    assert reason_of(encode_video(greys(2), rate=1, times=[0, 36_000])) == "video_too_long"


def test_a_playlist_opens_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "secret.mp4").write_bytes(encode_video(greys(4)))
    lines = [
        "#EXTM3U",
        "#EXT-X-TARGETDURATION:9",
        "#EXTINF:9,",
        f"file://{tmp_path}/secret.mp4",
        "#EXT-X-ENDLIST",
    ]
    assert reason_of("\n".join(lines).encode()) == "video_unreadable"


def test_damaged_pictures_are_refused_and_not_guessed() -> None:
    data = encode_video(moving(40), key_every=40)
    start, size = places_of_packets(data)[0]
    damaged = data[: start + size // 2] + bytes(size // 2) + data[start + size - size % 2 :]
    assert len(damaged) <= len(data)
    with pytest.raises(ImageError) as error:
        load_video(
            damaged,
            size=(48, 64),
            grid=(4, 2, 2),
            geometry=GEOMETRY,
            limits=ImageLimits(),
            config=VideoConfig(),
            background=(0, 0, 0),
        )
    assert error.value.reason == "video_corrupt"


def test_a_video_of_another_size_than_the_scan_found_is_refused() -> None:
    with pytest.raises(ImageError, match="48 x 32 pixels, 64 x 32 in the scan"):
        load(encode_video(greys(4)), 4, size=(32, 64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": 0.0}, "fps and max_seconds_of_video must be above 0"),
        ({"max_frames": 3}, "max_frames 3 is below min_frames 4"),
        ({"max_patches_per_video": -1}, "max_patches_per_video"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoConfig(**changes)


def test_the_decoders_are_loaded_with_the_first_video() -> None:
    program = "import preprocess.job, preprocess.pack, sys; print('av' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_a_real_clip_gives_the_frames_a_player_would(shared_data: Path) -> None:
    data = (shared_data / "video" / "realshort.mp4").read_bytes()
    header = header_of(data)
    assert (header.height, header.width, header.frames) == (240, 320, 36)
    with av.open(io.BytesIO(data)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    # Middles of 4 parts of 36 frames: 4.5, 13.5, 22.5, 31.5.
    expected = np.stack([resize(every[number], 6, 8, GEOMETRY) for number in (4, 13, 22, 31)])
    assert np.array_equal(load(data, 4, 6, 8), expected)
