"""The config of one preprocessing run: one TOML file under configs/preprocess/, see `shared.config`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from typing import Literal

from preprocess.budgets import AUTO, BudgetConfig, BudgetLimits, MemoryConfig
from preprocess.sources import AnySource
from shared.codecs import MAX_ZSTD_LEVEL
from shared.config import require_at_least
from shared.geometry import Geometry
from shared.tokens import TokenNames


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLimits:
    """What is not decoded, judged from the header and the size of the file."""

    # A worker of 260 MB takes 3 to 16 bytes more per pixel while it decodes, so that 64 megapixels keep it below
    # 1.3 GB beside its pack. JPEG 2000 takes 24 and may have two thirds of the pixels, WebP seven eighths
    # (benchmarks/image_memory.py).
    max_pixels: int = 64_000_000
    max_bytes: int = 64 << 20
    # Sides in pixels. The longest is what JPEG can hold; how small is too small, the data set has to say.
    max_side: int = 65_535
    min_side: int = 1
    # Longest side : shortest side. Beyond it a picture is a line: of 256 patches of 16 pixels one high or wide.
    max_aspect: float = 200.0
    # Of all texts of a sample. Plain text is tokenized in pieces, so that documents may be as long as a record
    # (64 MiB); a conversation in one go, which takes some 120 times its size in memory.
    max_text_bytes: int = 4 << 20
    # The work on one picture may take this long (on a video ten times, the reading of one record twenty times), and
    # a worker hold this many bytes. Beyond, the worker ends; the sample is found and counted as `crashed`. With the
    # serial executor they do nothing.
    max_seconds: float = 30.0
    max_memory: int = 1_500_000_000

    def __post_init__(self) -> None:
        require_at_least(self, 1, "max_pixels", "max_bytes", "max_side", "min_side", "max_aspect")
        require_at_least(self, 1, "max_text_bytes", "max_memory")
        if self.max_side < self.min_side:
            raise ValueError(
                f"max_side {self.max_side} is below min_side {self.min_side}: no picture is left"
            )
        if not self.max_seconds > 0:
            raise ValueError(f"max_seconds must be above 0, got {self.max_seconds}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageConfig:
    """How pixels are decoded."""

    # What is behind transparent pixels: "#rrggbb".
    background: str = "#ffffff"
    # Decode a JPEG to 1/2, 1/4 or 1/8 of its size where 1.5 times the target remains on both sides.
    dct_scaling: bool = True
    # Colours of embedded profiles (Display P3, Adobe RGB, inks) to sRGB. Costs nothing without a profile, and
    # what it costs with one is spent on the resized picture; false takes all colours for sRGB, as most loaders do.
    convert_profiles: bool = True

    def __post_init__(self) -> None:
        if not re.fullmatch(r"#[0-9A-Fa-f]{6}", self.background):
            raise ValueError(f'background must be "#rrggbb" in hexadecimal digits, got {self.background!r}')

    @property
    def background_rgb(self) -> tuple[int, int, int]:
        red, green, blue = bytes.fromhex(self.background[1:])
        return red, green, blue


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoConfig:
    """Which frames of a video are taken, what it may cost, and which videos are not decoded."""

    # Frames per second of video, at least and at most so many; rounded to whole temporal patches.
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 32
    # Shared by all frames of a video, which lies in one vision row. 0: as many as a picture may have.
    max_patches_per_video: int = 0
    max_seconds_of_video: float = 600.0
    # A worker holds a whole file, and the compressed pictures in it once more.
    max_bytes: int = 128 << 20
    # Of one frame as stored; 4096 x 2160. Decoders hold up to 17 frames.
    max_pixels: int = 8_847_360

    def __post_init__(self) -> None:
        require_at_least(self, 1, "min_frames", "max_frames", "max_bytes", "max_pixels")
        require_at_least(self, 0, "max_patches_per_video")
        if not 0 < self.fps < math.inf or not 0 < self.max_seconds_of_video < math.inf:
            raise ValueError(
                f"fps and max_seconds_of_video must be above 0, got {self.fps} and {self.max_seconds_of_video}"
            )
        if self.max_frames < self.min_frames:
            raise ValueError(f"max_frames {self.max_frames} is below min_frames {self.min_frames}")

    def patch_cap(self, geometry: Geometry) -> int:
        """The most patches of one video."""
        return self.max_patches_per_video or geometry.max_patches_per_image


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """How samples are grouped into packs and packs into shards."""

    # Pieces packed together, at most about: larger windows fill better, smaller ones bound memory.
    window: int = 65_536
    # Payload per shard. 512 MiB is read in one second from one NVMe drive and is cheap to write again.
    shard_bytes: int = 512 << 20
    # Share of samples, chosen by a hash of the key, that goes to the split "validation".
    validation_fraction: float = 0.0
    # 1: the layout of one image per vision row. 0: as many as fit.
    images_per_row: int = 0
    # Samples with the same texts and pictures as an earlier one, over all sources: told, left out, or not looked for.
    duplicates: Literal["count", "drop", "ignore"] = "count"
    # Where sources have weights: how often the samples of the least repeated one are used. Below 1 it is subsampled.
    least_repeat: float = 1.0

    def __post_init__(self) -> None:
        require_at_least(self, 1, "window", "shard_bytes")
        if not 0 < self.least_repeat < math.inf:
            raise ValueError(f"least_repeat must be above 0, got {self.least_repeat}")
        require_at_least(self, 0, "images_per_row")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie in [0, 1), got {self.validation_fraction}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CostConfig:
    """The model whose FLOPs `cost` counts. Only ratios matter: the trainer balances ranks with it."""

    # SigLIP2-base (93 M parameters) and a decoder of about 1 B.
    encoder_width: int = 768
    encoder_layers: int = 12
    encoder_parameters: int = 93_000_000
    decoder_width: int = 2048
    decoder_layers: int = 16
    decoder_parameters: int = 1_240_000_000

    def __post_init__(self) -> None:
        require_at_least(self, 0, *(field.name for field in fields(self)))


@dataclass(frozen=True, kw_only=True, slots=True)
class RayConfig:
    """Where the steps run. None of it changes a byte of the result."""

    # HOST:PORT or ray://HOST:PORT of a running cluster, "auto" on one of its nodes; empty starts a local one for the
    # time of the job.
    address: str = ""
    # Processes of the local cluster; 0 takes every core.
    workers: int = 0
    # What Ray sets aside for each: a node runs as many as its cores and its memory allow (limits.max_memory is where
    # a worker is ended).
    worker_memory: int = 1_500_000_000
    # Names of variables of this process that the workers of a running cluster get, such as AWS_PROFILE. Values are
    # not settings: they would lie beside the output.
    forward_env: tuple[str, ...] = ()
    # Units scheduled beyond the running ones, per worker: enough to hide scheduling, few enough to stop fast.
    queued_per_worker: int = 2

    def __post_init__(self) -> None:
        require_at_least(self, 0, "workers")
        require_at_least(self, 1, "queued_per_worker", "worker_memory")


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessConfig:
    """A whole run. Relative paths are relative to the working directory."""

    output: str
    # A directory with tokenizer.json and tokenizer_config.json, or its URI in a store, which workers read, too.
    tokenizer: str
    sources: dict[str, AnySource]
    budget: BudgetConfig
    seed: int = 0
    # How patches are stored: as they are, lossless, or as JPEG again (benchmarks/codecs.py: bytes and speed of each).
    codec: Literal["raw", "zstd", "jpeg"] = "raw"
    # Read by codec "jpeg" alone: 1 to 100, always 4:4:4.
    jpeg_quality: int = 95
    # Read by codec "zstd" alone: 1 is fastest, and the smallest below 16 (benchmarks/codecs.py).
    zstd_level: int = 1
    executor: Literal["ray", "serial"] = "ray"
    # A unit is tried again this often when its worker dies or a file cannot be read for a moment.
    retries: int = 3
    # When an earlier run in `output` had other settings or inputs: stop, or throw its work away.
    on_change: Literal["refuse", "rebuild"] = "refuse"
    geometry: Geometry = field(default_factory=Geometry)
    tokens: TokenNames = field(default_factory=TokenNames)
    limits: ImageLimits = field(default_factory=ImageLimits)
    images: ImageConfig = field(default_factory=ImageConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output is empty; name a directory")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        for name in self.sources:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(
                    f"source name {name!r}: use letters, digits, _ and - (it becomes a directory)"
                )
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality must lie in [1, 100], got {self.jpeg_quality}")
        if not 1 <= self.zstd_level <= MAX_ZSTD_LEVEL:
            raise ValueError(f"zstd_level must lie in [1, {MAX_ZSTD_LEVEL}], got {self.zstd_level}")
        if self.retries < 0:
            raise ValueError(f"retries must be at least 0, got {self.retries}")
        if not self.sources:
            raise ValueError("no source; add a table [sources.NAME] with its paths")
        if self.plan.least_repeat != 1 and not any(source.weight for source in self.sources.values()):
            raise ValueError(
                "plan.least_repeat is set, but no source has a weight; set repeat of the sources instead"
            )
        if self.budget.S == AUTO and not self.memory.gpu_bytes:
            raise ValueError('budget.S is "auto" and memory.gpu_bytes is not set; set it, or S')
        self.budget_limits.check(self.budget.S, self.budget.N, self.budget.L)

    @property
    def budget_limits(self) -> BudgetLimits:
        """What N and L are held to, given or chosen."""
        return BudgetLimits(self.geometry, self.video.patch_cap(self.geometry), self.limits.max_memory)
