"""The formula of activations against the bytes that are alive after a forward, and the parts of a rank's memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared.geometry import Budget
from tests.trainer.batches import GEOMETRY, Picture, make_batch
from trainer.memory import Division, Positions, kept_bytes, layer_sizes, rank_memory
from trainer.models.aimv2 import Aimv2Config
from trainer.models.decoder import DecoderConfig, DecoderLayer
from trainer.models.dinov3 import Dinov3Config
from trainer.models.encoder import EncoderConfig, make_encoder
from trainer.models.init import init_parameters
from trainer.models.layers import rotation_of
from trainer.models.projector import ProjectorConfig
from trainer.models.siglip2 import Siglip2Config
from trainer.models.vlm import ModelConfig, VisionLanguageModel
from trainer.optim import freeze
from trainer.parallel.recompute import Recompute, checkpoint_layer, inner_width

FLOAT32 = Division(value_bytes=4, repeated_keys=True)
ONE = {"pp": 1, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1}
MODES: list[Recompute] = ["none", "selective", "full"]


class Allocations(TorchDispatchMode):
    """Remembers what every operator has allocated, and tells what of it is still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            # A view of an input (a transposed weight) allocates nothing.
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in inputs:
                storage = x.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self) -> int:
        return sum(size for reference, size in self.storages.values() if not reference.expired())


def decoder_config(**changes: Any) -> DecoderConfig:
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 160, "num_layers": 2, "num_heads": 4}
    return DecoderConfig(**{**sizes, "num_kv_heads": 2, "head_dim": 16, **changes})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("changes", [{}, {"type": "qwen3", "head_dim": 32}], ids=["llama", "qwen3"])
