"""Initial weights depend on the seed and the name, on nothing else."""

from __future__ import annotations

import torch

from tests.trainer.batches import GEOMETRY, tiny_config
from trainer.models.init import init_parameters, initial_value
from trainer.models.vlm import VisionLanguageModel


def test_a_layer_starts_the_same_in_a_model_with_parts_taken_out() -> None:
    whole, stage = (VisionLanguageModel(tiny_config(), GEOMETRY) for _ in range(2))
    del stage.decoder.layers["0"]
    stage.encoder = stage.projector = None
    for model in (whole, stage):
        init_parameters(model, tiny_config(), seed=5)
    weights = whole.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in stage.state_dict().items())


def test_values_follow_name_seed_and_role() -> None:
    def draw(name: str, *shape: int, seed: int = 0) -> torch.Tensor:
        return initial_value(name, torch.Size(shape), num_layers=8, seed=seed)

    q = draw("decoder.layers.0.self_attn.q_proj.weight", 300, 400)
    assert not torch.equal(q, draw("decoder.layers.1.self_attn.q_proj.weight", 300, 400))
    assert not torch.equal(q, draw("decoder.layers.0.self_attn.q_proj.weight", 300, 400, seed=1))
    assert abs(q.std() * 400**0.5 - 1) < 0.02
    # A residual output: smaller by sqrt(2 * 8 layers) = 4.
    assert abs(draw("decoder.layers.0.mlp.down_proj.weight", 300, 400).std() * 400**0.5 - 0.25) < 0.01
    assert abs(draw("decoder.embed_tokens.weight", 300, 400).std() - 0.02) < 0.001
    assert abs(draw("encoder.layers.0.attention.o_proj.weight", 300, 400).std() * 400**0.5 - 0.25) < 0.01
    assert abs(draw("encoder.layers.0.ffn.down_proj.weight", 300, 400).std() * 400**0.5 - 0.25) < 0.01
    assert abs(draw("encoder.register_tokens", 1, 40, 3000).std() - 0.02) < 0.001
    assert abs(draw("encoder.cls_token", 1, 1, 120000).std() - 0.02) < 0.001
    assert draw("encoder.layers.0.layer_scale1.lambda1", 7).eq(1).all()
    assert draw("decoder.layers.0.self_attn.q_norm.weight", 7).eq(1).all()
    assert draw("encoder.layers.0.layer_norm1.weight", 7).eq(1).all()
    assert draw("encoder.layers.0.layer_norm1.bias", 7).eq(0).all()
