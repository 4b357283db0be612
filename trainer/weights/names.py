"""What Hugging Face calls our parameters, and which of its own have no counterpart here.

    ours     encoder.patch_embedding.weight         decoder.layers.0.mlp.up_proj.weight
    theirs   [root]embeddings.patch_embedding.weight     [root]layers.0.mlp.up_proj.weight

Inside a layer both names are the same, so it is prefixes that are renamed. The root is what stands before all
names of a part: "vision_model." in a model of text and pictures, nothing where the part was saved alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Names:
    """Names of one family; `config.type` is its key in NAMES."""

    roots: tuple[str, ...]
    """Where the part may lie in a file; an empty one, which fits every file, comes last."""
    prefixes: tuple[tuple[str, str], ...]
    """Ours, without "encoder." or "decoder.", and theirs, without the root."""
    unused: tuple[tuple[str, str], ...]
    """Patterns of whole names of theirs that our model has no use for, and what they are."""
    rootless: tuple[str, ...] = ()
    """Theirs that stand outside the root."""
    convolutions: tuple[str, ...] = ()
    """Ours that are linear over (p p c), and theirs a convolution [E, c, p, p]."""

    def theirs(self, name: str, root: str) -> str:
        """Their name of our parameter, which `name` gives without its part."""
        for ours, theirs in self.prefixes:
            if name.startswith(ours):
                renamed = theirs + name.removeprefix(ours)
                return renamed if renamed.startswith(self.rootless) else root + renamed
        raise KeyError(f"no name for {name}")

    def root_of(self, names: Iterable[str]) -> str:
        """The root of a file with these names."""
        names = list(names)
        return next(root for root in self.roots if not root or any(name.startswith(root) for name in names))

    def known_unused(self, name: str) -> str | None:
        """What a tensor of theirs is, if it is known to have no counterpart here."""
        return next((what for pattern, what in self.unused if re.match(pattern, name)), None)


DECODER = Names(
    roots=("model.", ""),
    prefixes=(
        ("embed_tokens.", "embed_tokens."),
        ("layers.", "layers."),
        ("norm.", "norm."),
        ("lm_head.", "lm_head."),
    ),
    unused=(
        # Old files have them, here they are computed.
        (r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq$", "rotary frequencies"),
        # Some files store it beside the embedding, which is what transformers reads too. Wanted where ours is untied.
        (r"lm_head\.weight$", "tied head"),
    ),
    rootless=("lm_head.",),
)

# Of a model of text and pictures: the other tower, and what joins the two.
TEXT_TOWER = (
    (r"text_model\.", "text tower"),
    (r"(text_projection|visual_projection|logit_scale|logit_bias)\b", "contrastive loss"),
)

NAMES = {
    "llama": DECODER,
    "qwen3": DECODER,
    "siglip2": Names(
        roots=("vision_model.", ""),
        prefixes=(
            ("patch_embedding.", "embeddings.patch_embedding."),
            ("position_embedding.", "embeddings.position_embedding."),
            ("layers.", "encoder.layers."),
            ("post_layernorm.", "post_layernorm."),
        ),
        unused=((r"(vision_model\.)?head\.", "pooling head"), *TEXT_TOWER),
    ),
    "aimv2": Names(
        roots=("vision_model.", ""),
        prefixes=(
            ("patch_embedding.", "embeddings.patch_embed."),
            ("patch_norm.", "embeddings.rms_norm."),
            ("position_embedding.", "embeddings.position_embedding."),
            ("layers.", "encoder.layers."),
            ("rms_norm.", "rms_norm."),
        ),
        unused=((r"(vision_model\.)?head\.", "pooling head"), *TEXT_TOWER),
        convolutions=("patch_embedding.weight",),
    ),
    "dinov3": Names(
        roots=("",),
        prefixes=(
            ("patch_embedding.", "embeddings.patch_embeddings."),
            ("cls_token", "embeddings.cls_token"),
            ("register_tokens", "embeddings.register_tokens"),
            ("layers.", "layer."),
            ("norm.", "norm."),
        ),
        unused=((r"embeddings\.mask_token$", "mask token"),),
        convolutions=("patch_embedding.weight",),
    ),
}