def test_a_decoder_layer_keeps_what_the_formula_says(mode: Recompute, changes: dict[str, Any]) -> None:
    config, length = decoder_config(**changes), 256
    layer = DecoderLayer(config)
    sizes = layer_sizes(layer)
    assert (sizes.width, sizes.keys, sizes.inner, sizes.heads) == (64, 2 * config.head_dim, 160, 4)
    checkpoint_layer(layer, mode)
    rotation = rotation_of(torch.rand(1, length, config.head_dim // 2))
    mask = torch.zeros(1, 1, length, length)
    h_BSD = torch.rand(1, length, 64, requires_grad=True)
    with Allocations() as allocations:
        before = h_BSD * 1
        out = layer(before, rotation, mask)
        kept = allocations.alive() - out.nbytes
    expected = kept_bytes(sizes, mode, FLOAT32) * length
    if mode == "none":
        # RMSNorm on a CPU keeps its input divided by the root mean square too, which CUDA's kernel does not.
        normed = 2 * 64 + (sizes.queries + sizes.keys if sizes.normed_heads else 0)
        expected += 4 * normed * length
    assert kept == pytest.approx(expected, rel=0.1)


def test_selective_recompute_keeps_more_where_shapes_cannot_tell_the_mlp_from_attention() -> None:
    # The inner width of 64 is that of the queries too: outputs of gate, up and down stay beside what is kept anyway.
    config, length = decoder_config(hidden_size=48, intermediate_size=64), 256
    layer = DecoderLayer(config)
    assert inner_width(layer, divided=False) is None
    checkpoint_layer(layer, "selective")
    rotation = rotation_of(torch.rand(1, length, 8))
    h_BSD, mask = torch.rand(1, length, 48, requires_grad=True), torch.zeros(1, 1, length, length)
    with Allocations() as allocations:
        before = h_BSD * 1
        out = layer(before, rotation, mask)
        kept = allocations.alive() - out.nbytes
    expected = kept_bytes(layer_sizes(layer), "selective", FLOAT32) + 4 * (64 + 64 + 48)
    assert kept == pytest.approx(expected * length, rel=0.02)


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


def test_selective_recompute_computes_two_of_the_seven_products_of_a_layer_again() -> None:
    counts = {}
    for mode in MODES:
        layer = DecoderLayer(decoder_config())
        checkpoint_layer(layer, mode)
        h_BSD = torch.rand(1, 8, 64, requires_grad=True)
        out = layer(h_BSD, rotation_of(torch.rand(1, 8, 8)), torch.zeros(1, 1, 8, 8))
        with Products() as products:
            out.sum().backward()
        counts[mode] = products.count
    # Backward has two for each of seven matrices. Again: gate and up; with full all but down, the last.
    assert counts == {"none": 14, "selective": 14 + 2, "full": 14 + 6}


ENCODER = {"hidden_size": 64, "intermediate_size": 160, "num_layers": 1, "num_heads": 4, "patch_size": 2}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("config", "rms_norms"),
    [
        (Siglip2Config(**ENCODER, position_grid=2), False),
        (Aimv2Config(**ENCODER), True),
        (Dinov3Config(**ENCODER), False),
        (Dinov3Config(**ENCODER, gated_mlp=True), False),
    ],
    ids=["siglip2", "aimv2", "dinov3", "dinov3-gated"],
)
def test_an_encoder_layer_keeps_what_the_formula_says(
    mode: Recompute, config: EncoderConfig, rms_norms: bool
) -> None:
    length = 256
    [layer] = make_encoder(config, [0.5] * 3, [0.5] * 3).layers.values()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    checkpoint_layer(layer, mode)
    rotation = [rotation_of(torch.rand(1, length, 8))] if config.type == "dinov3" else []
    z_NLE = torch.rand(1, length, 64, requires_grad=True)
    mask = torch.zeros(1, 1, length, length)
    with Allocations() as allocations:
        before = z_NLE * 1
        out = layer(before, *rotation, mask)
        kept = allocations.alive() - out.nbytes
    expected = kept_bytes(layer_sizes(layer), mode, FLOAT32) * length
    if mode == "none" and rms_norms:
        expected += 4 * 2 * 64 * length  # as above
    assert kept == pytest.approx(expected, rel=0.1)


def model_config(**changes: Any) -> ModelConfig:
    return ModelConfig(
        encoder=Siglip2Config(
            hidden_size=64, intermediate_size=160, num_layers=3, num_heads=4, patch_size=2, position_grid=2
        ),
        projector=ProjectorConfig(merge=2, hidden_size=96),
        decoder=decoder_config(tie_embeddings=False, **changes),
    )


@pytest.mark.parametrize("trained", [["encoder", "projector", "decoder"], ["projector", "decoder"]])
@pytest.mark.parametrize("mode", MODES)
def test_a_forward_of_the_model_keeps_what_the_formula_says(mode: Recompute, trained: list[str]) -> None:
    budget = Budget(S=256, N=2, L=128)
    model = VisionLanguageModel(model_config(), GEOMETRY)
    init_parameters(model, model_config(), seed=0)
    freeze([model], trained)
    encoder = model.encoder
    assert encoder is not None
    expected = rank_memory([model], ONE, mode, FLOAT32, positions(budget)).activations
    if mode == "none":
        expected += 2 * 2 * 64 * 4 * budget.S  # as above, in two layers
    # Once for all layers: the masks, and the angles of positions.
    expected += 4 * budget.S**2 + ("encoder" in trained) * 4 * budget.N * budget.L**2 + 2 * 4 * 16 * budget.S
    expected += 64 * 4 * budget.S  # the last norm, as above
    for layer in [*encoder.layers.values(), *model.decoder.layers.values()]:
        checkpoint_layer(layer, mode)
    batch = make_batch([[[7, Picture(8, 8), 9], [Picture(8, 4), *range(5, 30)]]], budget)
    with Allocations() as allocations:
        nll_BS = model(batch)
        kept = allocations.alive() - nll_BS.nbytes
    assert kept == pytest.approx(expected, rel=0.1)


def test_a_rank_of_tensor_and_context_parallelism_keeps_its_part() -> None:
    with torch.device("meta"):
        sizes = layer_sizes(DecoderLayer(decoder_config()))
    division = Division(value_bytes=2, tp=2, cp=2, sequence_parallel=True)
    # D 64, Q 64 and KV 32 and F 160 over 2 ranks, 4 heads over 2. Inputs of norms are divided, their outputs gathered;
    # keys and values of both ranks of cp are there.
    values = 2 * 32 + 2 * 64 + 2 * 32 + 2 * 2 * 16 + 4 * 80
    assert kept_bytes(sizes, "none", division) == 2 * values + 4 * 2
    # Input, queries, keys and values, attention's output; the output of o is a sum over all of D.
    assert kept_bytes(sizes, "selective", division) == 2 * (32 + 32 + 32 + 32 + 64) + 4 * 2
    assert kept_bytes(sizes, "full", division) == 2 * 32


def meta_model(**changes: Any) -> VisionLanguageModel:
    with torch.device("meta"):
        return VisionLanguageModel(model_config(**changes), GEOMETRY)


def values_in(model: nn.Module, part: str, *, matrices: bool | None = None) -> int:
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if name.startswith(part) and matrices in (None, p.ndim >= 2)
    )


