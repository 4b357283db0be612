"""The composed model: documents and pictures of a pack do not see each other; fit to a data set."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from shared.errors import UserError
from shared.geometry import Budget, Geometry
from tests.trainer.batches import ENCODERS, GEOMETRY, VOCABULARY, Picture, make_batch, num_labels, tiny_config
from trainer.attention import document_mask
from trainer.models.init import init_parameters
from trainer.models.vlm import Masks, ModelConfig, VisionLanguageModel, check_fit, place_visual_tokens

DOCUMENTS = [
    [7, 8, Picture(4, 2), 9, 10, 11],
    [12, 13, 14],
    [Picture(2, 6, seed=1), 15, Picture(4, 4, seed=2), 16, 17],
    [18, Picture(2, 2, seed=3), 19],
]
BUDGET = Budget(S=64, N=3, L=24)


def make_model(config: ModelConfig | None = None) -> VisionLanguageModel:
    config = config or tiny_config()
    model = VisionLanguageModel(config, GEOMETRY)
    init_parameters(model, config, seed=3)
    return model


@pytest.mark.parametrize("decoder", [{"tie_embeddings": True}, {"type": "qwen3"}], ids=["llama", "qwen3"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_packed_loss_equals_the_token_weighted_mean_of_documents_run_alone(
    encoder: str, decoder: dict[str, object]
) -> None:
    model = make_model(tiny_config(ENCODERS[encoder], **decoder))
    packed = make_batch([DOCUMENTS[:3], DOCUMENTS[3:]], BUDGET)
    packed_loss = model(packed).sum() / num_labels(packed)
    alone = [make_batch([[document]], Budget(S=24, N=2, L=16)) for document in DOCUMENTS]
    total = torch.stack([model(batch).sum() for batch in alone]).sum()
    labels = sum(num_labels(batch) for batch in alone)
    assert labels == num_labels(packed)
    assert abs((packed_loss - total / labels).item()) < 1e-5


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    model, batch = make_model(), make_batch([DOCUMENTS], BUDGET)
    logits = model.logits(batch).flatten(0, 1)
    reference = torch.nn.functional.cross_entropy(logits, batch.labels_BS.flatten().long(), reduction="none")
    assert torch.allclose(model(batch).flatten(), reference, atol=1e-5)


def test_what_stands_in_padding_changes_no_loss() -> None:
    model, batch = make_model(), make_batch([DOCUMENTS[:2]], BUDGET)
    length = int((batch.labels_BS[0] != -100).nonzero().max()) + 2
    tokens, pixels = batch.tokens_BS.clone(), batch.pixel_values_NLP.clone()
    tokens[0, length:] = 33
    pixels[batch.image_ids_NL < 0] = 99
    noisy = dataclasses.replace(batch, tokens_BS=tokens, pixel_values_NLP=pixels)
    assert torch.equal(model(batch), model(noisy))


def test_a_picture_changes_its_own_document_only() -> None:
    model = make_model()
    batch = make_batch([DOCUMENTS], BUDGET)
    other = make_batch(
        [[DOCUMENTS[0], DOCUMENTS[1], [Picture(2, 6, seed=9), *DOCUMENTS[2][1:]], DOCUMENTS[3]]], BUDGET
    )
    changed = (model(batch) != model(other))[0].nonzero().flatten()
    document = (batch.positions_BS[0] == 0).cumsum(0)
    assert set(document[changed].tolist()) == {3}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_batch_without_pictures_gives_zero_gradients_to_the_vision_parts(encoder: str) -> None:
    model = make_model(tiny_config(ENCODERS[encoder]))
    model(make_batch([[[5, 6, 7]]], Budget(S=8, N=1, L=8))).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.startswith("decoder"):
            assert parameter.grad.eq(0).all(), name


@pytest.mark.parametrize("encoder", ENCODERS)
def test_pictures_give_gradients_to_every_vision_parameter(encoder: str) -> None:
    model = make_model(tiny_config(ENCODERS[encoder]))
    model(make_batch([DOCUMENTS], BUDGET)).sum().backward()
    # The softmax does not feel a shift of all keys: the gradient of k_proj.bias is 0 but for rounding.
    still = [n for n, p in model.named_parameters() if "k_proj.bias" not in n and not p.grad.abs().max() > 0]
    assert still == []


def test_visual_tokens_land_where_the_index_says() -> None:
    h = torch.arange(12.0).view(2, 3, 2)
    visual = torch.tensor([[100.0, 101.0], [200.0, 201.0], [300.0, 301.0]], requires_grad=True)
    placed = place_visual_tokens(h, visual, torch.tensor([[-1, 2, -1], [0, -1, -1]], dtype=torch.int32))
    expected = h.clone()
    expected[0, 1], expected[1, 0] = torch.tensor([300.0, 301.0]), torch.tensor([100.0, 101.0])
    assert torch.equal(placed, expected)
    placed.sum().backward()
    assert torch.equal(visual.grad, torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]))


def test_the_dense_mask_of_a_batch_is_kept_once_for_all_layers_until_backward() -> None:
    model, batch = make_model(tiny_config(num_layers=3)), make_batch([DOCUMENTS], BUDGET)
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.shape[-2:] == (BUDGET.S, BUDGET.S):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        nll_BS = model(batch)
        once = dict(kept)
        bools = Masks(document_mask(batch.positions_BS), model.masks(batch).encoder)
        kept.clear()
        # As sdpa does it from bools: a mask of floats in each of the three layers.
        assert torch.equal(model(batch, masks=bools), nll_BS)
    assert list(once.values()) == [4 * BUDGET.S**2]
    assert list(kept.values()) == 3 * [4 * BUDGET.S**2]


def test_masks_have_the_dtype_that_layers_compute_in_and_padding_stays_finite() -> None:
    config = tiny_config()
    model = VisionLanguageModel(config, GEOMETRY, dtype=torch.bfloat16)
    init_parameters(model, config, seed=3)
    batch = make_batch([[[5, 6]], []], BUDGET)  # the second pack is padding, and no row has a picture
    nll_BS = model.bfloat16()(batch)
    assert nll_BS.isfinite().all()
    nll_BS.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_two_stages_with_parts_taken_out_equal_the_whole_model() -> None:
    batch = make_batch([DOCUMENTS], BUDGET)
    whole, first, last = make_model(), make_model(), make_model()
    del first.decoder.layers["1"], last.decoder.layers["0"]
    first.decoder.norm = first.decoder.lm_head = None
    last.encoder = last.projector = last.decoder.embed_tokens = None
    assert torch.equal(last(batch, first(batch)), whole(batch))


@pytest.mark.parametrize(
    ("geometry", "budget", "vocabulary", "named"),
    [
        (Geometry(patch_size=4, max_patches_per_image=64), BUDGET, VOCABULARY, "encoder.patch_size is 2"),
        (
            dataclasses.replace(GEOMETRY, temporal_patch_size=2),
            BUDGET,
            VOCABULARY,
            "encoder.temporal_patch_size",
        ),
        (
            dataclasses.replace(GEOMETRY, merge=1),
            BUDGET,
            VOCABULARY,
            "projector.merge is 2, the data set has 1",
        ),
        (GEOMETRY, BUDGET, VOCABULARY + 1, "decoder.vocab_size is 40"),
        (GEOMETRY, Budget(S=8, N=1, L=10), VOCABULARY, "budget.L"),
    ],
)
def test_a_model_that_does_not_fit_the_data_set_is_refused_by_name(
    geometry: Geometry, budget: Budget, vocabulary: int, named: str
) -> None:
    with pytest.raises(UserError, match=named):
        check_fit(tiny_config(), geometry, budget, vocabulary)


def test_a_model_that_fits_is_accepted() -> None:
    check_fit(tiny_config(), GEOMETRY, BUDGET, VOCABULARY)
