"""What a step takes of a device's memory: an estimate by formula, for a layout that no device has run yet.

states        float32 weights, gradients and two moments of AdamW, sharded: 16 bytes per trained parameter, 4 per
              frozen one
gathered      weights in the dtype of computation: the root's (embedding, norm, head) and two layers at a time;
              under pipeline parallelism all of the stage
gradients     one layer's, in both dtypes; beside it whole float32 gradients of the rank's stage while microbatches
              are accumulated, unless each is reduced (compute.reduce = "microbatch")
activations   what autograd keeps of a layer per position, by the table below, times the positions of a
              microbatch and the microbatches that a pipeline has in flight
working       the larger of: one layer of the most expensive kind computed again and its gradients; the head, with
              a chunk of logits and the whole gradient of its weight
batches       what the loader holds on the device

Kept of a layer per position, in values of the dtype (D width, Q and KV values of queries and keys, F inner width):

    none        two inputs of norms, two outputs of norms, queries, keys, values, attention's output, 4 F (gated) or
                2 F of the MLP; Q + KV more where heads are normalized, 2 D where layers are scaled. Keys and
                values as attention takes them: repeated for each query head but by flex, and those of all
                ranks under context parallelism
    selective   the input, attention's output, and outputs of its four products
    full        the input

With tensor parallelism Q, KV and F are a rank's part, and with sequence parallelism the inputs of norms too.

Not modelled: the device's context, buffers of the communication library, workspaces of kernels, fragmentation, dense
masks (attention = "sdpa": S * S / cp values per pack, once for all layers), what a frozen layer saves by keeping no
inputs of its products, and the outputs of the MLP's products that "selective" keeps where its inner width is also one
of attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from torch import nn

from trainer.data.loader import STEPS_AHEAD
from trainer.loss import CHUNK_VALUES
from trainer.models.vlm import VisionLanguageModel
from trainer.parallel.fsdp import Reduce
from trainer.parallel.recompute import Recompute

# Weights, gradients and two moments in float32.
TRAINED_BYTES, FROZEN_BYTES = 16, 4
# The layer that computes, and the next one on its way.
GATHERED_LAYERS = 2
# int32 tokens, labels, positions, visual indices, sources per token; grid, image ids and sizes per patch.
TOKEN_BYTES, PATCH_BYTES = 5 * 4, 6 * 4


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """Of one layer of an encoder or decoder, undivided."""

    width: int
    queries: int
    keys: int
    inner: int
    heads: int
    gated: bool
    normed_heads: bool
    scaled: bool
    """What attention and MLP give is multiplied by learned factors."""
    parameters: int


def layer_sizes(layer: nn.Module) -> LayerSizes:
    linears = {name.rpartition(".")[2]: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
    widths = {getattr(module, "head_dim", None) for module in layer.modules()}
    [head_dim] = (width for width in widths if isinstance(width, int))
    last = linears.get("down_proj") or linears["fc2"]
    return LayerSizes(
        width=linears["q_proj"].in_features,
        queries=linears["q_proj"].out_features,
        keys=linears["k_proj"].out_features,
        inner=last.in_features,
        heads=linears["q_proj"].out_features // head_dim,
        gated="gate_proj" in linears,
        normed_heads=any(name.endswith("q_norm") and m is not None for name, m in layer.named_modules()),
        scaled=any("layer_scale" in name for name, _ in layer.named_parameters()),
        parameters=sum(parameter.numel() for parameter in layer.parameters()),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Division:
    """How the positions and products of a layer are divided, and how its attention takes keys."""

    value_bytes: int
    tp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    repeated_keys: bool = False
    """Attention gets keys and values once per query head."""


def kept_bytes(sizes: LayerSizes, mode: Recompute, division: Division) -> float:
    """What autograd keeps of one layer per position of this rank's part of a sequence."""
    d, q, kv, f = (
        sizes.width,
        sizes.queries / division.tp,
        sizes.keys / division.tp,
        sizes.inner / division.tp,
    )
    residual = d / division.tp if division.sequence_parallel else d
    softmax = 4 * sizes.heads / division.tp
    if mode == "full":
        return residual * division.value_bytes
    if mode == "selective":
        values = residual + q + (q + 2 * kv + d)
        return values * division.value_bytes + softmax
    attended = 2 * division.cp * (q if division.repeated_keys else kv)
    values = 2 * residual + 2 * d + 2 * q + attended + (4 if sizes.gated else 2) * f
    values += (q + kv if sizes.normed_heads else 0) + (2 * d if sizes.scaled else 0)
    return values * division.value_bytes + softmax