def test_states_are_divided_by_the_ranks_that_share_a_part() -> None:
    model, budget = meta_model(), Budget(S=8, N=1, L=8)
    axes = {**ONE, "dp_replicate": 2, "dp_shard": 2, "cp": 3, "tp": 2}
    division = Division(value_bytes=2, tp=2, cp=3)
    vision = values_in(model, "encoder") + values_in(model, "projector")
    matrices = values_in(model, "decoder", matrices=True)
    vectors = values_in(model, "decoder", matrices=False)
    whole = rank_memory([model], axes, "none", division, positions(budget))
    assert whole.states == 16 * (vision + matrices) // 12 + 16 * vectors // 6
    freeze([model], ["projector", "decoder"])
    frozen = rank_memory([model], axes, "none", division, positions(budget))
    assert whole.states - frozen.states == 12 * values_in(model, "encoder") // 12


def test_accumulation_holds_whole_gradients_and_a_pipeline_whole_weights() -> None:
    model, budget = meta_model(), Budget(S=8, N=1, L=8)
    axes = {**ONE, "dp_shard": 8}
    once, often = (
        rank_memory([model], axes, "none", Division(value_bytes=2), positions(budget, microbatches=count))
        for count in (1, 4)
    )
    total = values_in(model, "")
    assert often.gradients - once.gradients == 4 * total
    reduced = rank_memory(
        [model], axes, "none", Division(value_bytes=2), positions(budget, microbatches=4), reduce="microbatch"
    )
    assert reduced.gradients == once.gradients
    assert often.batches == 4 * once.batches
    piped = rank_memory(
        [model], {**axes, "pp": 2}, "none", Division(value_bytes=2), positions(budget, in_flight=2.0)
    )
    assert piped.gathered == 2 * total and piped.activations == 2 * once.activations
    assert once.gathered < piped.gathered


def test_the_head_works_in_chunks_beside_the_gradient_of_its_weight() -> None:
    model, budget = meta_model(vocab_size=50_000), Budget(S=8, N=1, L=8)
    memory = rank_memory([model], ONE, "none", Division(value_bytes=2), positions(budget))
    # A chunk of 2^25 logits in two dtypes, the gradient of 50,000 x 64 weights in two, and that of 8 positions.
    assert memory.working == 6 * 2**25 + 6 * 50_000 * 64 + 2 * 8 * 64


def positions(budget: Budget, **changes: Any) -> Positions:
    values = {
        "tokens": budget.S,
        "all_tokens": budget.S,
        "patches": budget.N * budget.L,
        "encoder_positions": budget.N * budget.L,
        "patch_values": GEOMETRY.values_per_patch,
        "microbatches": 1,
    }
    return Positions(**{**values, **changes})
