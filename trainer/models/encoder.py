"""The encoders that there are, and the one that a config asks for. Their contract is in `trainer.models.vision`."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.models.aimv2 import Aimv2Config, Aimv2Encoder
from trainer.models.dinov3 import Dinov3Config, Dinov3Encoder
from trainer.models.siglip2 import Siglip2Config, Siglip2Encoder
from trainer.models.vision import frame_segments

__all__ = ["Encoder", "EncoderConfig", "frame_segments", "make_encoder"]

EncoderConfig = Siglip2Config | Aimv2Config | Dinov3Config
Encoder = Siglip2Encoder | Aimv2Encoder | Dinov3Encoder


def make_encoder(config: EncoderConfig, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> Encoder:
    """`pixel_mean` and `pixel_std` belong to the data set, on the scale of 0 to 1."""
    match config:
        case Siglip2Config():
            return Siglip2Encoder(config, pixel_mean, pixel_std)
        case Aimv2Config():
            return Aimv2Encoder(config, pixel_mean, pixel_std)
        case Dinov3Config():
            return Dinov3Encoder(config, pixel_mean, pixel_std)