@dataclass(frozen=True, kw_only=True, slots=True)
class Positions:
    """Of one microbatch on one rank."""

    tokens: int
    """B * S / cp"""
    all_tokens: int
    """B * S: text tensors are whole on every rank."""
    patches: int
    """Vision rows of this rank * L."""
    encoder_positions: int
    """Likewise, with the class and register tokens of an encoder that has them."""
    patch_values: int
    """P"""
    microbatches: int
    """Per step."""
    in_flight: float = 1.0
    """Microbatches whose activations a pipeline keeps at once, as multiples of all layers of the rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on one rank."""

    states: int
    gathered: int
    gradients: int
    activations: int
    working: int
    batches: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def rank_memory(
    parts: Sequence[VisionLanguageModel],
    axes: Mapping[str, int],
    mode: Recompute,
    division: Division,
    positions: Positions,
    *,
    reduce: Reduce = "step",
) -> Memory:
    """Of a rank that holds `parts`, undivided and on any device, of a mesh with the sizes `axes`."""
    held = [
        (name, p, held_values(name, p, axes["tp"])) for part in parts for name, p in part.named_parameters()
    ]
    states = sum(
        values / num_shards(name, axes) * (TRAINED_BYTES if p.requires_grad else FROZEN_BYTES)
        for name, p, values in held
    )
    accumulated = positions.microbatches > 1 and reduce == "step"
    whole, root = sum(values for *_, values in held), sum(v for name, _, v in held if ".layers." not in name)
    trained = sum(values for _, p, values in held if p.requires_grad)
    layers = [_Layer(part, vision, division) for part in parts for vision in (True, False)]
    layers = [layer for layer in layers if layer.count]
    largest = max(layer.parameters for layer in layers)
    value = division.value_bytes
    kept = sum(layer.count * layer.kept(mode, positions) for layer in layers if layer.gradients)
    kept += sum(_kept_at_the_ends(part, division, positions) for part in parts)
    return Memory(
        states=int(states),
        gathered=int(value * (whole if axes["pp"] > 1 else root + GATHERED_LAYERS * largest)),
        gradients=int((4 * trained if accumulated else 0) + (4 + value) * largest),
        activations=int(
            kept * positions.in_flight + sum(_received(part, division, positions) for part in parts)
        ),
        working=int(
            max(
                *(layer.working(mode, positions) for layer in layers),
                *(_head_working(part, division, positions) for part in parts),
            )
        ),
        # What is trained on, what waits, and what is being made.
        batches=(STEPS_AHEAD + 2)
        * positions.microbatches
        * (TOKEN_BYTES * positions.all_tokens + (PATCH_BYTES + positions.patch_values) * positions.patches),
    )


def _received(part: VisionLanguageModel, division: Division, positions: Positions) -> float:
    """What a stage receives into: torch keeps a buffer per microbatch, of hidden states and of their gradients."""
    width = next(
        parameter.shape[0] for name, parameter in part.named_parameters() if "input_layernorm" in name
    )
    tokens = positions.tokens / (division.tp if division.sequence_parallel else 1)
    sides = int(part.decoder.embed_tokens is None) + int(part.decoder.norm is None)
    return sides * positions.microbatches * tokens * width * division.value_bytes


def held_values(name: str, parameter: nn.Parameter, tp: int) -> float:
    """Values of a parameter that tensor parallelism leaves on a rank: it divides the matrices of the decoder."""
    divided = name.startswith("decoder.") and parameter.ndim >= 2
    return parameter.numel() / (tp if divided else 1)


def num_shards(name: str, axes: Mapping[str, int]) -> int:
    """Ranks that FSDP divides a parameter over; encoder and projector know no tp."""
    return axes["dp_shard"] * axes["cp"] * (1 if name.startswith("decoder.") else axes["tp"])


class _Layer:
    """The layers of one part's encoder or decoder."""

    def __init__(self, part: VisionLanguageModel, vision: bool, division: Division) -> None:
        root = part.encoder if vision else part.decoder
        layers = [] if root is None else list(root.layers.values())
        self.vision, self.count = vision, len(layers)
        if not layers:
            return
        self.division = Division(value_bytes=division.value_bytes, repeated_keys=True) if vision else division
        self.sizes = layer_sizes(layers[0])
        self.parameters = self.sizes.parameters / self.division.tp
        assert root is not None
        self.gradients = not vision or any(p.requires_grad for p in root.parameters())

    def kept(self, mode: Recompute, positions: Positions) -> float:
        here = positions.encoder_positions if self.vision else positions.tokens
        return kept_bytes(self.sizes, mode, self.division) * here

    def working(self, mode: Recompute, positions: Positions) -> float:
        """Backward: the layer computed again if it must be, and gradients of the MLP's inner values."""
        inner = (
            (3 if self.sizes.gated else 2) * self.sizes.inner / self.division.tp * self.division.value_bytes
        )
        here = positions.encoder_positions if self.vision else positions.tokens
        return inner * here + (self.kept("none", positions) if mode != "none" else 0.0)


def _kept_at_the_ends(part: VisionLanguageModel, division: Division, positions: Positions) -> float:
    """Patches, last norm and projector of the encoder; last norm and head of the decoder."""
    values = 0.0
    if part.encoder is not None and part.projector is not None:
        width = layer_sizes(next(iter(part.encoder.layers.values()))).width
        merged = part.projector.linear_1.in_features / width
        per_patch = 2 * width + 2 * part.projector.linear_1.out_features / merged
        if any(p.requires_grad for p in part.encoder.parameters()):
            per_patch += width + positions.patch_values
        values += per_patch * positions.patches
    if part.decoder.norm is not None:
        values += 2 * part.decoder.norm.normalized_shape[0] * positions.tokens
    return values * division.value_bytes


def _head_working(part: VisionLanguageModel, division: Division, positions: Positions) -> float:
    """A chunk of logits as they are and in float32; the gradient of the weight, in float32 and as it is handed on."""
    if part.decoder.norm is None:
        return 0.0
    weight = part.decoder.head_weight
    handed_on = (4 + division.value_bytes) * weight.numel() / division.tp if weight.requires_grad else 0.0
    chunk = (4 + division.value_bytes) * CHUNK_VALUES
    return chunk + handed_on + division.value_bytes * weight.shape[1] * positions.tokens
