"""Videos to frames at their patch grid: how long header, decoding and resize take, and what is not decoded.

    python benchmarks/video.py [CLIP.mp4 ...]

Clips of moving texture, 30 frames a second, a key frame every 250 at most, are made by PyAV's encoders; of the last
one, six times as long, every 60. Two frames a second are taken, 32 at most. Beside the way in use: the same without
skipping, and every frame decoded, which is what a loop over `container.decode` does. All three give the same pixels.
One thread, in turn, CPU time.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from preprocess.budgets import BudgetConfig
from preprocess.config import ImageLimits, PreprocessConfig, VideoConfig
from preprocess.job import run_job
from preprocess.sources.webdataset import WebDatasetConfig
from preprocess.synthetic import train_tokenizer
from preprocess.video import decode, load_video, num_temporal_patches, patches_per_frame, read_video_header
from preprocess.video.header import VideoHeader
from preprocess.video.picture import to_picture
from preprocess.video.sampling import frames_on_screen
from shared.dataset import open_dataset
from shared.geometry import Geometry, resize_grid

GEOMETRY = Geometry(patch_size=16, merge=2, max_patches_per_image=1024)
LIMITS, CONFIG = ImageLimits(), VideoConfig(max_patches_per_video=4096)
WHITE = (255, 255, 255)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clips", nargs="*", type=Path)
    parser.add_argument("--seconds", type=int, default=20, help="length of the clips that are made")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clips = {path.name: path.read_bytes() for path in options.clips}
    count = 30 * options.seconds
    for codec, container, height, width in (
        ("libx264", "mp4", 360, 640),
        ("libx264", "mp4", 1080, 1920),
        ("libx265", "mp4", 360, 640),
        ("libvpx-vp9", "webm", 360, 640),
        ("mpeg4", "avi", 360, 640),
    ):
        clips[f"{codec} {height}p"] = make_clip(codec, container, height, width, count)
    clips["libx264 180p"] = make_clip("libx264", "mp4", 180, 320, 6 * count, key_every=60)
    figures: dict[str, Any] = {name: measure(name, data, options.rounds) for name, data in clips.items()}
    figures["job"] = measure_job([data for name, data in clips.items() if "360p" in name])
    if options.json:
        print(json.dumps(figures))


def make_clip(codec: str, container: str, height: int, width: int, count: int, key_every: int = 250) -> bytes:
    """Texture that slides in curves, with new noise in every frame."""
    rng = np.random.default_rng(0)
    wall = rng.integers(0, 256, (height // 8 + 40, width // 8 + 40, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    grain = rng.integers(0, 9, (8, height, width, 3), np.uint8)
    file = io.BytesIO()
    options = {
        "libvpx-vp9": {"cpu-used": "8", "deadline": "realtime"},
        "libx265": {"x265-params": "log-level=none"},
    }
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=30, options={"preset": "fast", **options.get(codec, {})})
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = height, width, "yuv420p", key_every
        stream.bit_rate = 1_000_000 * height // 360
        for number in range(count):
            y, x = (int(150 * (1 + f(number / 40))) for f in (np.sin, np.cos))
            pixels = wall[y : y + height, x : x + width] // 2 + grain[number % 8]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 30)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def header_of(data: bytes) -> VideoHeader:
    return read_video_header(io.BytesIO(data), limits=LIMITS, config=CONFIG)


def measure(name: str, data: bytes, rounds: int) -> dict[str, float]:
    header = header_of(data)
    t = num_temporal_patches(header, CONFIG, GEOMETRY)
    cap = np.array([patches_per_frame(t, CONFIG, GEOMETRY)])
    [[h, w]] = resize_grid(np.array([header.height]), np.array([header.width]), GEOMETRY, cap).tolist()

    def ours() -> np.ndarray:
        return load_video(
            data,
            size=(header.height, header.width),
            grid=(t, h, w),
            geometry=GEOMETRY,
            limits=LIMITS,
            config=CONFIG,
            background=WHITE,
        )

    def unskipped() -> np.ndarray:
        skipping, decode.SKIPPING = decode.SKIPPING, ()
        try:
            return ours()
        finally:
            decode.SKIPPING = skipping

    def everything() -> np.ndarray:
        starts = np.arange(header.frames, dtype=np.int64)
        chosen = frames_on_screen(starts, header.frames, t).tolist()
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            pictures = {
                number: to_picture(frame, (h, w), GEOMETRY, WHITE)
                for number, frame in enumerate(container.decode(stream))
                if number in chosen
            }
        return np.stack([pictures[number] for number in chosen])

    assert np.array_equal(ours(), unskipped()), "skipping changed a pixel"
    assert np.array_equal(ours(), everything()), "seeking changed a pixel"
    ways: list[Callable[[], object]] = [lambda: header_of(data), ours, unskipped, everything]
    times = [[seconds(way) for way in ways] for _ in range(rounds)]
    head, own, whole, loop = (statistics.median(column) for column in zip(*times, strict=True))
    figures = {
        "frames": t,
        "of_frames": header.frames,
        "h": h,
        "w": w,
        "header_ms": 1e3 * head,
        "frames_per_s": t / own,
        "without_skipping": whole / own,
        "everything_decoded": loop / own,
    }
    print(
        f"{name:15}  {t:2} of {header.frames} frames at {h} x {w} patches: header {1e3 * head:5.1f} ms, "
        f"{t / own:5.0f} frames/s; {whole / own:.2f} times without skipping, {loop / own:.2f} times all decoded"
    )
    return figures


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure_job(clips: list[bytes]) -> dict[str, float]:
    """Scan, plan and pack of a tar, in one process."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        path = directory / "clips.tar"
        with tarfile.open(path, "w") as tar:
            for number, data in enumerate(clips):
                for name, content in ((f"{number}.mp4", data), (f"{number}.txt", b"texture")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        train_tokenizer([], directory / "tokenizer", vocabulary_size=262)
        config = PreprocessConfig(
            output=str(directory / "first"),
            tokenizer=str(directory / "tokenizer"),
            sources={"clips": WebDatasetConfig(paths=(str(path),))},
            budget=BudgetConfig(S=8192, N=4, L=4096),
            geometry=GEOMETRY,
            video=CONFIG,
            executor="serial",
        )
        run_job(config)  # the plan's kernels are compiled, once per machine
        start, cpu = time.perf_counter(), time.process_time()
        run_job(replace(config, output=str(directory / "out")))
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        dataset = open_dataset(directory / "out")
        frames = sum(
            int(image["t"])
            for number in range(dataset.num_packs("train"))
            for image in dataset.pack("train", number).images
        )
    print(
        f"the job: {len(clips)} clips of 360p, {frames} frames, {cpu:.1f} s of CPU: {frames / cpu:.0f} frames/s"
    )
    return {
        "clips": len(clips),
        "frames": frames,
        "wall_s": wall,
        "cpu_s": cpu,
        "frames_per_cpu_s": frames / cpu,
    }


if __name__ == "__main__":
    main()
