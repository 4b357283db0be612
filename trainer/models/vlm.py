"""The vision-language model: encoder, projector and decoder composed, and the check that it fits a data set.

    pixel_values_NLP -> encoder -> z_NLE -> projector -> visual tokens [B*N*L/m^2, D] --+
    tokens_BS -> embed_tokens -> h_BSD <---- visual_index_BS puts them in their places --+
    h_BSD -> decoder -> norm -> head -> nll_BS

Every shape is static and every branch always runs, also on a batch without a picture: ranks of a group stay
in step, and the encoder's gradients are then zeros, never missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from shared.errors import UserError
from shared.geometry import Budget, Geometry
from trainer.attention import Backend, Mask, as_summand, document_mask, segment_mask
from trainer.loss import chunked_nll
from trainer.models.decoder import Decoder, DecoderConfig
from trainer.models.encoder import Encoder, EncoderConfig, make_encoder
from trainer.models.projector import Projector, ProjectorConfig
from trainer.models.vision import frame_segments

if TYPE_CHECKING:
    from trainer.data.batch import Batch
    from trainer.parallel.context import SequencePart


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    encoder: EncoderConfig
    projector: ProjectorConfig
    decoder: DecoderConfig


class Masks(NamedTuple):
    """What may attend to what in one microbatch. Built once; every layer and every stage takes the same."""

    decoder: Mask
    encoder: Mask | None
    """None in a stage without encoder."""


class VisionLanguageModel(nn.Module):
    """One stage of the model; all of it unless parts are taken out.

    A later pipeline stage has no encoder, projector and `decoder.embed_tokens`; an earlier one has no
    `decoder.norm` and `decoder.lm_head`. `trainer.parallel` sets `sequence`, `gather_visual`, `nll` and the
    decoder's `exchange` where ranks share a batch; by default the whole of it is here.
    """

    def __init__(
        self,
        config: ModelConfig,
        geometry: Geometry,
        *,
        backend: Backend = "sdpa",
        dtype: torch.dtype = torch.float32,
        z_loss: float = 0.0,
    ) -> None:
        """`dtype` is what layers compute in, whatever their weights are kept in: masks are made for it."""
        super().__init__()
        encoder_width, decoder_width = config.encoder.hidden_size, config.decoder.hidden_size
        self.encoder: Encoder | None = make_encoder(config.encoder, geometry.mean, geometry.std)
        self.projector: Projector | None = Projector(config.projector, encoder_width, decoder_width)
        self.decoder = Decoder(config.decoder)
        self.backend: Backend = backend
        self.dtype = dtype
        self.z_loss = z_loss
        self.sequence: SequencePart | None = None
        self.gather_visual: Callable[[Tensor], Tensor] | None = None
        self.nll: Callable[..., Tensor] = chunked_nll

    def forward(self, batch: Batch, h_BSD: Tensor | None = None, *, masks: Masks | None = None) -> Tensor:
        """nll_BS: nats per label, float32, 0 where there is none. A stage without the head returns h_BSD.

        `h_BSD` comes from the stage before, and is None in the first one. Under context parallelism S is this
        rank's part of the positions.
        """
        h_BSD = self.hidden(batch, h_BSD, masks=masks)
        if self.decoder.norm is None:
            return h_BSD
        return self.nll(h_BSD, self.decoder.head_weight, self.own(batch.labels_BS), z_loss=self.z_loss)

    def logits(self, batch: Batch) -> Tensor:
        """[B, S, V], for comparisons of small models; training never builds it."""
        return self.hidden(batch) @ self.decoder.head_weight.t()

    def hidden(self, batch: Batch, h_BSD: Tensor | None = None, *, masks: Masks | None = None) -> Tensor:
        """h_BSD after the decoder."""
        masks = masks or self.masks(batch)
        if h_BSD is None:
            h_BSD = self.embed(batch, masks)
        return self.decoder(h_BSD, self.own(batch.positions_BS), masks.decoder)

    def embed(self, batch: Batch, masks: Masks) -> Tensor:
        """Token embeddings with the visual tokens in their places: h_BSD."""
        assert self.encoder is not None and self.projector is not None, "only the first stage embeds"
        assert self.decoder.embed_tokens is not None and masks.encoder is not None, (
            "only the first stage embeds"
        )
        segments_NL = frame_segments(batch.image_ids_NL, batch.grid_thw_NL3)
        z_NLE = self.encoder(
            batch.pixel_values_NLP, batch.grid_thw_NL3, batch.image_sizes_NL2, segments_NL, masks.encoder
        )
        visual_vD = self.projector(z_NLE)
        if self.gather_visual is not None:
            visual_vD = self.gather_visual(visual_vD)
        h_BSD = self.decoder.embed_tokens(self.own(batch.tokens_BS))
        return place_visual_tokens(h_BSD, visual_vD, self.own(batch.visual_index_BS))

    def masks(self, batch: Batch) -> Masks:
        order = None if self.sequence is None else self.sequence.order
        decoder = document_mask(batch.positions_BS, self.backend, ends=batch.document_ends, order=order)
        if self.encoder is None:
            return Masks(as_summand(decoder, self.dtype), None)
        segments_NL = frame_segments(batch.image_ids_NL, batch.grid_thw_NL3)
        segments_NX = self.encoder.attention_segments(segments_NL)
        encoder = segment_mask(segments_NX, self.backend, ends=batch.frame_ends)
        return Masks(as_summand(decoder, self.dtype), as_summand(encoder, self.dtype))

    def own(self, x_BS: Tensor) -> Tensor:
        """This rank's positions."""
        return x_BS if self.sequence is None else self.sequence.take(x_BS)


