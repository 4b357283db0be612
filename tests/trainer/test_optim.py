"""What is trained, parameter groups, multipliers and the curves of the learning rate."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from shared.config import load_config, to_toml
from shared.errors import UserError
from tests.trainer.batches import GEOMETRY, tiny_config
from trainer.models.init import init_parameters
from trainer.models.vlm import VisionLanguageModel
from trainer.optim import (
    OptimizerConfig,
    ScheduleConfig,
    check_names,
    freeze,
    lr_factor,
    make_optimizer,
    parameter_groups,
    set_lr,
)


def meta_model() -> VisionLanguageModel:
    with torch.device("meta"):
        return VisionLanguageModel(tiny_config(), GEOMETRY)


def trained_names(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_cosine_warms_up_and_falls_to_its_final_ratio_at_the_last_step() -> None:
    schedule = ScheduleConfig(warmup_steps=4, final_ratio=0.2)
    factors = [lr_factor(step, 13, schedule) for step in range(13)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    # Steps 4 .. 12 are progress 0, 1/8 .. 1 of the cosine: the peak, half way at step 8, the end.
    assert factors[4] == 1.0 and factors[8] == pytest.approx(0.6) and factors[12] == pytest.approx(0.2)
    assert factors[5] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 8)) / 2)


def test_learning_rate_without_warmup_starts_at_the_peak_and_stays_low_after_the_end() -> None:
    schedule = ScheduleConfig(warmup_steps=0, final_ratio=0.0)
    assert lr_factor(0, 10, schedule) == 1.0 and lr_factor(50, 10, schedule) == 0.0
    assert lr_factor(0, 1, schedule) == 1.0


@pytest.mark.parametrize(
    ("shape", "decay"),
    [
        # Progress 1/4, 2/4, 3/4, 1 in the last 4 steps: 0.2 + 0.8 * (1 - progress).
        ("linear", [0.8, 0.6, 0.4, 0.2]),
        # 0.2 + 0.8 * (1 - sqrt(progress)).
        ("sqrt", [0.6, 1 - 0.8 * math.sqrt(0.5), 1 - 0.8 * math.sqrt(0.75), 0.2]),
    ],
)
def test_wsd_stays_at_the_peak_and_decays_in_its_last_steps(shape: str, decay: list[float]) -> None:
    schedule = ScheduleConfig(kind="wsd", warmup_steps=2, decay_steps=4, decay_shape=shape, final_ratio=0.2)  # pyright: ignore[reportArgumentType]  # str for Literal
    factors = [lr_factor(step, 10, schedule) for step in range(10)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, *decay])


def test_a_longer_wsd_run_has_the_same_curve_until_the_shorter_one_decays() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup_steps=2, decay_steps=4)
    short, long = ([lr_factor(step, total, schedule) for step in range(total)] for total in (10, 30))
    assert short[:6] == long[:6] and short[6] < long[6]
    cosine = ScheduleConfig(warmup_steps=2)
    assert lr_factor(5, 10, cosine) < lr_factor(5, 30, cosine)


def test_a_constant_rate_stays_after_its_warmup() -> None:
    schedule = ScheduleConfig(kind="constant", warmup_steps=2)
    assert [lr_factor(step, 4, schedule) for step in range(5)] == [0.5, 1, 1, 1, 1]


def test_a_schedule_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="decay_steps is 0 with kind 'wsd'"):
        ScheduleConfig(kind="wsd")
    with pytest.raises(ValueError, match="decay_steps is 5 with kind 'cosine'"):
        ScheduleConfig(decay_steps=5)
    with pytest.raises(ValueError, match=r"warmup_steps 6 \+ decay_steps 4 leave nothing of 10 steps"):
        ScheduleConfig(kind="wsd", warmup_steps=6, decay_steps=4).check_length(10)
    ScheduleConfig(kind="wsd", warmup_steps=5, decay_steps=4).check_length(10)


def test_only_what_is_named_is_trained() -> None:
    model = meta_model()
    everything = {name for name, _ in model.named_parameters()}
    freeze([model], ["projector", "encoder.layers.1.*"])
    wanted = {name for name in everything if name.startswith(("projector.", "encoder.layers.1."))}
    assert trained_names(model) == wanted and len(wanted) == 6 + 16
    freeze([model], ["encoder", "projector", "decoder"])
    assert trained_names(model) == everything


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        (["projektor"], "trained: 'projektor' fits no parameter; did you mean 'projector'?"),
        # A pattern must fit the whole name.
        (["decoder.norm"], "trained: 'decoder.norm' fits no parameter; did you mean 'decoder.norm.weight'?"),
        ([], "trained: is empty"),
    ],
)
def test_a_trained_part_that_does_not_exist_is_refused_with_the_closest(
    trained: list[str], message: str
) -> None:
    with pytest.raises(UserError) as error:
        check_names(meta_model(), trained, [])
    assert message in str(error.value)


def test_a_multiplier_of_nothing_is_refused() -> None:
    check_names(meta_model(), ["decoder"], ["encoder", "*norm*"])
    with pytest.raises(
        UserError, match=r"optimizer.lr_multipliers: '\*norn\*' fits no parameter; give encoder, pro"
    ):
        check_names(meta_model(), ["decoder"], ["encoder", "*norn*"])


def test_matrices_decay_and_biases_norms_and_tables_do_not() -> None:
    model = meta_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups([model], OptimizerConfig(weight_decay=0.1))
    by_decay = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in groups}
    decayed, kept = by_decay[0.1], by_decay[0.0]
    assert len(groups) == 2 and decayed | kept == set(names.values()) and not decayed & kept
    tables = {"decoder.embed_tokens.weight", "encoder.position_embedding.weight"}
    assert tables <= kept
    assert all("norm" in name or name.endswith("bias") for name in kept - tables)
    assert not any("norm" in name or name.endswith("bias") for name in decayed)
    assert {
        "encoder.patch_embedding.weight",
        "projector.linear_2.weight",
        "decoder.lm_head.weight",
    } <= decayed


def test_groups_are_by_multiplier_and_decay_and_leave_out_what_is_frozen() -> None:
    model = meta_model()
    freeze([model], ["encoder", "decoder.lm_head.weight"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    multipliers = {"encoder": 0.1, "encoder.layers.*": 0.5}
    groups = parameter_groups([model], OptimizerConfig(weight_decay=0.2, lr_multipliers=multipliers))
    found = {
        (group["lr_multiplier"], group["weight_decay"]): {names[id(p)] for p in group["params"]}
        for group in groups
    }
    assert set(found) == {(0.1, 0.2), (0.1, 0.0), (0.5, 0.2), (0.5, 0.0), (1.0, 0.2)}
    assert found[1.0, 0.2] == {"decoder.lm_head.weight"} and found[0.1, 0.2] == {
        "encoder.patch_embedding.weight"
    }
    # The last entry that fits counts.
    assert "encoder.layers.0.mlp.fc1.weight" in found[0.5, 0.2]


def test_the_learning_rate_of_a_group_is_multiplied_at_every_step() -> None:
    optimizer = make_optimizer([meta_model()], OptimizerConfig(lr=1.0, lr_multipliers={"encoder": 0.1}))
    for lr in (1.0, 0.5):
        if lr < 1:
            set_lr(optimizer, lr)
        assert {group["lr"] for group in optimizer.param_groups} == {lr, 0.1 * lr}


def test_a_stage_without_anything_trained_has_an_optimizer_that_does_nothing() -> None:
    stage = meta_model()
    freeze([stage], ["projector"])
    stage.projector = None
    optimizer = make_optimizer([stage], OptimizerConfig())
    optimizer.step()
    assert [group["params"] for group in optimizer.param_groups] == [[]]


def test_several_parts_of_a_model_share_their_groups() -> None:
    whole, first, last = meta_model(), meta_model(), meta_model()
    first.decoder.layers, last.encoder, last.projector = torch.nn.ModuleDict(), None, None
    last.decoder.embed_tokens = None
    of_whole, of_parts = (
        [
            (group["weight_decay"], len(group["params"]))
            for group in parameter_groups(parts, OptimizerConfig())
        ]
        for parts in ([whole], [first, last])
    )
    # `first` keeps norm and head here, `last` has them as well: one matrix and one vector more.
    assert dict(of_parts) == {0.1: dict(of_whole)[0.1] + 1, 0.0: dict(of_whole)[0.0] + 1}


def test_weight_decay_reaches_only_its_group() -> None:
    model = VisionLanguageModel(tiny_config(), GEOMETRY)
    init_parameters(model, tiny_config(), seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = make_optimizer([model], OptimizerConfig(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = model.state_dict()
    # Zero gradients: what is left is the decay, 1 - 0.1 * 0.5.
    assert torch.allclose(after["decoder.lm_head.weight"], before["decoder.lm_head.weight"] * 0.95)
    assert torch.equal(after["decoder.embed_tokens.weight"], before["decoder.embed_tokens.weight"])


def test_multipliers_come_from_a_table_and_survive_being_written(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[lr_multipliers]\nencoder = 0.1\n"decoder.layers.*" = 2\n')
    config = load_config(OptimizerConfig, path, ["--lr-multipliers.projector", "3"])
    assert config.lr_multipliers == {"encoder": 0.1, "decoder.layers.*": 2.0, "projector": 3.0}
    path.write_text(to_toml(config))
    assert list(load_config(OptimizerConfig, path).lr_multipliers.items()) == list(
        config.lr_multipliers.items()
    )
    with pytest.raises(UserError, match=r"lr_multipliers.encoder must be above 0, got 0.0; leave out"):
        load_config(OptimizerConfig, None, ["--lr-multipliers.encoder", "0"])