def place_visual_tokens(h_BSD: Tensor, visual_vD: Tensor, visual_index_BS: Tensor) -> Tensor:
    """Replace h_BSD[b, s] by visual token `visual_index_BS[b, s]`, except where that is -1.

    A visual token has at most one place. The inverse map is made first, with integers only, so that autograd
    sees one `index_copy`, whose backward is a gather. (Backward of a gather by `visual_index_BS` would add
    the gradients of all text positions into one row.)
    """
    num_places, num_visual = visual_index_BS.numel(), visual_vD.shape[0]
    # One slot more on either side takes what has no partner.
    index_T = torch.where(visual_index_BS < 0, num_visual, visual_index_BS).flatten().long()
    place_v = torch.full((num_visual + 1,), num_places, device=h_BSD.device)
    place_v[index_T] = torch.arange(num_places, device=h_BSD.device)
    h_TD = torch.cat([h_BSD.flatten(0, 1), h_BSD.new_zeros(1, h_BSD.shape[-1])])
    return h_TD.index_copy(0, place_v[:num_visual], visual_vD)[:num_places].view_as(h_BSD)


def check_fit(config: ModelConfig, geometry: Geometry, budget: Budget, vocab_size: int) -> None:
    """Refuse a model that cannot read the data set: `vocab_size` is the data set's largest token id + 1.

    Raises:
        UserError: names the key of the config, its value and the value that the data set needs.
    """
    needs = {
        "encoder.patch_size": (config.encoder.patch_size, geometry.patch_size),
        "encoder.temporal_patch_size": (config.encoder.temporal_patch_size, geometry.temporal_patch_size),
        "projector.merge": (config.projector.merge, geometry.merge),
    }
    for key, (value, needed) in needs.items():
        if value != needed:
            raise UserError(
                f"model does not fit the data set: {key} is {value}, the data set has {needed}; "
                f"set it to {needed}"
            )
    if config.decoder.vocab_size < vocab_size:
        raise UserError(
            f"model does not fit the data set: decoder.vocab_size is {config.decoder.vocab_size}, "
            f"the data set's tokenizer has {vocab_size} ids; set it to at least {vocab_size}"
        )
    if budget.L % geometry.patches_per_token:
        raise UserError(
            f"model does not fit the data set: a vision row of {budget.L} patches is no whole number of "
            f"{geometry.merge} x {geometry.merge} cells; preprocess with another budget.L"
        )
